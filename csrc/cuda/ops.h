// The operators of the CUDA library; see ttsr_fast/operators/ops.py for their contracts.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <string>
#include <vector>

#include "../common.h"

namespace ttsr_fast {

inline cudaStream_t current_stream(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// What every operator is told of patches and grids. The maps that are read have their channels side by side,
// sizes of values are multiples of the stride, and one value may serve the whole batch.
struct PatchOptions {
  int64_t kernel_size, padding;
  int64_t key_height, key_width;  // the key grid that the index counts in
  std::string divisor;
};

// All check their arguments. The weights are of the type that values are summed in, and contiguous as the
// index is.
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

// Blocks of packed maps, see kernels/slab.py. A layout is height, width, strips, width of a strip,
// pixels of a line, and rows of a block.
struct SlabOptions {
  int64_t key_images, depth;       // columns that are multiplied
  int64_t together, image_stride;  // images in one product, and where they lie in the ring
  std::vector<int64_t> query, key;
  int64_t keys, walk_rows;
};

void slab_search(const Tensor& query_rows,  // [N*pixels + slack, columns]
                 const Tensor& key_rows,    // [N*pixels + slack, columns]
                 const Tensor& scale,       // [N or 1, strips, HKo, slots]
                 const Tensor& best,        // [N, Ho, Wo]
                 const Tensor& ring,        // [rows, 4096]
                 const SlabOptions& options);
// What follows the product, for the first pair of blocks alone: for tests and benchmarks.
void box_max(const Tensor& query_rows, const Tensor& key_rows, const Tensor& scale, const Tensor& best,
             const Tensor& ring, const SlabOptions& options);

}  // namespace ttsr_fast
