// The search kernel for one instruction set: matrix product, box sum along the diagonal, running argmax.
//
// search_kernel_<isa>.cpp includes it after setting the target of all functions below. It defines TTSR_ISA (a
// namespace), TTSR_VECTOR_BYTES and TTSR_VECTORS (key vectors of a register tile); TTSR_BFLOAT16 or
// TTSR_TILES adds products of bfloat16. Nothing here may call a function of the standard library: the linker
// keeps one copy, perhaps the one for this instruction set.
//
// A register tile is kPanel query pixels by TTSR_VECTORS vectors of key pixels. Every M(i, j) is summed over
// the channels in the same order wherever it is computed. Equal patches thus have bit-equal scores, and the
// lowest of their indices wins.

#include "isa.h"

namespace ttsr_fast {
namespace TTSR_ISA {

constexpr int kVectors = TTSR_VECTORS;
constexpr int64_t kDepthBlock = 256;  // channels summed in registers; bounds the rounding error

template <class T>
struct Simd;

template <>
struct Simd<float> {
  typedef float Vector __attribute__((vector_size(TTSR_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t Mask __attribute__((vector_size(TTSR_VECTOR_BYTES), aligned(4), may_alias));
};

template <>
struct Simd<double> {
  typedef double Vector __attribute__((vector_size(TTSR_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t Mask __attribute__((vector_size(TTSR_VECTOR_BYTES), aligned(8), may_alias));
};

template <class T>
struct Plain {  // one channel per packed element
  static constexpr bool kTiles = false;
  using Score = T;
  using Packed = T;
  using Vector = typename Simd<T>::Vector;
  static TTSR_INLINE void multiply_add(Vector& sum, T q, const Vector& k) { sum += q * k; }
};

#ifdef TTSR_BFLOAT16
struct BFloat16Pair {  // two channels per packed element
  static constexpr bool kTiles = false;
  using Score = float;
  using Packed = int32_t;
  using Vector = Simd<float>::Vector;
  static TTSR_INLINE void multiply_add(Vector& sum, int32_t q, const Vector& k) {
    sum = (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(q), (__m512bh)k);
  }
};
#endif

template <class E>
constexpr int64_t lanes() {
  return TTSR_VECTOR_BYTES / sizeof(typename E::Score);
}

// product[m][n] (+)= sum over depth of query[depth][m] * key[n / L][depth][n % L]
template <class E, int kRows, int kCols>
void multiply_tile(const typename E::Packed* query, const typename E::Packed* key, int64_t key_stride,
                   int64_t depth, bool add, typename E::Score* product, int64_t product_stride) {
  using Vector = typename E::Vector;
  constexpr int64_t L = lanes<E>();
  Vector sum[kRows][kCols] = {};
  for (int64_t d = 0; d < depth; ++d) {
    Vector k[kCols];
#pragma GCC unroll 8
    for (int n = 0; n < kCols; ++n) k[n] = *(const Vector*)(key + n * key_stride + d * L);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
      for (int n = 0; n < kCols; ++n) E::multiply_add(sum[m][n], query[d * kRows + m], k[n]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < kCols; ++n) {
      Vector* out = (Vector*)(product + m * product_stride + n * L);
      *out = add ? *out + sum[m][n] : sum[m][n];
    }
  }
}

template <class E>
using MultiplyTile = void (*)(const typename E::Packed*, const typename E::Packed*, int64_t, int64_t, bool,
                              typename E::Score*, int64_t);

template <class E, int kCols>
constexpr MultiplyTile<E> tile_of(int64_t rows) {
  constexpr MultiplyTile<E> table[kPanel] = {multiply_tile<E, 1, kCols>, multiply_tile<E, 2, kCols>,
                                             multiply_tile<E, 3, kCols>, multiply_tile<E, 4, kCols>,
                                             multiply_tile<E, 5, kCols>, multiply_tile<E, 6, kCols>};
  return table[rows - 1];
}

// One panel of query pixels times all key pixels of a row.
template <class E>
struct Multiplier {
  using T = typename E::Score;
  using P = typename E::Packed;

  void panel(const P* query, int64_t rows, const P* key, int64_t vectors, int64_t depth, T* product,
             int64_t product_stride) {
    constexpr int64_t L = lanes<E>();
    for (int64_t d = 0; d < depth; d += kDepthBlock) {
      const int64_t n_d = depth - d < kDepthBlock ? depth - d : kDepthBlock;
      int64_t v = 0;
      for (int64_t left = (vectors + kVectors - 1) / kVectors; left > 0; --left) {
        const int64_t n_v = (vectors - v + left - 1) / left;  // nearly equal tiles
        const MultiplyTile<E> multiply = n_v == 1   ? tile_of<E, 1>(rows)
                                         : n_v == 2 ? tile_of<E, 2>(rows)
#if TTSR_VECTORS >= 4
                                         : n_v == 4 ? tile_of<E, 4>(rows)
                                                    : tile_of<E, 3>(rows);
#else
                                                    : nullptr;
#endif
        multiply(query + d * rows, key + (v * depth + d) * L, depth * L, n_d, d > 0, product + v * L,
                 product_stride);
        v += n_v;
      }
    }
  }
};

#ifdef TTSR_TILES
#include "search_kernel_tiles.h"
#endif

// A score that exceeds the threshold, or is NaN, can replace `best`. The threshold is `best` if its index is
// lower than all that follow; else the next number below it, because an equal score may have a lower index.
template <class T, class Bits>
T threshold_of(T best, bool lower) {
  constexpr T infinity = sizeof(T) == 8 ? T(__builtin_inf()) : T(__builtin_inff());
  constexpr T least_normal = sizeof(T) == 8 ? T(__DBL_MIN__) : T(__FLT_MIN__);
  if (best != best) return infinity;
  if (lower || best == -infinity) return best;
  if (best == 0) return -least_normal;  // denormals may be flushed to zero
  union {
    T value;
    Bits bits;
  } below = {best};
  below.bits += best > 0 ? -1 : 1;
  return below.value;
}

// Compilers load a value again for every addition that can read it from memory.
template <class Vector>
TTSR_INLINE Vector in_register(Vector value) {
#if TTSR_VECTOR_BYTES == 64
  asm("" : "+v"(value));
#endif
  return value;
}

// Lanes that exceed the threshold or are NaN, as bits.
template <class T>
TTSR_INLINE unsigned lanes_above(typename Simd<T>::Vector score, typename Simd<T>::Vector threshold) {
#if TTSR_VECTOR_BYTES == 64
  return sizeof(T) == 4 ? _mm512_cmp_ps_mask((__m512)score, (__m512)threshold, _CMP_NLE_UQ)
                        : _mm512_cmp_pd_mask((__m512d)score, (__m512d)threshold, _CMP_NLE_UQ);
#else
  const typename Simd<T>::Mask below = score <= threshold;
  unsigned lanes = 0;
  for (unsigned n = 0; n < TTSR_VECTOR_BYTES / sizeof(T); ++n) lanes |= unsigned(~below[n] & 1) << n;
  return lanes;
#endif
}

// True if a lane of one of the scores exceeds its threshold or is NaN.
template <class T, int kRows>
TTSR_INLINE bool any_above(const typename Simd<T>::Vector* scores,
                           const typename Simd<T>::Vector* thresholds) {
#if TTSR_VECTOR_BYTES == 64
  unsigned above = 0;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) above |= lanes_above<T>(scores[r], thresholds[r]);
  return above != 0;
#else
  typename Simd<T>::Mask below = scores[0] <= thresholds[0];
#pragma GCC unroll 8
  for (int r = 1; r < kRows; ++r) below &= scores[r] <= thresholds[r];
#if TTSR_VECTOR_BYTES == 32
  return _mm256_movemask_epi8((__m256i)below) != -1;
#else
  typedef int64_t Halves __attribute__((vector_size(16)));
  const Halves halves = (Halves)below;
  return (halves[0] & halves[1]) != -1;
#endif
#endif
}

// Sums of M along the diagonals of a row of key patches, and the running argmax of the patches that end in
// it.
template <class T, int kKernel>
struct BoxSum {
  using Vector = typename Simd<T>::Vector;
  using Bits = typename std::remove_reference<decltype(typename Simd<T>::Mask{}[0])>::type;
  using Layout = Workspace<T>;
  static constexpr int64_t L = TTSR_VECTOR_BYTES / sizeof(T);
  static constexpr int kSlots = kKernel > 1 ? kKernel - 1 : 1;

  const T* product;  // M(0, 0); null if the row lies outside the image
  T* slot[kSlots];   // sums for the kernel_size - 1 rows above, the oldest first, which is replaced
  int64_t columns;   // key patches
  bool complete;     // patches end in this row; the rest only if so
  const T* scale;
  const Bits* valid;
  int64_t index_begin;
  T* score;        // best scores of the query patches, `keep` of each, descending
  int64_t* index;  // their keys
  int64_t keep, keep_stride;

  // Columns of M, n - m, in which query patches from m on have taps: aligned vectors.
  static int64_t first_column(int64_t m) { return -((m + kBoxRows - 1 + L - 1) / L * L); }
  int64_t vectors(int64_t m) const { return (columns - 1 - m - first_column(m)) / L + 1; }

  // Query patches m to m + kRows.
  template <int kRows>
  void rows(int64_t m) const {
    const int64_t first = first_column(m), width = vectors(m) * L;
    const T* const taps = product ? product + m * Layout::product_stride + first : nullptr;
    const T* const scales = scale + m + first;
    T* sums[kSlots];
    for (int j = 0; j < kSlots; ++j) sums[j] = slot[j] + m * Layout::state_stride;
    const bool inside = product, ends = complete;
    T limit[kRows] = {};
    Vector threshold[kRows] = {};
    if (ends) {
      for (int r = 0; r < kRows; ++r) limit[r] = threshold_at(m + r, index_begin);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) threshold[r] = Vector{} + limit[r];
    }
    for (int64_t v = 0; v < width; v += L) {
      Vector sum[kRows] = {};
      if (inside) {
        Vector tap[kRows + kKernel - 1];
#pragma GCC unroll 16
        for (int r = 0; r < kRows + kKernel - 1; ++r) {
          tap[r] = in_register(*(const Vector*)(taps + r * Layout::product_stride + v));
        }
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          sum[r] = tap[r];
#pragma GCC unroll 8
          for (int d = 1; d < kKernel; ++d) sum[r] += tap[r + d];
        }
      }
      if (kKernel > 1) {
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const int64_t at = r * Layout::state_stride + v;
          Vector total = *(const Vector*)(sums[0] + at);
#pragma GCC unroll 8
          for (int j = 1; j < kSlots; ++j) total += *(const Vector*)(sums[j] + at);
          *(Vector*)(sums[0] + at) = sum[r];
          sum[r] += total;
        }
      }
      if (!ends) continue;
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sum[r] *= *(const Vector*)(scales + r + v);
      if (__builtin_expect(!any_above<T, kRows>(sum, threshold), 1)) continue;
      T scores[kRows * L];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) *(Vector*)(scores + r * L) = sum[r];
      for (int r = 0; r < kRows; ++r) merge(scores + r * L, m + r, first + m + r + v, limit[r]);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) threshold[r] = Vector{} + limit[r];
    }
  }

