// Registers the CUDA kernels; their schemas are defined in ttsr_fast/operators/schemas.py.

#include <cuda_runtime.h>

#include "ops.h"

// Tests run the kernels on the CPU, thread by thread, and register them there.
#ifndef TTSR_DISPATCH_KEY
#define TTSR_DISPATCH_KEY CUDA
#endif

namespace ttsr_fast {
namespace {

void cuda_gather_fold(const std::vector<Tensor>& values, const Tensor& index,
                      const std::optional<Tensor>& weight, const std::vector<Tensor>& outs,
                      const std::vector<int64_t>& strides, int64_t kernel_size, int64_t padding,
                      int64_t key_height, int64_t key_width, std::string divisor, bool check_index) {
  gather_fold(values, index, weight, outs, strides, {kernel_size, padding, key_height, key_width, divisor},
              check_index);
}

void cuda_gather_fold_adjoint(const std::vector<Tensor>& grads, const Tensor& index, const Tensor& begin,
                              const Tensor& order, const std::optional<Tensor>& weight,
                              const std::vector<Tensor>& outs, const std::vector<int64_t>& strides,
                              int64_t kernel_size, int64_t padding, int64_t key_height, int64_t key_width,
                              std::string divisor) {
  gather_fold_adjoint(grads, index, begin, order, weight, outs, strides,
                      {kernel_size, padding, key_height, key_width, divisor});
}

void cuda_gather_dot(const Tensor& value, const Tensor& grad, const Tensor& index, const Tensor& out,
                     int64_t stride, int64_t kernel_size, int64_t padding, int64_t key_height,
                     int64_t key_width, std::string divisor, bool check_index) {
  gather_dot(value, grad, index, out, stride, {kernel_size, padding, key_height, key_width, divisor},
             check_index);
}

void cuda_slab_search(const Tensor& query_rows, const Tensor& key_rows, const Tensor& scale,
                      const Tensor& best, const Tensor& ring, int64_t key_images, int64_t depth,
                      int64_t together, int64_t image_stride, std::vector<int64_t> query,
                      std::vector<int64_t> key, int64_t keys, int64_t walk_rows) {
  slab_search(query_rows, key_rows, scale, best, ring,
              {key_images, depth, together, image_stride, query, key, keys, walk_rows});
}

void cuda_box_max(const Tensor& query_rows, const Tensor& key_rows, const Tensor& scale, const Tensor& best,
                  const Tensor& ring, int64_t key_images, int64_t depth, int64_t together,
                  int64_t image_stride, std::vector<int64_t> query, std::vector<int64_t> key, int64_t keys,
                  int64_t walk_rows) {
  box_max(query_rows, key_rows, scale, best, ring,
          {key_images, depth, together, image_stride, query, key, keys, walk_rows});
}

// Of the toolkit that compiled this: thousands of the major version.
int64_t cuda_version() { return CUDART_VERSION; }

}  // namespace
}  // namespace ttsr_fast

STABLE_TORCH_LIBRARY_IMPL(ttsr_fast, TTSR_DISPATCH_KEY, m) {
  m.impl("cuda_gather_fold", TORCH_BOX(&ttsr_fast::cuda_gather_fold));
  m.impl("cuda_gather_fold_adjoint", TORCH_BOX(&ttsr_fast::cuda_gather_fold_adjoint));
  m.impl("cuda_gather_dot", TORCH_BOX(&ttsr_fast::cuda_gather_dot));
  m.impl("cuda_slab_search", TORCH_BOX(&ttsr_fast::cuda_slab_search));
  m.impl("cuda_box_max", TORCH_BOX(&ttsr_fast::cuda_box_max));
}

STABLE_TORCH_LIBRARY_IMPL(ttsr_fast, CompositeExplicitAutograd, m) {
  m.impl("cuda_version", TORCH_BOX(&ttsr_fast::cuda_version));
}
