// Device code that the CUDA kernels share: vectors, sources of a weighted sum, launches.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/macros/Macros.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "params.h"

namespace ttsr_fast {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr unsigned kFullWarp = 0xffffffff;

// kVector elements that are loaded and stored at once.
template <class T, int kVector>
struct alignas(sizeof(T) * kVector) Vector {
  T element[kVector];
};

// Offset of a block in its map, and its weight. A negative offset stands for zeros.
template <class S>
struct alignas(kVectorBytes) Source {
  int64_t offset;
  S weight;
};

// The key patch of a query patch. An index outside the key grid stops the kernel if `check`, else gives -1.
__device__ __forceinline__ int64_t key_patch_of(const int64_t* index, int64_t patch, bool check,
                                                const Grid& keys) {
  const int64_t key_patch = index[patch];
  const bool inside = key_patch >= 0 && key_patch < keys.size();
  CUDA_KERNEL_ASSERT((inside || !check) && "index outside the key grid");
  return inside ? key_patch : -1;
}

template <int kThreads = kWarps * kWarpSize, class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  // A check of the returned status would leave the error in this library's own runtime, for the next launch.
  cudaLaunchKernelEx(&config, kernel, arguments...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace ttsr_fast
