// The search kernel for one instruction set: matrix product, box sum along the diagonal, running argmax.
//
// search_kernel_<isa>.cpp includes it after setting the target of all functions below. It defines TTSR_ISA (a
// namespace), TTSR_VECTOR_BYTES and TTSR_VECTORS (key vectors of a register tile). Nothing here may call a
// function of the standard library: the linker keeps one copy, perhaps the one for this instruction set.
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
  using Score = T;
  using Packed = T;
  using Vector = typename Simd<T>::Vector;
  static TTSR_INLINE void multiply_add(Vector& sum, T q, const Vector& k) { sum += q * k; }
};

#ifdef TTSR_BFLOAT16
struct BFloat16Pair {  // two channels per packed element
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
void multiply_panel(const typename E::Packed* query, int64_t rows, const typename E::Packed* key,
                    int64_t vectors, int64_t depth, typename E::Score* product, int64_t product_stride) {
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

// True if a lane of `score` exceeds the threshold or is NaN.
template <class Vector>
TTSR_INLINE bool any_above(const Vector& score, const Vector& threshold) {
#if TTSR_VECTOR_BYTES == 64
  if (sizeof(score[0]) == 4) return _mm512_cmp_ps_mask((__m512)score, (__m512)threshold, _CMP_NLE_UQ) != 0;
  return _mm512_cmp_pd_mask((__m512d)score, (__m512d)threshold, _CMP_NLE_UQ) != 0;
#elif TTSR_VECTOR_BYTES == 32
  return _mm256_movemask_epi8((__m256i) ~(score <= threshold)) != 0;
#else
  typedef int64_t Halves __attribute__((vector_size(16)));
  const Halves above = (Halves) ~(score <= threshold);
  return (above[0] | above[1]) != 0;
#endif
}

// Best score so far of one query patch, its key, and the best score of another key.
template <class T>
struct Best {
  T* score;
  int64_t* index;
  T* second;  // may be null
};

// Merges the scores of keys `column` to `column + lanes` of a row into the best. Not every key is one.
template <class T, class Bits>
__attribute__((noinline)) void merge_scores(const T* scores, int64_t lanes, int64_t column, int64_t columns,
                                            const Bits* valid, int64_t index_begin, const Best<T>& best) {
  const int64_t begin = column < 0 ? 0 : column;
  const int64_t end = column + lanes < columns ? column + lanes : columns;
  for (int64_t n = begin; n < end; ++n) {
    if (!valid[n]) continue;
    const T score = scores[n - column];
    if (ranks_before(score, index_begin + n, *best.score, *best.index)) {
      if (best.second) *best.second = *best.score;
      *best.score = score;
      *best.index = index_begin + n;
    } else if (best.second && score > *best.second) {
      *best.second = score;
    }
  }
}

// kRows query patches from column m on, against a row of key patches. Adds the taps of one image row of M to
// those of the rows above, and completes the patches that end here.
template <class T, int kKernel>
struct BoxSum {
  using Vector = typename Simd<T>::Vector;
  using Bits = typename std::remove_reference<decltype(typename Simd<T>::Mask{}[0])>::type;
  static constexpr int64_t L = TTSR_VECTOR_BYTES / sizeof(T);
  static constexpr int kSlots = kKernel > 1 ? kKernel - 1 : 1;

  const T* product;  // M(0, 0); null if the row lies outside the image
  int64_t product_stride;
  T* slot[kSlots];  // sums of the kernel_size - 1 rows above, the oldest first; that one is replaced
  int64_t state_stride;
  int64_t columns;  // key patches
  bool complete;    // the patches end in this row
  const T* scale;   // the rest only if so
  const Bits* valid;
  int64_t index_begin;
  Best<T> best;

  template <int kRows>
  TTSR_INLINE void rows(int64_t m) const {
    const int64_t first = -((m + kBoxRows - 1 + L - 1) / L * L);  // column n - m of M, aligned
    const int64_t vectors = (columns - 1 - m - first) / L + 1;
    const T* const p = product + m * product_stride + first;
    const T* const s = scale + m + first;
    const int64_t state = m * state_stride;
    Vector threshold[kRows] = {};
    if (complete) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) threshold[r] = Vector{} + threshold_at(m + r, index_begin);
    }
    for (int64_t v = 0; v < vectors * L; v += L) {
      Vector sum[kRows] = {};
      if (product) {
        Vector tap[kRows + kKernel - 1];
#pragma GCC unroll 16
        for (int r = 0; r < kRows + kKernel - 1; ++r) tap[r] = *(const Vector*)(p + r * product_stride + v);
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
          const int64_t at = state + r * state_stride + v;
          Vector total = *(const Vector*)(slot[0] + at);
#pragma GCC unroll 8
          for (int j = 1; j < kSlots; ++j) total += *(const Vector*)(slot[j] + at);
          *(Vector*)(slot[0] + at) = sum[r];
          sum[r] += total;
        }
      }
      if (!complete) continue;
      bool any = false;
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        sum[r] *= *(const Vector*)(s + r + v);
        any |= any_above<Vector>(sum[r], threshold[r]);
      }
      if (__builtin_expect(!any, 1)) continue;
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        if (any_above<Vector>(sum[r], threshold[r])) {
          const Best<T> row = {best.score + m + r, best.index + m + r,
                               best.second ? best.second + m + r : nullptr};
          T scores[L];
          *(Vector*)scores = sum[r];
          merge_scores<T, Bits>(scores, L, first + m + r + v, columns, valid, index_begin, row);
          threshold[r] = Vector{} + threshold_at(m + r, index_begin + first + m + r + v + L);
        }
      }
    }
  }

  // Of scores that can replace the best ones of a patch; their indices begin at `next_index`.
  T threshold_at(int64_t m, int64_t next_index) const {
    const T threshold = threshold_of<T, Bits>(best.score[m], best.index[m] < next_index);
    return best.second && best.second[m] < threshold ? best.second[m] : threshold;
  }

  // All patches from column m up to `end`.
  void run(int64_t m, int64_t end) const {
    for (; m + kBoxRows <= end; m += kBoxRows) rows<kBoxRows>(m);
    for (; m < end; ++m) rows<1>(m);
  }
};

