// The search kernel for x86-64 with AVX-512 and bfloat16 products.

#include "isa.h"

#ifdef TTSR_X86
#include <immintrin.h>

TTSR_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")
#define TTSR_ISA avx512_bf16
#define TTSR_VECTOR_BYTES 64
#define TTSR_VECTORS 4
#define TTSR_BFLOAT16
#include "search_kernel_body.h"
TTSR_TARGET_END
#endif
