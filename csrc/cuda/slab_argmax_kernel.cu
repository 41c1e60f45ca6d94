// slab_argmax: sums products of pixels to scores of patches and merges the argmax over the keys of a block.
//
// Half a warp moves down both blocks, one row at a time. A thread has kQueries x kKeys pairs, neighbours
// along the row in query and key. It has loaded all taps along the row but two columns, which come from the
// next lane. The three rows of a patch belong to consecutive steps. Lanes exchange values by shuffles only,
// so the kernel has no barrier.

#include <algorithm>
#include <cmath>

#include "device.h"

namespace ttsr_fast {

namespace {

constexpr int kHalf = kWarpSize / 2;
constexpr int kBlocks = 3;  // on a multiprocessor

// Work of half a warp: patch rows at one offset between key row and query row, and a range of key columns.
struct Run {
  int32_t query_row, key_row, rows, key_column;
};

// Longest runs first, for load balance. All lanes of a warp get the same rows.
template <int kKeys>
__device__ __forceinline__ Run run_of(const SlabArgmaxParams& p) {
  const int32_t groups = (p.key_columns + 2 * kKeys - 1) / (2 * kKeys);
  const int32_t warp = blockIdx.x * kSlabWarps + threadIdx.x / kWarpSize;
  const int32_t rank = warp / groups, half = (rank + 1) / 2;
  if (rank >= p.query_rows + p.key_rows - 1) return {0, 0, 0, 0};
  const int32_t offset = (p.query_rows + p.key_rows) / 2 - p.query_rows + (rank % 2 == 1 ? half : -half);
  const int32_t first = max(0, -offset), length = min(p.query_rows, p.key_rows - offset) - first;
  const int32_t begin = blockIdx.y * p.rows_per_warp;
  const int32_t half_warp = threadIdx.x % kWarpSize / kHalf;
  return {first + begin, first + begin + offset, min(p.rows_per_warp, length - begin),
          (warp % groups * 2 + half_warp) * kKeys};
}

// Products of kKeys + 2 key pixels with the query pixels of a thread.
template <int kKeys>
struct Products {
  float4 key[kKeys + 2];

  __device__ __forceinline__ void load(const float* first) {
#pragma unroll
    for (int k = 0; k < kKeys + 2; ++k) {
      key[k] = *reinterpret_cast<const float4*>(first + int64_t(k) * kProductStride);
    }
  }

