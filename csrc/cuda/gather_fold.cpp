// From tensors to the parameters of the CUDA kernels: grids, strides, and which levels share a launch.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <limits>

#include "../check.h"
#include "ops.h"
#include "transfer.h"

namespace ttsr_fast {

namespace {

constexpr int64_t kMost = std::numeric_limits<int32_t>::max();  // thread blocks, patches, elements of a row

template <class T>
constexpr ScalarType kSumType = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;

using Guard = torch::stable::accelerator::DeviceGuard;

void check_count(int64_t count, int64_t limit, const char* what) {
  STD_TORCH_CHECK(count <= limit, "ttsr_fast: the CUDA kernels can have ", limit, " ", what, ", got ", count);
}

// A batch of maps, cut into blocks.
template <class T>
struct BlockMaps : Maps<T> {
  Grid blocks;

  BlockMaps(const Tensor& x, int64_t stride) : Maps<T>(x), blocks{x.size(2) / stride, x.size(3) / stride} {
    if (this->channels == 1) this->stride_c = 1;
  }

  bool channels_last() const { return this->stride_c == 1; }

  // Whether the channels of every pixel can be moved `elements` at a time.
  bool wide(int64_t elements) const {
    const int64_t bytes = elements * sizeof(T);
    return this->channels % elements == 0 && this->stride_n % elements == 0 &&
           this->stride_h % elements == 0 && this->stride_w % elements == 0 &&
           reinterpret_cast<uintptr_t>(this->data) % bytes == 0;
  }
};

// The two grids of a call, whose sizes in blocks are those of the maps.
Transfer transfer_of(const Tensor& index, Grid output, Grid value, const PatchOptions& o) {
  return {{{index.size(1), index.size(2)}, output, o.padding},
          {{o.key_height, o.key_width}, value, o.padding},
          o.kernel_size,
          o.divisor == "overlap",
          o.divisor == "area" ? 1.0 / double(o.kernel_size * o.kernel_size) : 1.0};
}

// The maps of one level: `in` is read, `out` is filled.
template <class T>
struct LevelMaps {
  static constexpr int kWide = kVectorBytes / sizeof(T);
  BlockMaps<const T> in;
  BlockMaps<T> out;
  bool wide;

  LevelMaps(const Tensor& in_, const Tensor& out_, int64_t stride)
      : in(in_, stride), out(out_, stride),
        wide(in.wide(kWide) && (!out.channels_last() || out.wide(kWide))) {}

  bool goes_with(const LevelMaps& other) const {
    return wide == other.wide && in.blocks == other.in.blocks && out.blocks == other.out.blocks;
  }

