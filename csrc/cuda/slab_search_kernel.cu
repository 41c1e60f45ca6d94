// box_max: sums products of pixels to products of patches, scales them, and keeps the best key of each query.
//
// Half a warp walks down both blocks at once. A thread owns kQueries x kKeys pairs that are neighbours on
// both sides: of the three taps along a row it has all but two columns, which the next lane has. The three
// rows of a patch are those of consecutive steps. Nothing is shared but through shuffles, so there is no
// barrier.

#include <algorithm>
#include <cmath>

#include "slab_search.h"
#include "vector.h"

namespace ttsr_fast {

namespace {

constexpr int kHalf = kWarpSize / 2;
constexpr int kBlocks = 3;  // on a multiprocessor

// A part of a walk: rows of patches with one offset between key row and query row, and a range of keys.
struct Walk {
  int32_t query_row, key_row, rows, first_key;
};

// The longest walks come first. All lanes of a warp get the same rows.
template <int kKeys>
__device__ __forceinline__ Walk walk_of(const BoxMaxParams& p) {
  const int32_t groups = (p.key_columns + 2 * kKeys - 1) / (2 * kKeys);
  const int32_t warp = blockIdx.x * kSlabWarps + threadIdx.x / kWarpSize;
  const int32_t rank = warp / groups, half = (rank + 1) / 2;
  if (rank >= p.query_rows + p.key_rows - 1) return {0, 0, 0, 0};
  const int32_t offset = (p.query_rows + p.key_rows) / 2 - p.query_rows + (rank % 2 == 1 ? half : -half);
  const int32_t first = max(0, -offset), length = min(p.query_rows, p.key_rows - offset) - first;
  const int32_t begin = blockIdx.y * p.walk_rows;
  const int32_t side = threadIdx.x % kWarpSize / kHalf;
  return {first + begin, first + begin + offset, min(p.walk_rows, length - begin),
          (warp % groups * 2 + side) * kKeys};
}

// The products of kKeys + 2 key pixels with a thread's query pixels.
template <int kKeys>
struct Products {
  float4 key[kKeys + 2];

  __device__ __forceinline__ void load(const float* first) {
#pragma unroll
    for (int k = 0; k < kKeys + 2; ++k) {
      key[k] = *reinterpret_cast<const float4*>(first + int64_t(k) * kLeading);
    }
  }

  // Adds up the three taps of a row: products of pixels become those of rows of patches.
  __device__ __forceinline__ void sum_taps(float (&row)[kKeys][kQueries]) const {
#pragma unroll
    for (int k = 0; k < kKeys; ++k) {
      const float4 a = key[k], b = key[k + 1], c = key[k + 2];
      row[k][0] = a.x + b.y + c.z;
      row[k][1] = a.y + b.z + c.w;
      row[k][2] = a.z + b.w + __shfl_down_sync(kWholeWarp, c.x, 1);
      row[k][3] = a.w + __shfl_down_sync(kWholeWarp, b.x + c.y, 1);
    }
  }
};

// As kernels/argmax.py: the upper half orders as the score does, the lower half falls with the index.
__device__ __forceinline__ int64_t encode(float score, int32_t index) {
  const int32_t bits = __float_as_int(score + 0.0f);  // -0.0 equals 0.0
  const int32_t ordered = bits ^ ((bits >> 31) & 0x7fffffff);
  return int64_t(uint64_t(uint32_t(ordered)) << 32 | uint32_t(index ^ 0x7fffffff));
}

__device__ __forceinline__ float decode_score(int32_t ordered) {
  return __int_as_float(ordered ^ ((ordered >> 31) & 0x7fffffff));
}

template <int kKeys>
__global__ void __launch_bounds__(kSlabWarps* kWarpSize, kBlocks)
    box_max_kernel(const __grid_constant__ BoxMaxParams p) {
  const Walk walk = walk_of<kKeys>(p);
  if (walk.rows <= 0) return;
  const int32_t column = threadIdx.x % kHalf * kQueries;
  const float* product = p.product + blockIdx.z * p.product_n + walk.query_row * p.query_line + column +
                         int64_t(walk.key_row * p.key_line + walk.first_key) * kLeading;
  const float* scale = p.scale + blockIdx.z * p.scale_n + walk.key_row * p.slots + walk.first_key;
  int64_t* best = p.best + blockIdx.z * p.best_n + walk.query_row * p.best_h + column;
  int32_t first_key = p.first_key + walk.key_row * p.key_width + walk.first_key;
  const int64_t step = int64_t(p.key_line) * kLeading + p.query_line;

  Products<kKeys> products;
  float rows[3][kKeys][kQueries];  // the last three, in turn
  products.load(product);
  products.sum_taps(rows[0]);
  products.load(product += step);
  products.sum_taps(rows[1]);
  products.load(product += step);
  // The row `newest` completes a row of patches with the two before it.
  const auto take = [&](int32_t y, auto& oldest, auto& middle, auto& newest) {
    products.sum_taps(newest);
    products.load(product += y + 1 < walk.rows ? step : 0);  // on its way while the rest is computed
    const auto score_of = [&](int k, int q) {
      return (oldest[k][q] + middle[k][q] + newest[k][q]) * scale[k];
    };
    float known[kQueries], most[kQueries];
    bool improved = false;
#pragma unroll
    for (int q = 0; q < kQueries; ++q) {
      // From the L2 cache, where the atomics are. It may be outdated, and then too low: they decide.
      const int32_t* upper = reinterpret_cast<const int32_t*>(best + q) + 1;
      // No query is there in other lanes, and no score is at least NaN, whatever they have read.
      known[q] = column + q < p.query_columns ? decode_score(__ldcg(upper)) : NAN;
      most[q] = score_of(0, q);
#pragma unroll
      for (int k = 1; k < kKeys; ++k) most[q] = fmaxf(most[q], score_of(k, q));
      improved |= most[q] >= known[q];
    }
    if (__any_sync(kWholeWarp, improved)) {
#pragma unroll
      for (int q = 0; q < kQueries; ++q) {
        int32_t key = kKeys - 1;
#pragma unroll
        for (int k = kKeys - 1; k >= 0; --k) key = score_of(k, q) == most[q] ? k : key;
        if (most[q] >= known[q]) {
          atomicMax(reinterpret_cast<long long*>(best + q), (long long)(encode(most[q], first_key + key)));
        }
      }
    }
    scale += p.slots;
    best += p.best_h;
    first_key += p.key_width;
  };
  for (int32_t y = 0;;) {
    take(y, rows[0], rows[1], rows[2]);
    if (++y == walk.rows) break;
    take(y, rows[1], rows[2], rows[0]);
    if (++y == walk.rows) break;
    take(y, rows[2], rows[0], rows[1]);
    if (++y == walk.rows) break;
  }
}

}  // namespace

template <int kKeys>
void launch_box_max(const BoxMaxParams& p, cudaStream_t stream) {
  const int32_t groups = (p.key_columns + 2 * kKeys - 1) / (2 * kKeys);
  const int32_t warps = (p.query_rows + p.key_rows - 1) * groups;
  const int32_t parts = (std::min(p.query_rows, p.key_rows) + p.walk_rows - 1) / p.walk_rows;
  const dim3 grid((warps + kSlabWarps - 1) / kSlabWarps, parts, p.images);
  launch<kSlabWarps * kWarpSize>(box_max_kernel<kKeys>, grid, stream, p);
}

template void launch_box_max<4>(const BoxMaxParams&, cudaStream_t);
template void launch_box_max<8>(const BoxMaxParams&, cudaStream_t);

}  // namespace ttsr_fast
