// The operators of the CUDA library; see ttsr_fast/ops.py for their contracts.
#pragma once

#include <string>
#include <vector>

#include "../common.h"

namespace ttsr_fast {

// What every operator is told of patches and grids. The maps that are read have their channels side by side,
// sizes of values are multiples of the stride, and one value may serve the whole batch.
struct PatchOptions {
  int64_t kernel_size, padding;
  int64_t key_height, key_width;  // the key grid that the index counts in
  std::string divisor;
};

// The weights are of the type that values are summed in, and contiguous as the index is.
void gather_fold(const std::vector<Tensor>& values,    // levels of [N or 1, C, HV, WV]
                 const Tensor& index,                  // [N, Ho, Wo]
                 const std::optional<Tensor>& weight,  // [N, Ho, Wo]
                 const std::vector<Tensor>& outs,      // levels of [N, C, stride*H, stride*W]
                 const std::vector<int64_t>& strides, const PatchOptions& options, bool check_index);
void gather_fold_adjoint(const std::vector<Tensor>& grads,     // levels of [N, C, stride*H, stride*W]
                         const Tensor& index,                  // [N, Ho, Wo], for its sizes
                         const Tensor& begin,                  // int32 [N*HKo*WKo + 1] or [HKo*WKo + 1]
                         const Tensor& order,                  // int32 [N*Ho*Wo]
                         const std::optional<Tensor>& weight,  // [N, Ho, Wo]
                         const std::vector<Tensor>& outs,      // levels of [N or 1, C, HV, WV]
                         const std::vector<int64_t>& strides, const PatchOptions& options);
void gather_dot(const Tensor& value,  // [N or 1, C, HV, WV]
                const Tensor& grad,   // [N, C, stride*H, stride*W]
                const Tensor& index,  // [N, Ho, Wo]
                const Tensor& out,    // [N, Ho, Wo]
                int64_t stride, const PatchOptions& options, bool check_index);

}  // namespace ttsr_fast
