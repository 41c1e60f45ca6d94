// search: packs a band of the query and a band of the key, walks their tiles on all threads, merges what the
// threads found; band after band, image after image.

#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "../check.h"
#include "../ops.h"
#include "pack.h"

namespace ttsr_fast {

namespace {

// Row offsets walked together: key rows are read once for all of them, and their partial sums share the
// cache.
int64_t group_of(int kernel_size) { return kernel_size <= 3 ? 4 : 1; }

void check_not_stopped(const SearchOptions& o) {
  STD_TORCH_CHECK(!stopped(o.stop), "ttsr_fast: the search was interrupted");
}

// Factor and validity of every patch of a key band, in the tile layout of the kernel.
template <class T>
struct KeyWeights {
  using Bits = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  Tensor scale, valid;
  std::vector<int64_t> begin, stride;  // of every tile
  int64_t first;                       // lowest valid key position, or none

  static constexpr int64_t none = std::numeric_limits<int64_t>::max();

  explicit KeyWeights(const Packed& key) {
    int64_t size = 0;
    for (int64_t t = 0; t < key.tiles; ++t) {
      begin.push_back(size);
      stride.push_back(round_up(key.tile(t).columns, key.lanes));
      size += stride[t] * key.band;
    }
    scale = scratch(size * sizeof(T));
    valid = scratch(size * sizeof(Bits));
  }

