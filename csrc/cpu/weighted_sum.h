// Weighted sums of blocks of a map, the inner loops of gather_fold, compiled for every instruction set.
#pragma once

#include "../common.h"

// One copy of a function for every instruction set; the loader chooses. (The address sanitizer starts later.)
#if defined(__x86_64__) && defined(__linux__) && !defined(__SANITIZE_ADDRESS__)
#define TTSR_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define TTSR_CLONES
#endif

namespace ttsr_fast {

template <class S>
struct Source {
  int64_t offset;  // of a block's first element, in elements of the map
  S weight;
};

// A block in some channels of a map whose rows are contiguous.
template <class T>
struct Planes {
  T* data;
  int64_t row, plane;  // strides
};

// out[p][r][c] = sum over sources of weight * map[p][r][c], from the source's offset on, for the stride x
// stride elements of a block in every plane.
void sum_blocks(const Planes<const float>& map, const Source<float>* sources, int64_t count, int64_t stride,
                int64_t planes, const Planes<float>& out);
void sum_blocks(const Planes<const double>& map, const Source<double>* sources, int64_t count, int64_t stride,
                int64_t planes, const Planes<double>& out);
void sum_blocks(const Planes<const Half>& map, const Source<float>* sources, int64_t count, int64_t stride,
                int64_t planes, const Planes<Half>& out);
void sum_blocks(const Planes<const BFloat16>& map, const Source<float>* sources, int64_t count,
                int64_t stride, int64_t planes, const Planes<BFloat16>& out);

// out[i] = sum over sources of weight * map[offset + i], for i in [0, length).
void sum_vectors(const float* map, const Source<float>* sources, int64_t count, int64_t length, float* out);
void sum_vectors(const double* map, const Source<double>* sources, int64_t count, int64_t length,
                 double* out);
void sum_vectors(const Half* map, const Source<float>* sources, int64_t count, int64_t length, Half* out);
void sum_vectors(const BFloat16* map, const Source<float>* sources, int64_t count, int64_t length,
                 BFloat16* out);

}  // namespace ttsr_fast
