// cpp_search: packs a chunk of the query and a chunk of the key, searches their tiles and merges the argmax
// of the threads. Threads take whole images of a batch, or the tasks of one image after another.

#include <cmath>
#include <limits>
#include <memory>
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

// Most memory of an image that one thread searches alone.
constexpr int64_t kImageBytes = 8 << 20;

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

  void fill(const Packed& key, const std::optional<Tensor>& key_mask, int64_t n, const SearchOptions& o,
            int64_t threads) {
    const uint8_t* mask = nullptr;  // every byte but 0 is true; a C++ bool must be 0 or 1
    int64_t mask_h = 0, mask_w = 0;
    if (key_mask) {
      mask = data_of<uint8_t>(*key_mask) + (key_mask->size(0) > 1 ? n * key_mask->stride(0) : 0);
      mask_h = key_mask->stride(1), mask_w = key_mask->stride(2);
    }
    std::atomic<int64_t> lowest{kNone};
    const int64_t rows = key.end - key.begin;
    const auto fill_row = [&](int64_t row, int64_t) {
      const int64_t y = key.begin + row;
      int64_t first = kNone;
      for (int64_t t = 0; t < key.tiles; ++t) {
        T* scales = mutable_data_of<T>(scale) + begin[t] + row * stride[t];
        Bits* valids = mutable_data_of<Bits>(valid) + begin[t] + row * stride[t];
        std::fill(scales, scales + stride[t], T(0));
        std::fill(valids, valids + stride[t], Bits(0));
        const int64_t left = key.tile_begin(t);
        key.patch_norms(y, left, left + key.tile(t).columns, [&](int64_t x, double norm) {
          if (mask && !mask[y * mask_h + x * mask_w]) return;
          const double factor = o.normalize_key ? 1 / o.denominator(norm) : 1;
          scales[x - left] = T(std::isfinite(norm) ? factor : std::nan(""));
          valids[x - left] = Bits(-1);
          first = std::min(first, y * key.grid_width + x);
        });
      }
      for (int64_t seen = lowest; first < seen && !lowest.compare_exchange_weak(seen, first);) {}
    };
    parallel_tasks(rows, 5.0 * rows * key.grid_width, fill_row, threads);
    first_valid = lowest;
  }
};

template <class T>
struct Argmax {  // of the patches of a query chunk
  T* score;
  int64_t* index;
};

// Workspaces of the threads that search an image, and the argmax of all but the first thread, whose argmax is
// the result.
template <class T>
class ThreadMemory {
 public:
  ThreadMemory(int64_t threads, const Packed& query, const Packed& key)
      : threads_(threads), patches_(query.chunk_rows * query.grid_width) {
    const Workspace<T> layout(query.tile(0), query.kernel_size);
    workspace_bytes_ = round_up(layout.size(offsets_per_call(query.kernel_size)) * sizeof(T), 64);
    const int64_t argmax_bytes = threads > 1 ? round_up(patches_ * (sizeof(T) + sizeof(int64_t)), 64) : 0;
    thread_bytes_ = workspace_bytes_ + argmax_bytes;
    memory_ = scratch(threads * thread_bytes_);
  }

  int64_t threads() const { return threads_; }
  char* workspace(int64_t thread) const { return mutable_data_of<char>(memory_) + thread * thread_bytes_; }
  Argmax<T> argmax(int64_t thread, const Argmax<T>& result) const {
    if (thread == 0) return result;
    int64_t* const index = reinterpret_cast<int64_t*>(workspace(thread) + workspace_bytes_);
    return {reinterpret_cast<T*>(index + patches_), index};
  }

 private:
  int64_t threads_, patches_, workspace_bytes_, thread_bytes_;
  Tensor memory_;
};

// Rough time of a search on one thread.
double nanoseconds(double query_pixels, double key_pixels, int64_t channels) {
  return query_pixels * key_pixels * (channels / 16.0 + 0.5);
}

