// The search over a slab: for every pair of blocks one GEMM of PyTorch's, and the kernel that follows it.

#include "slab_search.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <array>

#include "../check.h"
#include "ops.h"

namespace ttsr_fast {

namespace {

using Guard = torch::stable::accelerator::DeviceGuard;

constexpr int64_t kHalo = 2;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether every number is in [1, limit).
bool are_sizes(std::initializer_list<int64_t> sizes, int64_t limit = int64_t(1) << 31) {
  return std::ranges::all_of(sizes, [&](int64_t n) { return 0 < n && n < limit; });
}

// A packed map whose strips are cut into blocks of `rows` rows of patches; see kernels/layout.py.
struct Slab {
  int64_t images, height, width, strips, strip_width, line, rows;

  Slab(const std::vector<int64_t>& sizes, int64_t images_, const Tensor& packed, const char* name)
      : images(images_) {
    STD_TORCH_CHECK(sizes.size() == 6, "ttsr_fast: the layout of ", name, " must have 6 numbers, got ",
                    sizes.size());
    height = sizes[0], width = sizes[1], strips = sizes[2];
    strip_width = sizes[3], line = sizes[4], rows = sizes[5];
    STD_TORCH_CHECK(are_sizes({images, height, width, strips, strip_width, line, rows}, 1 << 21) &&
                        rows <= height && strip_width + kHalo <= line && strips * strip_width >= width &&
                        (strips - 1) * strip_width < width,
                    "ttsr_fast: invalid layout of ", name);
    STD_TORCH_CHECK(packed.dim() == 2 && packed.is_contiguous() && packed.size(0) / pixels() >= images,
                    "ttsr_fast: ", name, " must be contiguous, with ", pixels(), " rows for each image");
  }

  int64_t pixels() const { return strips * (height + kHalo) * line; }
  int64_t block_pixels() const { return (rows + kHalo) * line; }
  int64_t blocks() const { return ceil_div(height, rows); }
  // The last block overlaps the one before it.
  int64_t first_row(int64_t block) const { return std::min(block * rows, height - rows); }
  int64_t columns(int64_t strip) const { return std::min(strip_width, width - strip * strip_width); }
};

Tensor view(const Tensor& x, std::array<int64_t, 3> size, std::array<int64_t, 3> stride, int64_t offset) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(x.get(), 3, size.data(), stride.data(), offset, &handle));
  return Tensor(handle);
}

// out = a @ b for batches, in float32.
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
  torch::stable::detail::to<Tensor>(stack[0]);  // releases it
}

struct Search {
  Slab query, key;
  const Tensor &query_rows, &key_rows, &scale, &best, &ring;
  int64_t depth, together, image_stride;

  void check(int64_t keys, int64_t walk_rows) const {
    for (const Tensor* x : {&query_rows, &key_rows, &scale, &ring}) check_device(*x, best, "every tensor");
    STD_TORCH_CHECK((keys == 4 || keys == 8) && walk_rows > 0,
                    "ttsr_fast: a thread has 4 or 8 keys and walks down at least one row");
    STD_TORCH_CHECK(query_rows.scalar_type() == key_rows.scalar_type() &&
                        query_rows.size(1) == key_rows.size(1) && depth > 0 && depth <= key_rows.size(1),
                    "ttsr_fast: both packed maps must have the same type and at least `depth` columns");
    STD_TORCH_CHECK(best.scalar_type() == ScalarType::Long && best.is_contiguous() && best.dim() == 3 &&
                        best.size(1) == query.height && best.size(2) == query.width,
                    "ttsr_fast: best must be int64 [N, Ho, Wo], contiguous");
    STD_TORCH_CHECK(key.images == 1 || key.images == query.images,
                    "ttsr_fast: there must be one key or one for each image");
    STD_TORCH_CHECK(scale.scalar_type() == ScalarType::Float && scale.is_contiguous() && scale.dim() == 4 &&
                        (scale.size(0) == 1 || scale.size(0) == query.images) &&
                        scale.size(1) == key.strips && scale.size(2) == key.height &&
                        scale.size(3) >= ceil_div(key.strip_width, 2 * keys) * 2 * keys &&
                        scale.size(3) % 4 == 0,
                    "ttsr_fast: scale must be float32 [N or 1, strips, rows, slots], contiguous");
    STD_TORCH_CHECK(query.line <= kSlabColumns && query.line % kQueries == 0 &&
                        query.block_pixels() <= kLeading && image_stride % kQueries == 0,
                    "ttsr_fast: a line of queries must have at most ", kSlabColumns,
                    " pixels, a multiple of ", kQueries, ", and a block at most ", kLeading);
    STD_TORCH_CHECK(key.height * key.width < int64_t(1) << 31, "ttsr_fast: at most 2^31 - 1 keys");
    STD_TORCH_CHECK(are_sizes({together, image_stride}) && together <= query.images && together < 1 << 16,
                    "ttsr_fast: too many images together");
    // Half a warp reads up to 2 * keys + 2 key pixels and kSlabColumns query pixels from any pair on.
    const int64_t last =
        (together - 1) * image_stride + (key.block_pixels() + 2 * keys) * kLeading + kSlabColumns;
    STD_TORCH_CHECK(ring.scalar_type() == ScalarType::Float && ring.is_contiguous() && ring.dim() == 2 &&
                        ring.size(1) == kLeading && ring.numel() >= last,
                    "ttsr_fast: the ring must be float32 [rows, ", kLeading, "], of ", last, " elements");
  }

