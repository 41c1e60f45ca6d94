#include "pack.h"

#include <bit>
#include <cmath>
#include <limits>

namespace ttsr_fast {

namespace {

// Width of a tile, in bytes of a row of products. The working set of the kernel stays in the L2 cache:
// partial sums (query tile x key tile x row offsets x (kernel_size - 1)) and the pixels of a few rows.
int64_t tile_bytes(Side side, int kernel_size) {
  if (side == Side::kKey) return kKeyTileBytes;
  return kernel_size <= 3 ? 256 : 512;  // the halo costs more
}

// Limits of a chunk, so that memory does not grow with the image.
constexpr int64_t kChunkBytes = 128 << 20, kChunkPatches = 1 << 18;

int64_t element_bytes(Element e) { return e == Element::kDouble ? 8 : 4; }

// Channels of a row that are packed together: they stay in the L1 cache between the steps.
constexpr int64_t kChannelBlock = 16;

// Copies `channels` rows of pixels from one address as [channels][pixels], `stride` elements apart.
template <class S, class T>
void load_rows(const T* from, int64_t stride_c, int64_t stride_w, int64_t channels, int64_t pixels,
               int64_t stride, S* rows) {
  if (stride_w == 1) {
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t u = 0; u < pixels; ++u) rows[c * stride + u] = S(from[c * stride_c + u]);
    }
    return;
  }
  for (int64_t u = 0; u < pixels; ++u) {
    for (int64_t c = 0; c < channels; ++c) rows[c * stride + u] = S(from[c * stride_c + u * stride_w]);
  }
}

// Rounded to bfloat16, ties to even, at most to its largest number; denormals are 0, as a tile unit takes
// them.
inline float rounded_to_bfloat16(float x) {
  constexpr float kLargest = 0x1.fep127f;
  const uint32_t bits = std::bit_cast<uint32_t>(std::clamp(x, -kLargest, kLargest));
  const float rounded = std::bit_cast<float>((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u);
  return std::fabs(rounded) < std::numeric_limits<float>::min() ? 0 : rounded;
}

// Makes pairs of the rows of two channels: bfloat16 values, which are the upper halves of floats.
void pair_rows(float* rows, int64_t channels, int64_t stride) {
  if (channels % 2) std::fill(rows + channels * stride, rows + (channels + 1) * stride, 0.f);
  for (int64_t c = 0; c < channels; c += 2) {
    const float* even = rows + c * stride;
    float* pair = rows + c / 2 * stride;
    for (int64_t u = 0; u < stride; ++u) {
      const uint32_t low = std::bit_cast<uint32_t>(even[u]), high = std::bit_cast<uint32_t>(even[stride + u]);
      pair[u] = std::bit_cast<float>(low >> 16 | (high & 0xffff0000u));
    }
  }
}

// Splits rows of features into two parts, and adds up the squares of the low parts and of what both leave
// out.
void split_rows(float* features, float* low, int64_t rows, int64_t pixels, int64_t stride, double* low_square,
                double* left_out_square) {
  constexpr int64_t kMost = kKeyTileBytes / sizeof(float);
  float low_sum[kMost] = {}, left_out_sum[kMost] = {};
  for (int64_t r = 0; r < rows; ++r) {
    float *const high = features + r * stride, *const rest = low + r * stride;
    for (int64_t u = 0; u < pixels; ++u) {
      const float feature = high[u];
      high[u] = rounded_to_bfloat16(feature);
      const float error = feature - high[u];
      rest[u] = rounded_to_bfloat16(error);
      const float left_out = error - rest[u];
      low_sum[u] += rest[u] * rest[u];
      left_out_sum[u] += left_out * left_out;
    }
    std::fill(rest + pixels, rest + stride, 0.f);
  }
  for (int64_t u = 0; u < pixels; ++u) {
    low_square[u] += double(low_sum[u]);
    left_out_square[u] += double(left_out_sum[u]);
  }
}

// Bounds instead of the squares that can have vanished in float: |l| <= 1.004 2^-8 |x|, |e| <= 2^-16 |x|, or
// less than the least normal number for each part that was a denormal.
void bound_small_pixels(int64_t pixels, int64_t channels, double* const* square) {
  for (int64_t u = 0; u < pixels; ++u) {
    const double features = square[Packed::kFeatures][u];
    if (features >= std::ldexp(1, -60)) continue;
    square[Packed::kLowParts][u] = std::ldexp(1.01 * features, -16);
    square[Packed::kLeftOut][u] = std::ldexp(features, -31) + std::ldexp(double(channels), -249);
  }
}

// Packs kCount pixels of all rows as [rows][kCount].
template <int kCount, class S>
void pack_columns(const S* from, int64_t stride, int64_t rows, S* out) {
  for (int64_t c = 0; c < rows; ++c) {
    for (int u = 0; u < kCount; ++u) out[c * kCount + u] = from[c * stride + u];
  }
}

template <class S>
void pack_columns(const S* from, int64_t stride, int64_t rows, int64_t count, S* out) {
  switch (count) {
    case 1: return pack_columns<1>(from, stride, rows, out);
    case 2: return pack_columns<2>(from, stride, rows, out);
    case 3: return pack_columns<3>(from, stride, rows, out);
    case 4: return pack_columns<4>(from, stride, rows, out);
    case 5: return pack_columns<5>(from, stride, rows, out);
    case 6: return pack_columns<6>(from, stride, rows, out);
    case 8: return pack_columns<8>(from, stride, rows, out);
    case 16: return pack_columns<16>(from, stride, rows, out);
  }
}

}  // namespace

