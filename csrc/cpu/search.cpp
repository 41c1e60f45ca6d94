// cpp_search: packs a chunk of the query and a chunk of the key, searches their tiles on all threads and
// merges the argmax of the threads; chunk by chunk, image by image.

#include <cmath>
#include <limits>
#include <tuple>

#include "../check.h"
#include "pack.h"

namespace ttsr_fast {

namespace {

struct SearchOptions {
  int kernel_size;
  int64_t padding;
  bool normalize_query, normalize_key;
  double eps;
  bool add_eps;
  const int32_t* stop;  // another thread sets it to end the search with an error; may be null

  double denominator(double norm) const { return add_eps ? norm + eps : std::max(norm, eps); }
};

// Row offsets of one call of the kernel: it reads key rows once for all, and their partial sums share the
// cache.
int64_t offsets_per_call(int kernel_size) { return kernel_size <= 3 ? 4 : 1; }

void check_not_stopped(const SearchOptions& o) {
  STD_TORCH_CHECK(!stopped(o.stop), "ttsr_fast: the search was interrupted");
}

// Factor and validity of every patch of a key chunk, in the tile layout of the kernel.
template <class T>
struct KeyScale {
  using Bits = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  Tensor scale, valid;
  std::vector<int64_t> begin, stride;  // of every tile
  int64_t first_valid;                 // lowest index of a valid key patch, or kNone

  static constexpr int64_t kNone = std::numeric_limits<int64_t>::max();

  explicit KeyScale(const Packed& key) {
    int64_t size = kScalePadding * key.lanes;
    for (int64_t t = 0; t < key.tiles; ++t) {
      begin.push_back(size);
      stride.push_back(key.tile(t).columns + kScalePadding * key.lanes);
      size += stride[t] * key.chunk_rows;
    }
    scale = scratch(size * sizeof(T));
    valid = scratch(size * sizeof(Bits));
    std::fill_n(mutable_data_of<T>(scale), kScalePadding * key.lanes, T(0));
  }

  void fill(const Packed& key, const std::optional<Tensor>& key_mask, int64_t n, const SearchOptions& o) {
    const uint8_t* mask = nullptr;  // every byte but 0 is true; a C++ bool must be 0 or 1
    if (key_mask) mask = data_of<uint8_t>(*key_mask) + n * key_mask->stride(0);
    std::atomic<int64_t> lowest{kNone};
    const int64_t rows = key.end - key.begin;
    parallel_tasks(rows, 10.0 * rows * key.grid_width, [&](int64_t row, int64_t) {
      const int64_t y = key.begin + row;
      for (int64_t t = 0; t < key.tiles && !stopped(o.stop); ++t) {
        T* scales = mutable_data_of<T>(scale) + begin[t] + row * stride[t];
        Bits* valids = mutable_data_of<Bits>(valid) + begin[t] + row * stride[t];
        const int64_t columns = key.tile(t).columns;
        for (int64_t x = 0; x < stride[t]; ++x) {
          const int64_t column = key.tile_begin(t) + x;
          const bool allowed =
              x < columns && (!mask || mask[y * key_mask->stride(1) + column * key_mask->stride(2)]);
          valids[x] = allowed ? Bits(-1) : Bits(0);
          scales[x] = 0;
          if (!allowed) continue;
          const double norm = key.patch_norm(y, column);
          scales[x] = T(!std::isfinite(norm) ? std::nan("") : o.normalize_key ? 1 / o.denominator(norm) : 1);
          const int64_t position = y * key.grid_width + column;
          for (int64_t seen = lowest; position < seen && !lowest.compare_exchange_weak(seen, position);) {}
        }
      }
    });
    first_valid = lowest;
  }
};

// Argmax of every thread over one pair of chunks, and the workspace of its kernel.
template <class T>
class ThreadResults {
 public:
  ThreadResults(const Packed& query, int64_t threads, int64_t workspace)
      : query_(query), threads_(threads), patches_((query.end - query.begin) * query.grid_width),
        workspace_bytes_(round_up(workspace * sizeof(T), 64)),
        thread_bytes_(workspace_bytes_ + round_up(patches_ * (sizeof(T) + sizeof(int64_t)), 64)),
        memory_(scratch(threads * thread_bytes_)), data_(mutable_data_of<char>(memory_)) {}

  char* workspace(int64_t thread) const { return data_ + thread * thread_bytes_; }
  int64_t* index(int64_t thread) const {
    return reinterpret_cast<int64_t*>(workspace(thread) + workspace_bytes_);
  }
  T* score(int64_t thread) const { return reinterpret_cast<T*>(index(thread) + patches_); }

