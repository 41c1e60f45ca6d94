// The search kernel for any processor, with vectors of 16 bytes.
#include <type_traits>

#include "isa.h"

#define TTSR_ISA baseline
#define TTSR_VECTOR_BYTES 16
#ifdef TTSR_X86
#define TTSR_VECTORS 2  // 16 registers
#else
#define TTSR_VECTORS 4  // 32 registers on AArch64
#endif
#include "box_max_walk.h"

namespace ttsr_fast {
namespace baseline {

void walk(const BoxMaxParams& p, Element element, int kernel_size) {
  if (element == Element::kDouble) return walk_element<Plain<double>>(p, kernel_size);
  walk_element<Plain<float>>(p, kernel_size);
}

}  // namespace baseline
}  // namespace ttsr_fast
