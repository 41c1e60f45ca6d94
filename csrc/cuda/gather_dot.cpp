// cuda_gather_dot: checks, parameters and launch; see gather_dot_kernel.cu.

#include "host.h"

namespace ttsr_fast {

namespace {

void cuda_gather_dot(const Tensor& value,  // [N or 1, C, HV, WV], contiguous channels
                     const Tensor& grad,   // [N, C, stride*H, stride*W], contiguous channels
                     const Tensor& index,  // [N, Ho, Wo]
                     const Tensor& out,    // [N, Ho, Wo]
                     int64_t stride, int64_t kernel_size, int64_t padding, int64_t key_height,
                     int64_t key_width, std::string divisor, bool check_index) {
  const TransferOptions options{kernel_size, padding, key_height, key_width, divisor};
  check_level(grad, value, index, stride, options);
  check_device(out, index, "the result");
  check_contiguous(out, sum_type(value.scalar_type()), {index.size(0), index.size(1), index.size(2)},
                   "the result");
  check_count(index.numel(), kMaxInt, "query patches");
  const DeviceGuard guard(index.get_device_index());
  with_element(value, [&](auto element) {
    using T = decltype(element);
    using Values = BlockMaps<const T>;
    const Values values(value, stride), grads(grad, stride);
    values.check_channels_last();
    grads.check_channels_last();
    check_count(stride * stride * values.channels, kMaxInt / kWarpSize, "elements in a block");
    const GatherDotParams params{.transfer = transfer_of(grad, value, index, stride, options),
                                 .images = index.size(0),
                                 .index = data_of<int64_t>(index),
                                 .check_index = check_index,
                                 .value = values.data,
                                 .grad = grads.data,
                                 .value_stride_n = values.stride_n,
                                 .value_stride_h = values.stride_h,
                                 .value_stride_w = values.stride_w,
                                 .grad_stride_n = grads.stride_n,
                                 .grad_stride_h = grads.stride_h,
                                 .grad_stride_w = grads.stride_w,
                                 .stride = int32_t(stride),
                                 .channels = int32_t(values.channels),
                                 .out = out.mutable_data_ptr()};
    const bool wide = values.wide() && grads.wide();
    (wide ? launch_gather_dot<T, Values::kWide> : launch_gather_dot<T, 1>)(params, current_stream(index));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ttsr_fast, TTSR_DISPATCH_KEY, m) {
  m.impl("cuda_gather_dot", TORCH_BOX(&cuda_gather_dot));
}

}  // namespace ttsr_fast
