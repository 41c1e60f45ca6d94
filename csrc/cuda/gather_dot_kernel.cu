// gather_dot: for every query patch, the inner product of its patch of the gradient with the value patch it
// chose. A warp takes a patch: its lanes look up the blocks under 32 taps side by side, then go through them
// together, each lane a few elements, and add up their sums in a fixed order.

#include "vector.h"

namespace ttsr_fast {

namespace {

// Where the blocks that meet under a tap begin, in the value and in the gradient.
template <class S>
struct alignas(kVectorBytes) Meeting {
  int64_t value, grad;
  S weight;
};

// That of a query patch under a tap; the value's offset is negative if they do not meet.
template <class T>
__device__ Meeting<Sum<T>> meeting_at(const GatherDotParams& p, int64_t image, int64_t patch, int64_t chosen,
                                      int32_t tap) {
  const Transfer& t = p.transfer;
  const int32_t k = t.kernel_size;
  if (tap >= k * k || chosen < 0) return {-1, 0, 0};
  const Position from = t.value_block(chosen, tap / k, tap % k);
  const Position to = t.output_block(patch, tap / k, tap % k);
  if (!t.key.blocks.holds(from) || !t.query.blocks.holds(to)) return {-1, 0, 0};
  const int64_t stride = p.stride;
  return {image * p.value_n + stride * (from.y * p.value_h + from.x * p.value_w),
          image * p.grad_n + stride * (to.y * p.grad_h + to.x * p.grad_w), Sum<T>(t.scale(to))};
}

template <class T, int kVector>
__global__ void __launch_bounds__(kWarps* kWarpSize, 4)
    gather_dot_kernel(const __grid_constant__ GatherDotParams p) {
  __shared__ Meeting<Sum<T>> meetings[kWarps][kWarpSize];
  const Transfer& t = p.transfer;
  const int32_t warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int32_t taps = int32_t(t.kernel_size * t.kernel_size);
  const int64_t number = int64_t(blockIdx.x) * kWarps + warp;
  const int64_t patches = t.query.patches.size(), image = number / patches;
  if (image >= p.images) return;
  const int64_t chosen = chosen_by(p.index, number, p.check_index, t.key.patches);
  const int32_t per_pixel = p.channels / kVector, per_row = p.stride * per_pixel;
  Sum<T> sum = 0;
  for (int32_t first = 0; first < taps; first += kWarpSize) {
    __syncwarp();
    meetings[warp][lane] = meeting_at<T>(p, image, number - image * patches, chosen, first + lane);
    __syncwarp();
    for (int32_t tap = 0; tap < min(kWarpSize, taps - first); ++tap) {
      const Meeting<Sum<T>> at_tap = meetings[warp][tap];
      if (at_tap.value < 0) continue;
      Sum<T> dot = 0;
      for (int32_t at = lane; at < p.stride * per_row; at += kWarpSize) {
        const int32_t row = at / per_row, pixel = at % per_row / per_pixel, c = at % per_pixel * kVector;
        const auto v = *reinterpret_cast<const Vector<T, kVector>*>(
            static_cast<const T*>(p.value) + at_tap.value + row * p.value_h + pixel * p.value_w + c);
        const auto g = *reinterpret_cast<const Vector<T, kVector>*>(
            static_cast<const T*>(p.grad) + at_tap.grad + row * p.grad_h + pixel * p.grad_w + c);
#pragma unroll
        for (int e = 0; e < kVector; ++e) dot += Sum<T>(v.element[e]) * Sum<T>(g.element[e]);
      }
      sum += at_tap.weight * dot;
    }
  }
  for (int32_t step = kWarpSize / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kWholeWarp, sum, step);
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
