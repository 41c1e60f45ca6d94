// The matrix product of the search kernel in a tile unit; search_kernel_body.h includes it.

template <int kParts_>
struct BFloat16Tiles {  // blocks of kTileChannels channels; the high part of each before the low one
  static constexpr bool kTiles = true;
  static constexpr int kParts = kParts_;
  using Score = float;
  using Packed = int32_t;
  using Vector = Simd<float>::Vector;
};

template <int kParts>
struct Multiplier<BFloat16Tiles<kParts>> {
  static constexpr int64_t kTile = kTileBytes / sizeof(int32_t);  // of packed elements
  TileUnit unit;

  void panel(const int32_t* query, int64_t rows, const int32_t* key, int64_t vectors, int64_t depth,
             float* product, int64_t product_stride) {
    for (int64_t v = 0; v < vectors; v += 2) {
      const int32_t* const k = key + v * depth * kTilePixels;
      float* const out = product + v * kTilePixels;
      if (rows > kTilePixels) {
        v + 1 < vectors ? tiles<2, 2>(query, k, depth, out, product_stride)
                        : tiles<2, 1>(query, k, depth, out, product_stride);
      } else {
        v + 1 < vectors ? tiles<1, 2>(query, k, depth, out, product_stride)
                        : tiles<1, 1>(query, k, depth, out, product_stride);
      }
    }
  }

  // kRows x kCols tiles of the product. Sums are in tiles 0 to 3, two of the query in 4 and 5, two of the key
  // in 6 and 7.
  template <int kRows, int kCols>
  TTSR_INLINE void tiles(const int32_t* query, const int32_t* key, int64_t depth, float* product,
                         int64_t product_stride) {
    const int64_t next = depth * kTilePixels;  // the second tile of a side
    unit.template zero<0>();
    if (kCols > 1) unit.template zero<1>();
    if (kRows > 1) unit.template zero<2>();
    if (kRows > 1 && kCols > 1) unit.template zero<3>();
    for (int64_t d = 0; d < next; d += kParts * kTile) {
      load_query<kRows>(query + d + (kParts - 1) * kTile, next);
      load_key<kCols>(key + d, next);
      multiply<kRows, kCols>();  // low query, high key; the only product if there is one part
      if (kParts == 1) continue;
      load_query<kRows>(query + d, next);
      multiply<kRows, kCols>();  // both high
      load_key<kCols>(key + d + kTile, next);
      multiply<kRows, kCols>();  // high query, low key
    }
    unit.template store<0>(product, product_stride);
    if (kCols > 1) unit.template store<1>(product + kTilePixels, product_stride);
    product += kTilePixels * product_stride;
    if (kRows > 1) unit.template store<2>(product, product_stride);
    if (kRows > 1 && kCols > 1) unit.template store<3>(product + kTilePixels, product_stride);
  }

  template <int kRows>
  TTSR_INLINE void load_query(const int32_t* tile, int64_t next) {
    unit.template load<4>(tile);
    if (kRows > 1) unit.template load<5>(tile + next);
  }

  template <int kCols>
  TTSR_INLINE void load_key(const int32_t* tile, int64_t next) {
    unit.template load<6>(tile);
    if (kCols > 1) unit.template load<7>(tile + next);
  }

  template <int kRows, int kCols>
  TTSR_INLINE void multiply() {
    unit.template multiply<0, 4, 6>();
    if (kCols > 1) unit.template multiply<1, 4, 7>();
    if (kRows > 1) unit.template multiply<2, 5, 6>();
    if (kRows > 1 && kCols > 1) unit.template multiply<3, 5, 7>();
  }
};
