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

// The key patch that a query patch chose. Unchecked, one outside the grid reads zeros or another block.
__device__ __forceinline__ int64_t chosen_by(const int64_t* index, int64_t patch, bool check,
                                             const Grid& keys) {
  const int64_t chosen = index[patch];
  CUDA_KERNEL_ASSERT((!check || (chosen >= 0 && chosen < keys.size())) && "index outside the key grid");
  return chosen;
}

template <class... Expected, class... Given>
void launch(void (*kernel)(Expected...), dim3 grid, cudaStream_t stream, const Given&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(kWarps * kWarpSize);
  config.stream = stream;
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, arguments...));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace ttsr_fast
