// What the CUDA kernels of the transfer are given, by the code that knows tensors.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "../gather_fold.h"

namespace ttsr_fast {

constexpr int kWarpSize = 32;
constexpr int kWarps = 8;  // of a thread block
constexpr int kVectorBytes = 16;
constexpr int kMaxLevels = 4;
constexpr int kMaxTaps = 49;  // of a patch

// Vectors of a thread, and of a slice, which is what a warp sums at a time.
template <int kVector>
constexpr int kVectors = kVector == 1 || kVector == 4 ? 2 : 1;
template <int kVector>
constexpr int kSlice = kVectors<kVector> * kWarpSize;

// The type that values of type T are summed in.
template <class T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

// One level of the feature pyramid: the map that is read, whose channels lie side by side, and the one that
// is filled. Strides are in elements.
struct Level {
  const void* in;
  void* out;
  int64_t in_n, in_h, in_w;
  int64_t out_n, out_c, out_h, out_w;
  int32_t stride, channels;
  int32_t slices;  // a row of a block, stride * channels elements, in parts of kSlice<kVector> vectors
};

// Query patch j is number n * query.patches.size() + j of a batch, and has index and weight there.
struct GatherFoldParams {
  Transfer transfer;
  int64_t images;        // of the maps that are filled
  const int64_t* index;  // forward: the key patch of every query patch
  bool check_index;
  const int32_t* begin;  // adjoint: where the query patches of every key patch begin in `order`;
  const int32_t* order;  // a value that serves the whole batch has one row of key patches, others one each
  int32_t patches;       // in `order`
  const void* weight;    // Sum<T> of every query patch, or null
  int32_t levels;
  Level level[kMaxLevels];
};

struct GatherDotParams {
  Transfer transfer;
  int64_t images;
  const int64_t* index;
  bool check_index;
  const void *value, *grad;  // channels side by side
  int64_t value_n, value_h, value_w;
  int64_t grad_n, grad_h, grad_w;
  int32_t stride, channels;
  void* out;  // Sum<T> of every query patch
};

// For T double, float, Half and BFloat16; kVector elements are moved at a time, one or those of 16 bytes, to
// which all addresses and strides are then aligned.
template <class T, int kVector>
void launch_gather_fold(const GatherFoldParams& params, cudaStream_t stream);
template <class T, int kVector>
void launch_gather_fold_adjoint(const GatherFoldParams& params, cudaStream_t stream);
template <class T, int kVector>
void launch_gather_dot(const GatherDotParams& params, cudaStream_t stream);

}  // namespace ttsr_fast
