// cpp_gather_dot: for every query patch, the inner product of its gradient patch and the value patch at its
// index.

#include "../transfer.h"
#include "parallel.h"

namespace ttsr_fast {

namespace {

constexpr int64_t kPatches = 256;  // per task: their sums and block pairs stay in the cache
constexpr int64_t kChannels = 8;   // per pass over the block pairs

// The blocks under one tap of a patch.
struct BlockPair {
  int64_t value, grad;  // offsets in the maps
  double scale;
};

void cpp_gather_dot(const Tensor& value,  // [N or 1, C, HV, WV]
                    const Tensor& grad,   // [N, C, stride*H, stride*W]
                    const Tensor& index,  // [N, Ho, Wo]
                    Tensor out,           // [N, Ho, Wo]
                    int64_t stride, int64_t kernel_size, int64_t padding, int64_t key_height,
                    int64_t key_width, std::string divisor) {
  const TransferOptions options{kernel_size, padding, key_height, key_width, divisor};
  check_level(grad, value, index, stride, options);
  check_index(index, key_height * key_width);
  check_contiguous(out, sum_type(value.scalar_type()), {index.size(0), index.size(1), index.size(2)},
                   "the result");
  const Transfer t = transfer_of(grad, value, index, stride, options);
  const int64_t* key_patch = data_of<int64_t>(index);
  const int64_t patches = t.query.patches.size(), chunks = (patches + kPatches - 1) / kPatches;
  with_element(value, [&](auto element) {
    using T = decltype(element);
    using S = Sum<T>;
    const Maps<const T> values(value), grads(grad);
    S* const result = mutable_data_of<S>(out);
    const double products = double(index.numel()) * kernel_size * kernel_size * stride * stride;
    parallel_tasks(index.size(0) * chunks, products * values.channels, [&](int64_t task, int64_t) {
      const int64_t n = task / chunks, first = task % chunks * kPatches;
      const int64_t count = std::min(kPatches, patches - first);
      std::vector<BlockPair> pairs;
      std::vector<size_t> end(count);  // of every patch's pairs
      for (int64_t p = 0; p < count; ++p) {
        const int64_t key = key_patch[n * patches + first + p];
        for (int64_t a = 0; a < t.kernel_size; ++a) {
          for (int64_t b = 0; b < t.kernel_size; ++b) {
            const Position from = t.value_block(key, a, b), to = t.output_block(first + p, a, b);
            if (!t.key.blocks.contains(from) || !t.query.blocks.contains(to)) continue;
            pairs.push_back({stride * (from.y * values.stride_h + from.x * values.stride_w),
                             stride * (to.y * grads.stride_h + to.x * grads.stride_w), t.scale(to)});
          }
        }
        end[p] = pairs.size();
      }
      std::vector<double> sum(count, 0.0);
      for (int64_t first_c = 0; first_c < values.channels; first_c += kChannels) {
        const int64_t channels = std::min(values.channels - first_c, kChannels);
        const T* v = values.at(n, first_c, 0, 0);
        const T* g = grads.at(n, first_c, 0, 0);
        for (int64_t p = 0; p < count; ++p) {
          double dot[kChannels] = {};  // independent sums, for SIMD
          for (size_t m = p ? end[p - 1] : 0; m < end[p]; ++m) {
            for (int64_t y = 0; y < stride; ++y) {
              for (int64_t x = 0; x < stride; ++x) {
                const T* from = v + pairs[m].value + y * values.stride_h + x * values.stride_w;
                const T* to = g + pairs[m].grad + y * grads.stride_h + x * grads.stride_w;
                for (int64_t c = 0; c < channels; ++c) {
                  dot[c] += pairs[m].scale * double(S(from[c * values.stride_c])) *
                            double(S(to[c * grads.stride_c]));
                }
              }
            }
          }
          for (double d : dot) sum[p] += d;
        }
      }
      std::copy(sum.begin(), sum.end(), result + n * patches + first);
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ttsr_fast, CPU, m) { m.impl("cpp_gather_dot", TORCH_BOX(&cpp_gather_dot)); }

}  // namespace ttsr_fast
