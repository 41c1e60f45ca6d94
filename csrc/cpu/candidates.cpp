#include "candidates.h"

namespace ttsr_fast {

namespace {

// Pairs of patches that are multiplied together: enough for the planes of the key to be read once for many.
constexpr int64_t kPairs = 4096;
constexpr int64_t kGatheredBytes = 16 << 20;

// Bytes of the key's planes that are read by turns.
constexpr int64_t kPlaneBytes = 1 << 18;

struct Pair {
  int64_t patch;  // of the query
  int64_t key;
  double bound;  // of the error of the candidates' scores
  double score;  // of the last candidate, which is not scored exactly
  double product = 0;
};

struct Range {
  int64_t begin, end;
};

// A side of the pairs, and where its patches lie.
template <class T>
struct PatchMap {
  Maps<const T> maps;
  int64_t kernel_size, padding, columns;
  const T* image;

  PatchMap(const Tensor& x, int64_t n, const SearchOptions& o)
      : maps(x), kernel_size(o.kernel_size), padding(o.padding),
        columns(maps.width + 2 * padding - kernel_size + 1), image(maps.at(n, 0, 0, 0)) {}

  Position first_tap(int64_t patch) const { return {patch / columns - padding, patch % columns - padding}; }
  int64_t at(Position p) const { return p.y * maps.stride_h + p.x * maps.stride_w; }
  bool has(Position p) const { return p.y >= 0 && p.y < maps.height && p.x >= 0 && p.x < maps.width; }
  bool inside(Position first) const {
    return has(first) && has({first.y + kernel_size - 1, first.x + kernel_size - 1});
  }
};

template <class T>
class PairProducts {
 public:
  PairProducts(const Tensor& query, const Tensor& key, int64_t n, const SearchOptions& o)
      : query_(query, n, o), key_(key, n, o) {}

  // Inner products of pairs of patches, from the features as given.
  void fill(std::vector<Pair>& pairs) const {
    const int64_t channels = query_.maps.channels;
    const int64_t plane = key_.maps.height * key_.maps.width * int64_t(sizeof(T));
    const bool planes = query_.maps.stride_c >= query_.maps.stride_w;
    const int64_t step = planes ? std::clamp<int64_t>(kPlaneBytes / plane, 1, channels) : channels;
    for (int64_t c = 0; c < channels; c += step) {
      for (Pair& pair : pairs) pair.product += product(pair, c, std::min(c + step, channels));
    }
  }

 private:
  double product(const Pair& pair, int64_t begin, int64_t end) const {
    const Position q = query_.first_tap(pair.patch), k = key_.first_tap(pair.key);
    const T *a = query_.image + query_.at(q), *b = key_.image + key_.at(k);
    const int64_t size = query_.kernel_size;
    if (size == 3 && query_.inside(q) && key_.inside(k)) return sum_taps(a, b, begin, end, {0, 3}, {0, 3});
    const auto both = [size](int64_t from, int64_t other, int64_t extent, int64_t other_extent) {
      return Range{std::max<int64_t>({0, -from, -other}),
                   std::min({size, extent - from, other_extent - other})};
    };
    const Range rows = both(q.y, k.y, query_.maps.height, key_.maps.height);
    const Range columns = both(q.x, k.x, query_.maps.width, key_.maps.width);
    return sum_taps(a, b, begin, end, rows, columns);
  }

  // In one order everywhere: equal patches have bit-equal products at the border too.
  TTSR_INLINE double sum_taps(const T* a, const T* b, int64_t begin, int64_t end, Range rows,
                              Range columns) const {
    double sum = 0;
    for (int64_t c = begin; c < end; ++c) {
      for (int64_t y = rows.begin; y < rows.end; ++y) {
        for (int64_t x = columns.begin; x < columns.end; ++x) sum += tap(a, b, c, y, x);
      }
    }
    return sum;
  }

  TTSR_INLINE double tap(const T* q, const T* k, int64_t c, int64_t y, int64_t x) const {
    const auto value = [&](const T* first, const Maps<const T>& m) {
      return double(float(first[c * m.stride_c + y * m.stride_h + x * m.stride_w]));
    };
    return value(q, query_.maps) * value(k, key_.maps);
  }

  PatchMap<T> query_, key_;
};

// Bounds of the errors of the scores of a row's patches, not divided by the query's norm.
struct ErrorBounds {
  const Packed& query;
  const Largest& key;
  double rounding, flushed;

  ErrorBounds(const Packed& query_, const Largest& key_) : query(query_), key(key_) {
    // Roundings of a term on its way into a score: 16 of a tile's sum and its two halves, one for each tile
    // and product, those of the box sum, of the factor and of its product. The parts together are at
    // most 1.02 times as large as the features.
    const double tiles = std::ceil(double(query.channels) / kTileChannels), taps = query.kernel_size;
    rounding = 1.02 * std::ldexp(17 + 3 * tiles + 2 * (taps - 1) + 2, -24);
    flushed = std::ldexp(taps * taps * (4 * kTileChannels * tiles + 64), -126) * key.factor;
  }