Packed::Packed(Side side_, const Tensor& x, Element element_, int kernel_size_, int64_t padding_,
               const Isa& isa)
    : side(side_), element(element_), kernel_size(kernel_size_), padding(padding_),
      lanes(isa.vector_bytes / element_bytes(element_)),
      blocks(isa.tiles && element_ != Element::kFloat && element_ != Element::kDouble), channels(x.size(1)),
      depth(x.size(1)), height(x.size(2)), width(x.size(3)),
      grid_height(height + 2 * padding - kernel_size + 1), grid_width(width + 2 * padding - kernel_size + 1),
      rounded(element_ == Element::kBFloat16 && x.scalar_type() != ScalarType::BFloat16) {
  if (blocks) {
    depth = parts() * round_up(channels, kTileChannels) / 2;
  } else if (element == Element::kBFloat16) {
    depth = (channels + 1) / 2;
  }
  const int64_t widest = tile_bytes(side, kernel_size) / element_bytes(element);
  if (side == Side::kQuery && !blocks) {  // equal tiles
    const int64_t halo = kernel_size - 1, count = (width - halo + widest - halo - 1) / (widest - halo);
    set_tiles(count > 1 ? (width - halo + count - 1) / count + halo : std::max<int64_t>(width, kernel_size));
  } else {  // whole vectors; the width with the fewest unused lanes, the widest of several
    const int64_t narrowest = round_up(kernel_size, lanes);
    int64_t best = narrowest;
    for (int64_t p = narrowest; p <= widest; p += lanes) {
      if (set_tiles(p) <= set_tiles(best)) best = p;
    }
    set_tiles(best);
  }
  for (int64_t t = 0; t < tiles; ++t) offset_.push_back(t ? offset_[t - 1] + stored_pixels(t - 1) : 0);
  const int64_t row_bytes = (offset_.back() + stored_pixels(tiles - 1)) * depth * element_bytes(element);
  chunk_rows = std::min(kChunkBytes / row_bytes - kernel_size + 1, kChunkPatches / grid_width);
  chunk_rows = std::clamp<int64_t>(chunk_rows, 1, grid_height);
  const int64_t image_rows = std::min(chunk_rows + kernel_size - 1, height);
  squares_at_ = round_up(image_rows * row_bytes, 64);
  memory_ = scratch(squares_at_ + norms() * image_rows * width * int64_t(sizeof(double)));
}

// Splits the columns into tiles of that many pixels, halo included. Returns the stored pixels of a row.
int64_t Packed::set_tiles(int64_t pixels) {
  const int64_t halo = kernel_size - 1;
  tile_pixels = pixels;
  tiles = std::max<int64_t>(1, (width - halo + pixels - halo - 1) / (pixels - halo));
  int64_t stored = 0;
  for (int64_t t = 0; t < tiles; ++t) stored += stored_pixels(t);
  return stored;
}

Tile Packed::tile(int64_t t) const {
  Tile tile;
  tile.first_row = row_begin();
  tile.height = height;
  const int64_t stop = t + 1 < tiles ? tile_begin(t + 1) : grid_width;
  tile.columns = stop - tile_begin(t);
  const int64_t first = tile_begin(t) - padding, start = std::max<int64_t>(first, 0);
  tile.left = start - first;
  tile.pixels = std::min(width, stop - padding + kernel_size - 1) - start;
  tile.rows =
      data_of<char>(memory_) + offset_[t] * (row_end() - row_begin()) * depth * element_bytes(element);
  tile.row_stride = stored_pixels(t) * depth;
  return tile;
}

int64_t Packed::stored_pixels(int64_t t) const {
  const int64_t start = std::max<int64_t>(tile_begin(t) - padding, 0);
  const int64_t stop = t + 1 < tiles ? tile_begin(t + 1) - padding + kernel_size - 1 : width;
  return side == Side::kKey || blocks ? round_up(stop - start, lanes) : stop - start;
}

// Sums the squares of a patch row by row, for several patches at once.
void Packed::set_norms(int64_t y, int64_t begin, int64_t count, Norm which, double* norms) const {
  std::fill(norms, norms + count, 0.0);
  for (int64_t v = std::max<int64_t>(y - padding, 0); v < std::min(height, y - padding + kernel_size); ++v) {
    const double* const row = squares(v, which);
    for (int64_t u = begin - padding; u < begin - padding + kernel_size; ++u) {
      const int64_t first = std::max<int64_t>(-u, 0), last = std::min(width - u, count);
      for (int64_t x = first; x < last; ++x) norms[x] += row[u + x];
    }
  }
  for (int64_t x = 0; x < count; ++x) norms[x] = std::sqrt(norms[x]);
}

