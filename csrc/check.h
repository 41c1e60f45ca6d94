// Checks of an operator's arguments: what passes them is read and written inside its tensors.
//
// Operators are called by Python code of this package, by exported programs and by whoever finds them, so
// these checks stand where the memory is touched.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <limits>
#include <string>

#include "common.h"

namespace ttsr_fast {

constexpr int64_t kMostPatches = std::numeric_limits<int32_t>::max();  // of an image
constexpr int64_t kMostElements = int64_t(1) << 48;                    // of a map, stored or expanded

inline std::string shape_of(const Tensor& x) {
  std::string text = "[";
  for (int64_t d = 0; d < x.dim(); ++d) text += (d ? ", " : "") + std::to_string(x.size(d));
  return text + "]";
}

inline void check_shape(const Tensor& x, std::initializer_list<int64_t> shape, const char* name) {
  bool right = x.dim() == int64_t(shape.size());
  for (size_t d = 0; right && d < shape.size(); ++d) right = x.size(d) == shape.begin()[d];
  if (right) return;
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

// The storage of a tensor can be smaller than its sizes and strides say: it can be freed behind its back.
inline void check_memory(const Tensor& x, const char* name) {
  int64_t last = x.storage_offset(), bytes = 0;
  for (int64_t d = 0; d < x.dim(); ++d) last += (x.size(d) - 1) * x.stride(d);
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(x.get(), &bytes));
  STD_TORCH_CHECK(x.numel() == 0 || (last + 1) * int64_t(x.element_size()) <= bytes, "ttsr_fast: ", name,
                  " has less memory than its shape ", shape_of(x), " needs");
}

// A number for every query patch, to be filled.
inline void check_result(const Tensor& x, ScalarType type, std::initializer_list<int64_t> shape,
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
  STD_TORCH_CHECK(fits && pixels <= kMostPatches && 0 < elements && elements <= kMostElements,
                  "ttsr_fast: ", name,
                  " must have at least 1 and at most 2^31 - 1 pixels and 2^48 elements, got ", shape_of(x));
  check_memory(x, name);
}

// One map for every image, or one for all of them.
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

// Patches along an axis of `blocks`.
inline int64_t patches_of(int64_t blocks, int64_t kernel_size, int64_t padding, const char* name) {
  const int64_t patches = blocks + 2 * padding - kernel_size + 1;
  STD_TORCH_CHECK(patches > 0, "ttsr_fast: ", name, " is smaller than one patch");
  return patches;
}

// One level of a transfer: `output` [N, C, stride*H, stride*W] meets `value` [N or 1, C, HV, WV] at the key
// positions that `index` [N, Ho, Wo] holds. `Options` has kernel_size, padding, key_height, key_width,
// divisor.
template <class Options>
void check_level(const Tensor& output, const Tensor& value, const Tensor& index, int64_t stride,
                 const Options& o) {
  check_patch(o.kernel_size, o.padding);
  STD_TORCH_CHECK(o.divisor == "area" || o.divisor == "overlap" || o.divisor == "none",
                  "ttsr_fast: divisor must be area, overlap or none, got ", o.divisor);
  check_type(index, ScalarType::Long, "index");
  STD_TORCH_CHECK(index.dim() == 3 && index.is_contiguous() && index.numel() > 0,
                  "ttsr_fast: index must be a contiguous [N, Ho, Wo] that is not empty, got ",
                  shape_of(index));
  check_memory(index, "index");
  check_map(output, "the output or its gradient");
  check_map(value, "the value or its gradient");
  check_device(output, index, "the output or its gradient");
  check_device(value, index, "the value or its gradient");
  check_type(output, value.scalar_type(), "the output or its gradient");
  STD_TORCH_CHECK(0 < stride && stride <= kMostPatches, "ttsr_fast: stride must be positive, got ", stride);
  check_batch(value, index.size(0), "the value or its gradient");
  const int64_t shrink = o.kernel_size - 1 - 2 * o.padding;
  check_shape(
      output,
      {index.size(0), value.size(1), (index.size(1) + shrink) * stride, (index.size(2) + shrink) * stride},
      "the output or its gradient");
  // A value whose last block was completed holds one more block than its key grid counts.
  const auto fits = [&](int64_t size, int64_t keys) {
    const int64_t most = size / stride - shrink;
    return keys > 0 && (keys == most || keys == most - 1);
  };
  STD_TORCH_CHECK(fits(value.size(2), o.key_height) && fits(value.size(3), o.key_width),
                  "ttsr_fast: the key grid of value ", shape_of(value), " at stride ", stride, " is not ",
                  o.key_height, " x ", o.key_width);
}

inline void check_weight(const std::optional<Tensor>& weight, const Tensor& index) {
  if (!weight) return;
  check_shape(*weight, {index.size(0), index.size(1), index.size(2)}, "weight");
  check_device(*weight, index, "weight");
  check_memory(*weight, "weight");
  with_element(*weight, [](auto) {});
}

// On the CPU, whose values can be read at once.
inline void check_index(const Tensor& index, int64_t keys) {
  const int64_t* data = static_cast<const int64_t*>(index.const_data_ptr());
  const int64_t count = index.numel();
  int64_t low = data[0], high = data[0];
  for (int64_t j = 1; j < count; ++j) {
    low = std::min(low, data[j]);
    high = std::max(high, data[j]);
  }
  STD_TORCH_CHECK(0 <= low && high < keys, "ttsr_fast: index must lie in [0, ", keys, "), got ", low, " to ",
                  high);
}

}  // namespace ttsr_fast