  // 0 for patches of zeros, infinity where sums can overflow, NaN for patches that are not finite.
  std::vector<double> row(int64_t y) const {
    std::vector<double> bounds(query.grid_width, flushed);
    const auto add = [&](Packed::Norm which, double factor) {
      const auto add_norm = [&](int64_t x, double norm) { bounds[x] += 1.0001 * factor * norm; };
      query.patch_norms(y, 0, query.grid_width, add_norm, which);
    };
    add(Packed::kLowParts, key.low_parts);
    add(Packed::kLeftOut, key.features + key.left_out);
    add(Packed::kFeatures, key.left_out + rounding * key.features);
    query.patch_norms(y, 0, query.grid_width, [&](int64_t x, double norm) {
      if (norm == 0) bounds[x] = 0;
      if (norm * key.norm >= 1e36) bounds[x] = INFINITY;
      if (!std::isfinite(norm)) bounds[x] = NAN;
    });
    return bounds;
  }
};

template <class T>
void choose_rows(const PairProducts<T>& products, const ErrorBounds& bounds, int64_t begin, int64_t end,
                 const Argmax<float>& candidates, const float* factors, const Argmax<float>& result,
                 uint8_t* certain) {
  const int64_t columns = bounds.query.grid_width, first_patch = bounds.query.begin * columns;
  const int64_t scored = std::max<int64_t>(candidates.keep - 1, 1);
  std::vector<Pair> pairs;
  for (int64_t row = begin; row < end; ++row) {
    const std::vector<double> bound =
        certain ? bounds.row(bounds.query.begin + row) : std::vector(columns, 0.0);
    for (int64_t x = 0; x < columns; ++x) {
      const int64_t j = row * columns + x;
      const float best = candidates.score[j];
      result.score[j] = best;
      result.index[j] = candidates.index[j];
      if (certain) certain[j] = bound[x] != INFINITY;
      if (std::isnan(best) || bound[x] == INFINITY || (certain && bound[x] == 0)) continue;
      const double last = candidates.score[(candidates.keep - 1) * candidates.stride + j];
      for (int64_t r = 0; r < scored; ++r) {
        const int64_t at = r * candidates.stride + j;
        if (std::isinf(candidates.score[at]) || candidates.score[at] < best - 2 * bound[x]) break;
        pairs.push_back({first_patch + j, candidates.index[at], bound[x], last});
      }
    }
  }
  products.fill(pairs);
  for (size_t p = 0; p < pairs.size();) {
    const int64_t j = pairs[p].patch - first_patch;
    const double excluded = pairs[p].score + pairs[p].bound;
    double best = -INFINITY;
    result.score[j] = -INFINITY;
    for (; p < pairs.size() && pairs[p].patch - first_patch == j; ++p) {
      const float factor = factors[pairs[p].key], score = float(pairs[p].product) * factor;
      best = std::max(best, pairs[p].product * double(factor));
      if (!ranks_before(score, pairs[p].key, result.score[j], result.index[j])) continue;
      result.score[j] = score;
      result.index[j] = pairs[p].key;
    }
    if (certain) certain[j] = excluded < best;
  }
}

}  // namespace

void choose_candidates(const Tensor& query, const Tensor& key, int64_t n, const Packed& packed_query,
                       const Largest& largest_key, const float* factors, const Argmax<float>& candidates,
                       const SearchOptions& o, int64_t threads, const Argmax<float>& result,
                       uint8_t* certain) {
  const ErrorBounds bounds(packed_query, largest_key);
  const int64_t rows = packed_query.end - packed_query.begin, columns = packed_query.grid_width;
  const int64_t step = std::max<int64_t>(1, std::min(kPairs / columns, (rows + threads - 1) / threads));
  with_element(query, [&](auto element) {
    const PairProducts<decltype(element)> products(query, key, n, o);
    const auto choose = [&](int64_t task, int64_t) {
      if (stopped(o.stop)) return;
      const int64_t begin = task * step, end = std::min(begin + step, rows);
      choose_rows(products, bounds, begin, end, candidates, factors, result, certain);
    };
    const double work = 8.0 * rows * columns * packed_query.channels;
    parallel_tasks((rows + step - 1) / step, work, choose, threads);
  });
}

Gathered gather_uncertain(const Tensor& query, int64_t n, const uint8_t* certain, const SearchOptions& o,
                          int64_t& begin) {
  const int64_t channels = query.size(1), height = query.size(2), width = query.size(3);
  const int64_t shrink = o.kernel_size - 1 - 2 * o.padding, columns = width - shrink;
  const int64_t patches = (height - shrink) * columns;
  const int64_t most = kGatheredBytes / (channels * o.kernel_size * int64_t(query.element_size()));

  // Pixel columns of the map, by the first of their rows; patches beside each other share them.
  std::vector<Position> pixels;
  Gathered gathered;
  for (; begin < patches && (pixels.empty() || int64_t(pixels.size()) < most); ++begin) {
    if (certain[begin]) continue;
    const Position first{begin / columns - o.padding, begin % columns - o.padding};
    int64_t shared = 0;
    if (!pixels.empty() && pixels.back().y == first.y) {
      shared = std::max<int64_t>(0, pixels.back().x + 1 - first.x);
    }
    gathered.patch.push_back(begin);
    gathered.column.push_back(int64_t(pixels.size()) - shared + o.padding);
    for (int64_t b = shared; b < o.kernel_size; ++b) pixels.push_back({first.y, first.x + b});
  }
  if (pixels.empty()) return gathered;
  const int64_t count = pixels.size();
  gathered.map = torch::stable::empty({1, channels, o.kernel_size, count}, query.scalar_type());
  with_element(query, [&](auto element) {
    using T = decltype(element);
    const Maps<const T> maps(query);
    T* out = mutable_data_of<T>(gathered.map);
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t a = 0; a < o.kernel_size; ++a) {
        for (const Position& p : pixels) {
          const bool inside = p.y + a >= 0 && p.y + a < height && p.x >= 0 && p.x < width;
          *out++ = inside ? *maps.at(n, c, p.y + a, p.x) : T(0.f);
        }
      }
    }
  });
  return gathered;
}

}  // namespace ttsr_fast
