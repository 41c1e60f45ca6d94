// The search kernel of one instruction set without torch: runs the cases of a file.
//
//   search_kernel_driver <cases> <results>
//
// Compiled together with search_kernel_<isa>.cpp, ISA and VECTOR_BYTES defined. Both files hold doubles. A
// case is a header, query, key, the initial score of every query patch, factor and validity of every key
// patch; a result is the best scores of every query patch, then their keys.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <vector>

#include "cpu/isa.h"

namespace ttsr_fast {

namespace {

using Doubles = std::vector<double>;

struct Map {
  int64_t channels, height, width, kernel_size, padding;
  int64_t tile_columns;  // patch columns of a tile
  Doubles values;        // [channels, height, width]

  int64_t grid_height() const { return height + 2 * padding - kernel_size + 1; }
  int64_t grid_width() const { return width + 2 * padding - kernel_size + 1; }
  int64_t patches() const { return grid_height() * grid_width(); }
};

struct Case {
  bool is_double;
  int64_t keep;     // best scores of a query patch
  int64_t offsets;  // row offsets of one call of the kernel
  Map query, key;
  Doubles score;         // initial, [query patches]
  Doubles scale, valid;  // [key patches]
};

template <class T>
struct PackedTile {
  Tile tile;
  int64_t begin;  // first patch column
  std::vector<T> rows;
};

// Column tiles of a map, the first with `padding` columns more. A query tile is stored in panels, a key tile
// in zero-padded vectors.
template <class T>
std::vector<PackedTile<T>> pack(const Map& map, bool in_panels) {
  constexpr int64_t lanes = VECTOR_BYTES / sizeof(T);
  std::vector<PackedTile<T>> tiles;
  for (int64_t begin = 0, end; begin < map.grid_width(); begin = end) {
    end = begin + map.tile_columns + (begin ? 0 : map.padding);
    if (map.grid_width() - end < map.kernel_size) end = map.grid_width();
    const int64_t first = begin - map.padding, start = std::max<int64_t>(first, 0);
    const int64_t pixels = std::min(map.width, end - map.padding + map.kernel_size - 1) - start;
    const Panels panels(pixels);
    std::vector<T> rows;
    for (int64_t y = 0; y < map.height; ++y) {
      for (int64_t g = 0; g < (in_panels ? panels.count : (pixels + lanes - 1) / lanes); ++g) {
        const int64_t u = in_panels ? panels.begin(g) : g * lanes;
        const int64_t stop = in_panels ? panels.begin(g + 1) : u + lanes;
        for (int64_t c = 0; c < map.channels; ++c) {
          const double* row = &map.values[(c * map.height + y) * map.width];
          for (int64_t x = u; x < stop; ++x) rows.push_back(x < pixels ? T(row[start + x]) : T(0));
        }
      }
    }
    Tile tile{};
    tile.rows = rows.data();
    tile.row_stride = int64_t(rows.size()) / map.height;
    tile.height = map.height;
    tile.columns = end - begin;
    tile.pixels = pixels;
    tile.left = start - first;
    tiles.push_back({tile, begin, std::move(rows)});
  }
  return tiles;
}

// Factor and validity of the key patches of one tile; vectors without a key before and after every row.
template <class T>
struct KeyScale {
  using Bits = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  static constexpr int64_t kSpare = kScalePadding * VECTOR_BYTES / sizeof(T);
  int64_t stride;
  std::vector<T> scale;
  std::vector<Bits> valid;

