// Exact scores of what a search with rounded products chose, and the exact choice among its best candidates.
#pragma once

#include "argmax.h"
#include "key_scale.h"

namespace ttsr_fast {

// Best scores that a search with features in two parts keeps. All but the last one can be scored exactly.
constexpr int64_t kCandidates = 4;

// Chooses the best of the candidates of a query chunk by their exact scores. Writes score and index as a
// search in float would find them, and whether no other key can be better: `certain`, 1 or 0 for every query
// patch. Of one candidate only the score is computed; `certain` is null.
//
// With x = h + l + e, the parts of a feature and what they leave out, the search takes h h' + h l' + l h' for
// x x'. So the inner product of two patches is off by at most |l||l'| + |e||x'| + (|x| + |e|)|e'|, and by the
// rounding of its sums and the denormals that they flush, see ErrorBounds. Every key with a score below the
// exact score of another by more than that is excluded, and the last of the best scores excludes all keys
// that are not candidates.
void choose_candidates(const Tensor& query, const Tensor& key, int64_t n, const Packed& packed_query,
                       const Largest& largest_key, const float* factors,  // of all key patches
                       const Argmax<float>& candidates, const SearchOptions& o, int64_t threads,
                       const Argmax<float>& result, uint8_t* certain);

// The patches of some queries of image n side by side, in the rows of one map: see `Gathered::column`.
struct Gathered {
  Tensor map;                   // [1, C, kernel_size, columns]
  std::vector<int64_t> patch;   // query patches
  std::vector<int64_t> column;  // the column of the map's patch grid that has each of them
};

// Patches from number `begin` on that are not certain, as many as fit; their row in the patch grid of the map
// is the padding. `begin` becomes the number of the first one left.
Gathered gather_uncertain(const Tensor& query, int64_t n, const uint8_t* certain, const SearchOptions& o,
                          int64_t& begin);

}  // namespace ttsr_fast
