// cpp_gather_fold and cpp_gather_fold_adjoint: every destination block is a weighted sum of source blocks.
//
// Forward, the sources of an output block are the value blocks under the taps of its query patches. Backward,
// the sources of a value block are the gradient blocks under the taps of all query patches that chose its key
// patches. Every destination has one writer and a fixed order of addition, so results are bit-equal with any
// number of threads.

#include <sys/mman.h>

#include "../transfer.h"
#include "parallel.h"
#include "weighted_sum.h"

namespace ttsr_fast {

namespace {

constexpr int64_t kSources = 1 << 19;  // most sources that are listed at a time
constexpr int64_t kDestinations = 64;  // of a task that lists sources
constexpr int64_t kTasks = 16;         // per thread, for load balance
constexpr int64_t kPartial = 256;      // most sources of a partial sum

// The weight of every query patch, 1 by default.
class PatchWeights {
 public:
  explicit PatchWeights(const std::optional<Tensor>& weight) {
    if (!weight) return;
    const int64_t height = weight->size(1), width = weight->size(2);
    values_.reserve(weight->numel());
    with_element(*weight, [&](auto element) {
      using T = decltype(element);
      const T* data = data_of<T>(*weight);
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

// The query patches of each key patch, in ascending order, as compressed sparse rows.
struct Csr {
  std::vector<int64_t> offsets, indices;

  Csr(const int64_t* key_patch, int64_t queries, int64_t keys) : offsets(keys + 1, 0), indices(queries) {
    for (int64_t j = 0; j < queries; ++j) ++offsets[key_patch[j] + 1];
    for (int64_t i = 0; i < keys; ++i) offsets[i + 1] += offsets[i];
    std::vector<int64_t> next(offsets.begin(), offsets.end() - 1);
    for (int64_t j = 0; j < queries; ++j) indices[next[key_patch[j]]++] = j;
  }
};

// An output of a weighted sum: its range in the list of sources, and its offset in the map.
struct Destination {
  int64_t begin, end, offset;
};

// Calls f(patch, a, b) for every patch with its tap (a, b) at a block.
template <class F>
void for_each_patch_at(const PatchGrid& side, Position block, int64_t kernel_size, const F& f) {
  for (int64_t a = 0; a < kernel_size; ++a) {
    for (int64_t b = 0; b < kernel_size; ++b) {
      const Position patch = side.patch_of(block, a, b);
      if (side.patches.contains(patch)) f(side.patches.index(patch), a, b);
    }
  }
}

template <class T>
int64_t offset_of(const Maps<T>& map, int64_t stride, Position block) {
  return stride * (block.y * map.stride_h + block.x * map.stride_w);
}

// Fills the destination blocks of `out` with weighted sums of blocks of `in`.
template <class In, class S, class Out>
void sum_each(const std::vector<Destination>& destinations, const std::vector<Source<S>>& sources,
              const Extent& block, const Blocks<const In>& in, const Blocks<Out>& out) {
  const int64_t planes = planes_at_a_time(block.columns), groups = (block.planes + planes - 1) / planes;
  const int64_t count = destinations.size(), tasks = kTasks * torch::stable::get_num_threads();
  // Large tasks, so that one thread writes neighbouring blocks.
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

// sum_each with long sums split into partial sums, for load balance and less rounding error: in flat areas
// many queries choose one key. A partial sum has more than kPartial / 2 sources on average, so there are few.
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
    d.begin = d.end;  // no sources, until the partial sums are known
  }
  sum_each(destinations, sources, block, in, out);
  if (parts.empty()) return;
  // In the order of sources, for the cache: neighbouring destinations share them.
  const auto source = [&](const Destination& part) { return sources[part.begin].offset; };
  std::sort(parts.begin(), parts.end(), [&](auto& a, auto& b) { return source(a) < source(b); });
  const Tensor memory = scratch(parts.size() * block.size() * sizeof(S));
  const Blocks<S> sums{mutable_data_of<S>(memory), block.rows * block.columns, block.columns};
  sum_each(parts, sources, block, in, sums);
  sum_each(wholes, partial, block, Blocks<const S>{sums.data, sums.plane, sums.row}, out);
}

// Requests huge pages for a result: page faults on small pages take longer than filling them.
template <class T>
void use_huge_pages([[maybe_unused]] const Maps<T>& map, [[maybe_unused]] int64_t count) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t begin = (uintptr_t(map.data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = uintptr_t(map.data + count) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Fills image n of `out` from image n of `in`, one chunk of destinations at a time.
//   size_of(block): upper bound on the sources of a destination
//   list(block, add): calls add(offset, weight) for each source
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

void cpp_gather_fold(const Tensor& value,                  // [N or 1, C, HV, WV]
                     const Tensor& index,                  // [N, Ho, Wo]
                     const std::optional<Tensor>& weight,  // [N, Ho, Wo]
                     Tensor out,                           // [N, C, stride*H, stride*W]
                     int64_t stride, int64_t kernel_size, int64_t padding, int64_t key_height,
                     int64_t key_width, std::string divisor) {
  const TransferOptions options{kernel_size, padding, key_height, key_width, divisor};
  check_level(out, value, index, stride, options);
  check_weight(weight, index);
  check_index(index, key_height * key_width);
  const Transfer t = transfer_of(out, value, index, stride, options);
  const PatchWeights weights(weight);
  with_element(value, [&](auto element) {
    using T = decltype(element);
    const Maps<const T> in(value);
    const Maps<T> to(out);
    use_huge_pages(to, out.numel());
    for (int64_t n = 0; n < index.size(0); ++n) {
      const int64_t first = n * t.query.patches.size();
      const int64_t* const key_patch = data_of<int64_t>(index) + first;
      fill(
          in, to, n, t.query.blocks, stride, [&](Position) { return kernel_size * kernel_size; },
          [&](Position block, const auto& add) {
            const double scale = t.scale(block);
            for_each_patch_at(t.query, block, kernel_size, [&](int64_t j, int64_t a, int64_t b) {
              const Position from = t.value_block(key_patch[j], a, b);
              if (!t.key.blocks.contains(from)) return;
              add(offset_of(in, stride, from), scale * weights[first + j]);
            });
          });
    }
  });
}

void cpp_gather_fold_adjoint(const Tensor& grad,                   // [N, C, stride*H, stride*W]
                             const Tensor& index,                  // [N, Ho, Wo]
                             const std::optional<Tensor>& weight,  // [N, Ho, Wo]
                             Tensor out,                           // [N or 1, C, HV, WV]
                             int64_t stride, int64_t kernel_size, int64_t padding, int64_t key_height,
                             int64_t key_width, std::string divisor) {
  const TransferOptions options{kernel_size, padding, key_height, key_width, divisor};
  check_level(grad, out, index, stride, options);
  check_weight(weight, index);
  check_index(index, key_height * key_width);
  const Transfer t = transfer_of(grad, out, index, stride, options);
  const PatchWeights weights(weight);
  const int64_t patches = t.query.patches.size();
  const int64_t images = index.size(0) / out.size(0);  // that one value is for
  with_element(grad, [&](auto element) {
    using T = decltype(element);
    const Maps<const T> in(grad);
    const Maps<T> to(out);
    use_huge_pages(to, out.numel());
    for (int64_t n = 0; n < out.size(0); ++n) {
      const int64_t first = n * images * patches;
      const Csr csr(data_of<int64_t>(index) + first, images * patches, t.key.patches.size());
      fill(
          in, to, n, t.key.blocks, stride,
          [&](Position block) {
            int64_t size = 0;
            for_each_patch_at(t.key, block, kernel_size, [&](int64_t i, int64_t, int64_t) {
              size += csr.offsets[i + 1] - csr.offsets[i];
            });
            return size;
          },
          [&](Position block, const auto& add) {
            for_each_patch_at(t.key, block, kernel_size, [&](int64_t i, int64_t a, int64_t b) {
              for (int64_t c = csr.offsets[i]; c < csr.offsets[i + 1]; ++c) {
                const int64_t j = csr.indices[c];
                const Position from = t.output_block(j % patches, a, b);
                if (!t.query.blocks.contains(from)) continue;
                add(j / patches * in.stride_n + offset_of(in, stride, from),
                    t.scale(from) * weights[first + j]);
              }
            });
          });
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ttsr_fast, CPU, m) {
  m.impl("cpp_gather_fold", TORCH_BOX(&cpp_gather_fold));
  m.impl("cpp_gather_fold_adjoint", TORCH_BOX(&cpp_gather_fold_adjoint));
}

}  // namespace ttsr_fast
