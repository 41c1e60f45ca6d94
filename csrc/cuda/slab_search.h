// The search over a slab: the loop over blocks, and the kernel that follows each product.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace ttsr_fast {

constexpr int kLeading = 4096;    // floats from one key pixel of the products to the next
constexpr int kSlabColumns = 64;  // query pixels of a line, at most
constexpr int kSlabWarps = 4;     // of a thread block
constexpr int kQueries = 4;       // of a thread, beside each other

// A pair of blocks. M(i, j) is the inner product of key pixel i and query pixel j, and both count in lines:
// pixel (y, x) of a block is number y * line + x.
struct BoxMaxParams {
  const float* product;  // [key pixels][kLeading]
  int64_t product_n;     // from image to image
  const float* scale;    // of the first key: [rows][slots], NaN for a key that must not match
  int64_t scale_n, slots;
  int64_t* best;  // of the first query: [rows][best_h], merged into
  int64_t best_n, best_h;
  int32_t images;
  int32_t query_rows, query_columns, query_line;  // of patches, and pixels of a line
  int32_t key_rows, key_columns, key_line;
  int32_t first_key, key_width;  // index of the first key, and from one row of keys to the next
  int32_t walk_rows;             // of patches, that a warp walks down at most
};

// kKeys of a thread, 4 or 8.
template <int kKeys>
void launch_box_max(const BoxMaxParams& params, cudaStream_t stream);

}  // namespace ttsr_fast
