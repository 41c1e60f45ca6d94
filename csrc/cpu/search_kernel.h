// Parameters of the search kernel, and what the kernel shares with the code that calls it.
//
// M(i, j) is the inner product of key pixel i and query pixel j. The kernel takes one column tile of each map
// and moves down both, one row at a time. At a fixed row offset, the kernel_size rows of M that a patch sums
// belong to consecutive steps: partial sums are kept between steps, and every M(i, j) is computed once.
#pragma once

#include <cstdint>
#include <type_traits>

#define TTSR_INLINE inline __attribute__((always_inline))

namespace ttsr_fast {

// What the kernel multiplies; bfloat16 in pairs of channels, summed in float.
enum class Element {
  kFloat,
  kDouble,
  kBFloat16,       // features rounded once
  kBFloat16Parts,  // float as the sum of two, of which the product of the low ones is left out
};

// Channels in bfloat16 of a pixel lie in blocks, one for each part, if a tile unit multiplies them.
constexpr int64_t kTileChannels = 32, kTilePixels = 16;

// A column tile of one image, packed for the matrix product.
struct Tile {
  const void* rows;    // packed pixels, from image row `first_row` on
  int64_t row_stride;  // elements: float, double, or a 32-bit pair of bfloat16
  int64_t first_row;
  int64_t height;   // of the image
  int64_t columns;  // patch columns
  int64_t pixels;   // image columns that the patches cover
  int64_t left;     // zero columns before them
};

struct SearchKernelParams {
  int64_t depth;  // packed elements per pixel
  int64_t padding;
  int64_t offset_begin, offset_end;  // key row - query row
  int64_t query_begin, query_end;    // patch rows of the query chunk
  int64_t key_begin, key_end;        // patch rows of the key chunk
  Tile query, key;
  const void* scale;  // [key_end - key_begin, scale_stride], factor of every key patch, 0 where not valid;
                      // kScalePadding vectors of 0 lie before and after every row
  const void* valid;  // [key_end - key_begin, scale_stride], all bits set or none
  int64_t scale_stride;
  int64_t index_begin;   // index of the key tile's first patch in row 0
  int64_t index_stride;  // patches in a row of the key grid
  void* score;           // [keep][query_end - query_begin, score_stride], best scores so far, descending
  int64_t* index;        // [keep][query_end - query_begin, score_stride], their keys
  int64_t score_stride;
  int64_t keep;         // scores of a query patch
  int64_t keep_stride;  // from one score of a patch to the next best
  void* workspace;      // Workspace::size() elements of the score, aligned to 64 bytes
  const int32_t* stop;  // another thread sets it to end the kernel early; may be null
};

TTSR_INLINE bool stopped(const int32_t* stop) { return stop && __atomic_load_n(stop, __ATOMIC_RELAXED) != 0; }

// Order of candidates: NaN first, then the larger score, then the lower index.
template <class T>
TTSR_INLINE bool ranks_before(T score, int64_t index, T best, int64_t best_index) {
  const bool nan = score != score, best_nan = best != best;
  if (nan != best_nan) return nan;
  if (!nan && score != best) return score > best;
  return index < best_index;
}

// Inserts a candidate into a list of scores in that order, if it ranks before the last one, which is dropped.
template <class T>
TTSR_INLINE void insert_ranked(T candidate, int64_t candidate_index, T* score, int64_t* index, int64_t keep,
                               int64_t stride) {
  int64_t at = (keep - 1) * stride;
  if (!ranks_before(candidate, candidate_index, score[at], index[at])) return;
  for (; at > 0; at -= stride) {
    const int64_t above = at - stride;
    if (!ranks_before(candidate, candidate_index, score[above], index[above])) break;
    score[at] = score[above];
    index[at] = index[above];
  }
  score[at] = candidate;
  index[at] = candidate_index;
}

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Most query pixels of a register tile; key vectors are its other side.
constexpr int kPanel = 6;

// Most query patches that are summed at once; they share rows of M.
constexpr int kBoxRows = 4;
constexpr int64_t kKeyTileBytes = 768;  // most pixels of a key tile, as elements of the score
constexpr int kScalePadding = 2;        // they read so many vectors beyond the columns at most

// Query pixels that are multiplied at once: panels of nearly equal size, or of two tiles.
struct Panels {
  int64_t count, pixels;
  bool tiles;
  explicit Panels(int64_t pixels_, bool tiles_ = false) : pixels(pixels_), tiles(tiles_) {
    const int64_t most = tiles ? 2 * kTilePixels : kPanel;
    count = (pixels + most - 1) / most;
  }
  int64_t begin(int64_t p) const {
    if (!tiles) return p * pixels / count;
    return p < count ? p * 2 * kTilePixels : pixels;
  }
};

// Layout of the kernel's workspace, in elements of the score.
//
// M(m, n) of query pixel m and key pixel n lies at origin + m * product_stride + n - m: every row begins one
// element further left, so that the taps of a patch, on a diagonal of M, are in one column.
// The strides are constants, an odd number of cache lines each.
template <class T>
struct Workspace {
  static constexpr int64_t origin = 128 / sizeof(T);
  static constexpr int64_t product_stride = (kKeyTileBytes + 64) / sizeof(T);
  static constexpr int64_t state_stride = (kKeyTileBytes + 192) / sizeof(T);
  int64_t product_size, slot_size;  // a slot holds the sums along the diagonals for one image row
  int64_t state_size;               // of one row offset: kernel_size - 1 slots
  Workspace(const Tile& query, int64_t kernel_size)
      : product_size(origin + (query.columns + kernel_size + kTilePixels) * product_stride),
        slot_size(query.columns * state_stride), state_size((kernel_size - 1) * slot_size) {}
  int64_t size(int64_t offsets) const { return product_size + offsets * state_size; }
};

}  // namespace ttsr_fast
