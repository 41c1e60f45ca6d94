#include "pack.h"

#include <cmath>
#include <cstring>

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

// Packs pixels [begin, begin + count) of `row` ([channels][pixels]) as [depth][stride].
template <class S>
void pack_columns(const S* row, int64_t pixels, int64_t channels, int64_t begin, int64_t count,
                  int64_t stride, Element element, void* out) {
  if (element == Element::kBFloat16) {
    BFloat16* pairs = static_cast<BFloat16*>(out);
    for (int64_t c = 0; c < round_up(channels, 2); ++c) {
      for (int64_t x = 0; x < stride; ++x) {
        const bool inside = c < channels && x < count;
        pairs[((c / 2) * stride + x) * 2 + c % 2] =
            inside ? BFloat16(float(row[c * pixels + begin + x])) : BFloat16(0.f);
      }
    }
    return;
  }
  S* plain = static_cast<S*>(out);
  for (int64_t c = 0; c < channels; ++c) {
    std::memcpy(plain + c * stride, row + c * pixels + begin, count * sizeof(S));
    std::fill(plain + c * stride + count, plain + (c + 1) * stride, S(0));
  }
}

}  // namespace

Packed::Packed(Side side_, const Tensor& x, Element element_, int kernel_size_, int64_t padding_,
               const Isa& isa)
    : side(side_), element(element_), kernel_size(kernel_size_), padding(padding_),
      lanes(isa.vector_bytes / element_bytes(element_)), channels(x.size(1)),
      depth(element_ == Element::kBFloat16 ? (x.size(1) + 1) / 2 : x.size(1)), height(x.size(2)),
      width(x.size(3)), grid_height(height + 2 * padding - kernel_size + 1),
      grid_width(width + 2 * padding - kernel_size + 1),
      rounded(element_ == Element::kBFloat16 && x.scalar_type() != ScalarType::BFloat16) {
  const int64_t widest = tile_bytes(side, kernel_size) / element_bytes(element);
  if (side == Side::kQuery) {  // equal tiles
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
  rows_ = scratch(image_rows * row_bytes);
  squared_ = scratch(image_rows * width * sizeof(double));
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
  tile.rows = data_of<char>(rows_) + offset_[t] * (row_end() - row_begin()) * depth * element_bytes(element);
  tile.row_stride = stored_pixels(t) * depth;
  return tile;
}

int64_t Packed::stored_pixels(int64_t t) const {
  const int64_t start = std::max<int64_t>(tile_begin(t) - padding, 0);
  const int64_t stop = t + 1 < tiles ? tile_begin(t + 1) - padding + kernel_size - 1 : width;
  return side == Side::kKey ? round_up(stop - start, lanes) : stop - start;
}

double Packed::patch_norm(int64_t y, int64_t x) const {
  const double* map = data_of<double>(squared_);
  double sum = 0;
  for (int64_t v = std::max<int64_t>(y - padding, 0); v < std::min(height, y - padding + kernel_size); ++v) {
    for (int64_t u = std::max<int64_t>(x - padding, 0); u < std::min(width, x - padding + kernel_size); ++u) {
      sum += map[(v - row_begin()) * width + u];
    }
  }
  return std::sqrt(sum);
}

void Packed::fill(const Tensor& x, int64_t n, int64_t begin_, int64_t end_, const int32_t* stop) {
  begin = begin_;
  end = end_;
  with_element(x, [&](auto element) {
    const Maps<const decltype(element)> maps(x);
    const int64_t rows = row_end() - row_begin();
    parallel_tasks(rows, 5.0 * rows * width * channels,
                   [&](int64_t row, int64_t) { fill_row(maps, n, row_begin() + row, stop); });
  });
}

template <class T>
void Packed::fill_row(const Maps<const T>& maps, int64_t n, int64_t y, const int32_t* stop) {
  using S = Sum<T>;
  std::vector<S> row;
  std::vector<double> norm;
  for (int64_t t = 0; t < tiles && !stopped(stop); ++t) {
    const Tile tile = this->tile(t);
    const int64_t start = tile_begin(t) - padding + tile.left, pixels = tile.pixels;
    row.resize(channels * pixels);
    norm.assign(pixels, 0.0);
    const auto take = [&](int64_t c, int64_t u) { row[c * pixels + u] = S(*maps.at(n, c, y, start + u)); };
    if (maps.stride_c < maps.stride_w) {
      for (int64_t u = 0; u < pixels; ++u) {
        for (int64_t c = 0; c < channels; ++c) take(c, u);
      }
    } else {
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t u = 0; u < pixels; ++u) take(c, u);
      }
    }
    if (rounded) {
      for (S& value : row) value = S(float(BFloat16(float(value))));
    }
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t u = 0; u < pixels; ++u) {
        norm[u] += double(row[c * pixels + u]) * double(row[c * pixels + u]);
      }
    }
    std::copy(norm.begin(), norm.end(),
              mutable_data_of<double>(squared_) + (y - row_begin()) * width + start);

    char* out = static_cast<char*>(const_cast<void*>(tile.rows)) +
                (y - row_begin()) * tile.row_stride * element_bytes(element);
    const auto pack = [&](int64_t from, int64_t count, int64_t stride) {
      pack_columns(row.data(), pixels, channels, from, count, stride, element, out);
      out += stride * depth * element_bytes(element);
    };
    if (side == Side::kKey) {
      for (int64_t u = 0; u < pixels; u += lanes) pack(u, std::min(lanes, pixels - u), lanes);
    } else {
      const Panels panels(pixels);
      for (int64_t p = 0; p < panels.count; ++p) {
        const int64_t count = panels.begin(p + 1) - panels.begin(p);
        pack(panels.begin(p), count, count);
      }
    }
  }
}

}  // namespace ttsr_fast