  // Merges the scores of keys `column` to `column + L`, not all of which need exist, into those of patch m.
  __attribute__((noinline)) void merge(const T* scores, int64_t m, int64_t column, T& limit) const {
    const Vector candidates = *(const Vector*)scores, threshold = Vector{} + limit;
    unsigned lanes = lanes_above<T>(candidates, threshold);
    if (lanes == 0) return;
    for (; lanes; lanes &= lanes - 1) {
      const int64_t lane = __builtin_ctz(lanes), n = column + lane;
      if (n < 0 || n >= columns || !valid[n]) continue;
      insert_ranked(scores[lane], index_begin + n, score + m, index + m, keep, keep_stride);
    }
    limit = threshold_at(m, index_begin + column + L);
  }

  // Above it are the scores that can change those of patch m; their indices begin at `next_index`.
  T threshold_at(int64_t m, int64_t next_index) const {
    const int64_t last = m + (keep - 1) * keep_stride;
    return threshold_of<T, Bits>(score[last], index[last] < next_index);
  }

  void run(int64_t m, int64_t end) const {
    for (; m + kBoxRows <= end; m += kBoxRows) rows<kBoxRows>(m);
    for (; m < end; ++m) rows<1>(m);
  }
};

template <class T>
void zero_rows(T* rows, int64_t count, int64_t stride, int64_t width) {
  for (int64_t row = 0; row < count; ++row) {
    for (int64_t n = 0; n < width; ++n) rows[row * stride + n] = 0;
  }
}

template <class E, int kKernel>
void search_tiles(const SearchKernelParams& p) {
  using T = typename E::Score;
  using P = typename E::Packed;
  using Box = BoxSum<T, kKernel>;
  using Layout = Workspace<T>;
  constexpr int64_t L = lanes<E>();
  const Layout layout(p.query, kKernel);
  T* const product = (T*)p.workspace;
  T* const state = product + layout.product_size;
  Box box;
  box.columns = p.key.columns;
  box.keep = p.keep;
  box.keep_stride = p.keep_stride;
  // What no product is written to: padding, and columns beside the tile that patches in the same vector read.
  zero_rows(product + Layout::origin - kBoxRows - L,
            p.query.columns + kKernel + (E::kTiles ? kTilePixels : 0), Layout::product_stride - 1,
            p.key.columns + 2 * (L + kBoxRows) + kKernel);
  zero_rows(state, (p.offset_end - p.offset_begin) * (kKernel - 1) * p.query.columns, Layout::state_stride,
            round_up(p.key.columns + kBoxRows + L, L));
  const int64_t vectors = round_up(p.key.pixels, L) / L;
  const Panels panels(p.query.pixels, E::kTiles);
  Multiplier<E> multiplier;
  constexpr int64_t kNextPixel = Layout::product_stride - 1;
  T* const first_product = product + Layout::origin + p.query.left * kNextPixel + p.key.left;

  // y: image row of the query. The patches of grid row `row` end at image row `row + reach`.
  const int64_t reach = kKernel - 1 - p.padding;
  const int64_t earliest = p.key_begin - p.offset_end + 1;
  const int64_t first = (p.query_begin > earliest ? p.query_begin : earliest) - p.padding;
  for (int64_t y = first < 0 ? 0 : first; y < p.query_end + reach && !stopped(p.stop); ++y) {
    for (int64_t offset = p.offset_begin; offset < p.offset_end; ++offset) {
      const int64_t row = y - reach;
      const int64_t low = p.query_begin > p.key_begin - offset ? p.query_begin : p.key_begin - offset;
      const int64_t high = p.query_end < p.key_end - offset ? p.query_end : p.key_end - offset;
      if (y + offset < 0 || y < low - p.padding || row >= high) continue;
      const bool inside = y < p.query.height && y + offset < p.key.height;
      T* const slots = state + (offset - p.offset_begin) * layout.state_size;
      for (int j = 0; j < Box::kSlots; ++j) box.slot[j] = slots + (y + j) % Box::kSlots * layout.slot_size;
      box.product = inside ? product + Layout::origin : nullptr;
      box.complete = row >= low;
      const int64_t key_row = (row + offset - p.key_begin) * p.scale_stride;
      box.scale = (const T*)p.scale + key_row;
      box.valid = (const typename Box::Bits*)p.valid + key_row;
      box.index_begin = p.index_begin + (row + offset) * p.index_stride;
      const int64_t query_row = (row - p.query_begin) * p.score_stride;
      box.score = (T*)p.score + query_row;
      box.index = p.index + query_row;
      int64_t m = 0;  // first patch that is not summed yet
      for (int64_t panel = 0; inside && panel < panels.count; ++panel) {
        const int64_t begin = panels.begin(panel), end = panels.begin(panel + 1);
        multiplier.panel(
            (const P*)p.query.rows + (y - p.query.first_row) * p.query.row_stride + begin * p.depth,
            end - begin, (const P*)p.key.rows + (y + offset - p.key.first_row) * p.key.row_stride, vectors,
            p.depth, first_product + begin * kNextPixel, kNextPixel);
        const int64_t ready = (p.query.left + end - (kKernel - 1)) / kBoxRows * kBoxRows;
        if (panel + 1 < panels.count && ready > m) {
          box.run(m, ready);
          m = ready;
        }
      }
      box.run(m, p.query.columns);
    }
  }
}

template <class E>
void search_elements(const SearchKernelParams& p, int kernel_size) {
  switch (kernel_size) {
    case 1: return search_tiles<E, 1>(p);
    case 3: return search_tiles<E, 3>(p);
    case 5: return search_tiles<E, 5>(p);
    case 7: return search_tiles<E, 7>(p);
  }
}

void search_kernel(const SearchKernelParams& p, Element element, int kernel_size) {
#ifdef TTSR_TILES
  if (element == Element::kBFloat16) return search_elements<BFloat16Tiles<1>>(p, kernel_size);
  if (element == Element::kBFloat16Parts) return search_elements<BFloat16Tiles<2>>(p, kernel_size);
  avx512::search_kernel(p, element, kernel_size);
#elif defined(TTSR_BFLOAT16)
  if (element == Element::kBFloat16) return search_elements<BFloat16Pair>(p, kernel_size);
  avx512::search_kernel(p, element, kernel_size);
#else
  if (element == Element::kDouble) return search_elements<Plain<double>>(p, kernel_size);
  search_elements<Plain<float>>(p, kernel_size);
#endif
}

}  // namespace TTSR_ISA
}  // namespace ttsr_fast
