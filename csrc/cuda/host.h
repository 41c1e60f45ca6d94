// Host code of the CUDA operators: streams, devices, maps cut into blocks.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../transfer.h"
#include "params.h"

// Tests compile the kernels for the CPU and register them there.
#ifndef TTSR_DISPATCH_KEY
#define TTSR_DISPATCH_KEY CUDA
#endif

namespace ttsr_fast {

using torch::stable::accelerator::DeviceGuard;

constexpr int64_t kMaxInt = std::numeric_limits<int32_t>::max();

inline cudaStream_t current_stream(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_count(int64_t count, int64_t limit, const char* what) {
  STD_TORCH_CHECK(count <= limit, "ttsr_fast: the CUDA kernels take at most ", limit, " ", what, ", got ",
                  count);
}

// A batch of maps of stride x stride blocks.
template <class T>
struct BlockMaps : Maps<T> {
  static constexpr int kWide = kVectorBytes / sizeof(T);
  Grid blocks;

  BlockMaps(const Tensor& x, int64_t stride) : Maps<T>(x), blocks{x.size(2) / stride, x.size(3) / stride} {
    if (this->channels == 1) this->stride_c = 1;
  }

  bool channels_last() const { return this->stride_c == 1; }

  void check_channels_last() const {
    STD_TORCH_CHECK(channels_last(), "ttsr_fast: the channels of a map must be contiguous");
  }

  // The channels of a pixel can be moved in vectors of kVectorBytes.
  bool wide() const {
    return this->channels % kWide == 0 && this->stride_n % kWide == 0 && this->stride_h % kWide == 0 &&
           this->stride_w % kWide == 0 && reinterpret_cast<uintptr_t>(this->data) % kVectorBytes == 0;
  }
};

}  // namespace ttsr_fast
