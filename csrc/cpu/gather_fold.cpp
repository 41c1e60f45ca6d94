// gather_fold and its adjoint: every destination block is a weighted sum of source blocks.
//
// The two differ only in the list of where, for a band of destinations, the sources are: forward, the taps of
// the patches that meet at an output block; backward, the taps of all patches that took a value block. One
// writer per destination and a fixed order of addition: bit-equal results with any number of threads.

#include <sys/mman.h>

#include <vector>

#include "../check.h"
#include "../ops.h"
#include "transfer.h"
#include "weighted_sum.h"

namespace ttsr_fast {

namespace {

constexpr int64_t kSources = 1 << 19;  // listed at a time
constexpr int64_t kDestinations = 64;  // whose sources are listed by a task
constexpr int64_t kTasks = 16;         // per thread, so that all end together
constexpr int64_t kPartial = 256;      // sources added up in one go

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

// A block to be filled: the part of a list that holds its sources, and its offset in its map.
struct Destination {
  int64_t begin, end, offset;
};

template <class T>
int64_t offset_of(const Maps<T>& map, int64_t stride, Position block) {
  return stride * (block.y * map.stride_h + block.x * map.stride_w);
}

// Sums the blocks of destinations in the map `out` from the map `in`.
template <class In, class S, class Out>
void sum_each(const std::vector<Destination>& destinations, const std::vector<Source<S>>& sources,
              const Extent& block, const Blocks<const In>& in, const Blocks<Out>& out) {
  const int64_t planes = planes_at_a_time(block.columns), groups = (block.planes + planes - 1) / planes;
  const int64_t count = destinations.size(), tasks = kTasks * torch::stable::get_num_threads();
  // A task is as large as that allows: results that lie together come from one thread.
  const int64_t chunks = std::clamp<int64_t>(tasks / std::max<int64_t>(groups, 1), 1, count);
  const double nanoseconds = 0.3 * double(sources.size()) * block.size();
  parallel_tasks(chunks * groups, nanoseconds, [&](int64_t task, int64_t) {
    const int64_t p = task / chunks * planes, chunk = task % chunks;
    const Extent part{std::min(planes, block.planes - p), block.rows, block.columns};
    for (int64_t d = chunk * count / chunks; d < (chunk + 1) * count / chunks; ++d) {
      const Destination& to = destinations[d];
      sum_blocks(in.at(p, 0), sources.data() + to.begin, to.end - to.begin, part,
                 Blocks<Out>{out.at(p, 0).data + to.offset, out.plane, out.row});
    }
  });
}

// The same, with long sums in parts, which are tasks of their own and lose less to rounding: flat areas send
// many queries to one key. Parts have more than kPartial / 2 sources on average, so a band has few of them.
template <class In, class S, class Out>
void sum_in_parts(std::vector<Destination>& destinations, const std::vector<Source<S>>& sources,
                  const Extent& block, const Blocks<const In>& in, const Blocks<Out>& out) {
  std::vector<Destination> parts, wholes;
  std::vector<Source<S>> partial;
  for (Destination& d : destinations) {
    if (d.end - d.begin <= kPartial) continue;
    const int64_t first = partial.size();
    for (; d.begin < d.end; d.begin += kPartial) {
      const int64_t offset = partial.size() * block.size();
      parts.push_back({d.begin, std::min(d.begin + kPartial, d.end), offset});
      partial.push_back({offset, 1});
    }
    wholes.push_back({first, int64_t(partial.size()), d.offset});
    d.begin = d.end;  // zero, for the time being
  }
  sum_each(destinations, sources, block, in, out);
  if (parts.empty()) return;
  // Neighbouring destinations share their sources: in this order these are still in a cache.
  const auto source = [&](const Destination& part) { return sources[part.begin].offset; };
  std::sort(parts.begin(), parts.end(), [&](auto& a, auto& b) { return source(a) < source(b); });
  const Tensor memory = scratch(parts.size() * block.size() * sizeof(S));
  const Blocks<S> sums{static_cast<S*>(memory.mutable_data_ptr()), block.rows * block.columns, block.columns};
  sum_each(parts, sources, block, in, sums);
  sum_each(wholes, partial, block, Blocks<const S>{sums.data, sums.plane, sums.row}, out);
}

// Asks for huge pages under a result: to make small ones, one by one, takes longer than to fill them.
template <class T>
void use_huge_pages([[maybe_unused]] const Maps<T>& map, [[maybe_unused]] int64_t count) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t begin = (uintptr_t(map.data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = uintptr_t(map.data + count) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Fills image n of the map `out` from that of the map `in`, band after band.
//   size_of(block): upper bound on a destination's sources
//   list(block, add): calls add(offset, weight) for each
template <class T, class SizeOf, class List>
void fill(const Maps<const T>& in, const Maps<T>& out, int64_t n, const Grid& blocks, int64_t stride,
          const SizeOf& size_of, const List& list) {
  const auto has_pixels = [](const auto& map) {
    return map.stride_c == 1 && (map.stride_w == map.channels || map.width == 1);
  };
  const auto has_rows = [](const auto& map) { return map.stride_w == 1 || map.width == 1; };
  const bool channels_last = out.channels > 1 && has_pixels(in) && has_pixels(out);
  STD_TORCH_CHECK(channels_last || (has_rows(in) && has_rows(out)), "ttsr_fast: rows must be contiguous");
  const Extent block = channels_last ? Extent{1, stride, stride * out.channels}  // rows of whole pixels
                                     : Extent{out.channels, stride, stride};
  std::vector<Destination> destinations;
  std::vector<Source<Sum<T>>> sources;
  for (int64_t first = 0; first < blocks.size(); first += destinations.size()) {
    destinations.clear();
    int64_t size = 0;
    for (int64_t d = first; d < blocks.size(); ++d) {
      const int64_t next = size + size_of(blocks.position(d));
      if (next > kSources && d > first) break;
      destinations.push_back({size, size, offset_of(out, stride, blocks.position(d))});
      size = next;
    }
    sources.resize(size);
    const int64_t count = destinations.size();
    parallel_tasks((count + kDestinations - 1) / kDestinations, 5.0 * size, [&](int64_t task, int64_t) {
      for (int64_t d = task * kDestinations; d < std::min(count, (task + 1) * kDestinations); ++d) {
        int64_t& end = destinations[d].end;
        list(blocks.position(first + d),
             [&](int64_t offset, double weight) { sources[end++] = {offset, Sum<T>(weight)}; });
      }
    });
    sum_in_parts(destinations, sources, block, Blocks<const T>{in.at(n, 0, 0, 0), in.stride_c, in.stride_h},
                 Blocks<T>{out.at(n, 0, 0, 0), out.stride_c, out.stride_h});
  }
}

}  // namespace

void gather_fold(const Tensor& value, const Tensor& index, const std::optional<Tensor>& weight, Tensor out,
                 const GatherFoldOptions& o) {
  check_level(out, value, index, o.stride, o);
  check_weight(weight, index);
  check_index(index, o.key_height * o.key_width);
  const Transfer t = transfer_of(out, value, index, o);
  const PatchWeights weights(weight);
  const int64_t* chosen = static_cast<const int64_t*>(index.const_data_ptr());
  const int64_t patches = t.query.patches.size();
  with_element(value, [&](auto element) {
    using T = decltype(element);
    const Maps<const T> in(value);
    const Maps<T> to(out);
    use_huge_pages(to, out.numel());
    for (int64_t n = 0; n < index.size(0); ++n) {
      fill(
          in, to, n, t.query.blocks, o.stride, [&](Position) { return t.kernel_size * t.kernel_size; },
          [&](Position block, const auto& add) {
            const double scale = t.scale(block);
            for_each_patch_at(t.query, block, t.kernel_size, [&](int64_t j, int64_t a, int64_t b) {
              const Position at = t.value_block(chosen[n * patches + j], a, b);
              if (!t.key.blocks.holds(at)) return;
              add(offset_of(in, o.stride, at), scale * weights[n * patches + j]);
            });
          });
    }
  });
}

void gather_fold_adjoint(const Tensor& grad, const Tensor& index, const std::optional<Tensor>& weight,
                         Tensor out, const GatherFoldOptions& o) {
  check_level(grad, out, index, o.stride, o);
  check_weight(weight, index);
  check_index(index, o.key_height * o.key_width);
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
    use_huge_pages(to, out.numel());
    for (int64_t n = 0; n < out.size(0); ++n) {
      const int64_t first = n * images * patches;
      const Choosers choosers(chosen + first, images * patches, t.key.patches.size());
      fill(
          in, to, n, t.key.blocks, o.stride,
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
                add(j / patches * in.stride_n + offset_of(in, o.stride, at),
                    t.scale(at) * weights[first + j]);
              }
            });
          });
    }
  });
}

}  // namespace ttsr_fast
