// The operators that the library implements; see ttsr_fast/operators/ops.py for their contracts. All check their
// arguments.
#pragma once

#include <algorithm>
#include <string>

#include "common.h"

namespace ttsr_fast {

struct SearchOptions {
  int kernel_size;
  int64_t padding;
  bool normalize_query, normalize_key;
  double eps;
  bool add_eps;
  bool bfloat16;        // round features to bfloat16 where the processor multiplies those
  const int32_t* stop;  // another thread sets it to end the search with an error; may be null

  // What a patch of that norm is divided by.
  double denominator(double norm) const { return add_eps ? norm + eps : std::max(norm, eps); }
};

// Fills score and index.
void search(const Tensor& query,                    // [N, C, H, W]
            const Tensor& key,                      // [N or 1, C, HK, WK]
            const std::optional<Tensor>& key_mask,  // [N or 1, HKo, WKo]
            Tensor score,                           // [N, Ho, Wo]
            Tensor index,                           // [N, Ho, Wo]
            const SearchOptions& options);

struct GatherFoldOptions {
  int64_t stride, kernel_size, padding;
  int64_t key_height, key_width;  // the key grid that the index counts in
  std::string divisor;
};

// Values end with whole blocks; the rows of value and out of the first two are both contiguous, or their
// pixels.
void gather_fold(const Tensor& value,                  // [N or 1, C, HV, WV]
                 const Tensor& index,                  // [N, Ho, Wo]
                 const std::optional<Tensor>& weight,  // [N, Ho, Wo]
                 Tensor out,                           // [N, C, stride*H, stride*W]
                 const GatherFoldOptions& options);
void gather_fold_adjoint(const Tensor& grad,                   // [N, C, stride*H, stride*W]
                         const Tensor& index,                  // [N, Ho, Wo]
                         const std::optional<Tensor>& weight,  // [N, Ho, Wo]
                         Tensor out,                           // [N or 1, C, HV, WV]
                         const GatherFoldOptions& options);
void gather_dot(const Tensor& value,  // [N or 1, C, HV, WV]
                const Tensor& grad,   // [N, C, stride*H, stride*W]
                const Tensor& index,  // [N, Ho, Wo]
                Tensor out,           // [N, Ho, Wo]
                const GatherFoldOptions& options);

}  // namespace ttsr_fast
