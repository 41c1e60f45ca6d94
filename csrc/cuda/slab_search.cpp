// cuda_slab_search: for every pair of blocks, a cuBLAS GEMM through PyTorch, and the argmax that follows it;
// see slab_argmax_kernel.cu. cuda_slab_argmax runs that argmax alone.

#include <array>

#include "host.h"

namespace ttsr_fast {

namespace {

constexpr int64_t kHalo = 2;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// True if every number is in [1, limit).
bool are_sizes(std::initializer_list<int64_t> sizes, int64_t limit = int64_t(1) << 31) {
  return std::ranges::all_of(sizes, [&](int64_t n) { return 0 < n && n < limit; });
}

// A packed map [images, strips, height + kHalo, line] in strips of patch columns, split into blocks of `rows`
// patch rows; see kernels/layout.py.
struct Slab {
  int64_t images, height, width, strips, strip_width, line, rows;

  Slab(const std::vector<int64_t>& layout, int64_t images_, const Tensor& packed, const char* name)
      : images(images_) {
    STD_TORCH_CHECK(layout.size() == 6, "ttsr_fast: the layout of ", name, " must have 6 numbers, got ",
                    layout.size());
    height = layout[0], width = layout[1], strips = layout[2];
    strip_width = layout[3], line = layout[4], rows = layout[5];
    STD_TORCH_CHECK(are_sizes({images, height, width, strips, strip_width, line, rows}, 1 << 21) &&
                        rows <= height && strip_width + kHalo <= line && strips * strip_width >= width &&
                        (strips - 1) * strip_width < width,
                    "ttsr_fast: invalid layout of ", name);
    STD_TORCH_CHECK(packed.dim() == 2 && packed.is_contiguous() && packed.size(0) / pixels() >= images,
                    "ttsr_fast: ", name, " must be contiguous, with ", pixels(), " rows for each image");
  }

  int64_t pixels() const { return strips * (height + kHalo) * line; }
  int64_t block_pixels() const { return (rows + kHalo) * line; }
  int64_t blocks_per_strip() const { return ceil_div(height, rows); }
  int64_t blocks() const { return strips * blocks_per_strip(); }
  int64_t strip(int64_t block) const { return block / blocks_per_strip(); }
  // The last block of a strip overlaps the block before it.
  int64_t row(int64_t block) const { return std::min(block % blocks_per_strip() * rows, height - rows); }
  int64_t columns(int64_t block) const { return std::min(strip_width, width - strip(block) * strip_width); }
  // First pixel of a block in its image.
  int64_t pixel(int64_t block) const { return (strip(block) * (height + kHalo) + row(block)) * line; }
  // First patch of a block in its grid.
  int64_t patch(int64_t block) const { return row(block) * width + strip(block) * strip_width; }
};

Tensor view(const Tensor& x, std::array<int64_t, 3> size, std::array<int64_t, 3> stride, int64_t offset) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(x.get(), 3, size.data(), stride.data(), offset, &handle));
  return Tensor(handle);
}

// Batched out = a @ b, in float32.
void multiply(const Tensor& a, const Tensor& b, const Tensor& out) {
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack{from(a), from(b), from(out)};
  const char* overload = "out";
  if (a.scalar_type() != ScalarType::Float) {
    stack[3] = stack[2];
    stack[2] = from(ScalarType::Float);
    overload = "dtype_out";
  }
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::bmm", overload, stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // releases the result
}

// The arguments of both operators.
struct Search {
  const Tensor &query_rows, &key_rows, &scale, &best, &ring;
  Slab query, key;
  int64_t depth, batch, batch_stride, keys_per_thread, rows_per_warp;

  void check() const {
    for (const Tensor* x : {&query_rows, &key_rows, &scale, &best, &ring}) {
      check_device(*x, best, "every tensor");
      check_memory(*x, "every tensor");
    }
    STD_TORCH_CHECK((keys_per_thread == 4 || keys_per_thread == 8) && rows_per_warp > 0,
                    "ttsr_fast: a thread must have 4 or 8 keys, and a warp at least one row");
    STD_TORCH_CHECK(query_rows.scalar_type() == key_rows.scalar_type() &&
                        query_rows.size(1) == key_rows.size(1) && depth > 0 && depth <= key_rows.size(1),
                    "ttsr_fast: both packed maps must have the same type and at least `depth` columns");
    STD_TORCH_CHECK(best.scalar_type() == ScalarType::Long && best.is_contiguous() &&
                        best.size(1) == query.height && best.size(2) == query.width,
                    "ttsr_fast: best must be int64 [N, Ho, Wo], contiguous");
    STD_TORCH_CHECK(key.images == 1 || key.images == query.images,
                    "ttsr_fast: there must be one key or one for each image");
    STD_TORCH_CHECK(
        scale.scalar_type() == ScalarType::Float && scale.is_contiguous() && scale.dim() == 4 &&
            (scale.size(0) == 1 || scale.size(0) == query.images) && scale.size(1) == key.strips &&
            scale.size(2) == key.height &&
            scale.size(3) >= ceil_div(key.strip_width, 2 * keys_per_thread) * 2 * keys_per_thread &&
            scale.size(3) % 4 == 0,
        "ttsr_fast: scale must be float32 [N or 1, strips, rows, slots], contiguous");
    STD_TORCH_CHECK(query.line <= kSlabColumns && query.line % kQueries == 0 &&
                        query.block_pixels() <= kProductStride && batch_stride % kQueries == 0,
                    "ttsr_fast: a line of queries must have at most ", kSlabColumns,
                    " pixels, a multiple of ", kQueries, ", and a block at most ", kProductStride);
    STD_TORCH_CHECK(key.height * key.width < int64_t(1) << 31, "ttsr_fast: at most 2^31 - 1 keys");
    STD_TORCH_CHECK(are_sizes({batch, batch_stride}) && batch <= query.images && batch < 1 << 16,
                    "ttsr_fast: too many images together");
    // From any pair, half a warp reads up to 2 * keys_per_thread + 2 key pixels and kSlabColumns query
    // pixels.
    const int64_t last = (batch - 1) * batch_stride +
                         (key.block_pixels() + 2 * keys_per_thread) * kProductStride + kSlabColumns;
    STD_TORCH_CHECK(ring.scalar_type() == ScalarType::Float && ring.is_contiguous() && ring.dim() == 2 &&
                        ring.size(1) == kProductStride && ring.numel() >= last,
                    "ttsr_fast: the ring must be float32 [rows, ", kProductStride, "], of ", last,
                    " elements");
  }

