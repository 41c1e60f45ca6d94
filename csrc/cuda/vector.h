// Vectors of elements, sources of a weighted sum, and launches: what the CUDA kernels share.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/macros/Macros.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "transfer.h"

namespace ttsr_fast {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr unsigned kWholeWarp = 0xffffffff;

// kVector elements that are loaded and stored at once.
template <class T, int kVector>
struct alignas(sizeof(T) * kVector) Vector {
  T element[kVector];
};

// Where a block of a map is, and its weight; a negative offset stands for zeros.
template <class S>
struct alignas(kVectorBytes) Source {
  int64_t offset;
  S weight;
};

// The key patch that a query patch chose; -1 for one outside the grid, where that is not to stop the kernel.
__device__ __forceinline__ int64_t chosen_by(const int64_t* index, int64_t patch, bool check,
                                             const Grid& keys) {
  const int64_t chosen = index[patch];
  const bool inside = chosen >= 0 && chosen < keys.size();
  CUDA_KERNEL_ASSERT((inside || !check) && "index outside the key grid");
  return inside ? chosen : -1;
}

template <int kThreads = kWarps * kWarpSize, class... Expected, class... Given>
void launch(void (*kernel)(Expected...), dim3 grid, cudaStream_t stream, const Given&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  // The check of what it returns would leave the error behind, in this library's own runtime, for the next.
  cudaLaunchKernelEx(&config, kernel, arguments...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace ttsr_fast
