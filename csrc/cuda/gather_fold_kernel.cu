// gather_fold and its adjoint: every destination block is a weighted sum of blocks of another map.
//
// A warp sums one slice of a block, row by row. Its lanes look up 32 sources side by side, then take them one
// after another, each lane a few elements, several sources in flight. Forward, the sources are the taps of
// the patches that meet at the block; backward, the taps of all query patches that took it. A long list of
// those is shared out among the warps of the thread block. Whoever sums, the order is fixed.

#include "vector.h"

namespace ttsr_fast {

namespace {

constexpr int kFlight = 3;  // sources whose loads are on their way together; nine are three times that
constexpr int kLong = 128;  // sources that one warp sums by itself
constexpr int kBlocks = 3;  // on a multiprocessor; more would break up a flight

// The slice of a block's rows that a thread block works on, for as many blocks side by side as it has warps.
struct Slice {
  int64_t image;
  Position block;       // of the first warp
  int32_t first, size;  // in vectors
};

template <int kVector>
__device__ __forceinline__ Slice slice_of(const GatherFoldParams& p, const Grid& blocks, int32_t* level) {
  int32_t part = blockIdx.y;
  for (*level = 0; part >= p.level[*level].slices; ++*level) part -= p.level[*level].slices;
  const uint32_t tiles = (uint32_t(blocks.width) + kWarps - 1) / kWarps, line = blockIdx.x / tiles;
  const int32_t first = part * kSlice<kVector>;
  const int32_t vectors = p.level[*level].stride * p.level[*level].channels / kVector;
  return {line / uint32_t(blocks.height),
          {line % uint32_t(blocks.height), int64_t(blockIdx.x - line * tiles) * kWarps},
          first,
          min(kSlice<kVector>, vectors - first)};
}

template <class T>
__device__ __forceinline__ Sum<T> weight_of(const GatherFoldParams& p, int64_t patch) {
  return p.weight ? static_cast<const Sum<T>*>(p.weight)[patch] : Sum<T>(1);
}

__device__ __forceinline__ int64_t offset_of(const Level& l, int64_t image, Position block) {
  return image * l.in_n + l.stride * (block.y * l.in_h + block.x * l.in_w);
}

// The sources of an output block, tap by tap.
template <class T>
struct Taps {
  const GatherFoldParams& p;
  const Level& level;
  int64_t image;
  Position block;
  Sum<T> scale;  // of the block

  __device__ int32_t count() const { return int32_t(p.transfer.kernel_size * p.transfer.kernel_size); }
  __device__ Source<Sum<T>> operator()(int32_t tap) const {
    const Transfer& t = p.transfer;
    const int32_t k = t.kernel_size, a = tap / k, b = tap % k;
    const Position at = t.query.patch_of(block, a, b);
    if (!t.query.patches.holds(at)) return {-1, 0};
    const int64_t patch = image * t.query.patches.size() + t.query.patches.index(at);
    const int64_t chosen = chosen_by(p.index, patch, p.check_index, t.key.patches);
    if (chosen < 0) return {-1, 0};
    const Position from = t.value_block(chosen, a, b);
    if (!t.key.blocks.holds(from)) return {-1, 0};
    return {offset_of(level, image, from), scale * weight_of<T>(p, patch)};
  }
};

// The query patches that took a block of the value, tap by tap: where each tap's begin in `order`, and how
// many sources come before them.
struct Takers {
  int32_t begin[kMaxTaps], before[kMaxTaps + 1];

  __device__ void list(const GatherFoldParams& p, int64_t image, Position block) {
    const PatchGrid& keys = p.transfer.key;
    const int32_t k = p.transfer.kernel_size, lane = threadIdx.x % kWarpSize;
    int32_t total = 0;
    for (int32_t first = 0; first < k * k; first += kWarpSize) {
      const int32_t tap = first + lane;
      int32_t count = 0;
      if (tap < k * k) {
        const Position at = keys.patch_of(block, tap / k, tap % k);
        if (block.x < keys.blocks.width && keys.patches.holds(at)) {
          const int32_t* of_key = p.begin + image * keys.patches.size() + keys.patches.index(at);
          begin[tap] = min(max(of_key[0], 0), p.patches);
          count = max(min(of_key[1], p.patches) - begin[tap], 0);
        }
      }
      int32_t sum = count;
      for (int32_t step = 1; step < kWarpSize; step *= 2) {
        const int32_t lower = __shfl_up_sync(kWholeWarp, sum, step);
        if (lane >= step) sum += lower;
      }
      if (tap < k * k) before[tap] = total + sum - count;
      total += __shfl_sync(kWholeWarp, sum, kWarpSize - 1);
    }
    if (lane == 0) before[k * k] = total;
    __syncwarp();
  }
};

template <class T>
struct Choosers {
  const GatherFoldParams& p;
  const Level& level;
  const Takers& takers;

