// Which block meets which in gather_fold, its adjoint and its inner products; for host and device.
//
// Value and output are grids of stride x stride blocks. A patch at grid position (y, x) covers the blocks
// (y - padding + a, x - padding + b) for taps a, b in [0, kernel_size). In the forward pass the patch j of
// the query grid takes its blocks from the patch index[j] of the key grid, tap by tap.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define TTSR_HOST_DEVICE __host__ __device__
#else
#define TTSR_HOST_DEVICE
#endif

namespace ttsr_fast {

struct Position {
  int64_t y, x;
};

struct Grid {
  int64_t height, width;

  TTSR_HOST_DEVICE int64_t size() const { return height * width; }
  bool operator==(const Grid&) const = default;
  TTSR_HOST_DEVICE bool holds(Position p) const {
    return p.y >= 0 && p.y < height && p.x >= 0 && p.x < width;
  }
  TTSR_HOST_DEVICE int64_t index(Position p) const { return p.y * width + p.x; }

  TTSR_HOST_DEVICE Position position(int64_t index) const {
    if (uint64_t(index | width) >> 32) return {index / width, index % width};
    const uint32_t y = uint32_t(index) / uint32_t(width);  // several times as fast
    return {y, uint32_t(index) - y * uint32_t(width)};
  }
};

// The patches and the blocks of one side, query or key.
struct PatchGrid {
  Grid patches, blocks;
  int64_t padding;

  // The block under tap (a, b) of a patch; outside the blocks it is zero.
  TTSR_HOST_DEVICE Position block_of(Position patch, int64_t a, int64_t b) const {
    return {patch.y - padding + a, patch.x - padding + b};
  }

  // The patch whose tap (a, b) covers a block; outside the patches there is none.
  TTSR_HOST_DEVICE Position patch_of(Position block, int64_t a, int64_t b) const {
    return {block.y + padding - a, block.x + padding - b};
  }

  // How many patches cover a block.
  TTSR_HOST_DEVICE int64_t overlap(Position block, int64_t kernel_size) const {
    return covering(block.y, patches.height, kernel_size) * covering(block.x, patches.width, kernel_size);
  }

 private:
  TTSR_HOST_DEVICE int64_t covering(int64_t at, int64_t count, int64_t kernel_size) const {
    const int64_t first = at + padding - kernel_size + 1, last = at + padding;
    return (last < count ? last : count - 1) - (first > 0 ? first : 0) + 1;
  }
};

// The two sides of a transfer, and the factor of every block of the output.
struct Transfer {
  PatchGrid query, key;
  int64_t kernel_size;
  bool overlap;   // divide by the number of patches at a block
  double factor;  // else multiply by this

  TTSR_HOST_DEVICE double scale(Position query_block) const {
    return overlap ? 1.0 / double(query.overlap(query_block, kernel_size)) : factor;
  }
  // The block of the value under a tap of the key patch `chosen`.
  TTSR_HOST_DEVICE Position value_block(int64_t chosen, int64_t a, int64_t b) const {
    return key.block_of(key.patches.position(chosen), a, b);
  }
  // The block of the output under a tap of the query patch `patch`.
  TTSR_HOST_DEVICE Position output_block(int64_t patch, int64_t a, int64_t b) const {
    return query.block_of(query.patches.position(patch), a, b);
  }
};

}  // namespace ttsr_fast
