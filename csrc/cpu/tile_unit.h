// The tile unit of x86-64 (AMX): eight registers of 16 rows, 64 bytes each.
//
// Tiles 0 to 3 hold sums in float, tiles 4 to 7 pairs of bfloat16. With TTSR_PORTABLE_TILES the same
// operations are plain C++, rounded as the instructions round, so that the kernel can be tested on any
// processor.
#pragma once

#include <cstdint>

#include "search_kernel.h"

namespace ttsr_fast {

constexpr int64_t kTileRows = 16, kTileRowBytes = 64, kTileBytes = kTileRows * kTileRowBytes;

#ifndef TTSR_PORTABLE_TILES

// Configured for this thread as long as it lives. Tile numbers are constants in the instructions.
class TileUnit {
 public:
  TileUnit() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int t = 0; t < 8; ++t) {
      config.row_bytes[t] = kTileRowBytes;
      config.rows[t] = kTileRows;
    }
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~TileUnit() { asm volatile("tilerelease"); }
  TileUnit(const TileUnit&) = delete;

  template <int t>
  TTSR_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(t));
  }
  template <int t>
  TTSR_INLINE void load(const void* tile) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(tile), "r"(kTileRowBytes), "i"(t) : "memory");
  }
  template <int t>
  TTSR_INLINE void store(float* rows, int64_t stride) {  // stride in elements
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(rows), "r"(stride * 4), "i"(t) : "memory");
  }
  // sum[m][n] += the inner product of row m of `a` and column n of `b`, which holds pairs of rows.
  template <int sum, int a, int b>
  TTSR_INLINE void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(a), "i"(b));
  }
};

#else

class TileUnit {
 public:
  template <int t>
  void zero() {
    for (uint32_t& element : tiles_[t]) element = 0;
  }
  template <int t>
  void load(const void* tile) {
    for (int64_t n = 0; n < kTileBytes / 4; ++n) tiles_[t][n] = static_cast<const uint32_t*>(tile)[n];
  }
  template <int t>
  void store(float* rows, int64_t stride) {
    for (int64_t m = 0; m < 16; ++m) {
      for (int64_t n = 0; n < 16; ++n) rows[m * stride + n] = value(tiles_[t][m * 16 + n]);
    }
  }
  template <int sum, int a, int b>
  void multiply() {
    for (int64_t m = 0; m < 16; ++m) {
      float even[16] = {}, odd[16] = {};  // every step rounds to nearest and flushes denormals to zero
      for (int64_t k = 0; k < 16; ++k) {
        const uint32_t x = tiles_[a][m * 16 + k];
        for (int64_t n = 0; n < 16; ++n) {
          const uint32_t y = tiles_[b][k * 16 + n];
          even[n] = flushed(__builtin_fmaf(value(x << 16), value(y << 16), even[n]));
          odd[n] = flushed(__builtin_fmaf(value(x & 0xffff0000), value(y & 0xffff0000), odd[n]));
        }
      }
      for (int64_t n = 0; n < 16; ++n) {
        uint32_t& element = tiles_[sum][m * 16 + n];
        element = bits(flushed(value(element) + flushed(even[n] + odd[n])));
      }
    }
  }

 private:
  union Word {
    uint32_t bits;
    float value;
  };
  static float flushed(float x) { return __builtin_fabsf(x) < __FLT_MIN__ ? 0 : x; }
  static float value(uint32_t bits) { return flushed(Word{.bits = bits}.value); }
  static uint32_t bits(float value) { return Word{.value = value}.bits; }

  uint32_t tiles_[8][kTileBytes / 4];
};

#endif

}  // namespace ttsr_fast
