// cpp_search: packs a chunk of the query and a chunk of the key, searches their tiles and merges the argmax
// of the threads. Threads take whole images of a batch, or the tasks of one image after another.

#include <memory>
#include <tuple>

#include "../check.h"
#include "candidates.h"

namespace ttsr_fast {

namespace {

// Most memory of an image that one thread searches alone.
constexpr int64_t kImageBytes = 8 << 20;

// Rough time of a search on one thread.
double nanoseconds(double query_pixels, double key_pixels, int64_t channels) {
  return query_pixels * key_pixels * (channels / 16.0 + 0.5);
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
    p.keep = own.keep;
    p.keep_stride = own.stride;
    p.workspace = memory.workspace(thread);
    p.stop = o.stop;
    for (int64_t k = 0; k < key.tiles; ++k) {
      p.key = key.tile(k);
      p.scale = scale.scale + scale.begin[k];
      p.valid = scale.valid + scale.begin[k];
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
void normalise(const Packed& query, const SearchOptions& o, T* score, int64_t threads,
               Packed::Norm which = Packed::kFeatures) {
  const int64_t rows = query.end - query.begin, columns = query.grid_width;
  const auto divide_row = [&](int64_t row, int64_t) {
    query.patch_norms(
        query.begin + row, 0, columns,
        [&](int64_t x, double norm) {
          T& value = score[row * columns + x];
          value = T(double(value) / o.denominator(norm));
        },
        which);
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
  Tensor lists;  // of a chunk, if more than the best score is kept

  ImageMemory(Packed query_, std::shared_ptr<Packed> key_, std::shared_ptr<KeyScale<T>> scale_,
              int64_t threads_, int64_t keep)
      : query(std::move(query_)), key(std::move(key_)), scale(std::move(scale_)),
        threads(threads_, query, keep) {
    if (keep > 1) lists = scratch(Argmax<T>::bytes(query.chunk_rows * query.grid_width, keep));
  }
};

// What a search fills, for all images.
template <class T>
struct Results {
  T* score;
  int64_t* index;
  T* second;         // the best score of another key; may be null
  uint8_t* certain;  // of a search with two parts: see choose_candidates

  int64_t keep() const { return certain ? kCandidates : second ? 2 : 1; }
};

template <class T>
struct Batch {
  const Tensor &query, &key;
  const std::optional<Tensor>& key_mask;
  const SearchOptions& o;
  const Results<T>& results;
  bool one_key = false, one_scale = false;  // packed once for all images

  // Searches image n on at most `most` threads; ends early if it is stopped. Returns false if no key is
  // valid.
  bool search_image(int64_t n, ImageMemory<T>& memory, int64_t most) const {
    Packed &q = memory.query, &k = *memory.key;
    KeyScale<T>& scale = *memory.scale;
    for (int64_t y_q = 0; y_q < q.grid_height; y_q += q.chunk_rows) {
      q.fill(query, n, y_q, std::min(y_q + q.chunk_rows, q.grid_height), most, o.stop);
      const int64_t patch = (n * q.grid_height + y_q) * q.grid_width, keep = results.keep();
      const int64_t patches = q.chunk_rows * q.grid_width;
      const Argmax<T> result{results.score + patch, results.index + patch};
      const Argmax<T> best =
          keep > 1 ? Argmax<T>::at(mutable_data_of<char>(memory.lists), patches, keep) : result;
      Largest largest;
      bool first = true;
      for (int64_t y_k = 0; y_k < k.grid_height; y_k += k.chunk_rows) {
        if (!one_key) k.fill(key, n, y_k, std::min(y_k + k.chunk_rows, k.grid_height), most, o.stop);
        if (!one_scale) scale.fill(k, key_mask, n, o, most);
        if (stopped(o.stop)) return true;
        if (scale.first_valid == scale.kNone) continue;
        search_chunk(q, k, scale, o, memory.threads, best, first, most);
        largest.merge(scale.largest);
        first = false;
      }
      if (first) return false;
      if constexpr (sizeof(T) == sizeof(float)) {
        if (q.approximate() && !results.second) {
          choose_candidates(query, key, n, q, largest, scale.factors.data(), best, o, most, result,
                            results.certain ? results.certain + patch : nullptr);
        }
      }
      if (results.second) {
        const int64_t count = (q.end - q.begin) * q.grid_width;
        std::copy_n(best.score, count, result.score);
        std::copy_n(best.index, count, result.index);
        std::copy_n(best.score + best.stride, count, results.second + patch);
        if (o.normalize_query) normalise(q, o, results.second + patch, most);
      }
      const bool as_given = q.rounded && !results.second;
      const Packed::Norm norm = as_given ? Packed::kAsGiven : Packed::kFeatures;
      if (o.normalize_query) normalise(q, o, result.score, most, norm);
    }
    return true;
  }
};

template <class T>
void search_typed(const Tensor& query, const Tensor& key, const std::optional<Tensor>& key_mask,
                  const SearchOptions& o, Element element, const Results<T>& results) {
  const auto pack = [&](Side side) {
    return Packed(side, side == Side::kKey ? key : query, element, o.kernel_size, o.padding, best_isa());
  };
  Packed q = pack(Side::kQuery);
  const auto k = std::make_shared<Packed>(pack(Side::kKey));
  const auto scale = std::make_shared<KeyScale<T>>(*k);
  const bool whole_key = k->chunk_rows == k->grid_height;
  Batch<T> batch{query, key, key_mask, o, results};
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
  memory.emplace_back(std::move(q), k, scale, alone < images ? most : 1, results.keep());
  while (int64_t(memory.size()) < searches) {
    const auto own_key = batch.one_key ? k : std::make_shared<Packed>(pack(Side::kKey));
    const auto own_scale = batch.one_scale ? scale : std::make_shared<KeyScale<T>>(*own_key);
    memory.emplace_back(pack(Side::kQuery), own_key, own_scale, 1, results.keep());
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

// Searches the queries that are not certain again, in float.
void search_again(const Tensor& query, const Tensor& key, const std::optional<Tensor>& key_mask,
                  const SearchOptions& o, const Results<float>& results) {
  const int64_t shrink = o.kernel_size - 1 - 2 * o.padding;
  const int64_t patches = (query.size(2) - shrink) * (query.size(3) - shrink);
  const auto image_of = [](const Tensor& x, int64_t n) {
    Tensor whole = x;
    return x.size(0) == 1 ? x : torch::stable::narrow(whole, 0, n, 1);
  };
  for (int64_t n = 0; n < query.size(0); ++n) {
    const int64_t first = n * patches;
    const int64_t uncertain = std::count(results.certain + first, results.certain + first + patches, 0);
    if (uncertain == 0) continue;
    const Tensor key_n = image_of(key, n);
    const std::optional<Tensor> mask = key_mask ? std::optional(image_of(*key_mask, n)) : std::nullopt;
    if (uncertain * o.kernel_size * o.kernel_size > patches) {  // apart they would be more pixels
      search_typed<float>(image_of(query, n), key_n, mask, o, Element::kFloat,
                          {results.score + first, results.index + first, nullptr, nullptr});
      continue;
    }
    for (int64_t begin = 0; begin < patches;) {
      const Gathered some = gather_uncertain(query, n, results.certain + first, o, begin);
      if (some.patch.empty()) break;
      const int64_t columns = some.map.size(3) - shrink;
      std::vector<float> score((2 * o.padding + 1) * columns);
      std::vector<int64_t> index(score.size());
      search_typed<float>(some.map, key_n, mask, o, Element::kFloat,
                          {score.data(), index.data(), nullptr, nullptr});
      for (size_t p = 0; p < some.patch.size(); ++p) {
        const int64_t at = o.padding * columns + some.column[p];
        results.score[first + some.patch[p]] = score[at];
        results.index[first + some.patch[p]] = index[at];
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

#ifdef TTSR_PORTABLE_TILES
constexpr bool kAnySize = true;  // tests are small
#else
constexpr bool kAnySize = false;
#endif

// What the kernel multiplies: 16 bits, if that is allowed and faster. Products of two parts are allowed for
// the best key alone.
Element element_for(const Tensor& query, const Tensor& key, bool bfloat16, bool second) {
  if (query.scalar_type() == ScalarType::Double) return Element::kDouble;
  const Isa& isa = best_isa();
  const int64_t queries = query.size(2) * query.size(3), keys = key.size(2) * key.size(3);
  // Below, packing, blocks that are not full and exact scores of rounded features cost more than they save.
  const bool exact = query.scalar_type() == ScalarType::BFloat16;
  const bool large = query.size(1) >= 8 && queries >= 256 && keys >= (exact ? 256 : 2048);
  if (bfloat16) return isa.bfloat16 && (large || kAnySize) ? Element::kBFloat16 : Element::kFloat;
  return isa.tiles && !second && (large || kAnySize) ? Element::kBFloat16Parts : Element::kFloat;
}

void cpp_search(const Tensor& query,                    // [N, C, H, W]
                const Tensor& key,                      // [N or 1, C, HK, WK]
                const std::optional<Tensor>& key_mask,  // [N or 1, HKo, WKo]
                Tensor score,                           // [N, Ho, Wo]
                Tensor index,                           // [N, Ho, Wo]
                int64_t kernel_size, int64_t padding, bool normalize_query, bool normalize_key, double eps,
                bool add_eps, bool bfloat16,
                std::optional<Tensor> second,   // [N, Ho, Wo], the best score of another key
                std::optional<Tensor> certain,  // [N, Ho, Wo], uint8: 1 unless searched twice
                const std::optional<Tensor>& stop) {
  if (stop) check_contiguous(*stop, ScalarType::Int, {1}, "stop");
  check_search(query, key, key_mask, score, index, kernel_size, padding);
  for (const auto& [out, type, name] :
       {std::tuple{&second, score.scalar_type(), "second"}, {&certain, ScalarType::Byte, "certain"}}) {
    if (*out) check_contiguous(**out, type, {score.size(0), score.size(1), score.size(2)}, name);
  }
  const SearchOptions o{int(kernel_size),
                        padding,
                        normalize_query,
                        normalize_key,
                        eps,
                        add_eps,
                        stop ? data_of<int32_t>(*stop) : nullptr};
  const auto fill = [&](auto element_of_score, Element element, uint8_t* certain) {
    using T = decltype(element_of_score);
    T* const other = second ? mutable_data_of<T>(*second) : nullptr;
    const Results<T> results{mutable_data_of<T>(score), mutable_data_of<int64_t>(index), other, certain};
    search_typed<T>(query, key, key_mask, o, element, results);
    return results;
  };
  if (certain) std::fill_n(mutable_data_of<uint8_t>(*certain), certain->numel(), 1);
  const Element element = element_for(query, key, bfloat16, bool(second));
  if (element == Element::kDouble) {
    fill(double(), element, nullptr);
  } else if (element == Element::kBFloat16Parts) {
    if (!certain) certain = scratch(score.numel());
    search_again(query, key, key_mask, o, fill(float(), element, mutable_data_of<uint8_t>(*certain)));
  } else {
    fill(float(), element, nullptr);
  }
}

// Products of bfloat16 that such a search sums for a product of two features; 0 if it multiplies these.
int64_t cpp_bfloat16_products(const Tensor& query, const Tensor& key, bool bfloat16) {
  check_map(query, "query");
  check_map(key, "key");
  const Element element = element_for(query, key, bfloat16, false);
  return element == Element::kBFloat16Parts ? 3 : element == Element::kBFloat16 ? 1 : 0;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ttsr_fast, CPU, m) {
  m.impl("cpp_search", TORCH_BOX(&cpp_search));
  m.impl("cpp_bfloat16_products", TORCH_BOX(&cpp_bfloat16_products));
}

}  // namespace ttsr_fast