  // Initial values. A query patch that is not finite has score NaN with any key.
  void initialise(int64_t first_valid_key) const {
    parallel_tasks(threads_, 5.0 * threads_ * patches_, [&](int64_t thread, int64_t) {
      for (int64_t j = 0; j < patches_; ++j) {
        const double norm = query_.patch_norm(query_.begin + j / query_.grid_width, j % query_.grid_width);
        score(thread)[j] = std::isfinite(norm) ? -std::numeric_limits<T>::infinity() : T(std::nan(""));
        index(thread)[j] = first_valid_key;
      }
    });
  }

  // Merges all threads into `scores` and `indices`, or overwrites these if `first`.
  void merge(bool first, T* scores, int64_t* indices) const {
    parallel_tasks(query_.end - query_.begin, 3.0 * threads_ * patches_, [&](int64_t row, int64_t) {
      for (int64_t j = row * query_.grid_width; j < (row + 1) * query_.grid_width; ++j) {
        for (int64_t thread = 0; thread < threads_; ++thread) {
          const T s = score(thread)[j];
          const int64_t i = index(thread)[j];
          if ((first && thread == 0) || ranks_before(s, i, scores[j], indices[j])) {
            scores[j] = s;
            indices[j] = i;
          }
        }
      }
    });
  }