  void fill(const Packed& key, const std::optional<Tensor>& key_mask, int64_t n, const SearchOptions& o) {
    const uint8_t* mask = nullptr;  // any byte but 0 is true, which is more than a bool may hold
    if (key_mask) mask = static_cast<const uint8_t*>(key_mask->const_data_ptr()) + n * key_mask->stride(0);
    std::atomic<int64_t> lowest{none};
    const int64_t rows = key.end - key.begin;
    parallel_tasks(rows, 10.0 * rows * key.grid_width, [&](int64_t row, int64_t) {
      const int64_t y = key.begin + row;
      for (int64_t t = 0; t < key.tiles && !stopped(o.stop); ++t) {
        T* scales = static_cast<T*>(scale.mutable_data_ptr()) + begin[t] + row * stride[t];
        Bits* valids = static_cast<Bits*>(valid.mutable_data_ptr()) + begin[t] + row * stride[t];
        const int64_t columns = key.tile(t).columns;
        for (int64_t x = 0; x < stride[t]; ++x) {
          const int64_t column = key.tile_begin(t) + x;
          const bool legal =
              x < columns && (!mask || mask[y * key_mask->stride(1) + column * key_mask->stride(2)]);
          valids[x] = legal ? Bits(-1) : Bits(0);
          scales[x] = 0;
          if (!legal) continue;
          const double norm = key.patch_norm(y, column);
          scales[x] = T(!std::isfinite(norm) ? std::nan("") : o.normalize_key ? 1 / o.denominator(norm) : 1);
          const int64_t position = y * key.grid_width + column;
          for (int64_t seen = lowest; position < seen && !lowest.compare_exchange_weak(seen, position);) {}
        }
      }
    });
    first = lowest;
  }
};

template <class T>
struct Found {  // one thread's best in a band of query rows
  T* score;
  int64_t* index;
};

// The best keys of a band of the key for a band of the query, into score (before the query's norm) and index;
// added to those of the key bands before, unless `fresh`.
template <class T>
void search_band(const Packed& query, const Packed& key, const KeyWeights<T>& weights, const SearchOptions& o,
                 const Isa& isa, bool fresh, T* score, int64_t* index) {
  const int64_t patches = (query.end - query.begin) * query.grid_width;
  const int64_t delta_begin = key.begin - query.end + 1, delta_end = key.end - query.begin;
  const int64_t group = group_of(o.kernel_size), groups = (delta_end - delta_begin + group - 1) / group;
  // A task is one query tile and one group of row offsets; keys ascend within a tile.
  const int64_t tasks = groups * query.tiles;
  const double pairs = double(query.end - query.begin) * query.width * (key.end - key.begin) * key.width;
  const double nanoseconds = pairs * (query.channels / 16.0 + 0.5);
  const int64_t threads = threads_for(tasks, nanoseconds);

  const int64_t workspace =
      round_up(WalkLayout(query.tile(0), key.tile(0), o.kernel_size, key.lanes).size(group) * sizeof(T), 64);
  const int64_t per_thread = workspace + round_up(patches * (sizeof(T) + sizeof(int64_t)), 64);
  const Tensor memory = scratch(threads * per_thread);
  const auto workspace_of = [&](int64_t thread) {
    return static_cast<char*>(memory.mutable_data_ptr()) + thread * per_thread;
  };
  const auto found_by = [&](int64_t thread) {
    int64_t* indices = reinterpret_cast<int64_t*>(workspace_of(thread) + workspace);
    return Found<T>{reinterpret_cast<T*>(indices + patches), indices};
  };

  parallel_tasks(threads, 5.0 * threads * patches, [&](int64_t thread, int64_t) {
    const Found<T> found = found_by(thread);
    for (int64_t j = 0; j < patches; ++j) {
      const double norm = query.patch_norm(query.begin + j / query.grid_width, j % query.grid_width);
      found.score[j] = std::isfinite(norm) ? -std::numeric_limits<T>::infinity() : T(std::nan(""));
      found.index[j] = weights.first;
    }
  });

  parallel_tasks(tasks, nanoseconds, [&](int64_t task, int64_t thread) {
    if (stopped(o.stop)) return;
    const int64_t q = task % query.tiles;
    const Found<T> found = found_by(thread);
    BoxMaxParams p;
    p.depth = query.depth;
    p.padding = o.padding;
    p.delta_begin = delta_begin + task / query.tiles * group;
    p.delta_end = std::min(p.delta_begin + group, delta_end);
    p.row_begin = query.begin;
    p.row_end = query.end;
    p.key_begin = key.begin;
    p.key_end = key.end;
    p.query = query.tile(q);
    p.score = found.score + query.tile_begin(q);
    p.index = found.index + query.tile_begin(q);
    p.score_stride = query.grid_width;
    p.workspace = workspace_of(thread);
    p.stop = o.stop;
    for (int64_t k = 0; k < key.tiles; ++k) {
      p.key = key.tile(k);
      p.scale = static_cast<const T*>(weights.scale.const_data_ptr()) + weights.begin[k];
      p.valid =
          static_cast<const typename KeyWeights<T>::Bits*>(weights.valid.const_data_ptr()) + weights.begin[k];
      p.scale_stride = weights.stride[k];
      p.index_begin = key.tile_begin(k);
      p.index_stride = key.grid_width;
      isa.walk(p, key.element, o.kernel_size);
    }
  });

  check_not_stopped(o);

  const int64_t rows = query.end - query.begin;
  parallel_tasks(rows, 3.0 * threads * patches, [&](int64_t row, int64_t) {
    for (int64_t j = row * query.grid_width; j < (row + 1) * query.grid_width; ++j) {
      for (int64_t thread = 0; thread < threads; ++thread) {
        const Found<T> found = found_by(thread);
        if ((fresh && thread == 0) || goes_before(found.score[j], found.index[j], score[j], index[j])) {
          score[j] = found.score[j];
          index[j] = found.index[j];
        }
      }
    }
  });
}

template <class T>
void search_typed(const Tensor& query, const Tensor& key, const std::optional<Tensor>& key_mask,
                  const Tensor& score, const Tensor& index, const SearchOptions& o, Element element) {
  const Isa& isa = best_isa();
  Packed q(Side::kQuery, query, element, o.kernel_size, o.padding, isa);
  Packed k(Side::kKey, key, element, o.kernel_size, o.padding, isa);
  KeyWeights<T> weights(k);
  const bool one_key = key.size(0) == 1 && (!key_mask || key_mask->size(0) == 1) && k.band == k.grid_height;
  for (int64_t n = 0; n < query.size(0); ++n) {
    for (int64_t y_q = 0; y_q < q.grid_height; y_q += q.band) {
      q.fill(query, n, y_q, std::min(y_q + q.band, q.grid_height), o.stop);
      const int64_t at = (n * q.grid_height + y_q) * q.grid_width;
      T* const scores = static_cast<T*>(score.mutable_data_ptr()) + at;
      int64_t* const indices = static_cast<int64_t*>(index.mutable_data_ptr()) + at;
      bool fresh = true;
      for (int64_t y_k = 0; y_k < k.grid_height; y_k += k.band) {
        check_not_stopped(o);
        if (!one_key || k.end == 0) {
          k.fill(key, n, y_k, std::min(y_k + k.band, k.grid_height), o.stop);
          weights.fill(k, key_mask, key_mask && key_mask->size(0) > 1 ? n : 0, o);
        }
        check_not_stopped(o);
        if (weights.first == weights.none) continue;
        search_band(q, k, weights, o, isa, fresh, scores, indices);
        fresh = false;
      }
      STD_TORCH_CHECK(!fresh, "ttsr_fast: key_mask must leave at least one key position True in every image");
      if (!o.normalize_query) continue;
      for (int64_t j = 0; j < (q.end - q.begin) * q.grid_width; ++j) {
        const double norm = q.patch_norm(q.begin + j / q.grid_width, j % q.grid_width);
        scores[j] = T(double(scores[j]) / o.denominator(norm));
      }
    }
  }
}

void check_search(const Tensor& query, const Tensor& key, const std::optional<Tensor>& key_mask,
                  const Tensor& score, const Tensor& index, const SearchOptions& o) {
  check_patch(o.kernel_size, o.padding);
  check_map(query, "query");
  check_map(key, "key");
  check_type(key, query.scalar_type(), "key");
  check_batch(key, query.size(0), "key");
  STD_TORCH_CHECK(key.size(1) == query.size(1), "ttsr_fast: key must have the channels of query ",
                  shape_of(query), ", got ", shape_of(key));
  const auto grid = [&](const Tensor& x, int64_t axis, const char* name) {
    return patches_of(x.size(axis), o.kernel_size, o.padding, name);
  };
  for (const auto& [out, type, name] :
       {std::tuple{score, sum_type(query.scalar_type()), "score"}, {index, ScalarType::Long, "index"}}) {
    check_result(out, type, {query.size(0), grid(query, 2, "query"), grid(query, 3, "query")}, name);
  }
  const int64_t height = grid(key, 2, "key"), width = grid(key, 3, "key");
  if (!key_mask) return;
  check_type(*key_mask, ScalarType::Bool, "key_mask");
  STD_TORCH_CHECK(key_mask->dim() == 3, "ttsr_fast: key_mask must be [N or 1, ", height, ", ", width,
                  "], got ", shape_of(*key_mask));
  check_batch(*key_mask, query.size(0), "key_mask");
  check_shape(*key_mask, {key_mask->size(0), height, width}, "key_mask");
  check_memory(*key_mask, "key_mask");
}

}  // namespace

void search(const Tensor& query, const Tensor& key, const std::optional<Tensor>& key_mask, Tensor score,
            Tensor index, const SearchOptions& o) {
  check_search(query, key, key_mask, score, index, o);
  if (query.scalar_type() == ScalarType::Double) {
    search_typed<double>(query, key, key_mask, score, index, o, Element::kDouble);
  } else {
    const bool pairs = o.bfloat16 && best_isa().bfloat16;
    search_typed<float>(query, key, key_mask, score, index, o, pairs ? Element::kBFloat16 : Element::kFloat);
  }
}

}  // namespace ttsr_fast
