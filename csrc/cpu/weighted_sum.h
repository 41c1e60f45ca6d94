// Weighted sums of blocks of a map, the inner loops of gather_fold, for every instruction set.
#pragma once

#include "../common.h"

// One copy of a function for every instruction set. The loader chooses, before the address sanitizer is
// ready.
#if defined(__x86_64__) && defined(__linux__) && !defined(__SANITIZE_ADDRESS__)
#define TTSR_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define TTSR_CLONES
#endif

namespace ttsr_fast {

template <class S>
struct Source {
  int64_t offset;  // of a block's first element, in elements of the map
  S weight;
};

// The size of a block. Columns are contiguous.
struct Extent {
  int64_t planes, rows, columns;

  int64_t size() const { return planes * rows * columns; }
};

// Blocks of a map: the address at offset 0, and the strides inside a block.
template <class T>
struct Blocks {
  T* data;
  int64_t plane, row;

  Blocks at(int64_t p, int64_t r) const { return {data + p * plane + r * row, plane, row}; }
};

// Planes of a narrow block that are summed in one pass over its sources.
constexpr int64_t planes_at_a_time(int64_t columns) { return columns < 8 ? 8 / columns : 1; }

// The block at `out` = sum over sources of weight * block of `map` at offset.
#define TTSR_SUM_BLOCKS(In, Out)                                                              \
  void sum_blocks(const Blocks<const In>& map, const Source<Sum<In>>* sources, int64_t count, \
                  const Extent& block, const Blocks<Out>& out)
#define TTSR_SUM_BLOCKS_OF_ALL_TYPES(f)                                               \
  f(double, double) f(float, float) f(Half, Half) f(BFloat16, BFloat16)   /* whole */ \
      f(Half, float) f(BFloat16, float) f(float, Half) f(float, BFloat16) /* in parts */
#define TTSR_DECLARE(In, Out) TTSR_SUM_BLOCKS(In, Out);
TTSR_SUM_BLOCKS_OF_ALL_TYPES(TTSR_DECLARE)
#undef TTSR_DECLARE

}  // namespace ttsr_fast