 private:
  const Packed& query_;
  int64_t threads_, patches_, workspace_bytes_, thread_bytes_;
  Tensor memory_;
  char* data_;
};

// Argmax of a query chunk over a key chunk, in `score` (not divided by the query's norm) and `index`. Merges
// into the results of earlier key chunks unless `first`.
template <class T>
void search_chunk(const Packed& query, const Packed& key, const KeyScale<T>& scale, const SearchOptions& o,
                  bool first, T* score, int64_t* index) {
  const Isa& isa = best_isa();
  const int64_t offset_begin = key.begin - query.end + 1, offset_end = key.end - query.begin;
  const int64_t group = offsets_per_call(o.kernel_size);
  // A task is one query tile and one group of row offsets; keys ascend within a tile.
  const int64_t tasks = (offset_end - offset_begin + group - 1) / group * query.tiles;
  const double pairs = double(query.end - query.begin) * query.width * (key.end - key.begin) * key.width;
  const double nanoseconds = pairs * (query.channels / 16.0 + 0.5);
  const Workspace<T> layout(query.tile(0), o.kernel_size);
  const ThreadResults<T> results(query, threads_for(tasks, nanoseconds), layout.size(group));
  results.initialise(scale.first_valid);
  parallel_tasks(tasks, nanoseconds, [&](int64_t task, int64_t thread) {
    if (stopped(o.stop)) return;
    const int64_t q = task % query.tiles;
    SearchKernelParams p;
    p.depth = query.depth;
    p.padding = o.padding;
    p.offset_begin = offset_begin + task / query.tiles * group;
    p.offset_end = std::min(p.offset_begin + group, offset_end);
    p.query_begin = query.begin;
    p.query_end = query.end;
    p.key_begin = key.begin;
    p.key_end = key.end;
    p.query = query.tile(q);
    p.score = results.score(thread) + query.tile_begin(q);
    p.index = results.index(thread) + query.tile_begin(q);
    p.score_stride = query.grid_width;
    p.workspace = results.workspace(thread);
    p.keep = 1;
    p.keep_stride = 0;
    p.stop = o.stop;
    for (int64_t k = 0; k < key.tiles; ++k) {
      p.key = key.tile(k);
      p.scale = data_of<T>(scale.scale) + scale.begin[k];
      p.valid = data_of<typename KeyScale<T>::Bits>(scale.valid) + scale.begin[k];
      p.scale_stride = scale.stride[k];
      p.index_begin = key.tile_begin(k);
      p.index_stride = key.grid_width;
      isa.search_kernel(p, key.element, o.kernel_size);
    }
  });
  check_not_stopped(o);
  results.merge(first, score, index);
}

template <class T>
void search_typed(const Tensor& query, const Tensor& key, const std::optional<Tensor>& key_mask,
                  const Tensor& score, const Tensor& index, const SearchOptions& o, Element element) {
  Packed q(Side::kQuery, query, element, o.kernel_size, o.padding, best_isa());
  Packed k(Side::kKey, key, element, o.kernel_size, o.padding, best_isa());
  KeyScale<T> scale(k);
  const bool one_key =
      key.size(0) == 1 && (!key_mask || key_mask->size(0) == 1) && k.chunk_rows == k.grid_height;
  for (int64_t n = 0; n < query.size(0); ++n) {
    for (int64_t y_q = 0; y_q < q.grid_height; y_q += q.chunk_rows) {
      q.fill(query, n, y_q, std::min(y_q + q.chunk_rows, q.grid_height), o.stop);
      const int64_t patch = (n * q.grid_height + y_q) * q.grid_width;
      T* const scores = mutable_data_of<T>(score) + patch;
      int64_t* const indices = mutable_data_of<int64_t>(index) + patch;
      bool first = true;
      for (int64_t y_k = 0; y_k < k.grid_height; y_k += k.chunk_rows) {
        check_not_stopped(o);
        if (!one_key || k.end == 0) {
          k.fill(key, n, y_k, std::min(y_k + k.chunk_rows, k.grid_height), o.stop);
          scale.fill(k, key_mask, key_mask && key_mask->size(0) > 1 ? n : 0, o);
        }
        check_not_stopped(o);
        if (scale.first_valid == scale.kNone) continue;
        search_chunk(q, k, scale, o, first, scores, indices);
        first = false;
      }
      STD_TORCH_CHECK(!first, "ttsr_fast: key_mask must leave at least one key position True in every image");
      if (!o.normalize_query) continue;
      for (int64_t j = 0; j < (q.end - q.begin) * q.grid_width; ++j) {
        const double norm = q.patch_norm(q.begin + j / q.grid_width, j % q.grid_width);
        scores[j] = T(double(scores[j]) / o.denominator(norm));
      }
    }
  }
}

void check_search(const Tensor& query, const Tensor& key, const std::optional<Tensor>& key_mask,
                  const Tensor& score, const Tensor& index, int64_t kernel_size, int64_t padding) {
  check_patch(kernel_size, padding);
  check_map(query, "query");
  check_map(key, "key");
  check_type(key, query.scalar_type(), "key");
  check_batch(key, query.size(0), "key");
  STD_TORCH_CHECK(key.size(1) == query.size(1), "ttsr_fast: key must have the channels of query ",
                  shape_of(query), ", got ", shape_of(key));
  const auto patches = [&](const Tensor& x, int64_t axis, const char* name) {
    const int64_t count = x.size(axis) + 2 * padding - kernel_size + 1;
    STD_TORCH_CHECK(count > 0, "ttsr_fast: ", name, " is smaller than one patch");
    return count;
  };
  for (const auto& [out, type, name] :
       {std::tuple{score, sum_type(query.scalar_type()), "score"}, {index, ScalarType::Long, "index"}}) {
    check_contiguous(out, type, {query.size(0), patches(query, 2, "query"), patches(query, 3, "query")},
                     name);
  }
  const int64_t height = patches(key, 2, "key"), width = patches(key, 3, "key");
  if (!key_mask) return;
  check_type(*key_mask, ScalarType::Bool, "key_mask");
  STD_TORCH_CHECK(key_mask->dim() == 3, "ttsr_fast: key_mask must be [N or 1, ", height, ", ", width,
                  "], got ", shape_of(*key_mask));
  check_batch(*key_mask, query.size(0), "key_mask");
  check_shape(*key_mask, {key_mask->size(0), height, width}, "key_mask");
  check_memory(*key_mask, "key_mask");
}

void cpp_search(const Tensor& query,                    // [N, C, H, W]
                const Tensor& key,                      // [N or 1, C, HK, WK]
                const std::optional<Tensor>& key_mask,  // [N or 1, HKo, WKo]
                Tensor score,                           // [N, Ho, Wo]
                Tensor index,                           // [N, Ho, Wo]
                int64_t kernel_size, int64_t padding, bool normalize_query, bool normalize_key, double eps,
                bool add_eps, bool bfloat16, const std::optional<Tensor>& stop) {
  if (stop) check_contiguous(*stop, ScalarType::Int, {1}, "stop");
  check_search(query, key, key_mask, score, index, kernel_size, padding);
  const SearchOptions options{int(kernel_size),
                              padding,
                              normalize_query,
                              normalize_key,
                              eps,
                              add_eps,
                              stop ? data_of<int32_t>(*stop) : nullptr};
  if (query.scalar_type() == ScalarType::Double) {
    search_typed<double>(query, key, key_mask, score, index, options, Element::kDouble);
  } else {
    const Element element = bfloat16 && best_isa().bfloat16 ? Element::kBFloat16 : Element::kFloat;
    search_typed<float>(query, key, key_mask, score, index, options, element);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ttsr_fast, CPU, m) { m.impl("cpp_search", TORCH_BOX(&cpp_search)); }

}  // namespace ttsr_fast
