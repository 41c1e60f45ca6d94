// Checks of arguments. An operator that passes them reads and writes inside its tensors only.
//
// Exported programs and users call operators directly, so the checks stand where memory is accessed.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <limits>

#include "common.h"

namespace ttsr_fast {

constexpr int64_t kMaxPatches = std::numeric_limits<int32_t>::max();  // of an image
constexpr int64_t kMaxElements = int64_t(1) << 48;                    // of a map, stored or expanded

inline std::string shape_of(const Tensor& x) {
  std::string text = "[";
  for (int64_t d = 0; d < x.dim(); ++d) text += (d ? ", " : "") + std::to_string(x.size(d));
  return text + "]";
}

inline void check_shape(const Tensor& x, std::initializer_list<int64_t> shape, const char* name) {
  bool equal = x.dim() == int64_t(shape.size());
  for (size_t d = 0; equal && d < shape.size(); ++d) equal = x.size(d) == shape.begin()[d];
  if (equal) return;
  std::string expected;
  for (int64_t size : shape) expected += (expected.empty() ? "" : ", ") + std::to_string(size);
  STD_TORCH_CHECK(false, "ttsr_fast: ", name, " must be [", expected, "], got ", shape_of(x));
}

inline void check_type(const Tensor& x, ScalarType type, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == type, "ttsr_fast: ", name, " must be ",
                  torch::headeronly::toString(type), ", got ", torch::headeronly::toString(x.scalar_type()));
}

inline void check_device(const Tensor& x, const Tensor& other, const char* name) {
  STD_TORCH_CHECK(x.device() == other.device(), "ttsr_fast: ", name, " must be on the same device");
}

inline ScalarType sum_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The storage can be smaller than sizes and strides need: resizing it does not change the tensor.
inline void check_memory(const Tensor& x, const char* name) {
  int64_t last = x.storage_offset(), bytes = 0;
  for (int64_t d = 0; d < x.dim(); ++d) last += (x.size(d) - 1) * x.stride(d);
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(x.get(), &bytes));
  STD_TORCH_CHECK(x.numel() == 0 || (last + 1) * int64_t(x.element_size()) <= bytes, "ttsr_fast: ", name,
                  " has less memory than its shape ", shape_of(x), " needs");
}

// A contiguous tensor of known shape, to read or to fill.
inline void check_contiguous(const Tensor& x, ScalarType type, std::initializer_list<int64_t> shape,
                             const char* name) {
  check_type(x, type, name);
  check_shape(x, shape, name);
  STD_TORCH_CHECK(x.is_contiguous(), "ttsr_fast: ", name, " must be contiguous");
  check_memory(x, name);
}

// A batch of maps [N, C, H, W] that is not empty; its sizes multiply without overflow.
inline void check_map(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 4, "ttsr_fast: ", name, " must be [N, C, H, W], got ", shape_of(x));
  with_element(x, [](auto) {});
  int64_t pixels = 0, elements = 0;
  const bool fits = !__builtin_mul_overflow(x.size(2), x.size(3), &pixels) &&
                    !__builtin_mul_overflow(x.size(1), pixels, &elements) &&
                    !__builtin_mul_overflow(x.size(0), elements, &elements);
  STD_TORCH_CHECK(fits && pixels <= kMaxPatches && 0 < elements && elements <= kMaxElements,
                  "ttsr_fast: ", name,
                  " must have at least 1 and at most 2^31 - 1 pixels and 2^48 elements, got ", shape_of(x));
  check_memory(x, name);
}

// One map for each image, or one map that is broadcast.
inline void check_batch(const Tensor& x, int64_t images, const char* name) {
  STD_TORCH_CHECK(x.size(0) == 1 || x.size(0) == images, "ttsr_fast: ", name, " must have batch size 1 or ",
                  images, ", got ", shape_of(x));
}

inline void check_patch(int64_t kernel_size, int64_t padding) {
  STD_TORCH_CHECK(0 < kernel_size && kernel_size <= 7 && kernel_size % 2 == 1,
                  "ttsr_fast: kernel_size must be 1, 3, 5 or 7, got ", kernel_size);
  STD_TORCH_CHECK(0 <= padding && padding <= kernel_size / 2, "ttsr_fast: padding must be 0 to ",
                  kernel_size / 2, ", got ", padding);
}

}  // namespace ttsr_fast
