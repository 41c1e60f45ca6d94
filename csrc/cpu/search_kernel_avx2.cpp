// The search kernel for x86-64 with AVX2.

#include "isa.h"

#ifdef TTSR_X86
#include <immintrin.h>

TTSR_TARGET_BEGIN("avx2,fma")
#define TTSR_ISA avx2
#define TTSR_VECTOR_BYTES 32
#define TTSR_VECTORS 2
#include "search_kernel_body.h"
TTSR_TARGET_END
#endif
