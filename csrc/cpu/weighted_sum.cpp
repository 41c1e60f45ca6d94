#include "weighted_sum.h"

namespace ttsr_fast {

namespace {

// Long sums are split into partial sums of this many sources, which bounds their rounding error.
constexpr int64_t kPartial = 256;
constexpr int64_t kBlock = 64;  // elements summed in registers

// The elements that one sum covers: rows x cols of a block, in each of some planes.
template <int kPlanes, int kRows, int kCols, class T, class S>
inline __attribute__((always_inline)) void sum_fixed(const Planes<const T>& map, const Source<S>* sources,
                                                     int64_t count, const Planes<T>& out) {
  S total[kPlanes][kRows][kCols] = {};
  for (int64_t begin = 0; begin < count; begin += kPartial) {
    S sum[kPlanes][kRows][kCols] = {};
    const int64_t end = begin + kPartial < count ? begin + kPartial : count;
    for (int64_t n = begin; n < end; ++n) {
      const T* block = map.data + sources[n].offset;
      const S weight = sources[n].weight;
      for (int p = 0; p < kPlanes; ++p) {
        for (int r = 0; r < kRows; ++r) {
          for (int c = 0; c < kCols; ++c) sum[p][r][c] += weight * S(block[p * map.plane + r * map.row + c]);
        }
      }
    }
    for (int p = 0; p < kPlanes; ++p) {
      for (int r = 0; r < kRows; ++r) {
        for (int c = 0; c < kCols; ++c) total[p][r][c] += sum[p][r][c];
      }
    }
  }
  for (int p = 0; p < kPlanes; ++p) {
    for (int r = 0; r < kRows; ++r) {
      for (int c = 0; c < kCols; ++c) out.data[p * out.plane + r * out.row + c] = T(total[p][r][c]);
    }
  }
}

template <class T>
inline __attribute__((always_inline)) Planes<T> shifted(const Planes<T>& x, int64_t plane, int64_t row,
                                                        int64_t column) {
  return {x.data + plane * x.plane + row * x.row + column, x.row, x.plane};
}

template <class T, class S>
inline __attribute__((always_inline)) void sum_any(const Planes<const T>& map, const Source<S>* sources,
                                                   int64_t count, int64_t stride, int64_t planes,
                                                   const Planes<T>& out) {
  int64_t p = 0;
  for (; stride == 1 && p + 8 <= planes; p += 8) {
    sum_fixed<8, 1, 1>(shifted(map, p, 0, 0), sources, count, shifted(out, p, 0, 0));
  }
  for (; p < planes; ++p) {
    if (stride == 2) {
      sum_fixed<1, 2, 2>(shifted(map, p, 0, 0), sources, count, shifted(out, p, 0, 0));
    } else if (stride == 4) {
      sum_fixed<1, 4, 4>(shifted(map, p, 0, 0), sources, count, shifted(out, p, 0, 0));
    } else {
      for (int64_t r = 0; r < stride; ++r) {
        for (int64_t c = 0; c < stride; ++c) {
          sum_fixed<1, 1, 1>(shifted(map, p, r, c), sources, count, shifted(out, p, r, c));
        }
      }
    }
  }
}

template <class T, class S>
inline __attribute__((always_inline)) void sum_long(const T* map, const Source<S>* sources, int64_t count,
                                                    int64_t length, T* out) {
  const auto sum = [&](auto width, int64_t i) {
    sum_fixed<1, 1, decltype(width)::value>(Planes<const T>{map + i, 0, 0}, sources, count,
                                            Planes<T>{out + i, 0, 0});
  };
  int64_t i = 0;
  for (; i + kBlock <= length; i += kBlock) sum(std::integral_constant<int, kBlock>(), i);
  for (; i + 8 <= length; i += 8) sum(std::integral_constant<int, 8>(), i);
  for (; i < length; ++i) sum(std::integral_constant<int, 1>(), i);
}

}  // namespace

#define TTSR_INSTANTIATE(T, S)                                                                        \
  TTSR_CLONES void sum_blocks(const Planes<const T>& map, const Source<S>* sources, int64_t count,    \
                              int64_t stride, int64_t planes, const Planes<T>& out) {                 \
    sum_any(map, sources, count, stride, planes, out);                                                \
  }                                                                                                   \
  TTSR_CLONES void sum_vectors(const T* map, const Source<S>* sources, int64_t count, int64_t length, \
                               T* out) {                                                              \
    sum_long(map, sources, count, length, out);                                                       \
  }
TTSR_INSTANTIATE(float, float)
TTSR_INSTANTIATE(double, double)
TTSR_INSTANTIATE(Half, float)
TTSR_INSTANTIATE(BFloat16, float)
#undef TTSR_INSTANTIATE

}  // namespace ttsr_fast
