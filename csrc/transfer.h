// Arguments of gather_fold, its adjoint and gather_dot, on the host: checks and geometry.
#pragma once

#include "check.h"

namespace ttsr_fast {

struct TransferOptions {
  int64_t kernel_size, padding;
  int64_t key_height, key_width;  // of the key grid, in patches
  std::string divisor;
};

// One level of a transfer. The blocks of `value` are whole.
inline void check_level(const Tensor& output,  // [N, C, stride*H, stride*W]
                        const Tensor& value,   // [N or 1, C, HV, WV]
                        const Tensor& index,   // [N, Ho, Wo]
                        int64_t stride, const TransferOptions& options) {
  check_patch(options.kernel_size, options.padding);
  STD_TORCH_CHECK(options.divisor == "area" || options.divisor == "overlap" || options.divisor == "none",
                  "ttsr_fast: divisor must be area, overlap or none, got ", options.divisor);
  check_type(index, ScalarType::Long, "index");
  STD_TORCH_CHECK(index.dim() == 3 && index.is_contiguous() && index.numel() > 0,
                  "ttsr_fast: index must be a contiguous [N, Ho, Wo] that is not empty, got ",
                  shape_of(index));
  check_memory(index, "index");
  const char *output_name = "the output or its gradient", *value_name = "the value or its gradient";
  check_map(output, output_name);
  check_map(value, value_name);
  check_device(output, index, output_name);
  check_device(value, index, value_name);
  check_type(output, value.scalar_type(), output_name);
  STD_TORCH_CHECK(0 < stride && stride <= kMaxPatches, "ttsr_fast: stride must be positive, got ", stride);
  check_batch(value, index.size(0), value_name);
  const int64_t halo = options.kernel_size - 1 - 2 * options.padding;  // blocks - patches
  check_shape(
      output,
      {index.size(0), value.size(1), (index.size(1) + halo) * stride, (index.size(2) + halo) * stride},
      output_name);
  // If the last block was completed with zeros, the value has one block more than the key grid needs.
  const auto fits = [&](int64_t size, int64_t keys) {
    const int64_t most = size / stride - halo;
    return keys > 0 && (keys == most || keys == most - 1);
  };
  STD_TORCH_CHECK(fits(value.size(2), options.key_height) && fits(value.size(3), options.key_width),
                  "ttsr_fast: the key grid of value ", shape_of(value), " at stride ", stride, " is not ",
                  options.key_height, " x ", options.key_width);
}

inline void check_weight(const std::optional<Tensor>& weight,  // [N, Ho, Wo]
                         const Tensor& index) {                // [N, Ho, Wo]
  if (!weight) return;
  check_shape(*weight, {index.size(0), index.size(1), index.size(2)}, "weight");
  check_device(*weight, index, "weight");
  check_memory(*weight, "weight");
  with_element(*weight, [](auto) {});
}

// Range of the index, for tensors in the memory of the CPU.
inline void check_index(const Tensor& index, int64_t keys) {
  const int64_t* data = data_of<int64_t>(index);
  const auto [low, high] = std::minmax_element(data, data + index.numel());
  STD_TORCH_CHECK(0 <= *low && *high < keys, "ttsr_fast: index must lie in [0, ", keys, "), got ", *low,
                  " to ", *high);
}

inline Transfer transfer_of(const Tensor& output,  // [N, C, stride*H, stride*W]
                            const Tensor& value,   // [N or 1, C, HV, WV]
                            const Tensor& index,   // [N, Ho, Wo]
                            int64_t stride, const TransferOptions& options) {
  const auto blocks = [&](const Tensor& x) { return Grid{x.size(2) / stride, x.size(3) / stride}; };
  const double area = double(options.kernel_size * options.kernel_size);
  return {{{index.size(1), index.size(2)}, blocks(output), options.padding},
          {{options.key_height, options.key_width}, blocks(value), options.padding},
          options.kernel_size,
          options.divisor == "overlap",
          options.divisor == "area" ? 1.0 / area : 1.0};
}

}  // namespace ttsr_fast
