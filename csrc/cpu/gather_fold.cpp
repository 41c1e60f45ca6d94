// gather_fold and its adjoint: every destination block is a weighted sum of source blocks.
//
// The two differ only in the table that lists, for a band of destinations, where the sources are: forward,
// the taps of the patches that meet at an output block; backward, the taps of all patches that took a value
// block. One writer per destination and a fixed order of addition: bit-equal results with any number of
// threads.

#include <vector>

#include "../ops.h"
#include "transfer.h"
#include "weighted_sum.h"

namespace ttsr_fast {

namespace {

constexpr int64_t kTableEntries = 1 << 19;  // sources listed at a time
constexpr int64_t kPlaneBytes = 1 << 19;  // channels served by one look at the table: those that fit a cache
constexpr int64_t kPlanes = 8;            // but no more than these
constexpr int64_t kChannels = 64;         // channels per task in channels_last
constexpr int64_t kDestinations = 512;    // destination blocks per task

// The weight of every query patch of all images; ones where there is none.
class PatchWeights {
 public:
  explicit PatchWeights(const std::optional<Tensor>& weight) {
    if (!weight) return;
    const int64_t height = weight->size(1), width = weight->size(2);
    values_.reserve(weight->numel());
    with_element(*weight, [&](auto element) {
      using T = decltype(element);
      const T* data = static_cast<const T*>(weight->const_data_ptr());
      for (int64_t j = 0; j < weight->numel(); ++j) {
        const int64_t n = j / (height * width), y = j / width % height, x = j % width;
        values_.push_back(
            double(Sum<T>(data[n * weight->stride(0) + y * weight->stride(1) + x * weight->stride(2)])));
      }
    });
  }
  double operator[](int64_t j) const { return values_.empty() ? 1.0 : values_[j]; }

 private:
  std::vector<double> values_;
};

// The query patches that chose each key patch, in ascending order (compressed rows).
struct Choosers {
  std::vector<int64_t> begin, patch;

