// Weighted sums of blocks of a map, the inner loops of gather_fold, compiled for every instruction set.
#pragma once

#include "../common.h"

// One copy of a function for every instruction set; the loader chooses. (The address sanitizer starts later.)
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

// The size of a block. The columns of a row lie side by side.
struct Extent {
  int64_t planes, rows, columns;

  int64_t size() const { return planes * rows * columns; }
};

// A map, as the place from which the offsets of its blocks count and the strides inside every block.
template <class T>
struct Blocks {
  T* data;
  int64_t plane, row;

  Blocks at(int64_t p, int64_t r) const { return {data + p * plane + r * row, plane, row}; }
};

// How many planes of a narrow block are summed at a time, sharing the look at its sources.
constexpr int64_t planes_at_a_time(int64_t columns) { return columns < 8 ? 8 / columns : 1; }

// The block at the beginning of `out` = sum over sources of weight * the block at their offset in `map`.
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
