// Copies of the features in the order in which the search kernel reads them.
#pragma once

#include "isa.h"
#include "parallel.h"

namespace ttsr_fast {

enum class Side { kQuery, kKey };

// A chunk of patch rows of one image, split into column tiles and packed. Query tiles are stored in panels
// [depth][pixels of the panel], key tiles in zero-padded vectors [depth][lanes].
struct Packed {
  Side side;
  Element element;
  int kernel_size;
  int64_t padding, lanes;
  int64_t channels, depth;  // depth: packed elements per pixel
  int64_t height, width;    // of the image
  int64_t grid_height, grid_width;
  int64_t tiles, tile_pixels;
  int64_t chunk_rows;          // most patch rows of a chunk
  int64_t begin = 0, end = 0;  // patch rows of the chunk
  bool rounded;                // features are rounded to bfloat16

  Packed(Side side, const Tensor& x, Element element, int kernel_size, int64_t padding, const Isa& isa);

  // Packs patch rows [begin, end) of image n on at most `threads` threads; ends early if `stop` is set.
  void fill(const Tensor& x, int64_t n, int64_t begin, int64_t end, int64_t threads, const int32_t* stop);
  Tile tile(int64_t t) const;
  int64_t tile_begin(int64_t t) const { return t ? padding + t * (tile_pixels - kernel_size + 1) : 0; }
  int64_t bytes() const { return rows_.numel(); }

  // Calls f(x, norm) for the patches [begin, end) of row y, with the norm of their packed values.
  template <class F>
  void patch_norms(int64_t y, int64_t begin, int64_t end, const F& f) const {
    double norms[64];
    for (int64_t x = begin; x < end; x += 64) {
      const int64_t count = std::min<int64_t>(64, end - x);
      set_norms(y, x, count, norms);
      for (int64_t j = 0; j < count; ++j) f(x + j, norms[j]);
    }
  }

 private:
  std::vector<int64_t> offset_;  // of every tile, in pixels of a stored row
  Tensor rows_;                  // [tiles][image rows][stored pixels of the tile]
  Tensor squared_;               // [image rows, width] double: squared norm of every pixel

  int64_t row_begin() const { return std::max<int64_t>(begin - padding, 0); }
  int64_t row_end() const { return std::min(end - padding + kernel_size - 1, height); }
  int64_t stored_pixels(int64_t t) const;
  int64_t set_tiles(int64_t pixels);
  void set_norms(int64_t y, int64_t begin, int64_t count, double* norms) const;
  template <class T>
  void fill_row(const Maps<const T>& maps, int64_t n, int64_t y);
};

}  // namespace ttsr_fast
