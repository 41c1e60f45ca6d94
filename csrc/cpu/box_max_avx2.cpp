// The search kernel for x86-64 with AVX2.
#include <type_traits>

#include "isa.h"

#ifdef TTSR_X86

TTSR_TARGET_BEGIN("avx2,fma")
#define TTSR_ISA avx2
#define TTSR_VECTOR_BYTES 32
#define TTSR_VECTORS 2
#include "box_max_walk.h"

namespace ttsr_fast {
namespace avx2 {

void walk(const BoxMaxParams& p, Element element, int kernel_size) {
  if (element == Element::kDouble) return walk_element<Plain<double>>(p, kernel_size);
  walk_element<Plain<float>>(p, kernel_size);
}

}  // namespace avx2
}  // namespace ttsr_fast
TTSR_TARGET_END
#endif