  __device__ int32_t count() const { return takers.before[p.transfer.kernel_size * p.transfer.kernel_size]; }
  __device__ Source<Sum<T>> operator()(int32_t source) const {
    const Transfer& t = p.transfer;
    const int32_t k = t.kernel_size;
    int32_t tap = 0;
    while (takers.before[tap + 1] <= source) ++tap;
    const int32_t patch = p.order[takers.begin[tap] + source - takers.before[tap]];
    if (uint32_t(patch) >= uint32_t(p.patches)) return {-1, 0};
    const int32_t patches = t.query.patches.size(), image = uint32_t(patch) / uint32_t(patches);
    const Position at = t.output_block(patch - image * patches, tap / k, tap % k);
    if (!t.query.blocks.holds(at)) return {-1, 0};
    return {offset_of(level, image, at), Sum<T>(t.scale(at)) * weight_of<T>(p, patch)};
  }
};

// 32 sources at a time: every lane looks up one, and those that are not zeros are listed in shared memory.
template <class T, class Sources>
struct LookUp {
  const Sources& sources;
  Source<Sum<T>>* list;  // of the warp
  int32_t first = -1;    // source that the list begins at
  int32_t count = 0;

  __device__ __forceinline__ void list_from(int32_t begin, int32_t end) {
    if (first == begin) return;
    const int32_t lane = threadIdx.x % kWarpSize, number = begin + lane;
    const Source<Sum<T>> mine = number < end ? sources(number) : Source<Sum<T>>{-1, 0};
    const unsigned held = __ballot_sync(kWholeWarp, mine.offset >= 0);
    __syncwarp();  // all lanes have read the list before this
    if (mine.offset >= 0) list[__popc(held & ((1u << lane) - 1))] = mine;
    __syncwarp();
    first = begin;
    count = __popc(held);
  }
};

// A lane's elements of a slice in one row, and their sums.
template <class T, int kVector>
struct Lane {
  int32_t pixel[kVectors<kVector>], channel[kVectors<kVector>];
  bool here[kVectors<kVector>];     // lanes past the slice's end go along with the last
  const T* map[kVectors<kVector>];  // where the elements are in the block at offset 0
  Sum<T> sum[kVectors<kVector>][kVector];

  __device__ Lane(const Level& l, const Slice& slice, int32_t row) {
    const int32_t per_pixel = l.channels / kVector;
#pragma unroll
    for (int v = 0; v < kVectors<kVector>; ++v) {
      const int32_t number = v * kWarpSize + threadIdx.x % kWarpSize;
      const int32_t at = slice.first + min(number, slice.size - 1);
      pixel[v] = at / per_pixel;
      channel[v] = at % per_pixel * kVector;
      here[v] = number < slice.size;
      map[v] = static_cast<const T*>(l.in) + row * l.in_h + pixel[v] * l.in_w + channel[v];
    }
    clear();
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int v = 0; v < kVectors<kVector>; ++v) {
#pragma unroll
      for (int e = 0; e < kVector; ++e) sum[v][e] = 0;
    }
  }

  __device__ __forceinline__ void next_row(const Level& l) {
#pragma unroll
    for (int v = 0; v < kVectors<kVector>; ++v) map[v] += l.in_h;
    clear();
  }

  // Adds sources [begin, end), in sums of 32.
  template <class Sources>
  __device__ __forceinline__ void add(LookUp<T, Sources>& look_up, int32_t begin, int32_t end) {
    for (int32_t first = begin; first < end; first += kWarpSize) {
      look_up.list_from(first, end);
      Sum<T> part[kVectors<kVector>][kVector] = {};
      int32_t i = 0;
#pragma unroll 1
      for (; i + kFlight <= look_up.count; i += kFlight) add_flight<kFlight>(look_up.list + i, part);
#pragma unroll 1
      for (; i < look_up.count; ++i) add_flight<1>(look_up.list + i, part);
#pragma unroll
      for (int v = 0; v < kVectors<kVector>; ++v) {
#pragma unroll
        for (int e = 0; e < kVector; ++e) sum[v][e] += part[v][e];
      }
    }
  }