  Level level(int64_t stride) const {
    STD_TORCH_CHECK(in.channels_last(), "ttsr_fast: the channels of a map must lie side by side");
    const int64_t row = stride * out.channels, slice = wide ? kSlice<kWide> * kWide : kSlice<1>;
    check_count(row, kMost / kWarps, "elements in a row of a block");
    return {in.data,      out.data,        in.stride_n,           in.stride_h,
            in.stride_w,  out.stride_n,    out.stride_c,          out.stride_h,
            out.stride_w, int32_t(stride), int32_t(out.channels), int32_t((row + slice - 1) / slice)};
  }
};

// Fills `outs` from `ins`: levels that have the same grids, type and alignment share a launch.
void launch_levels(const std::vector<Tensor>& ins, const std::vector<Tensor>& outs,
                   const std::vector<int64_t>& strides, const Tensor& index,
                   const std::optional<Tensor>& weight, const PatchOptions& options,
                   GatherFoldParams common) {
  common.weight = weight ? weight->const_data_ptr() : nullptr;
  const bool adjoint = common.order != nullptr;
  check_count(options.kernel_size * options.kernel_size, kMaxTaps, "positions in a patch");
  const Guard guard(index.get_device_index());
  const cudaStream_t stream = current_stream(index);
  std::vector<bool> done(ins.size(), false);
  for (size_t first = 0; first < ins.size(); ++first) {
    if (done[first]) continue;
    with_element(ins[first], [&](auto element) {
      using T = decltype(element);
      STD_TORCH_CHECK(!weight || weight->scalar_type() == kSumType<T>,
                      "ttsr_fast: weights must be of the type that the values are summed in");
      const LevelMaps<T> maps(ins[first], outs[first], strides[first]);
      GatherFoldParams params = common;
      params.images = outs[first].size(0);
      params.transfer = adjoint ? transfer_of(index, maps.in.blocks, maps.out.blocks, options)
                                : transfer_of(index, maps.out.blocks, maps.in.blocks, options);
      int64_t parts = 0;
      for (size_t l = first; l < ins.size() && params.levels < kMaxLevels; ++l) {
        if (done[l] || ins[l].scalar_type() != ins[first].scalar_type()) continue;
        const LevelMaps<T> other(ins[l], outs[l], strides[l]);
        if (!other.goes_with(maps)) continue;
        params.level[params.levels] = other.level(strides[l]);
        parts += params.level[params.levels++].slices;
        done[l] = true;
      }
      check_count(parts, 65535, "slices of a block");
      check_count(params.images * maps.out.blocks.size(), kMost, "blocks in the maps that are filled");
      constexpr int kWide = LevelMaps<T>::kWide;
      if (adjoint) {
        (maps.wide ? launch_gather_fold_adjoint<T, kWide> : launch_gather_fold_adjoint<T, 1>)(params, stream);
      } else {
        (maps.wide ? launch_gather_fold<T, kWide> : launch_gather_fold<T, 1>)(params, stream);
      }
    });
  }
}

// Every level of a call, each an output with its value.
void check_levels(const std::vector<Tensor>& outputs, const std::vector<Tensor>& values, const Tensor& index,
                  const std::optional<Tensor>& weight, const std::vector<int64_t>& strides,
                  const PatchOptions& options) {
  STD_TORCH_CHECK(!values.empty() && values.size() == outputs.size() && values.size() == strides.size(),
                  "ttsr_fast: there must be a value, an output and a stride for every level, got ",
                  values.size(), ", ", outputs.size(), " and ", strides.size());
  for (size_t l = 0; l < values.size(); ++l) check_level(outputs[l], values[l], index, strides[l], options);
  check_count(index.numel(), kMost, "query patches");
  check_weight(weight, index);
  STD_TORCH_CHECK(!weight || weight->is_contiguous(), "ttsr_fast: weight must be contiguous");
}

template <class T>
const T* data_of(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

}  // namespace

void gather_fold(const std::vector<Tensor>& values, const Tensor& index, const std::optional<Tensor>& weight,
                 const std::vector<Tensor>& outs, const std::vector<int64_t>& strides,
                 const PatchOptions& options, bool check_index) {
  check_levels(outs, values, index, weight, strides, options);
  GatherFoldParams params{};
  params.index = data_of<int64_t>(index);
  params.check_index = check_index;
  launch_levels(values, outs, strides, index, weight, options, params);
}

void gather_fold_adjoint(const std::vector<Tensor>& grads, const Tensor& index, const Tensor& begin,
                         const Tensor& order, const std::optional<Tensor>& weight,
                         const std::vector<Tensor>& outs, const std::vector<int64_t>& strides,
                         const PatchOptions& options) {
  check_levels(grads, outs, index, weight, strides, options);
  check_type(begin, ScalarType::Int, "begin");
  check_type(order, ScalarType::Int, "order");
  check_device(begin, index, "begin");
  check_device(order, index, "order");
  check_shape(begin, {outs[0].size(0) * options.key_height * options.key_width + 1}, "begin");
  check_shape(order, {index.numel()}, "order");
  STD_TORCH_CHECK(begin.is_contiguous() && order.is_contiguous(),
                  "ttsr_fast: begin and order must be contiguous");
  check_memory(begin, "begin");
  check_memory(order, "order");
  for (const Tensor& out : outs) check_batch(out, outs[0].size(0), "the gradient of a value");
  GatherFoldParams params{};
  params.patches = int32_t(index.numel());
  params.begin = data_of<int32_t>(begin);
  params.order = data_of<int32_t>(order);
  launch_levels(grads, outs, strides, index, weight, options, params);
}

void gather_dot(const Tensor& value, const Tensor& grad, const Tensor& index, const Tensor& out,
                int64_t stride, const PatchOptions& options, bool check_index) {
  check_level(grad, value, index, stride, options);
  check_device(out, index, "the result");
  check_result(out, sum_type(value.scalar_type()), {index.size(0), index.size(1), index.size(2)},
               "the result");
  const Guard guard(index.get_device_index());
  with_element(value, [&](auto element) {
    using T = decltype(element);
    constexpr int kWide = kVectorBytes / sizeof(T);
    const BlockMaps<const T> values(value, stride), grads(grad, stride);
    STD_TORCH_CHECK(values.channels_last() && grads.channels_last(),
                    "ttsr_fast: the channels of a map must lie side by side");
    check_count(stride * stride * values.channels, kMost / kWarpSize, "elements in a block");
    check_count(index.numel(), kMost, "query patches");
    const GatherDotParams params{transfer_of(index, grads.blocks, values.blocks, options),
                                 index.size(0),
                                 data_of<int64_t>(index),
                                 check_index,
                                 values.data,
                                 grads.data,
                                 values.stride_n,
                                 values.stride_h,
                                 values.stride_w,
                                 grads.stride_n,
                                 grads.stride_h,
                                 grads.stride_w,
                                 int32_t(stride),
                                 int32_t(values.channels),
                                 out.mutable_data_ptr()};
    const bool wide = values.wide(kWide) && grads.wide(kWide);
    (wide ? launch_gather_dot<T, kWide> : launch_gather_dot<T, 1>)(params, current_stream(index));
  });
}

}  // namespace ttsr_fast
