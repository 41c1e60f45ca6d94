#include "weighted_sum.h"

#define TTSR_INLINE inline __attribute__((always_inline))

namespace ttsr_fast {

namespace {

// A block of fixed size, summed in registers.
template <int kPlanes, int kRows, int kColumns, class In, class S, class Out>
TTSR_INLINE void sum_fixed(const Blocks<const In>& map, const Source<S>* sources, int64_t count,
                           const Blocks<Out>& out) {
  S sum[kPlanes][kRows][kColumns] = {};
  for (int64_t n = 0; n < count; ++n) {
    const In* block = map.data + sources[n].offset;
    const S weight = sources[n].weight;
    // Without it, compilers vectorise over the sources, element by element.
    asm volatile("" : "+r"(block));
    for (int p = 0; p < kPlanes; ++p) {
      for (int r = 0; r < kRows; ++r) {
        for (int c = 0; c < kColumns; ++c) sum[p][r][c] += weight * S(block[p * map.plane + r * map.row + c]);
      }
    }
  }
  for (int p = 0; p < kPlanes; ++p) {
    for (int r = 0; r < kRows; ++r) {
      for (int c = 0; c < kColumns; ++c) out.data[p * out.plane + r * out.row + c] = Out(sum[p][r][c]);
    }
  }
}

// A square block, in any number of planes.
template <int kSide, class In, class S, class Out>
TTSR_INLINE void sum_square(const Blocks<const In>& map, const Source<S>* sources, int64_t count,
                            int64_t planes, const Blocks<Out>& out) {
  constexpr int kPlanes = planes_at_a_time(kSide);
  int64_t p = 0;
  for (; p + kPlanes <= planes; p += kPlanes) {
    sum_fixed<kPlanes, kSide, kSide>(map.at(p, 0), sources, count, out.at(p, 0));
  }
  for (; p < planes; ++p) sum_fixed<1, kSide, kSide>(map.at(p, 0), sources, count, out.at(p, 0));
}

template <class In, class S, class Out>
TTSR_INLINE void sum_row(const In* map, const Source<S>* sources, int64_t count, int64_t columns, Out* out) {
  const auto sum = [&](auto width, int64_t c) {
    sum_fixed<1, 1, decltype(width)::value>(Blocks<const In>{map + c, 0, 0}, sources, count,
                                            Blocks<Out>{out + c, 0, 0});
  };
  int64_t c = 0;
  for (; c + 64 <= columns; c += 64) sum(std::integral_constant<int, 64>(), c);
  for (; c + 8 <= columns; c += 8) sum(std::integral_constant<int, 8>(), c);
  for (; c < columns; ++c) sum(std::integral_constant<int, 1>(), c);
}

template <class In, class S, class Out>
TTSR_INLINE void sum_any(const Blocks<const In>& map, const Source<S>* sources, int64_t count,
                         const Extent& block, const Blocks<Out>& out) {
  if (block.rows == block.columns) {
    if (block.rows == 1) return sum_square<1>(map, sources, count, block.planes, out);
    if (block.rows == 2) return sum_square<2>(map, sources, count, block.planes, out);
    if (block.rows == 4) return sum_square<4>(map, sources, count, block.planes, out);
  }
  for (int64_t p = 0; p < block.planes; ++p) {
    for (int64_t r = 0; r < block.rows; ++r) {
      sum_row(map.at(p, r).data, sources, count, block.columns, out.at(p, r).data);
    }
  }
}

}  // namespace

#define TTSR_DEFINE(In, Out) \
  TTSR_CLONES TTSR_SUM_BLOCKS(In, Out) { sum_any(map, sources, count, block, out); }
TTSR_SUM_BLOCKS_OF_ALL_TYPES(TTSR_DEFINE)
#undef TTSR_DEFINE

}  // namespace ttsr_fast
