// Geometry of a transfer and the type of sums; for host and device.
//
// Value and output are grids of stride x stride blocks. A patch at grid position (y, x) covers the blocks
// (y - padding + a, x - padding + b) for taps a, b in [0, kernel_size). In the forward pass, query patch j
// takes its blocks from key patch index[j], tap by tap.
#pragma once

#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#define TTSR_HOST_DEVICE __host__ __device__
#else
#define TTSR_HOST_DEVICE
#endif

namespace ttsr_fast {

// The type in which values of type T are summed.
template <class T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

struct Position {
  int64_t y, x;
};

struct Grid {
  int64_t height, width;

  TTSR_HOST_DEVICE int64_t size() const { return height * width; }
  bool operator==(const Grid&) const = default;
  TTSR_HOST_DEVICE bool contains(Position p) const {
    return p.y >= 0 && p.y < height && p.x >= 0 && p.x < width;
  }
  TTSR_HOST_DEVICE int64_t index(Position p) const { return p.y * width + p.x; }

  TTSR_HOST_DEVICE Position position(int64_t index) const {
    if (uint64_t(index | width) >> 32) return {index / width, index % width};
    const uint32_t y = uint32_t(index) / uint32_t(width);  // several times faster than 64-bit division
    return {y, uint32_t(index) - y * uint32_t(width)};
  }
};

// Patches and blocks of one side, query or key.
struct PatchGrid {
  Grid patches, blocks;
  int64_t padding;

  // The block under tap (a, b) of a patch. Positions outside `blocks` are zero padding.
  TTSR_HOST_DEVICE Position block_of(Position patch, int64_t a, int64_t b) const {
    return {patch.y - padding + a, patch.x - padding + b};
  }

  // The patch with tap (a, b) at a block. It may lie outside `patches`.
  TTSR_HOST_DEVICE Position patch_of(Position block, int64_t a, int64_t b) const {
    return {block.y + padding - a, block.x + padding - b};
  }

  // Number of patches that cover a block.
  TTSR_HOST_DEVICE int64_t overlap(Position block, int64_t kernel_size) const {
    return overlap_along(block.y, patches.height, kernel_size) *
           overlap_along(block.x, patches.width, kernel_size);
  }

 private:
  TTSR_HOST_DEVICE int64_t overlap_along(int64_t at, int64_t count, int64_t kernel_size) const {
    const int64_t first = at + padding - kernel_size + 1, last = at + padding;
    return (last < count ? last : count - 1) - (first > 0 ? first : 0) + 1;
  }
};

// Both sides of a transfer, and the factor of every output block.
struct Transfer {
  PatchGrid query, key;
  int64_t kernel_size;
  bool divide_by_overlap;
  double factor;  // of every block, unless divide_by_overlap

  TTSR_HOST_DEVICE double scale(Position query_block) const {
    return divide_by_overlap ? 1.0 / double(query.overlap(query_block, kernel_size)) : factor;
  }
  // The value block under tap (a, b) of a key patch.
  TTSR_HOST_DEVICE Position value_block(int64_t key_patch, int64_t a, int64_t b) const {
    return key.block_of(key.patches.position(key_patch), a, b);
  }
  // The output block under tap (a, b) of a query patch.
  TTSR_HOST_DEVICE Position output_block(int64_t query_patch, int64_t a, int64_t b) const {
    return query.block_of(query.patches.position(query_patch), a, b);
  }
};

}  // namespace ttsr_fast