// Initial values of `threads` threads. The first one has the result of earlier key chunks unless `first`. A
// query patch that is not finite has score NaN with any key.
template <class T>
void initialise(const Packed& query, const ThreadMemory<T>& memory, const Argmax<T>& result, bool first,
                int64_t first_valid_key, int64_t threads) {
  const int64_t rows = query.end - query.begin, columns = query.grid_width;
  const auto fill_row = [&](int64_t row, int64_t) {
    for (int64_t thread = first ? 0 : 1; thread < threads; ++thread) {
      const Argmax<T> own = memory.argmax(thread, result);
      std::fill_n(own.score + row * columns, columns, -std::numeric_limits<T>::infinity());
      std::fill_n(own.index + row * columns, columns, first_valid_key);
    }
    if (!first) return;
    query.patch_norms(query.begin + row, 0, columns, [&](int64_t x, double norm) {
      if (!std::isfinite(norm)) result.score[row * columns + x] = T(std::nan(""));
    });
  };
  parallel_tasks(rows, (4.0 + threads) * rows * columns, fill_row, threads);
}

// Merges the argmax of all threads into the result, that of the first one.
template <class T>
void merge(const Packed& query, const ThreadMemory<T>& memory, const Argmax<T>& result, int64_t threads) {
  const int64_t rows = query.end - query.begin, columns = query.grid_width;
  const auto merge_row = [&](int64_t row, int64_t) {
    for (int64_t thread = 1; thread < threads; ++thread) {
      const Argmax<T> own = memory.argmax(thread, result);
      for (int64_t j = row * columns; j < (row + 1) * columns; ++j) {
        if (!ranks_before(own.score[j], own.index[j], result.score[j], result.index[j])) continue;
        result.score[j] = own.score[j];
        result.index[j] = own.index[j];
      }
    }
  };
  if (threads > 1) parallel_tasks(rows, 3.0 * threads * rows * columns, merge_row, threads);
}

// Argmax of a query chunk over a key chunk, not divided by the query's norm, on at most `most` threads.
// Merges into the result of earlier key chunks unless `first`.
template <class T>
void search_chunk(const Packed& query, const Packed& key, const KeyScale<T>& scale, const SearchOptions& o,
                  const ThreadMemory<T>& memory, const Argmax<T>& result, bool first, int64_t most) {
  const Isa& isa = best_isa();
  const int64_t offset_begin = key.begin - query.end + 1, offset_end = key.end - query.begin;
  const int64_t group = offsets_per_call(o.kernel_size);
  // A task is one query tile and one group of row offsets; keys ascend within a tile.
  const int64_t tasks = (offset_end - offset_begin + group - 1) / group * query.tiles;
  const double work = nanoseconds(double(query.end - query.begin) * query.width,
                                  double(key.end - key.begin) * key.width, query.channels);
  const int64_t threads = std::min(most, threads_for(tasks, work));
  initialise(query, memory, result, first, scale.first_valid, threads);
  const auto search_tiles = [&](int64_t task, int64_t thread) {
    if (stopped(o.stop)) return;
    const int64_t q = task % query.tiles;
    const Argmax<T> own = memory.argmax(thread, result);
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
    p.score = own.score + query.tile_begin(q);
    p.index = own.index + query.tile_begin(q);
    p.score_stride = query.grid_width;
    p.keep = 1;
    p.keep_stride = 0;
    p.workspace = memory.workspace(thread);
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
  };
  parallel_tasks(tasks, work, search_tiles, threads);
  merge(query, memory, result, threads);
}

template <class T>
void normalise(const Packed& query, const SearchOptions& o, T* score, int64_t threads) {
  const int64_t rows = query.end - query.begin, columns = query.grid_width;
  const auto divide_row = [&](int64_t row, int64_t) {
    query.patch_norms(query.begin + row, 0, columns, [&](int64_t x, double norm) {
      T& value = score[row * columns + x];
      value = T(double(value) / o.denominator(norm));
    });
  };
  parallel_tasks(rows, 6.0 * rows * columns, divide_row, threads);
}

// Memory for the search of one image. One key and its scale can belong to several images.
template <class T>
struct ImageMemory {
  Packed query;
  std::shared_ptr<Packed> key;
  std::shared_ptr<KeyScale<T>> scale;
  ThreadMemory<T> threads;

  ImageMemory(Packed query_, std::shared_ptr<Packed> key_, std::shared_ptr<KeyScale<T>> scale_,
              int64_t threads_)
      : query(std::move(query_)), key(std::move(key_)), scale(std::move(scale_)),
        threads(threads_, query, *key) {}
};

template <class T>
struct Batch {
  const Tensor &query, &key;
  const std::optional<Tensor>& key_mask;
  Argmax<T> result;
  const SearchOptions& o;
  bool one_key, one_scale;  // packed once for all images

