// What gather_fold, its adjoint and gather_dot share on the CPU.
#pragma once

#include "../gather_fold.h"
#include "../ops.h"

namespace ttsr_fast {

inline Transfer transfer_of(const Tensor& out, const Tensor& value, const Tensor& index,
                            const GatherFoldOptions& o) {
  return {{{index.size(1), index.size(2)}, {out.size(2) / o.stride, out.size(3) / o.stride}, o.padding},
          {{o.key_height, o.key_width}, {value.size(2) / o.stride, value.size(3) / o.stride}, o.padding},
          o.kernel_size,
          o.divisor == "overlap",
          o.divisor == "area" ? 1.0 / double(o.kernel_size * o.kernel_size) : 1.0};
}

// Calls f(patch, a, b) for every patch of a side whose tap (a, b) covers a block.
template <class F>
void for_each_patch_at(const PatchGrid& side, Position block, int64_t kernel_size, const F& f) {
  for (int64_t a = 0; a < kernel_size; ++a) {
    for (int64_t b = 0; b < kernel_size; ++b) {
      const Position patch = side.patch_of(block, a, b);
      if (side.patches.holds(patch)) f(side.patches.index(patch), a, b);
    }
  }
}

}  // namespace ttsr_fast
