// gather_dot: for every query patch, the inner product of its gradient patch and the value patch at its
// index.
//
// A warp computes one patch. First, each lane finds the blocks under one tap, 32 taps at a time. Then all
// lanes multiply these blocks, a few elements each, and add their sums in a fixed order.

#include "device.h"

namespace ttsr_fast {

namespace {

// Offsets of the blocks under a tap, in the value and in the gradient.
template <class S>
struct alignas(kVectorBytes) BlockPair {
  int64_t value, grad;
  S weight;
};

// The block pair of a query patch under a tap; value < 0 if a block lies in the padding.
template <class T>
__device__ BlockPair<Sum<T>> block_pair(const GatherDotParams& p, int64_t image, int64_t patch,
                                        int64_t key_patch, int32_t tap) {
  const Transfer& t = p.transfer;
  const int32_t k = t.kernel_size;
  if (tap >= k * k || key_patch < 0) return {-1, 0, 0};
  const Position from = t.value_block(key_patch, tap / k, tap % k);
  const Position to = t.output_block(patch, tap / k, tap % k);
  if (!t.key.blocks.contains(from) || !t.query.blocks.contains(to)) return {-1, 0, 0};
  const int64_t stride = p.stride;
  return {image * p.value_stride_n + stride * (from.y * p.value_stride_h + from.x * p.value_stride_w),
          image * p.grad_stride_n + stride * (to.y * p.grad_stride_h + to.x * p.grad_stride_w),
          Sum<T>(t.scale(to))};
}

template <class T, int kVector>
__global__ void __launch_bounds__(kWarps* kWarpSize, 4)
    gather_dot_kernel(const __grid_constant__ GatherDotParams p) {
  __shared__ BlockPair<Sum<T>> pairs[kWarps][kWarpSize];
  const Transfer& t = p.transfer;
  const int32_t warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int32_t taps = int32_t(t.kernel_size * t.kernel_size);
  const int64_t number = int64_t(blockIdx.x) * kWarps + warp;
  const int64_t patches = t.query.patches.size(), image = number / patches;
  if (image >= p.images) return;
  const int64_t key_patch = key_patch_of(p.index, number, p.check_index, t.key.patches);
  const int32_t per_pixel = p.channels / kVector, per_row = p.stride * per_pixel;
  Sum<T> sum = 0;
  for (int32_t first = 0; first < taps; first += kWarpSize) {
    __syncwarp();
    pairs[warp][lane] = block_pair<T>(p, image, number - image * patches, key_patch, first + lane);
    __syncwarp();
    for (int32_t tap = 0; tap < min(kWarpSize, taps - first); ++tap) {
      const BlockPair<Sum<T>> pair = pairs[warp][tap];
      if (pair.value < 0) continue;
      Sum<T> dot = 0;
      for (int32_t at = lane; at < p.stride * per_row; at += kWarpSize) {
        const int32_t row = at / per_row, pixel = at % per_row / per_pixel, c = at % per_pixel * kVector;
        const auto v = *reinterpret_cast<const Vector<T, kVector>*>(static_cast<const T*>(p.value) +
                                                                    pair.value + row * p.value_stride_h +
                                                                    pixel * p.value_stride_w + c);
        const auto g = *reinterpret_cast<const Vector<T, kVector>*>(
            static_cast<const T*>(p.grad) + pair.grad + row * p.grad_stride_h + pixel * p.grad_stride_w + c);
#pragma unroll
        for (int e = 0; e < kVector; ++e) dot += Sum<T>(v.element[e]) * Sum<T>(g.element[e]);
      }
      sum += pair.weight * dot;
    }
  }
  for (int32_t step = kWarpSize / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kFullWarp, sum, step);
  if (lane == 0) static_cast<Sum<T>*>(p.out)[number] = sum;
}

}  // namespace

template <class T, int kVector>
void launch_gather_dot(const GatherDotParams& params, cudaStream_t stream) {
  const int64_t patches = params.images * params.transfer.query.patches.size();
  launch(gather_dot_kernel<T, kVector>, dim3(uint32_t((patches + kWarps - 1) / kWarps)), stream, params);
}

#define TTSR_INSTANTIATE(T, kVector) \
  template void launch_gather_dot<T, kVector>(const GatherDotParams&, cudaStream_t);
TTSR_INSTANTIATE(double, 1)
TTSR_INSTANTIATE(double, 2)
TTSR_INSTANTIATE(float, 1)
TTSR_INSTANTIATE(float, 4)
TTSR_INSTANTIATE(Half, 1)
TTSR_INSTANTIATE(Half, 8)
TTSR_INSTANTIATE(BFloat16, 1)
TTSR_INSTANTIATE(BFloat16, 8)

}  // namespace ttsr_fast