void Packed::fill(const Tensor& x, int64_t n, int64_t begin_, int64_t end_, int64_t threads,
                  const int32_t* stop) {
  begin = begin_;
  end = end_;
  with_element(x, [&](auto element) {
    const Maps<const decltype(element)> maps(x);
    const int64_t rows = row_end() - row_begin();
    const auto fill_row = [&](int64_t row, int64_t) {
      if (!stopped(stop)) this->fill_row(maps, n, row_begin() + row);
    };
    parallel_tasks(rows, 1.5 * rows * width * channels, fill_row, threads);
  });
}

template <class T>
void Packed::fill_row(const Maps<const T>& maps, int64_t n, int64_t y) {
  using S = Sum<T>;
  constexpr int64_t kBlock = kChannelBlock * kKeyTileBytes / sizeof(S);
  S block[2 * kBlock];
  S* const low = block + kBlock;
  const bool pairs = element != Element::kFloat && element != Element::kDouble, two = parts() == 2;
  for (int64_t t = 0; t < tiles; ++t) {
    const Tile tile = this->tile(t);
    const int64_t start = tile_begin(t) - padding + tile.left, pixels = tile.pixels;
    const int64_t stride = stored_pixels(t);
    double* square[3];
    for (int64_t which = 0; which < norms(); ++which) {
      square[which] = squares(y, Norm(which)) + start;
      std::fill(square[which], square[which] + pixels, 0.0);
    }
    S* const out = static_cast<S*>(const_cast<void*>(tile.rows)) + (y - row_begin()) * tile.row_stride;
    for (int64_t c = 0; c < (blocks ? round_up(channels, kTileChannels) : channels); c += kChannelBlock) {
      const int64_t count = std::clamp<int64_t>(channels - c, 0, kChannelBlock);
      if (count)
        load_rows(maps.at(n, c, y, start), maps.stride_c, maps.stride_w, count, pixels, stride, block);
      for (int64_t r = 0; r < count; ++r) {
        S* const row = block + r * stride;
        if (rounded) {
          for (int64_t u = 0; u < pixels; ++u) {
            square[kAsGiven][u] += double(row[u]) * double(row[u]);
            row[u] = S(float(BFloat16(float(row[u]))));
          }
        }
        for (int64_t u = 0; u < pixels; ++u) {
          square[kFeatures][u] += double(row[u]) * double(row[u]);
          // Not finite features decide by their norm. As numbers they would spoil the scores beside them.
          row[u] = std::fabs(row[u]) <= std::numeric_limits<S>::max() ? row[u] : S(0);
        }
        std::fill(row + pixels, row + stride, S(0));
      }
      if constexpr (sizeof(S) == sizeof(float)) {
        if (two) split_rows(block, low, count, pixels, stride, square[kLowParts], square[kLeftOut]);
        if (blocks) {
          for (int64_t part = 0; part < parts(); ++part) {
            S* const rows = part ? low : block;
            std::fill(rows + count * stride, rows + kChannelBlock * stride, 0.f);
            pair_rows(rows, kChannelBlock, stride);
            pack_blocks(rows, stride, c, part, out);
          }
          continue;
        }
        if (pairs) pair_rows(block, count, stride);
      }
      Panels panels(stride);
      if (side == Side::kKey) panels.count = stride / lanes;
      const int64_t rows = pairs ? (count + 1) / 2 : count, first = pairs ? c / 2 : c;
      for (int64_t p = 0; p < panels.count; ++p) {
        const int64_t u = side == Side::kKey ? p * lanes : panels.begin(p);
        const int64_t panel = side == Side::kKey ? lanes : panels.begin(p + 1) - u;
        pack_columns(block + u, stride, rows, panel, out + u * depth + first * panel);
      }
    }
    if (two) bound_small_pixels(pixels, channels, square);
  }
}

// Packs one part of kChannelBlock channels, from c on, in pairs.
void Packed::pack_blocks(const float* rows, int64_t stride, int64_t c, int64_t part, float* out) const {
  constexpr int64_t kPairs = kTileChannels / 2, kRows = kChannelBlock / 2;
  const int64_t first = c % kTileChannels / 2;
  for (int64_t u = 0; u < stride; u += kTilePixels) {
    float* const block = out + u * depth + (c / kTileChannels * parts() + part) * kPairs * kTilePixels;
    if (side == Side::kKey) {
      pack_columns<kTilePixels>(rows + u, stride, kRows, block + first * kTilePixels);
    } else {
      for (int64_t x = 0; x < kTilePixels; ++x) {
        for (int64_t r = 0; r < kRows; ++r) block[x * kPairs + first + r] = rows[r * stride + u + x];
      }
    }
  }
}

}  // namespace ttsr_fast
