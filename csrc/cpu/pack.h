// Copies of the features in the order in which the search kernel reads them.
#pragma once

#include "isa.h"
#include "parallel.h"

namespace ttsr_fast {

enum class Side { kQuery, kKey };

// A chunk of patch rows of one image, split into column tiles and packed. Query tiles are stored in panels
// [depth][pixels of the panel], key tiles in zero-padded vectors [depth][lanes]. For a tile unit both are in
// blocks of 16 pixels and kTileChannels channels, one for each part: [pixel][pair] of the query,
// [pair][pixel] of the key.
struct Packed {
  Side side;
  Element element;
  int kernel_size;
  int64_t padding, lanes;
  bool blocks;              // for a tile unit
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
  int64_t bytes() const { return memory_.numel(); }

  int64_t parts() const { return element == Element::kBFloat16Parts ? 2 : 1; }

  // What a patch has a norm of: the features, rounded if only that is packed; then the features as given,
  // with two parts the low parts and what both leave out.
  enum Norm { kFeatures, kAsGiven = 1, kLowParts = 1, kLeftOut = 2 };
  int64_t norms() const { return parts() == 2 ? 3 : rounded ? 2 : 1; }

  // Choices are approximate, scores are computed again.
  bool approximate() const { return parts() == 2 || rounded; }

  // Calls f(x, norm) for the patches [begin, end) of row y.
  template <class F>
  void patch_norms(int64_t y, int64_t begin, int64_t end, const F& f, Norm which = kFeatures) const {
    double norms[64];
    for (int64_t x = begin; x < end; x += 64) {
      const int64_t count = std::min<int64_t>(64, end - x);
      set_norms(y, x, count, which, norms);
      for (int64_t j = 0; j < count; ++j) f(x + j, norms[j]);
    }
  }

 private:
  std::vector<int64_t> offset_;  // of every tile, in pixels of a stored row
  Tensor memory_;                // [tiles][image rows][stored pixels of the tile], then
  int64_t squares_at_;           // [norms][image rows, width] double: squared norms of every pixel

  int64_t row_begin() const { return std::max<int64_t>(begin - padding, 0); }
  int64_t row_end() const { return std::min(end - padding + kernel_size - 1, height); }
  int64_t stored_pixels(int64_t t) const;
  int64_t set_tiles(int64_t pixels);
  double* squares(int64_t y, Norm which) const {
    const int64_t rows = std::min(chunk_rows + kernel_size - 1, height);
    double* const first = reinterpret_cast<double*>(mutable_data_of<char>(memory_) + squares_at_);
    return first + (which * rows + y - row_begin()) * width;
  }
  void set_norms(int64_t y, int64_t begin, int64_t count, Norm which, double* norms) const;
  template <class T>
  void fill_row(const Maps<const T>& maps, int64_t n, int64_t y);
  void pack_blocks(const float* rows, int64_t stride, int64_t c, int64_t part, float* out) const;
};

}  // namespace ttsr_fast
