// gather_fold and its adjoint: every destination block is a weighted sum of blocks of another map.
//
// A warp sums one slice of a block, row by row. First, each lane finds one of 32 sources. Then all lanes add
// these sources one by one, a few elements each, with several loads in flight. Forward, the sources of an
// output block are the value blocks under the taps of its query patches. Backward, the sources of a value
// block are the gradient blocks under the taps of all query patches that chose its key patches; all warps of
// the thread block share a long list of them. The order of addition is fixed.

#include "device.h"

namespace ttsr_fast {

namespace {

constexpr int kFlight = 3;  // sources with loads in flight at a time; divides the nine taps of a 3x3 patch
constexpr int kLong = 128;  // most sources that one warp sums alone
constexpr int kBlocks = 3;  // on a multiprocessor; more would leave too few registers for the loads in flight

// The slice of a thread block: the same elements of kWarps neighbouring blocks, one for each warp.
struct Slice {
  int64_t image;
  Position block;       // of the first warp
  int32_t first, size;  // in vectors
};

template <int kVector>
__device__ __forceinline__ Slice slice_of(const GatherFoldParams& p, const Grid& blocks, int32_t* level) {
  int32_t number = blockIdx.y;
  for (*level = 0; number >= p.level[*level].slices; ++*level) number -= p.level[*level].slices;
  const uint32_t tiles = (uint32_t(blocks.width) + kWarps - 1) / kWarps, line = blockIdx.x / tiles;
  const int32_t first = number * kSlice<kVector>;
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
  return image * l.in_stride_n + l.stride * (block.y * l.in_stride_h + block.x * l.in_stride_w);
}

// The sources of an output block, tap by tap.
template <class T>
struct ForwardSources {
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
    if (!t.query.patches.contains(at)) return {-1, 0};
    const int64_t patch = image * t.query.patches.size() + t.query.patches.index(at);
    const int64_t key_patch = key_patch_of(p.index, patch, p.check_index, t.key.patches);
    if (key_patch < 0) return {-1, 0};
    const Position from = t.value_block(key_patch, a, b);
    if (!t.key.blocks.contains(from)) return {-1, 0};
    return {offset_of(level, image, from), scale * weight_of<T>(p, patch)};
  }
};

// The rows of csr_indices for a value block, one for the key patch of each tap: where each row begins, and
// the number of sources before it.
struct CsrRows {
  int32_t begin[kMaxTaps], before[kMaxTaps + 1];

  __device__ void find(const GatherFoldParams& p, int64_t image, Position block) {
    const PatchGrid& keys = p.transfer.key;
    const int32_t k = p.transfer.kernel_size, lane = threadIdx.x % kWarpSize;
    int32_t total = 0;
    for (int32_t first = 0; first < k * k; first += kWarpSize) {
      const int32_t tap = first + lane;
      int32_t count = 0;
      if (tap < k * k) {
        const Position at = keys.patch_of(block, tap / k, tap % k);
        if (block.x < keys.blocks.width && keys.patches.contains(at)) {
          const int32_t* offsets = p.csr_offsets + image * keys.patches.size() + keys.patches.index(at);
          begin[tap] = min(max(offsets[0], 0), p.patches);
          count = max(min(offsets[1], p.patches) - begin[tap], 0);
        }
      }
      int32_t sum = count;
      for (int32_t step = 1; step < kWarpSize; step *= 2) {
        const int32_t lower = __shfl_up_sync(kFullWarp, sum, step);
        if (lane >= step) sum += lower;
      }
      if (tap < k * k) before[tap] = total + sum - count;
      total += __shfl_sync(kFullWarp, sum, kWarpSize - 1);
    }
    if (lane == 0) before[k * k] = total;
    __syncwarp();
  }
};

// The sources of a value block, tap by tap.
template <class T>
struct AdjointSources {
  const GatherFoldParams& p;
  const Level& level;
  const CsrRows& rows;