template <class E, int kKernel>
void search_tiles(const SearchKernelParams& p) {
  using T = typename E::Score;
  using P = typename E::Packed;
  using Box = BoxSum<T, kKernel>;
  constexpr int64_t L = lanes<E>();
  const Workspace layout(p.query, p.key, kKernel, L);
  T* const product = (T*)p.workspace;
  T* const state = product + layout.product_size;
  T* const end = state + (p.offset_end - p.offset_begin) * layout.state_size;
  for (T* zero = product; zero < end; ++zero) *zero = 0;
  const int64_t vectors = round_up(p.key.pixels, L) / L;
  const Panels panels(p.query.pixels);
  // Where M of the tiles' first pixels lies; the next query pixel is one element left of the next row.
  T* const first_product = product + layout.origin + p.query.left * (layout.product_stride - 1) + p.key.left;

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
      Box box;
      box.product = inside ? product + layout.origin : nullptr;
      box.product_stride = layout.product_stride;
      T* const slots = state + (offset - p.offset_begin) * layout.state_size;
      for (int j = 0; j < Box::kSlots; ++j) box.slot[j] = slots + (y + j) % Box::kSlots * layout.slot_size;
      box.state_stride = layout.state_stride;
      box.columns = p.key.columns;
      box.complete = row >= low;
      const int64_t key_row = (row + offset - p.key_begin) * p.scale_stride;
      box.scale = (const T*)p.scale + key_row;
      box.valid = (const typename Box::Bits*)p.valid + key_row;
      box.index_begin = p.index_begin + (row + offset) * p.index_stride;
      const int64_t query_row = (row - p.query_begin) * p.score_stride;
      box.best = {(T*)p.score + query_row, p.index + query_row,
                  p.second ? (T*)p.second + query_row : nullptr};
      if (!inside) {
        box.run(0, p.query.columns);
        continue;
      }
      const P* const query = (const P*)p.query.rows + (y - p.query.first_row) * p.query.row_stride;
      const P* const key = (const P*)p.key.rows + (y + offset - p.key.first_row) * p.key.row_stride;
      int64_t m = 0;
      for (int64_t panel = 0; panel < panels.count; ++panel) {
        const int64_t begin = panels.begin(panel), end = panels.begin(panel + 1);
        multiply_panel<E>(query + begin * p.depth, end - begin, key, vectors, p.depth,
                          first_product + begin * (layout.product_stride - 1), layout.product_stride - 1);
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
#ifdef TTSR_BFLOAT16
  if (element == Element::kBFloat16) return search_elements<BFloat16Pair>(p, kernel_size);
  avx512::search_kernel(p, element, kernel_size);
#else
  if (element == Element::kDouble) return search_elements<Plain<double> >(p, kernel_size);
  search_elements<Plain<float> >(p, kernel_size);
#endif
}

}  // namespace TTSR_ISA
}  // namespace ttsr_fast
