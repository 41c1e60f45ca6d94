// cuda_gather_fold and cuda_gather_fold_adjoint: checks, parameters and launches; see gather_fold_kernel.cu.

#include "host.h"

namespace ttsr_fast {

namespace {

// A level of a call: `in` is read, `out` is filled.
template <class T>
struct LevelMaps {
  static constexpr int kWide = BlockMaps<T>::kWide;
  BlockMaps<const T> in;
  BlockMaps<T> out;
  bool wide;

  LevelMaps(const Tensor& in_, const Tensor& out_, int64_t stride)
      : in(in_, stride), out(out_, stride), wide(in.wide() && (!out.channels_last() || out.wide())) {}

  bool can_share_launch(const LevelMaps& other) const {
    return wide == other.wide && in.blocks == other.in.blocks && out.blocks == other.out.blocks;
  }

  Level level(int64_t stride) const {
    in.check_channels_last();
    const int64_t row = stride * out.channels, slice = wide ? kSlice<kWide> * kWide : kSlice<1>;
    check_count(row, kMaxInt / kWarps, "elements in a row of a block");
    return {.in = in.data,
            .out = out.data,
            .in_stride_n = in.stride_n,
            .in_stride_h = in.stride_h,
            .in_stride_w = in.stride_w,
            .out_stride_n = out.stride_n,
            .out_stride_c = out.stride_c,
            .out_stride_h = out.stride_h,
            .out_stride_w = out.stride_w,
            .stride = int32_t(stride),
            .channels = int32_t(out.channels),
            .slices = int32_t((row + slice - 1) / slice)};
  }
};

// A call with its levels: maps that are read, maps to fill, strides.
struct Call {
  const std::vector<Tensor>&ins, &outs;
  const std::vector<int64_t>& strides;
  const Tensor& index;
  const std::optional<Tensor>& weight;
  TransferOptions options;
  bool adjoint;

  void check() const {
    const std::vector<Tensor>&outputs = adjoint ? ins : outs, &values = adjoint ? outs : ins;
    STD_TORCH_CHECK(!values.empty() && values.size() == outputs.size() && values.size() == strides.size(),
                    "ttsr_fast: there must be a value, an output and a stride for every level, got ",
                    values.size(), ", ", outputs.size(), " and ", strides.size());
    for (size_t l = 0; l < values.size(); ++l) {
      check_level(outputs[l], values[l], index, strides[l], options);
    }
    check_count(index.numel(), kMaxInt, "query patches");
    check_weight(weight, index);
    STD_TORCH_CHECK(!weight || weight->is_contiguous(), "ttsr_fast: weight must be contiguous");
    check_count(options.kernel_size * options.kernel_size, kMaxTaps, "positions in a patch");
  }

  // Levels with the same grids, type and alignment share a launch.
  void run(GatherFoldParams params) const {
    params.weight = weight ? weight->const_data_ptr() : nullptr;
    const DeviceGuard guard(index.get_device_index());
    std::vector<bool> done(ins.size(), false);
    for (size_t first = 0; first < ins.size(); ++first) {
      if (!done[first]) with_element(ins[first], [&](auto x) { launch<decltype(x)>(params, first, done); });
    }
  }

 private:
  // Launches a level, together with all later levels that can share the launch.
  template <class T>
  void launch(GatherFoldParams params, size_t first, std::vector<bool>& done) const {
    STD_TORCH_CHECK(!weight || weight->scalar_type() == sum_type(ins[first].scalar_type()),
                    "ttsr_fast: weights must be of the type that the values are summed in");
    const LevelMaps<T> maps(ins[first], outs[first], strides[first]);
    const auto [output, value] = adjoint ? std::pair(&ins, &outs) : std::pair(&outs, &ins);
    params.transfer = transfer_of((*output)[first], (*value)[first], index, strides[first], options);
    params.images = outs[first].size(0);
    int64_t slices = 0;
    for (size_t l = first; l < ins.size() && params.levels < kMaxLevels; ++l) {
      if (done[l] || ins[l].scalar_type() != ins[first].scalar_type()) continue;
      const LevelMaps<T> other(ins[l], outs[l], strides[l]);
      if (!other.can_share_launch(maps)) continue;
      params.level[params.levels] = other.level(strides[l]);
      slices += params.level[params.levels++].slices;
      done[l] = true;
    }
    check_count(slices, 65535, "slices of a block");
    check_count(params.images * maps.out.blocks.size(), kMaxInt, "blocks in the maps to fill");
    constexpr int kWide = LevelMaps<T>::kWide;
    const auto launcher =
        adjoint ? (maps.wide ? launch_gather_fold_adjoint<T, kWide> : launch_gather_fold_adjoint<T, 1>)
                : (maps.wide ? launch_gather_fold<T, kWide> : launch_gather_fold<T, 1>);
    launcher(params, current_stream(index));
  }
};

void cuda_gather_fold(const std::vector<Tensor>& values,    // levels of [N or 1, C, HV, WV]
                      const Tensor& index,                  // [N, Ho, Wo]
                      const std::optional<Tensor>& weight,  // [N, Ho, Wo]
                      const std::vector<Tensor>& outs,      // levels of [N, C, stride*H, stride*W]
                      const std::vector<int64_t>& strides, int64_t kernel_size, int64_t padding,
                      int64_t key_height, int64_t key_width, std::string divisor, bool check_index) {
  const Call call{
      values, outs, strides, index, weight, {kernel_size, padding, key_height, key_width, divisor}, false};
  call.check();
  GatherFoldParams params{};
  params.index = data_of<int64_t>(index);
  params.check_index = check_index;
  call.run(params);
}

void cuda_gather_fold_adjoint(const std::vector<Tensor>& grads,     // levels of [N, C, stride*H, stride*W]
                              const Tensor& index,                  // [N, Ho, Wo], for its sizes
                              const Tensor& csr_offsets,            // int32 [N or 1 * HKo*WKo + 1]
                              const Tensor& csr_indices,            // int32 [N*Ho*Wo]
                              const std::optional<Tensor>& weight,  // [N, Ho, Wo]
                              const std::vector<Tensor>& outs,      // levels of [N or 1, C, HV, WV]
                              const std::vector<int64_t>& strides, int64_t kernel_size, int64_t padding,
                              int64_t key_height, int64_t key_width, std::string divisor) {
  const Call call{grads, outs, strides, index, weight, {kernel_size, padding, key_height, key_width, divisor},
                  true};
  call.check();
  check_device(csr_offsets, index, "csr_offsets");
  check_device(csr_indices, index, "csr_indices");
  check_contiguous(csr_offsets, ScalarType::Int, {outs[0].size(0) * key_height * key_width + 1},
                   "csr_offsets");
  check_contiguous(csr_indices, ScalarType::Int, {index.numel()}, "csr_indices");
  for (const Tensor& out : outs) check_batch(out, outs[0].size(0), "the gradient of a value");
  GatherFoldParams params{};
  params.patches = int32_t(index.numel());
  params.csr_offsets = data_of<int32_t>(csr_offsets);
  params.csr_indices = data_of<int32_t>(csr_indices);
  call.run(params);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ttsr_fast, TTSR_DISPATCH_KEY, m) {
  m.impl("cuda_gather_fold", TORCH_BOX(&cuda_gather_fold));
  m.impl("cuda_gather_fold_adjoint", TORCH_BOX(&cuda_gather_fold_adjoint));
}

}  // namespace ttsr_fast