  __device__ int32_t count() const { return rows.before[p.transfer.kernel_size * p.transfer.kernel_size]; }
  __device__ Source<Sum<T>> operator()(int32_t source) const {
    const Transfer& t = p.transfer;
    const int32_t k = t.kernel_size;
    int32_t tap = 0;
    while (rows.before[tap + 1] <= source) ++tap;
    const int32_t patch = p.csr_indices[rows.begin[tap] + source - rows.before[tap]];
    if (uint32_t(patch) >= uint32_t(p.patches)) return {-1, 0};
    const int32_t patches = t.query.patches.size(), image = uint32_t(patch) / uint32_t(patches);
    const Position at = t.output_block(patch - image * patches, tap / k, tap % k);
    if (!t.query.blocks.contains(at)) return {-1, 0};
    return {offset_of(level, image, at), Sum<T>(t.scale(at)) * weight_of<T>(p, patch)};
  }
};

// A list of up to 32 sources in shared memory, without zeros. Every lane finds one.
template <class T, class Sources>
struct SourceList {
  const Sources& sources;
  Source<Sum<T>>* list;  // of the warp
  int32_t first = -1;    // number of the first source
  int32_t count = 0;

  __device__ __forceinline__ void fill(int32_t begin, int32_t end) {
    if (first == begin) return;
    const int32_t lane = threadIdx.x % kWarpSize, number = begin + lane;
    const Source<Sum<T>> mine = number < end ? sources(number) : Source<Sum<T>>{-1, 0};
    const unsigned found = __ballot_sync(kFullWarp, mine.offset >= 0);
    __syncwarp();  // all lanes have read the previous list
    if (mine.offset >= 0) list[__popc(found & ((1u << lane) - 1))] = mine;
    __syncwarp();
    first = begin;
    count = __popc(found);
  }
};

// The elements of a lane in one row of a slice, and their sums.
template <class T, int kVector>
struct LaneSums {
  int32_t pixel[kVectors<kVector>], channel[kVectors<kVector>];
  bool inside[kVectors<kVector>];   // lanes past the end of the slice repeat its last vector
  const T* map[kVectors<kVector>];  // address of the elements in the block at offset 0
  Sum<T> sum[kVectors<kVector>][kVector];

