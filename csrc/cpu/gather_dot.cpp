// gather_dot: for every query patch, the inner product of its patch of the gradient with the value patch it
// chose.

#include <vector>

#include "../check.h"
#include "transfer.h"

namespace ttsr_fast {

namespace {

constexpr int64_t kPatches = 256;  // per task: their sums and the places they read stay in the cache
constexpr int64_t kChannels = 8;   // per look at those places

// The blocks that meet under one tap of one patch.
struct Meeting {
  int64_t value, grad;  // offsets of the blocks in their maps
  double scale;
};

}  // namespace

void gather_dot(const Tensor& value, const Tensor& grad, const Tensor& index, Tensor out,
                const GatherFoldOptions& o) {
  check_level(grad, value, index, o.stride, o);
  check_index(index, o.key_height * o.key_width);
  check_result(out, sum_type(value.scalar_type()), {index.size(0), index.size(1), index.size(2)},
               "the result");
  const Transfer t = transfer_of(grad, value, index, o);
  const int64_t* chosen = static_cast<const int64_t*>(index.const_data_ptr());
  const int64_t patches = t.query.patches.size(), chunks = (patches + kPatches - 1) / kPatches;
  with_element(value, [&](auto element) {
    using T = decltype(element);
    using S = Sum<T>;
    const Maps<const T> values(value), grads(grad);
    S* const result = static_cast<S*>(out.mutable_data_ptr());
    const double products = double(index.numel()) * o.kernel_size * o.kernel_size * o.stride * o.stride;
    parallel_tasks(index.size(0) * chunks, products * values.channels, [&](int64_t task, int64_t) {
      const int64_t n = task / chunks, first = task % chunks * kPatches;
      const int64_t count = std::min(kPatches, patches - first);
      std::vector<Meeting> meetings;
      std::vector<size_t> end(count);  // of every patch's meetings
      for (int64_t p = 0; p < count; ++p) {
        const int64_t key = chosen[n * patches + first + p];
        for (int64_t a = 0; a < t.kernel_size; ++a) {
          for (int64_t b = 0; b < t.kernel_size; ++b) {
            const Position from = t.value_block(key, a, b), to = t.output_block(first + p, a, b);
            if (!t.key.blocks.holds(from) || !t.query.blocks.holds(to)) continue;
            meetings.push_back({o.stride * (from.y * values.stride_h + from.x * values.stride_w),
                                o.stride * (to.y * grads.stride_h + to.x * grads.stride_w), t.scale(to)});
          }
        }
        end[p] = meetings.size();
      }
      std::vector<double> sum(count, 0.0);
      for (int64_t first_c = 0; first_c < values.channels; first_c += kChannels) {
        const int64_t channels = std::min(values.channels - first_c, kChannels);
        const T* v = values.at(n, first_c, 0, 0);
        const T* g = grads.at(n, first_c, 0, 0);
        for (int64_t p = 0; p < count; ++p) {
          double dot[kChannels] = {};  // independent sums, which the processor adds side by side
          for (size_t m = p ? end[p - 1] : 0; m < end[p]; ++m) {
            const Meeting& at = meetings[m];
            for (int64_t y = 0; y < o.stride; ++y) {
              for (int64_t x = 0; x < o.stride; ++x) {
                const T* from = v + at.value + y * values.stride_h + x * values.stride_w;
                const T* to = g + at.grad + y * grads.stride_h + x * grads.stride_w;
                for (int64_t c = 0; c < channels; ++c) {
                  dot[c] +=
                      at.scale * double(S(from[c * values.stride_c])) * double(S(to[c * grads.stride_c]));
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

}  // namespace ttsr_fast