  KeyScale(const Case& c, const PackedTile<T>& key)
      : stride(key.tile.columns + kSpare), scale(kSpare + stride * c.key.grid_height()), valid(scale.size()) {
    for (int64_t y = 0; y < c.key.grid_height(); ++y) {
      for (int64_t x = 0; x < key.tile.columns; ++x) {
        const int64_t i = y * c.key.grid_width() + key.begin + x;
        scale[kSpare + y * stride + x] = T(c.scale[i]);
        valid[kSpare + y * stride + x] = c.valid[i] ? -1 : 0;
      }
    }
  }
};

template <class T>
Doubles search(const Case& c) {
  const int64_t first_valid = std::find(c.valid.begin(), c.valid.end(), 1.0) - c.valid.begin();
  std::vector<T> score;
  for (int64_t n = 0; n < c.keep; ++n) score.insert(score.end(), c.score.begin(), c.score.end());
  std::vector<int64_t> index(score.size(), first_valid);
  const auto queries = pack<T>(c.query, true), keys = pack<T>(c.key, false);
  SearchKernelParams p{};
  p.depth = c.query.channels;
  p.padding = c.query.padding;
  p.query_end = c.query.grid_height();
  p.key_end = c.key.grid_height();
  p.index_stride = c.key.grid_width();
  p.score_stride = c.query.grid_width();
  p.keep = c.keep;
  p.keep_stride = c.query.patches();
  for (const auto& key : keys) {
    const KeyScale<T> scale(c, key);
    p.key = key.tile;
    p.scale = scale.scale.data() + scale.kSpare;
    p.valid = scale.valid.data() + scale.kSpare;
    p.scale_stride = scale.stride;
    p.index_begin = key.begin;
    for (const auto& query : queries) {
      p.query = query.tile;
      p.score = score.data() + query.begin;
      p.index = index.data() + query.begin;
      const int64_t size = Workspace<T>(p.query, c.query.kernel_size).size(c.offsets);
      T* const workspace = new (std::align_val_t(64)) T[size];
      p.workspace = workspace;
      for (p.offset_begin = 1 - p.query_end; p.offset_begin < p.key_end; p.offset_begin = p.offset_end) {
        p.offset_end = std::min(p.offset_begin + c.offsets, p.key_end);
        std::fill_n(workspace, size, T(NAN));
        ISA::search_kernel(p, sizeof(T) == 8 ? Element::kDouble : Element::kFloat, int(c.query.kernel_size));
      }
      operator delete[](workspace, std::align_val_t(64));
    }
  }
  Doubles result(score.begin(), score.end());
  result.insert(result.end(), index.begin(), index.end());
  return result;
}

[[noreturn]] void fail(const char* message) {
  std::fprintf(stderr, "%s\n", message);
  std::exit(1);
}

Doubles read(std::FILE* file, int64_t count) {
  Doubles values(count);
  if (std::fread(values.data(), sizeof(double), count, file) != size_t(count)) fail("the case is too short");
  return values;
}

Case read_case(std::FILE* file, bool is_double) {
  const Doubles h = read(file, 11);
  const auto at = [&](int i) { return int64_t(h[i]); };
  Case c{is_double,
         at(0),
         at(1),
         {at(2), at(5), at(6), at(3), at(4), at(9), {}},
         {at(2), at(7), at(8), at(3), at(4), at(10), {}},
         {},
         {},
         {}};
  for (Map* map : {&c.query, &c.key}) map->values = read(file, map->channels * map->height * map->width);
  c.score = read(file, c.query.patches());
  c.scale = read(file, c.key.patches());
  c.valid = read(file, c.key.patches());
  return c;
}

int run(const char* cases, const char* results) {
  std::FILE* const in = std::fopen(cases, "rb");
  std::FILE* const out = std::fopen(results, "wb");
  if (!in || !out) fail("cannot open the files");
  for (double is_double; std::fread(&is_double, sizeof(double), 1, in) == 1;) {
    const Case c = read_case(in, is_double != 0);
    const Doubles found = c.is_double ? search<double>(c) : search<float>(c);
    std::fwrite(found.data(), sizeof(double), found.size(), out);
  }
  std::fclose(in);
  return std::fclose(out);
}

}  // namespace

}  // namespace ttsr_fast

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  return ttsr_fast::run(argv[1], argv[2]);
}