  Choosers(const int64_t* index, int64_t patches, int64_t keys) : begin(keys + 1, 0), patch(patches) {
    for (int64_t j = 0; j < patches; ++j) ++begin[index[j] + 1];
    for (int64_t i = 0; i < keys; ++i) begin[i + 1] += begin[i];
    std::vector<int64_t> next(begin.begin(), begin.end() - 1);
    for (int64_t j = 0; j < patches; ++j) patch[next[index[j]]++] = j;
  }
};

struct Range {
  int64_t begin, end;
};

// The sources of destination blocks [first, first + ranges.size()).
template <class S>
struct Table {
  int64_t first;
  std::vector<Range> ranges;  // of every destination's sources
  std::vector<Source<S>> sources;
};

// Fills the table of a band of destinations and runs `use` on it, band after band.
//   size_of(block): upper bound on a destination's sources
//   list(block, add): calls add(offset, weight) for each
template <class S, class SizeOf, class List, class Use>
void for_each_band(const Grid& blocks, const SizeOf& size_of, const List& list, const Use& use) {
  Table<S> table;
  for (table.first = 0; table.first < blocks.size(); table.first += table.ranges.size()) {
    table.ranges.clear();
    int64_t size = 0;
    for (int64_t d = table.first; d < blocks.size(); ++d) {
      const int64_t next = size + size_of(blocks.position(d));
      if (next > kTableEntries && d > table.first) break;
      table.ranges.push_back({size, next});
      size = next;
    }
    table.sources.resize(size);
    const int64_t count = table.ranges.size();
    parallel_tasks((count + kDestinations - 1) / kDestinations, [&](int64_t task, int64_t) {
      for (int64_t d = task * kDestinations; d < std::min(count, (task + 1) * kDestinations); ++d) {
        Range& range = table.ranges[d];
        range.end = range.begin;
        list(blocks.position(table.first + d),
             [&](int64_t offset, double weight) { table.sources[range.end++] = {offset, S(weight)}; });
      }
    });
    use(table);
  }
}

// Destination blocks of a band of the map `out`, from the map `in` of the same image.
template <class T>
void sum_band(const Table<Sum<T>>& table, const Grid& blocks, int64_t stride, const Maps<const T>& in,
              const Maps<T>& out, int64_t n) {
  const int64_t count = table.ranges.size(), chunks = (count + kDestinations - 1) / kDestinations;
  const bool channels_last = in.stride_c == 1 && out.stride_c == 1 && out.channels > 1;
  const auto has_rows = [](const auto& map) { return map.stride_w == 1 || map.width == 1; };
  STD_TORCH_CHECK(channels_last || (has_rows(in) && has_rows(out)), "ttsr_fast: rows must be contiguous");
  const int64_t planes = kPlaneBytes / (in.height * in.width * int64_t(sizeof(T)));
  const int64_t step = channels_last ? kChannels : std::clamp<int64_t>(planes, 1, kPlanes);
  const int64_t groups = (out.channels + step - 1) / step;
  const bool whole_rows = channels_last && groups == 1;
  parallel_tasks(chunks * groups, [&](int64_t task, int64_t) {
    const int64_t first_c = task / chunks * step, end_c = std::min(out.channels, first_c + step);
    const int64_t first_d = task % chunks * kDestinations, end_d = std::min(count, first_d + kDestinations);
    for (int64_t d = first_d; d < end_d; ++d) {
      const Position at = blocks.position(table.first + d);
      const Range range = table.ranges[d];
      const Source<Sum<T>>* sources = table.sources.data() + range.begin;
      const int64_t size = range.end - range.begin, y = at.y * stride, x = at.x * stride;
      if (!channels_last) {
        sum_blocks(Planes<const T>{in.at(n, first_c, 0, 0), in.stride_h, in.stride_c}, sources, size, stride,
                   end_c - first_c, Planes<T>{out.at(n, first_c, y, x), out.stride_h, out.stride_c});
        continue;
      }
      for (int64_t r = 0; r < stride; ++r) {
        for (int64_t q = 0; q < (whole_rows ? 1 : stride); ++q) {
          sum_vectors(in.at(n, first_c, r, q), sources, size, (whole_rows ? stride : 1) * (end_c - first_c),
                      out.at(n, first_c, y + r, x + q));
        }
      }
    }
  });
}

}  // namespace

void gather_fold(const Tensor& value, const Tensor& index, const std::optional<Tensor>& weight, Tensor out,
                 const GatherFoldOptions& o) {
  const Transfer t = transfer_of(out, value, index, o);
  const PatchWeights weights(weight);
  const int64_t* chosen = static_cast<const int64_t*>(index.const_data_ptr());
  const int64_t patches = t.query.patches.size();
  with_element(value, [&](auto element) {
    using T = decltype(element);
    const Maps<const T> in(value);
    const Maps<T> to(out);
    for (int64_t n = 0; n < index.size(0); ++n) {
      for_each_band<Sum<T>>(
          t.query.blocks, [&](Position) { return t.kernel_size * t.kernel_size; },
          [&](Position block, const auto& add) {
            const double scale = t.scale(block);
            for_each_patch_at(t.query, block, t.kernel_size, [&](int64_t j, int64_t a, int64_t b) {
              const Position at = t.value_block(chosen[n * patches + j], a, b);
              if (!t.key.blocks.holds(at)) return;
              add(o.stride * (at.y * in.stride_h + at.x * in.stride_w), scale * weights[n * patches + j]);
            });
          },
          [&](const auto& table) { sum_band<T>(table, t.query.blocks, o.stride, in, to, n); });
    }
  });
}

void gather_fold_adjoint(const Tensor& grad, const Tensor& index, const std::optional<Tensor>& weight,
                         Tensor out, const GatherFoldOptions& o) {
  const Transfer t = transfer_of(grad, out, index, o);
  const PatchWeights weights(weight);
  const int64_t* chosen = static_cast<const int64_t*>(index.const_data_ptr());
  const int64_t patches = t.query.patches.size();
  // A value that serves a whole batch is one destination for all of it.
  const int64_t images = index.size(0) / out.size(0);
  with_element(grad, [&](auto element) {
    using T = decltype(element);
    const Maps<const T> in(grad);
    const Maps<T> to(out);
    for (int64_t n = 0; n < out.size(0); ++n) {
      const int64_t first = n * images * patches;
      const Choosers choosers(chosen + first, images * patches, t.key.patches.size());
      for_each_band<Sum<T>>(
          t.key.blocks,
          [&](Position block) {
            int64_t size = 0;
            for_each_patch_at(t.key, block, t.kernel_size, [&](int64_t i, int64_t, int64_t) {
              size += choosers.begin[i + 1] - choosers.begin[i];
            });
            return size;
          },
          [&](Position block, const auto& add) {
            for_each_patch_at(t.key, block, t.kernel_size, [&](int64_t i, int64_t a, int64_t b) {
              for (int64_t c = choosers.begin[i]; c < choosers.begin[i + 1]; ++c) {
                const int64_t j = choosers.patch[c];
                const Position at = t.output_block(j % patches, a, b);
                if (!t.query.blocks.holds(at)) continue;
                add(j / patches * in.stride_n + o.stride * (at.y * in.stride_h + at.x * in.stride_w),
                    t.scale(at) * weights[first + j]);
              }
            });
          },
          [&](const auto& table) { sum_band<T>(table, t.key.blocks, o.stride, in, to, n); });
    }
  });
}

}  // namespace ttsr_fast
