// Parallel loops and scratch memory.
#pragma once

#include <atomic>

#include "../common.h"

namespace ttsr_fast {

// Least work of a thread: on a busy machine, waking one can take as long as a time slice of its scheduler.
constexpr double kNanosecondsPerThread = 30e3;

// Number of threads for tasks that take one thread about `nanoseconds` in total.
inline int64_t threads_for(int64_t tasks, double nanoseconds) {
  const double worth = std::clamp(nanoseconds / kNanosecondsPerThread, 1.0, double(tasks));
  return std::min<int64_t>(int64_t(worth), torch::stable::get_num_threads());
}

// Runs f(task, thread) for every task. Idle threads take the next task, in ascending order.
template <class F>
void parallel_tasks(int64_t tasks, double nanoseconds, const F& f) {
  if (tasks <= 0) return;
  std::atomic<int64_t> next{0};
  const int64_t threads = threads_for(tasks, nanoseconds);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      for (int64_t task; (task = next.fetch_add(1)) < tasks;) f(task, thread);
    }
  });
}

// Uninitialised memory from PyTorch's allocator, aligned to 64 bytes.
inline Tensor scratch(int64_t bytes) { return torch::stable::empty({bytes}, ScalarType::Byte); }

}  // namespace ttsr_fast
