// Parameters of the CUDA kernels: the only contract between host and device code. Strides are in elements.
#pragma once

#include <cuda_runtime.h>

#include "../geometry.h"

namespace ttsr_fast {

constexpr int kWarpSize = 32;
constexpr int kWarps = 8;  // of a thread block
constexpr int kVectorBytes = 16;
constexpr int kMaxLevels = 4;
constexpr int kMaxTaps = 49;  // of a patch

// A warp sums one slice at a time: kVectors vectors of kVector elements per thread.
template <int kVector>
constexpr int kVectors = kVector == 1 || kVector == 4 ? 2 : 1;
template <int kVector>
constexpr int kSlice = kVectors<kVector> * kWarpSize;

// One level of the feature pyramid: the map to read, with contiguous channels, and the map to fill.
struct Level {
  const void* in;
  void* out;
  int64_t in_stride_n, in_stride_h, in_stride_w;
  int64_t out_stride_n, out_stride_c, out_stride_h, out_stride_w;
  int32_t stride, channels;
  int32_t slices;  // of a row of a block: stride * channels elements
};

// gather_fold and its adjoint. Query patches are numbered through the batch.
struct GatherFoldParams {
  Transfer transfer;
  int64_t images;              // of the maps to fill
  const int64_t* index;        // [N, Ho, Wo], forward only
  bool check_index;            // stop the kernel at an index outside the key grid
  const int32_t* csr_offsets;  // [N * HKo * WKo + 1] or, for one value, [HKo * WKo + 1]; adjoint only
  const int32_t* csr_indices;  // [N * Ho * Wo], query patches of every key patch; adjoint only
  int32_t patches;             // in csr_indices
  const void* weight;          // Sum<T> [N, Ho, Wo], may be null
  int32_t levels;
  Level level[kMaxLevels];
};

struct GatherDotParams {
  Transfer transfer;
  int64_t images;
  const int64_t* index;  // [N, Ho, Wo]
  bool check_index;
  const void *value, *grad;  // with contiguous channels
  int64_t value_stride_n, value_stride_h, value_stride_w;
  int64_t grad_stride_n, grad_stride_h, grad_stride_w;
  int32_t stride, channels;
  void* out;  // Sum<T> [N, Ho, Wo]
};

// For T double, float, Half and BFloat16. A thread moves kVector elements at a time: 1, or as many as fit
// into kVectorBytes, to which addresses and strides are then aligned.
template <class T, int kVector>
void launch_gather_fold(const GatherFoldParams& params, cudaStream_t stream);
template <class T, int kVector>
void launch_gather_fold_adjoint(const GatherFoldParams& params, cudaStream_t stream);
template <class T, int kVector>
void launch_gather_dot(const GatherDotParams& params, cudaStream_t stream);

constexpr int kProductStride = 4096;  // floats from one key pixel of a product to the next
constexpr int kSlabColumns = 64;      // most query pixels of a line
constexpr int kSlabWarps = 4;         // of a thread block
constexpr int kQueries = 4;           // neighbours along a line, of a thread

// slab_argmax: M(i, j) is the inner product of key pixel i and query pixel j of a pair of blocks. Pixel (y,
// x) of a block has number y * line + x.
struct SlabArgmaxParams {
  const float* product;  // [images, key pixels, kProductStride]
  int64_t product_stride_n;
  const float* scale;  // [images or 1, key rows, scale_stride_h] of the first key, NaN for an excluded key
  int64_t scale_stride_n, scale_stride_h;
  int64_t* best;  // [images, query rows, best_stride_h] of the first query, packed score and index
  int64_t best_stride_n, best_stride_h;
  int32_t images;
  int32_t query_rows, query_columns, query_line;  // patch rows and columns, pixels of a line
  int32_t key_rows, key_columns, key_line;
  int32_t index_begin, index_stride;  // index of the first key, patches in a row of the key grid
  int32_t rows_per_warp;              // most patch rows of a warp
};

// For 4 or 8 keys of a thread.
template <int kKeys>
void launch_slab_argmax(const SlabArgmaxParams& params, cudaStream_t stream);

}  // namespace ttsr_fast
