// The search kernel for x86-64 with AVX-512 and its bfloat16 products.
#include <type_traits>

#include "isa.h"

#ifdef TTSR_X86
#include <immintrin.h>

TTSR_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")
#define TTSR_ISA avx512_bf16
#define TTSR_VECTOR_BYTES 64
#define TTSR_VECTORS 4
#define TTSR_BFLOAT16
#include "box_max_walk.h"

namespace ttsr_fast {
namespace avx512 { void walk(const BoxMaxParams& p, Element element, int kernel_size); }

namespace avx512_bf16 {

void walk(const BoxMaxParams& p, Element element, int kernel_size) {
  if (element == Element::kBFloat16) return walk_element<BFloat16Pair>(p, kernel_size);
  avx512::walk(p, element, kernel_size);
}

}  // namespace avx512_bf16
}  // namespace ttsr_fast
TTSR_TARGET_END
#endif
