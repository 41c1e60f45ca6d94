// Options of a search, and the factors of the key patches.
#pragma once

#include <cmath>
#include <limits>
#include <mutex>

#include "pack.h"

namespace ttsr_fast {

struct SearchOptions {
  int kernel_size;
  int64_t padding;
  bool normalize_query, normalize_key;
  double eps;
  bool add_eps;
  const int32_t* stop;  // another thread sets it to end the search with an error; may be null

  double denominator(double norm) const { return add_eps ? norm + eps : std::max(norm, eps); }
};

// Largest values of key patches that are finite; all but the norm times the patch's factor.
struct Largest {
  double norm = 0, factor = 0, features = 0, low_parts = 0, left_out = 0;

  void merge(const Largest& other) {
    for (double Largest::* value :
         {&Largest::norm, &Largest::factor, &Largest::features, &Largest::low_parts, &Largest::left_out}) {
      this->*value = std::max(this->*value, other.*value);
    }
  }
};

// Factor and validity of every patch of a key chunk, in the tile layout of the kernel.
template <class T>
struct KeyScale {
  using Bits = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  Tensor memory;
  T* scale;  // in `memory`, as the next
  Bits* valid;
  std::vector<int64_t> begin, stride;  // of every tile
  int64_t first_valid;                 // lowest index of a valid key patch, or kNone
  Largest largest;                     // of the valid patches, if features have two parts
  std::vector<T> factors;              // of all patches of the image, as given, if choices are approximate

  static constexpr int64_t kNone = std::numeric_limits<int64_t>::max();

  explicit KeyScale(const Packed& key) {
    const int64_t spare = kScalePadding * key.lanes;
    int64_t size = 0;
    for (int64_t t = 0; t < key.tiles; ++t) {
      begin.push_back(size + spare);
      stride.push_back(key.tile(t).columns + spare);
      size = begin[t] + stride[t] * key.chunk_rows;
    }
    if (key.approximate()) factors.resize(key.grid_height * key.grid_width);
    memory = scratch(size * int64_t(sizeof(T) + sizeof(Bits)));
    scale = mutable_data_of<T>(memory);
    valid = reinterpret_cast<Bits*>(scale + size);
    for (int64_t first : begin) std::fill_n(scale + first - spare, spare, T(0));
  }

  void fill(const Packed& key, const std::optional<Tensor>& key_mask, int64_t n, const SearchOptions& o,
            int64_t threads) {
    const uint8_t* mask = nullptr;  // every byte but 0 is true; a C++ bool must be 0 or 1
    int64_t mask_h = 0, mask_w = 0;
    if (key_mask) {
      mask = data_of<uint8_t>(*key_mask) + (key_mask->size(0) > 1 ? n * key_mask->stride(0) : 0);
      mask_h = key_mask->stride(1), mask_w = key_mask->stride(2);
    }
    std::atomic<int64_t> lowest{kNone};
    std::mutex mutex;
    largest = Largest();
    const int64_t rows = key.end - key.begin;
    const auto fill_row = [&](int64_t row, int64_t) {
      const int64_t y = key.begin + row;
      int64_t first = kNone;
      Largest own;
      for (int64_t t = 0; t < key.tiles; ++t) {
        T* const scales = scale + begin[t] + row * stride[t];
        Bits* const valids = valid + begin[t] + row * stride[t];
        std::fill(scales, scales + stride[t], T(0));
        std::fill(valids, valids + stride[t], Bits(0));
        const int64_t left = key.tile_begin(t);
        key.patch_norms(y, left, left + key.tile(t).columns, [&](int64_t x, double norm) {
          if (mask && !mask[y * mask_h + x * mask_w]) return;
          const double factor = o.normalize_key ? 1 / o.denominator(norm) : 1;
          scales[x - left] = T(std::isfinite(norm) ? factor : std::nan(""));
          valids[x - left] = Bits(-1);
          first = std::min(first, y * key.grid_width + x);
        });
        if (key.parts() == 2) add_largest(key, y, t, scales, own);
        if (!key.approximate()) continue;
        const auto set_factor = [&](int64_t x, double norm) {
          factors[y * key.grid_width + x] = T(o.normalize_key ? 1 / o.denominator(norm) : 1);
        };
        key.patch_norms(y, left, left + key.tile(t).columns, set_factor,
                        key.rounded ? Packed::kAsGiven : Packed::kFeatures);
      }
      if (key.parts() == 2) {
        const std::lock_guard<std::mutex> lock(mutex);
        largest.merge(own);
      }
      for (int64_t seen = lowest; first < seen && !lowest.compare_exchange_weak(seen, first);) {}
    };
    parallel_tasks(rows, 5.0 * rows * key.grid_width, fill_row, threads);
    first_valid = lowest;
  }

 private:
  // Of the key patches in row y of tile t. NaN, the factor of one that is not finite, is never larger.
  static void add_largest(const Packed& key, int64_t y, int64_t t, const T* factors, Largest& largest) {
    const int64_t left = key.tile_begin(t), end = left + key.tile(t).columns;
    const auto add = [&](double Largest::* value, Packed::Norm which) {
      const auto take = [&](int64_t x, double norm) {
        const double factor = factors[x - left];
        if (factor * norm > largest.*value) largest.*value = factor * norm;
        if (which != Packed::kFeatures || !(factor > 0)) return;
        largest.norm = std::max(largest.norm, norm);
        largest.factor = std::max(largest.factor, factor);
      };
      key.patch_norms(y, left, end, take, which);
    };
    add(&Largest::features, Packed::kFeatures);
    add(&Largest::low_parts, Packed::kLowParts);
    add(&Largest::left_out, Packed::kLeftOut);
  }
};

}  // namespace ttsr_fast
