// The parameters of one walk of the patch search, shared by the code that plans walks and the kernels.
//
// M(i, j) is the inner product of key pixel i and query pixel j. A walk takes one column tile of the query
// and one of the key and steps down both images at once: at a fixed row offset `delta` the three
// (kernel_size) rows of M that a patch needs are those of consecutive steps, so they are added up in place,
// and every M(i, j) is computed exactly once.
#pragma once

#include <cstdint>

namespace ttsr_fast {

enum class Element { kFloat, kDouble, kBFloat16 };  // kBFloat16: pairs of channels, summed in float

// A column tile of one image, packed for the matrix kernel.
struct Tile {
  const void* rows;    // packed pixels, from image row `first_row` on
  int64_t row_stride;  // elements: float, double, or a 32-bit pair of bfloat16
  int64_t first_row;
  int64_t height;   // of the image
  int64_t columns;  // patch positions in the tile
  int64_t pixels;   // columns of the image that its patches touch
  int64_t left;     // zero columns before the first of them
};

struct BoxMaxParams {
  int64_t depth;  // packed elements per pixel
  int64_t padding;
  int64_t delta_begin, delta_end;  // key row - query row; these walk together, reading key rows once
  int64_t row_begin, row_end;      // rows of the query grid, of a band of the query
  int64_t key_begin, key_end;      // rows of the key grid, of a band of the key
  Tile query, key;
  const void* scale;  // [key_end - key_begin][scale_stride], factor of every key patch
  const void* valid;  // the same shape, all-ones or zero bits of the same width
  int64_t scale_stride;
  int64_t index_begin;   // key grid position of the tile's first column in row 0
  int64_t index_stride;  // width of the key grid
  void* score;           // best so far, at the tile's first column of row row_begin
  int64_t* index;
  int64_t score_stride;
  void* workspace;      // WalkLayout::size() elements of the score, aligned to 64
  const int32_t* stop;  // the walk ends when this is no longer 0; may be null
};

inline __attribute__((always_inline)) bool stopped(const int32_t* stop) {
  return stop && __atomic_load_n(stop, __ATOMIC_RELAXED) != 0;
}

// What one instruction set offers.
struct Isa {
  const char* name;
  int64_t vector_bytes;
  bool bfloat16;  // whether it multiplies pairs of bfloat16
  void (*walk)(const BoxMaxParams&, Element, int kernel_size);
};

// Whether (score, index) goes before (best, best_index): NaN first, then the larger score, then the lower
// index.
template <class T>
inline __attribute__((always_inline)) bool goes_before(T score, int64_t index, T best, int64_t best_index) {
  const bool nan = score != score, best_nan = best != best;
  if (nan != best_nan) return nan;
  if (!nan && score != best) return score > best;
  return index < best_index;
}

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Query pixels that are packed and multiplied together, at most: with the vectors of keys, a register tile.
constexpr int kPanel = 6;

// The panels of `pixels` query pixels, of nearly equal heights.
struct Panels {
  int64_t count, pixels;
  explicit Panels(int64_t pixels_) : count((pixels_ + kPanel - 1) / kPanel), pixels(pixels_) {}
  int64_t begin(int64_t p) const { return p * pixels / count; }
};

// Layout of a walk's workspace, in elements of the score.
struct WalkLayout {
  int64_t product_stride, product_size, state_stride, state_size, row_size;
  WalkLayout(const Tile& query, const Tile& key, int64_t kernel_size, int64_t lanes)
      : product_stride(round_up(key.columns + kernel_size - 1, lanes) + lanes),
        product_size((query.columns + kernel_size - 1) * product_stride),
        state_stride(round_up(key.columns, lanes)),
        state_size(query.columns * (kernel_size - 1) * state_stride), row_size(state_stride) {}
  int64_t size(int64_t group) const { return product_size + group * state_size + row_size; }
};

}  // namespace ttsr_fast