  // Sums the three taps along the row.
  __device__ __forceinline__ void sum_taps(float (&row)[kKeys][kQueries]) const {
#pragma unroll
    for (int k = 0; k < kKeys; ++k) {
      const float4 a = key[k], b = key[k + 1], c = key[k + 2];
      row[k][0] = a.x + b.y + c.z;
      row[k][1] = a.y + b.z + c.w;
      row[k][2] = a.z + b.w + __shfl_down_sync(kFullWarp, c.x, 1);
      row[k][3] = a.w + __shfl_down_sync(kFullWarp, b.x + c.y, 1);
    }
  }
};

// The packing of kernels/argmax.py: larger scores first, then lower indices.
__device__ __forceinline__ int64_t pack(float score, int32_t index) {
  const int32_t bits = __float_as_int(score + 0.0f);  // -0.0 equals 0.0
  const int32_t ordered = bits ^ ((bits >> 31) & 0x7fffffff);
  return int64_t(uint64_t(uint32_t(ordered)) << 32 | uint32_t(index ^ 0x7fffffff));
}

__device__ __forceinline__ float score_of_upper_half(int32_t ordered) {
  return __int_as_float(ordered ^ ((ordered >> 31) & 0x7fffffff));
}

template <int kKeys>
__global__ void __launch_bounds__(kSlabWarps* kWarpSize, kBlocks)
    slab_argmax_kernel(const __grid_constant__ SlabArgmaxParams p) {
  const Run run = run_of<kKeys>(p);
  if (run.rows <= 0) return;
  const int32_t column = threadIdx.x % kHalf * kQueries;
  const float* product = p.product + blockIdx.z * p.product_stride_n + run.query_row * p.query_line + column +
                         int64_t(run.key_row * p.key_line + run.key_column) * kProductStride;
  const float* scale =
      p.scale + blockIdx.z * p.scale_stride_n + run.key_row * p.scale_stride_h + run.key_column;
  int64_t* best = p.best + blockIdx.z * p.best_stride_n + run.query_row * p.best_stride_h + column;
  int32_t index = p.index_begin + run.key_row * p.index_stride + run.key_column;
  const int64_t step = int64_t(p.key_line) * kProductStride + p.query_line;

  Products<kKeys> products;
  float rows[3][kKeys][kQueries];  // of the last three steps, in rotation
  products.load(product);
  products.sum_taps(rows[0]);
  products.load(product += step);
  products.sum_taps(rows[1]);
  products.load(product += step);
  // Adds the row `newest`, which completes a row of patches.
  const auto add_row = [&](int32_t y, auto& oldest, auto& middle, auto& newest) {
    products.sum_taps(newest);
    products.load(product += y + 1 < run.rows ? step : 0);  // in flight during the rest
    const auto score_of = [&](int k, int q) {
      return (oldest[k][q] + middle[k][q] + newest[k][q]) * scale[k];
    };
    float known[kQueries], most[kQueries];
    bool improved = false;
#pragma unroll
    for (int q = 0; q < kQueries; ++q) {
      // From the L2 cache, where the atomics are. A stale score is too low; the atomic maximum decides.
      const int32_t* upper = reinterpret_cast<const int32_t*>(best + q) + 1;
      // NaN for columns without a query: the comparison below is then false.
      known[q] = column + q < p.query_columns ? score_of_upper_half(__ldcg(upper)) : NAN;
      most[q] = score_of(0, q);
#pragma unroll
      for (int k = 1; k < kKeys; ++k) most[q] = fmaxf(most[q], score_of(k, q));
      improved |= most[q] >= known[q];
    }
    if (__any_sync(kFullWarp, improved)) {
#pragma unroll
      for (int q = 0; q < kQueries; ++q) {
        int32_t key = kKeys - 1;
#pragma unroll
        for (int k = kKeys - 1; k >= 0; --k) key = score_of(k, q) == most[q] ? k : key;
        if (most[q] >= known[q]) {
          atomicMax(reinterpret_cast<long long*>(best + q), (long long)(pack(most[q], index + key)));
        }
      }
    }
    scale += p.scale_stride_h;
    best += p.best_stride_h;
    index += p.index_stride;
  };
  for (int32_t y = 0;;) {
    add_row(y, rows[0], rows[1], rows[2]);
    if (++y == run.rows) break;
    add_row(y, rows[1], rows[2], rows[0]);
    if (++y == run.rows) break;
    add_row(y, rows[2], rows[0], rows[1]);
    if (++y == run.rows) break;
  }
}

}  // namespace

template <int kKeys>
void launch_slab_argmax(const SlabArgmaxParams& p, cudaStream_t stream) {
  const int32_t groups = (p.key_columns + 2 * kKeys - 1) / (2 * kKeys);
  const int32_t warps = (p.query_rows + p.key_rows - 1) * groups;
  const int32_t runs = (std::min(p.query_rows, p.key_rows) + p.rows_per_warp - 1) / p.rows_per_warp;
  const dim3 grid((warps + kSlabWarps - 1) / kSlabWarps, runs, p.images);
  launch<kSlabWarps * kWarpSize>(slab_argmax_kernel<kKeys>, grid, stream, p);
}

template void launch_slab_argmax<4>(const SlabArgmaxParams&, cudaStream_t);
template void launch_slab_argmax<8>(const SlabArgmaxParams&, cudaStream_t);

}  // namespace ttsr_fast
