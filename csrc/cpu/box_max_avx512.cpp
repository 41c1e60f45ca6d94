// The search kernel for x86-64 with AVX-512.
#include <type_traits>

#include "isa.h"

#ifdef TTSR_X86

TTSR_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,fma")
#define TTSR_ISA avx512
#define TTSR_VECTOR_BYTES 64
#define TTSR_VECTORS 4
#include "box_max_walk.h"

namespace ttsr_fast {
namespace avx512 {

void walk(const BoxMaxParams& p, Element element, int kernel_size) {
  if (element == Element::kDouble) return walk_element<Plain<double>>(p, kernel_size);
  walk_element<Plain<float>>(p, kernel_size);
}

}  // namespace avx512
}  // namespace ttsr_fast
TTSR_TARGET_END
#endif
