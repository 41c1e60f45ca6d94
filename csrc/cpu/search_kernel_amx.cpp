// The search kernel for x86-64 with AVX-512 and the tile unit AMX-BF16.

#include "isa.h"

#ifdef TTSR_X86
#include <immintrin.h>

TTSR_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,fma")
#include "tile_unit.h"
#define TTSR_ISA amx
#define TTSR_VECTOR_BYTES 64
#define TTSR_VECTORS 4
#define TTSR_TILES
#include "search_kernel_body.h"
TTSR_TARGET_END
#endif
