// Tensors of the stable ABI, element types and strided maps: what every operator uses.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "geometry.h"

namespace ttsr_fast {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Calls f with a value of the tensor's element type.
template <class F>
void with_element(const Tensor& x, F&& f) {
  switch (x.scalar_type()) {
    case ScalarType::Double: return f(double());
    case ScalarType::Float: return f(float());
    case ScalarType::Half: return f(Half());
    case ScalarType::BFloat16: return f(BFloat16());
    default: STD_TORCH_CHECK(false, "ttsr_fast: not a floating-point tensor");
  }
}

template <class T>
const T* data_of(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <class T>
T* mutable_data_of(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// A batch of maps [N, C, H, W] with any strides, in elements. A batch of one is broadcast: its stride_n is 0.
template <class T>
struct Maps {
  T* data;
  int64_t channels, height, width;
  int64_t stride_n, stride_c, stride_h, stride_w;

  explicit Maps(const Tensor& x)
      : data(const_cast<T*>(data_of<T>(x))), channels(x.size(1)), height(x.size(2)), width(x.size(3)),
        stride_n(x.size(0) == 1 ? 0 : x.stride(0)), stride_c(x.stride(1)), stride_h(x.stride(2)),
        stride_w(x.stride(3)) {}

  T* at(int64_t n, int64_t c, int64_t y, int64_t x) const {
    return data + n * stride_n + c * stride_c + y * stride_h + x * stride_w;
  }
};

}  // namespace ttsr_fast
