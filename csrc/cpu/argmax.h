// The best scores of the query patches of a chunk, and their merge from several threads.
#pragma once

#include <cmath>
#include <limits>

#include "pack.h"

namespace ttsr_fast {

// Row offsets of one call of the kernel: it reads key rows once for all, and their partial sums share the
// cache.
inline int64_t offsets_per_call(int kernel_size) { return kernel_size <= 3 ? 4 : 1; }

// The best scores of every query patch of a chunk and their keys: `keep` of each, descending.
template <class T>
struct Argmax {
  T* score;
  int64_t* index;
  int64_t keep = 1, stride = 0;  // stride: from one score of a patch to the next best

  static int64_t bytes(int64_t patches, int64_t keep) {
    return round_up(keep * patches * int64_t(sizeof(T) + sizeof(int64_t)), 64);
  }
  static Argmax at(char* memory, int64_t patches, int64_t keep) {
    int64_t* const index = reinterpret_cast<int64_t*>(memory);
    return {reinterpret_cast<T*>(index + keep * patches), index, keep, patches};
  }
};

// Workspaces of the threads that search an image, and the argmax of all but the first thread, whose argmax is
// the result.
template <class T>
class ThreadMemory {
 public:
  ThreadMemory(int64_t threads, const Packed& query, int64_t keep)
      : patches_(query.chunk_rows * query.grid_width), keep_(keep) {
    const Workspace<T> layout(query.tile(0), query.kernel_size);
    workspace_bytes_ = round_up(layout.size(offsets_per_call(query.kernel_size)) * sizeof(T), 64);
    thread_bytes_ = workspace_bytes_ + (threads > 1 ? Argmax<T>::bytes(patches_, keep) : 0);
    memory_ = scratch(threads * thread_bytes_);
  }

  char* workspace(int64_t thread) const { return mutable_data_of<char>(memory_) + thread * thread_bytes_; }
  Argmax<T> argmax(int64_t thread, const Argmax<T>& result) const {
    if (thread == 0) return result;
    return Argmax<T>::at(workspace(thread) + workspace_bytes_, patches_, keep_);
  }

 private:
  int64_t patches_, keep_, workspace_bytes_, thread_bytes_;
  Tensor memory_;
};

// Initial values of `threads` threads. The first one has the result of earlier key chunks unless `first`. A
// query patch that is not finite has score NaN with any key.
template <class T>
void initialise(const Packed& query, const ThreadMemory<T>& memory, const Argmax<T>& result, bool first,
                int64_t first_valid_key, int64_t threads) {
  const int64_t rows = query.end - query.begin, columns = query.grid_width;
  const auto fill_row = [&](int64_t row, int64_t) {
    for (int64_t thread = first ? 0 : 1; thread < threads; ++thread) {
      const Argmax<T> own = memory.argmax(thread, result);
      for (int64_t r = 0; r < own.keep; ++r) {
        const int64_t at = r * own.stride + row * columns;
        std::fill_n(own.score + at, columns, -std::numeric_limits<T>::infinity());
        std::fill_n(own.index + at, columns, first_valid_key);
      }
    }
    if (!first) return;
    query.patch_norms(query.begin + row, 0, columns, [&](int64_t x, double norm) {
      if (std::isfinite(norm)) return;
      for (int64_t r = 0; r < result.keep; ++r) {
        result.score[r * result.stride + row * columns + x] = T(std::nan(""));
      }
    });
  };
  parallel_tasks(rows, (4.0 + threads) * result.keep * rows * columns, fill_row, threads);
}

// Merges the argmax of all threads into the result, that of the first one.
template <class T>
void merge(const Packed& query, const ThreadMemory<T>& memory, const Argmax<T>& result, int64_t threads) {
  const int64_t rows = query.end - query.begin, columns = query.grid_width;
  const auto merge_row = [&](int64_t row, int64_t) {
    for (int64_t thread = 1; thread < threads; ++thread) {
      const Argmax<T> own = memory.argmax(thread, result);
      for (int64_t r = 0; r < own.keep; ++r) {
        const int64_t from = r * own.stride;
        for (int64_t j = row * columns; j < (row + 1) * columns; ++j) {
          insert_ranked(own.score[from + j], own.index[from + j], result.score + j, result.index + j,
                        result.keep, result.stride);
        }
      }
    }
  };
  if (threads > 1) parallel_tasks(rows, 3.0 * threads * result.keep * rows * columns, merge_row, threads);
}

}  // namespace ttsr_fast