  template <int kCount>
  __device__ __forceinline__ void add_flight(const Source<Sum<T>>* list,
                                             Sum<T> (&part)[kVectors<kVector>][kVector]) const {
    Vector<T, kVector> loaded[kCount][kVectors<kVector>];
    Sum<T> weight[kCount];
#pragma unroll
    for (int f = 0; f < kCount; ++f) {
      const Source<Sum<T>> source = list[f];
      weight[f] = source.weight;
#pragma unroll
      for (int v = 0; v < kVectors<kVector>; ++v) {
        loaded[f][v] = *reinterpret_cast<const Vector<T, kVector>*>(map[v] + source.offset);
      }
    }
#pragma unroll
    for (int f = 0; f < kCount; ++f) {
#pragma unroll
      for (int v = 0; v < kVectors<kVector>; ++v) {
#pragma unroll
        for (int e = 0; e < kVector; ++e) part[v][e] += weight[f] * Sum<T>(loaded[f][v].element[e]);
      }
    }
  }
};

// Lists longer than kLong, one after another: each warp of the thread block sums a share of every one.
template <class T, int kVector>
__device__ __forceinline__ void share_long_lists(const GatherFoldParams& p, const Level& level,
                                                 const Slice& slice, int32_t row,
                                                 const Takers (&takers)[kWarps], Lane<T, kVector>& own) {
  __shared__ Sum<T> partial[kWarps][kVectors<kVector>][kVector][kWarpSize];
  __shared__ Source<Sum<T>> lists[kWarps][kWarpSize];
  const int32_t warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  for (int32_t w = 0; w < kWarps; ++w) {
    const Choosers<T> sources{p, level, takers[w]};
    const int64_t count = sources.count();
    if (count <= kLong) continue;
    LookUp<T, Choosers<T>> look_up{sources, lists[warp]};
    Lane<T, kVector> share(level, slice, row);
    share.add(look_up, int32_t(count * warp / kWarps), int32_t(count * (warp + 1) / kWarps));
#pragma unroll
    for (int v = 0; v < kVectors<kVector>; ++v) {
#pragma unroll
      for (int e = 0; e < kVector; ++e) partial[warp][v][e][lane] = share.sum[v][e];
    }
    __syncthreads();
    if (warp == w) {
#pragma unroll
      for (int v = 0; v < kVectors<kVector>; ++v) {
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
          for (int32_t other = 0; other < kWarps; ++other) own.sum[v][e] += partial[other][v][e][lane];
        }
      }
    }
    __syncthreads();
  }
}

// Writes the sums of all warps. Planes are written through shared memory, so that neighbouring threads write
// neighbouring pixels.
template <class T, int kVector>
__device__ __forceinline__ void store(const Level& l, const Slice& slice, int32_t row, int64_t width,
                                      const Lane<T, kVector>& lane) {
  const int32_t warp = threadIdx.x / kWarpSize;
  T* const out = static_cast<T*>(l.out) + slice.image * l.out_n + (slice.block.y * l.stride + row) * l.out_h +
                 slice.block.x * l.stride * l.out_w;
  // The elements of a slice in the order of planes: a whole row has all pixels of a channel.
  const int32_t pixels = l.slices == 1 ? l.stride : 1, run = kWarps * pixels;
  __shared__ T staged[kSlice<kVector> * kVector * (kWarps + 1)];
  const bool inside = slice.block.x + warp < width;
#pragma unroll
  for (int v = 0; v < kVectors<kVector>; ++v) {
    if (!inside || !lane.here[v]) continue;
    Vector<T, kVector> result;
#pragma unroll
    for (int e = 0; e < kVector; ++e) result.element[e] = T(lane.sum[v][e]);
    if (l.out_c == 1) {
      T* const to = out + (warp * l.stride + lane.pixel[v]) * l.out_w + lane.channel[v];
      *reinterpret_cast<Vector<T, kVector>*>(to) = result;
      continue;
    }
    const int32_t element = lane.pixel[v] * l.channels + lane.channel[v] - slice.first * kVector;
    const int32_t first = pixels == 1 ? element : lane.channel[v];
    const int32_t place = pixels == 1 ? warp : warp * pixels + lane.pixel[v];
#pragma unroll
    for (int e = 0; e < kVector; ++e) staged[(first + e) * (run + 1) + place] = result.element[e];
  }
  if (l.out_c == 1) return;
  __syncthreads();
  // A thread stores every 256th element; dividing anew for each would take longer than summing them.
  const int32_t lines = slice.size * kVector / pixels, at_once = kWarps * kWarpSize;
  const int64_t columns = (width - slice.block.x) * pixels;
  int32_t line = threadIdx.x / run, place = threadIdx.x % run;
  while (line < lines) {
    if (place < columns) {
      int32_t channel = line, x = place;
      if (l.slices > 1) {
        channel = slice.first * kVector + line;
        x = place * l.stride + channel / l.channels;
        channel %= l.channels;
      }
      out[channel * l.out_c + x * l.out_w] = staged[line * (run + 1) + place];
    }
    line += at_once / run;
    place += at_once % run;
    if (place >= run) {
      place -= run;
      ++line;
    }
  }
  __syncthreads();  // before the next row is staged
}