  // The pixels of a block, [together, pixels, depth], for as many images as are searched together.
  Tensor operand(const Tensor& rows, const Slab& slab, int64_t image, int64_t number, bool transposed) const {
    const int64_t width = rows.size(1), image_rows = slab.images == 1 ? 0 : slab.pixels();
    const int64_t line =
        number / slab.blocks() * (slab.height + kHalo) + slab.first_row(number % slab.blocks());
    std::array<int64_t, 3> size{together, slab.block_pixels(), depth}, stride{image_rows * width, width, 1};
    if (transposed) std::swap(size[1], size[2]), std::swap(stride[1], stride[2]);
    return view(rows, size, stride, (image * image_rows + line * slab.line) * width);
  }

  BoxMaxParams params(int64_t image, int64_t query_number, int64_t key_number, int64_t walk_rows) const {
    const int64_t query_strip = query_number / query.blocks(), key_strip = key_number / key.blocks();
    const int64_t query_row = query.first_row(query_number % query.blocks());
    const int64_t key_row = key.first_row(key_number % key.blocks());
    const int64_t slots = scale.size(3), scale_n = scale.size(0) == 1 ? 0 : scale.stride(0);
    return {static_cast<const float*>(ring.const_data_ptr()),
            image_stride,
            static_cast<const float*>(scale.const_data_ptr()) + image * scale_n +
                (key_strip * key.height + key_row) * slots,
            scale_n,
            slots,
            static_cast<int64_t*>(best.mutable_data_ptr()) +
                (image * query.height + query_row) * query.width + query_strip * query.strip_width,
            query.height * query.width,
            query.width,
            int32_t(together),
            int32_t(query.rows),
            int32_t(query.columns(query_strip)),
            int32_t(query.line),
            int32_t(key.rows),
            int32_t(key.columns(key_strip)),
            int32_t(key.line),
            int32_t(key_row * key.width + key_strip * key.strip_width),
            int32_t(key.width),
            int32_t(walk_rows)};
  }
};

Search checked(const Tensor& query_rows, const Tensor& key_rows, const Tensor& scale, const Tensor& best,
               const Tensor& ring, const SlabOptions& options) {
  STD_TORCH_CHECK(best.dim() == 3, "ttsr_fast: best must be int64 [N, Ho, Wo], contiguous");
  const Search search{{options.query, best.size(0), query_rows, "query"},
                      {options.key, options.key_images, key_rows, "key"},
                      query_rows,
                      key_rows,
                      scale,
                      best,
                      ring,
                      options.depth,
                      options.together,
                      options.image_stride};
  search.check(options.keys, options.walk_rows);
  return search;
}

void launch(const BoxMaxParams& params, int64_t keys, cudaStream_t stream) {
  (keys == 4 ? launch_box_max<4> : launch_box_max<8>)(params, stream);
}

}  // namespace

void slab_search(const Tensor& query_rows, const Tensor& key_rows, const Tensor& scale, const Tensor& best,
                 const Tensor& ring, const SlabOptions& options) {
  const Search search = checked(query_rows, key_rows, scale, best, ring, options);
  const Slab &query = search.query, &key = search.key;
  const Guard guard(ring.get_device_index());
  const cudaStream_t stream = current_stream(ring);
  const Tensor products = view(ring, {search.together, key.block_pixels(), query.block_pixels()},
                               {search.image_stride, kLeading, 1}, 0);
  for (int64_t first = 0; first < query.images; first += search.together) {
    const int64_t image = std::min(first, query.images - search.together);
    std::vector<Tensor> queries;
    for (int64_t to = 0; to < query.strips * query.blocks(); ++to) {
      queries.push_back(search.operand(query_rows, query, image, to, true));
    }
    for (int64_t from = 0; from < key.strips * key.blocks(); ++from) {
      const Tensor keys = search.operand(key_rows, key, image, from, false);
      for (size_t to = 0; to < queries.size(); ++to) {
        multiply(keys, queries[to], products);
        launch(search.params(image, int64_t(to), from, options.walk_rows), options.keys, stream);
      }
    }
  }
}

void box_max(const Tensor& query_rows, const Tensor& key_rows, const Tensor& scale, const Tensor& best,
             const Tensor& ring, const SlabOptions& options) {
  const Search search = checked(query_rows, key_rows, scale, best, ring, options);
  const Guard guard(ring.get_device_index());
  launch(search.params(0, 0, 0, options.walk_rows), options.keys, current_stream(ring));
}

}  // namespace ttsr_fast