  __device__ LaneSums(const Level& l, const Slice& slice, int32_t row) {
    const int32_t per_pixel = l.channels / kVector;
#pragma unroll
    for (int v = 0; v < kVectors<kVector>; ++v) {
      const int32_t number = v * kWarpSize + threadIdx.x % kWarpSize;
      const int32_t at = slice.first + min(number, slice.size - 1);
      pixel[v] = at / per_pixel;
      channel[v] = at % per_pixel * kVector;
      inside[v] = number < slice.size;
      map[v] = static_cast<const T*>(l.in) + row * l.in_stride_h + pixel[v] * l.in_stride_w + channel[v];
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
    for (int v = 0; v < kVectors<kVector>; ++v) map[v] += l.in_stride_h;
    clear();
  }

  // Adds sources [begin, end), with a partial sum for every 32.
  template <class Sources>
  __device__ __forceinline__ void add(SourceList<T, Sources>& sources, int32_t begin, int32_t end) {
    for (int32_t first = begin; first < end; first += kWarpSize) {
      sources.fill(first, end);
      Sum<T> part[kVectors<kVector>][kVector] = {};
      int32_t i = 0;
#pragma unroll 1
      for (; i + kFlight <= sources.count; i += kFlight) add_flight<kFlight>(sources.list + i, part);
#pragma unroll 1
      for (; i < sources.count; ++i) add_flight<1>(sources.list + i, part);
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

// Sums of lists longer than kLong, one list at a time: each warp of the thread block sums a share of it.
template <class T, int kVector>
__device__ __forceinline__ void share_long_lists(const GatherFoldParams& p, const Level& level,
                                                 const Slice& slice, int32_t row,
                                                 const CsrRows (&rows)[kWarps], LaneSums<T, kVector>& own) {
  __shared__ Sum<T> partial[kWarps][kVectors<kVector>][kVector][kWarpSize];
  __shared__ Source<Sum<T>> lists[kWarps][kWarpSize];
  const int32_t warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  for (int32_t w = 0; w < kWarps; ++w) {
    const AdjointSources<T> sources{p, level, rows[w]};
    const int64_t count = sources.count();
    if (count <= kLong) continue;
    SourceList<T, AdjointSources<T>> list{sources, lists[warp]};
    LaneSums<T, kVector> share(level, slice, row);
    share.add(list, int32_t(count * warp / kWarps), int32_t(count * (warp + 1) / kWarps));
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

// Writes the sums of all warps. Planes go through shared memory, so that neighbouring threads write
// neighbouring pixels.
template <class T, int kVector>
__device__ __forceinline__ void store(const Level& l, const Slice& slice, int32_t row, int64_t width,
                                      const LaneSums<T, kVector>& lane) {
  const int32_t warp = threadIdx.x / kWarpSize;
  T* const out = static_cast<T*>(l.out) + slice.image * l.out_stride_n +
                 (slice.block.y * l.stride + row) * l.out_stride_h +
                 slice.block.x * l.stride * l.out_stride_w;
  // Elements in the order of planes. A slice that is a whole row has all pixels of a channel.
  const int32_t pixels = l.slices == 1 ? l.stride : 1, run = kWarps * pixels;
  __shared__ T staged[kSlice<kVector> * kVector * (kWarps + 1)];
  const bool inside = slice.block.x + warp < width;
#pragma unroll
  for (int v = 0; v < kVectors<kVector>; ++v) {
    if (!inside || !lane.inside[v]) continue;
    Vector<T, kVector> result;
#pragma unroll
    for (int e = 0; e < kVector; ++e) result.element[e] = T(lane.sum[v][e]);
    if (l.out_stride_c == 1) {
      T* const to = out + (warp * l.stride + lane.pixel[v]) * l.out_stride_w + lane.channel[v];
      *reinterpret_cast<Vector<T, kVector>*>(to) = result;
      continue;
    }
    const int32_t element = lane.pixel[v] * l.channels + lane.channel[v] - slice.first * kVector;
    const int32_t first = pixels == 1 ? element : lane.channel[v];
    const int32_t place = pixels == 1 ? warp : warp * pixels + lane.pixel[v];
#pragma unroll
    for (int e = 0; e < kVector; ++e) staged[(first + e) * (run + 1) + place] = result.element[e];
  }
  if (l.out_stride_c == 1) return;
  __syncthreads();
  // A thread stores every 256th element. Repeated division would take longer than the sums.
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
      out[channel * l.out_stride_c + x * l.out_stride_w] = staged[line * (run + 1) + place];
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
  const ForwardSources<T> sources{p, level, slice.image, block, Sum<T>(p.transfer.scale(block))};
  const int32_t count = block.x < blocks.width ? sources.count() : 0;
  __shared__ Source<Sum<T>> lists[kWarps][kWarpSize];
  SourceList<T, ForwardSources<T>> list{sources, lists[threadIdx.x / kWarpSize]};
  LaneSums<T, kVector> lane(level, slice, 0);
  for (int32_t row = 0; row < level.stride; ++row, lane.next_row(level)) {
    lane.add(list, 0, count);
    store(level, slice, row, blocks.width, lane);
  }
}

template <class T, int kVector>
__global__ void __launch_bounds__(kWarps* kWarpSize, kBlocks)
    gather_fold_adjoint_kernel(const __grid_constant__ GatherFoldParams p) {
  __shared__ CsrRows rows[kWarps];
  const Grid& blocks = p.transfer.key.blocks;
  int32_t number;
  const Slice slice = slice_of<kVector>(p, blocks, &number);
  const Level& level = p.level[number];
  const int32_t warp = threadIdx.x / kWarpSize;
  rows[warp].find(p, slice.image, {slice.block.y, slice.block.x + warp});
  const AdjointSources<T> sources{p, level, rows[warp]};
  __shared__ Source<Sum<T>> lists[kWarps][kWarpSize];
  SourceList<T, AdjointSources<T>> list{sources, lists[warp]};
  LaneSums<T, kVector> lane(level, slice, 0);
  __syncthreads();  // the rows of all warps are known
  bool any_long = false;
  for (int32_t w = 0; w < kWarps; ++w) any_long |= AdjointSources<T>{p, level, rows[w]}.count() > kLong;
  for (int32_t row = 0; row < level.stride; ++row, lane.next_row(level)) {
    if (sources.count() <= kLong) lane.add(list, 0, sources.count());
    if (any_long) share_long_lists(p, level, slice, row, rows, lane);
    store(level, slice, row, blocks.width, lane);
  }
}

dim3 grid_of(const GatherFoldParams& p, const Grid& blocks) {
  uint32_t slices = 0;
  for (int32_t l = 0; l < p.levels; ++l) slices += p.level[l].slices;
  return {uint32_t(p.images * blocks.height * ((blocks.width + kWarps - 1) / kWarps)), slices};
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