  // Pixels of a block of `batch` images, [batch, pixels, depth] or transposed.
  Tensor pixels(const Tensor& rows, const Slab& slab, int64_t image, int64_t block, bool transposed) const {
    const int64_t width = rows.size(1), image_rows = slab.images == 1 ? 0 : slab.pixels();
    std::array<int64_t, 3> size{batch, slab.block_pixels(), depth}, stride{image_rows * width, width, 1};
    if (transposed) std::swap(size[1], size[2]), std::swap(stride[1], stride[2]);
    return view(rows, size, stride, (image * image_rows + slab.pixel(block)) * width);
  }

  // Merges a product into the best scores of its queries.
  void argmax(int64_t image, int64_t query_block, int64_t key_block, cudaStream_t stream) const {
    const int64_t slots = scale.size(3), scale_n = scale.size(0) == 1 ? 0 : scale.stride(0);
    const int64_t key_row = key.strip(key_block) * key.height + key.row(key_block);
    const SlabArgmaxParams params{.product = data_of<float>(ring),
                                  .product_stride_n = batch_stride,
                                  .scale = data_of<float>(scale) + image * scale_n + key_row * slots,
                                  .scale_stride_n = scale_n,
                                  .scale_stride_h = slots,
                                  .best = mutable_data_of<int64_t>(best) +
                                          image * query.height * query.width + query.patch(query_block),
                                  .best_stride_n = query.height * query.width,
                                  .best_stride_h = query.width,
                                  .images = int32_t(batch),
                                  .query_rows = int32_t(query.rows),
                                  .query_columns = int32_t(query.columns(query_block)),
                                  .query_line = int32_t(query.line),
                                  .key_rows = int32_t(key.rows),
                                  .key_columns = int32_t(key.columns(key_block)),
                                  .key_line = int32_t(key.line),
                                  .index_begin = int32_t(key.patch(key_block)),
                                  .index_stride = int32_t(key.width),
                                  .rows_per_warp = int32_t(rows_per_warp)};
    (keys_per_thread == 4 ? launch_slab_argmax<4> : launch_slab_argmax<8>)(params, stream);
  }
};

// Packed maps and their layouts are described in kernels/layout.py. With kGemm, searches all pairs of blocks;
// without, does the argmax of the first pair alone, whose product is in the ring.
template <bool kGemm>
void slab_search(const Tensor& query_rows,  // [N*pixels + slack, columns]
                 const Tensor& key_rows,    // [N or 1 * pixels + slack, columns]
                 const Tensor& scale,       // [N or 1, strips, HKo, slots]
                 const Tensor& best,        // [N, Ho, Wo], packed score and index
                 const Tensor& ring,        // [rows, kProductStride]
                 int64_t key_images, int64_t depth, int64_t batch, int64_t batch_stride,
                 std::vector<int64_t> query_layout, std::vector<int64_t> key_layout, int64_t keys_per_thread,
                 int64_t rows_per_warp) {
  STD_TORCH_CHECK(best.dim() == 3, "ttsr_fast: best must be int64 [N, Ho, Wo], contiguous");
  const Slab query(query_layout, best.size(0), query_rows, "query");
  const Slab key(key_layout, key_images, key_rows, "key");
  const Search search{query_rows, key_rows,     scale,           best,         ring, query, key, depth,
                      batch,      batch_stride, keys_per_thread, rows_per_warp};
  search.check();
  const DeviceGuard guard(ring.get_device_index());
  const cudaStream_t stream = current_stream(ring);
  if (!kGemm) return search.argmax(0, 0, 0, stream);
  const Tensor products =
      view(ring, {batch, key.block_pixels(), query.block_pixels()}, {batch_stride, kProductStride, 1}, 0);
  for (int64_t first = 0; first < query.images; first += batch) {
    const int64_t image = std::min(first, query.images - batch);
    std::vector<Tensor> queries;
    for (int64_t q = 0; q < query.blocks(); ++q) {
      queries.push_back(search.pixels(query_rows, query, image, q, true));
    }
    for (int64_t k = 0; k < key.blocks(); ++k) {
      const Tensor keys = search.pixels(key_rows, key, image, k, false);
      for (int64_t q = 0; q < query.blocks(); ++q) {
        multiply(keys, queries[q], products);
        search.argmax(image, q, k, stream);
      }
    }
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ttsr_fast, TTSR_DISPATCH_KEY, m) {
  m.impl("cuda_slab_search", TORCH_BOX(&slab_search<true>));
  m.impl("cuda_slab_argmax", TORCH_BOX(&slab_search<false>));  // for tests and benchmarks
}

}  // namespace ttsr_fast