  // Searches image n on at most `most` threads; ends early if it is stopped. Returns false if no key is
  // valid.
  bool search_image(int64_t n, ImageMemory<T>& memory, int64_t most) const {
    Packed &q = memory.query, &k = *memory.key;
    KeyScale<T>& scale = *memory.scale;
    for (int64_t y_q = 0; y_q < q.grid_height; y_q += q.chunk_rows) {
      q.fill(query, n, y_q, std::min(y_q + q.chunk_rows, q.grid_height), most, o.stop);
      const int64_t patch = (n * q.grid_height + y_q) * q.grid_width;
      const Argmax<T> best{result.score + patch, result.index + patch};
      bool first = true;
      for (int64_t y_k = 0; y_k < k.grid_height; y_k += k.chunk_rows) {
        if (!one_key) k.fill(key, n, y_k, std::min(y_k + k.chunk_rows, k.grid_height), most, o.stop);
        if (!one_scale) scale.fill(k, key_mask, n, o, most);
        if (stopped(o.stop)) return true;
        if (scale.first_valid == scale.kNone) continue;
        search_chunk(q, k, scale, o, memory.threads, best, first, most);
        first = false;
      }
      if (first) return false;
      if (o.normalize_query) normalise(q, o, best.score, most);
    }
    return true;
  }
};

template <class T>
void search_typed(const Tensor& query, const Tensor& key, const std::optional<Tensor>& key_mask,
                  const Tensor& score, const Tensor& index, const SearchOptions& o, Element element) {
  const auto pack = [&](Side side) {
    return Packed(side, side == Side::kKey ? key : query, element, o.kernel_size, o.padding, best_isa());
  };
  Packed q = pack(Side::kQuery);
  const auto k = std::make_shared<Packed>(pack(Side::kKey));
  const auto scale = std::make_shared<KeyScale<T>>(*k);
  const bool whole_key = k->chunk_rows == k->grid_height;
  Batch<T> batch{query, key, key_mask, {mutable_data_of<T>(score), mutable_data_of<int64_t>(index)}, o};
  batch.one_key = whole_key && (key.size(0) == 1 || key.stride(0) == 0);
  batch.one_scale = batch.one_key && (!key_mask || key_mask->size(0) == 1 || key_mask->stride(0) == 0);

  // Every thread takes whole images, if they are small and as many as the threads that one image keeps busy.
  const int64_t images = query.size(0);
  const double work = nanoseconds(double(q.height) * q.width, double(k->height) * k->width, q.channels);
  const int64_t most = threads_for(kMostThreads, work);
  const bool small = whole_key && q.chunk_rows == q.grid_height && q.bytes() + k->bytes() <= kImageBytes;
  int64_t alone = small && images >= most ? images : 0;
  const int64_t searches = alone ? threads_for(images, images * work) : 1;
  if (images % searches < most) alone -= images % searches;  // fewer than threads: one after another

  std::vector<ImageMemory<T>> memory;
  memory.emplace_back(std::move(q), k, scale, alone < images ? most : 1);
  while (int64_t(memory.size()) < searches) {
    const auto own_key = batch.one_key ? k : std::make_shared<Packed>(pack(Side::kKey));
    const auto own_scale = batch.one_scale ? scale : std::make_shared<KeyScale<T>>(*own_key);
    memory.emplace_back(pack(Side::kQuery), own_key, own_scale, 1);
  }
  if (batch.one_key) k->fill(key, 0, 0, k->grid_height, kMostThreads, o.stop);
  if (batch.one_scale) scale->fill(*k, key_mask, 0, o, kMostThreads);
  std::atomic<bool> no_key{false};
  const auto search_image = [&](int64_t n, int64_t thread, int64_t threads) {
    if (stopped(o.stop) || no_key) return;
    if (!batch.search_image(n, memory[thread], threads)) no_key = true;
  };
  const auto search_alone = [&](int64_t n, int64_t thread) { search_image(n, thread, 1); };
  parallel_tasks(alone, alone * work, search_alone, searches);
  for (int64_t n = alone; n < images; ++n) search_image(n, 0, most);
  STD_TORCH_CHECK(!stopped(o.stop), "ttsr_fast: the search was interrupted");
  STD_TORCH_CHECK(!no_key, "ttsr_fast: key_mask must leave at least one key position True in every image");
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