template <class T, int kVector>
__global__ void __launch_bounds__(kWarps* kWarpSize, kBlocks)
    gather_fold_kernel(const __grid_constant__ GatherFoldParams p) {
  const Grid& blocks = p.transfer.query.blocks;
  int32_t number;
  const Slice slice = slice_of<kVector>(p, blocks, &number);
  const Level& level = p.level[number];
  const Position block{slice.block.y, slice.block.x + threadIdx.x / kWarpSize};
  const Taps<T> sources{p, level, slice.image, block, Sum<T>(p.transfer.scale(block))};
  const int32_t count = block.x < blocks.width ? sources.count() : 0;
  __shared__ Source<Sum<T>> lists[kWarps][kWarpSize];
  LookUp<T, Taps<T>> look_up{sources, lists[threadIdx.x / kWarpSize]};
  Lane<T, kVector> lane(level, slice, 0);
  for (int32_t row = 0; row < level.stride; ++row, lane.next_row(level)) {
    lane.add(look_up, 0, count);
    store(level, slice, row, blocks.width, lane);
  }
}

template <class T, int kVector>
__global__ void __launch_bounds__(kWarps* kWarpSize, kBlocks)
    gather_fold_adjoint_kernel(const __grid_constant__ GatherFoldParams p) {
  __shared__ Takers takers[kWarps];
  const Grid& blocks = p.transfer.key.blocks;
  int32_t number;
  const Slice slice = slice_of<kVector>(p, blocks, &number);
  const Level& level = p.level[number];
  const int32_t warp = threadIdx.x / kWarpSize;
  takers[warp].list(p, slice.image, {slice.block.y, slice.block.x + warp});
  const Choosers<T> sources{p, level, takers[warp]};
  __shared__ Source<Sum<T>> lists[kWarps][kWarpSize];
  LookUp<T, Choosers<T>> look_up{sources, lists[warp]};
  Lane<T, kVector> lane(level, slice, 0);
  __syncthreads();  // the lists of all warps are there
  bool any_long = false;
  for (int32_t w = 0; w < kWarps; ++w) any_long |= Choosers<T>{p, level, takers[w]}.count() > kLong;
  for (int32_t row = 0; row < level.stride; ++row, lane.next_row(level)) {
    if (sources.count() <= kLong) lane.add(look_up, 0, sources.count());
    if (any_long) share_long_lists(p, level, slice, row, takers, lane);
    store(level, slice, row, blocks.width, lane);
  }
}

dim3 grid_of(const GatherFoldParams& p, const Grid& blocks) {
  uint32_t parts = 0;
  for (int32_t l = 0; l < p.levels; ++l) parts += p.level[l].slices;
  return {uint32_t(p.images * blocks.height * ((blocks.width + kWarps - 1) / kWarps)), parts};
}

}  // namespace

template <class T, int kVector>
void launch_gather_fold(const GatherFoldParams& params, cudaStream_t stream) {
  launch(gather_fold_kernel<T, kVector>, grid_of(params, params.transfer.query.blocks), stream, params);
}

template <class T, int kVector>
void launch_gather_fold_adjoint(const GatherFoldParams& params, cudaStream_t stream) {
  launch(gather_fold_adjoint_kernel<T, kVector>, grid_of(params, params.transfer.key.blocks), stream, params);
}

#define TTSR_INSTANTIATE(T, kVector)                                                   \
  template void launch_gather_fold<T, kVector>(const GatherFoldParams&, cudaStream_t); \
  template void launch_gather_fold_adjoint<T, kVector>(const GatherFoldParams&, cudaStream_t);
TTSR_INSTANTIATE(double, 1)
TTSR_INSTANTIATE(double, 2)
TTSR_INSTANTIATE(float, 1)
TTSR_INSTANTIATE(float, 4)
TTSR_INSTANTIATE(Half, 1)
TTSR_INSTANTIATE(Half, 8)
TTSR_INSTANTIATE(BFloat16, 1)
TTSR_INSTANTIATE(BFloat16, 8)

}  // namespace ttsr_fast
