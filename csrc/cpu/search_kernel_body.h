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
  for (int m = 0; m < kRows; ++m) {
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

// One query patch against a row of key patches: adds the diagonal taps of M to the partial sums of the rows
// above. With `scores`, completes the patches and returns true if any score exceeds the threshold or is NaN.
template <class T, int kKernel>
bool box_sum_row(const T* product, int64_t product_stride, T* state, int64_t state_stride, int64_t vectors,
                 const T* scale, const void* valid, T threshold, T* scores) {
  using Vector = typename Simd<T>::Vector;
  using Mask = typename Simd<T>::Mask;
  constexpr int64_t L = TTSR_VECTOR_BYTES / sizeof(T);
  Mask any = {};
  for (int64_t v = 0; v < vectors; ++v) {
    Vector sum = {};
    if (product) {
      sum = *(const Vector*)(product + v * L);
#pragma GCC unroll 8
      for (int d = 1; d < kKernel; ++d) sum += *(const Vector*)(product + d * (product_stride + 1) + v * L);
    }
    Vector* partial[kKernel];
    for (int j = 0; j < kKernel - 1; ++j) partial[j] = (Vector*)(state + j * state_stride + v * L);
    Vector total = sum;
    if (kKernel > 1) {
      total = *partial[kKernel > 1 ? kKernel - 2 : 0] + sum;
#pragma GCC unroll 8
      for (int j = kKernel - 2; j > 0; --j) *partial[j] = *partial[j - 1] + sum;
      *partial[0] = sum;
    }
    if (scores) {
      const Vector score = total * *(const Vector*)(scale + v * L);
      *(Vector*)(scores + v * L) = score;
      any |= ~(Mask)(score <= threshold) & *((const Mask*)valid + v);
    }
  }
  if (!scores) return false;
  typename std::remove_reference<decltype(any[0])>::type bits = 0;
  for (int64_t n = 0; n < L; ++n) bits |= any[n];
  return bits != 0;
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

// Merges a row of scores into the best score and its index.
template <class T, class Bits>
void update_argmax(const T* scores, const Bits* valid, int64_t columns, int64_t index_begin, T& best,
                   int64_t& index) {
  for (int64_t n = 0; n < columns; ++n) {
    if (valid[n] && ranks_before(scores[n], index_begin + n, best, index)) {
      best = scores[n];
      index = index_begin + n;
    }
  }
}

template <class E, int kKernel>
void search_tiles(const SearchKernelParams& p) {
  using T = typename E::Score;
  using P = typename E::Packed;
  using Bits = typename std::remove_reference<decltype(typename Simd<T>::Mask{}[0])>::type;
  constexpr int64_t L = lanes<E>();
  const Workspace layout(p.query, p.key, kKernel, L);
  T* const product = (T*)p.workspace;
  T* const state = product + layout.product_size;
  T* const scores = state + (p.offset_end - p.offset_begin) * layout.state_size;
  const int64_t vectors = round_up(p.key.pixels, L) / L, box_vectors = layout.state_stride / L;
  const Panels panels(p.query.pixels);
  for (T* zero = product; zero < scores; ++zero) *zero = 0;

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
      const bool complete = row >= low;
      T* const sums = state + (offset - p.offset_begin) * layout.state_size;
      const T* const scale = (const T*)p.scale + (row + offset - p.key_begin) * p.scale_stride;
      const Bits* const valid = (const Bits*)p.valid + (row + offset - p.key_begin) * p.scale_stride;
      T* const best = (T*)p.score + (row - p.query_begin) * p.score_stride;
      int64_t* const index = p.index + (row - p.query_begin) * p.score_stride;
      int64_t m = 0;
      for (int64_t panel = 0; panel < (inside ? panels.count : 1); ++panel) {
        int64_t ready = p.query.columns;  // end of the patches with all products computed
        if (inside) {
          const int64_t begin = panels.begin(panel), end = panels.begin(panel + 1);
          multiply_panel<E>(
              (const P*)p.query.rows + (y - p.query.first_row) * p.query.row_stride + begin * p.depth,
              end - begin, (const P*)p.key.rows + (y + offset - p.key.first_row) * p.key.row_stride, vectors,
              p.depth, product + (p.query.left + begin) * layout.product_stride + p.key.left,
              layout.product_stride);
          if (panel + 1 < panels.count) ready = p.query.left + end - (kKernel - 1);
        }
        for (; m < ready; ++m) {
          const int64_t index_begin = p.index_begin + (row + offset) * p.index_stride;
          const T threshold = complete ? threshold_of<T, Bits>(best[m], index[m] < index_begin) : 0;
          const bool improved = box_sum_row<T, kKernel>(
              inside ? product + m * layout.product_stride : nullptr, layout.product_stride,
              sums + m * (kKernel - 1) * layout.state_stride, layout.state_stride, box_vectors, scale, valid,
              threshold, complete ? scores : nullptr);
          if (improved) update_argmax(scores, valid, p.key.columns, index_begin, best[m], index[m]);
        }
      }
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
