// Parallel loops and scratch memory.
#pragma once

#include <atomic>

#ifdef __linux__
#include <sys/mman.h>
#endif
#include <limits>

#include "../common.h"

namespace ttsr_fast {

// Least work of a thread: on a busy machine, waking one can take as long as a time slice of its scheduler.
constexpr double kNanosecondsPerThread = 30e3;

constexpr int64_t kMostThreads = std::numeric_limits<int64_t>::max();  // all that PyTorch has

// Number of threads for tasks that take one thread about `nanoseconds` in total.
inline int64_t threads_for(int64_t tasks, double nanoseconds) {
  const double worth = std::min(nanoseconds / kNanosecondsPerThread, double(tasks));
  if (worth < 2) return 1;
  return std::min<int64_t>(int64_t(worth), torch::stable::get_num_threads());
}

// Runs f(task, thread) for every task, on at most `most` threads. Idle threads take the next task, in
// ascending order.
template <class F>
void parallel_tasks(int64_t tasks, double nanoseconds, const F& f, int64_t most = kMostThreads) {
  const int64_t threads = most > 1 ? std::min(most, threads_for(tasks, nanoseconds)) : 1;
  if (threads == 1) {
    for (int64_t task = 0; task < tasks; ++task) f(task, 0);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      for (int64_t task; (task = next.fetch_add(1)) < tasks;) f(task, thread);
    }
  });
}

// Uninitialised memory from PyTorch's allocator, aligned to 64 bytes; in huge pages where it is large and the
// system has them: a search reads it in many rows at once, and walks of page tables would take half its time.
inline Tensor scratch(int64_t bytes) {
  const Tensor memory = torch::stable::empty({bytes}, ScalarType::Byte);
#ifdef __linux__
  constexpr uintptr_t kPage = 4096, kLarge = 4 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory.const_data_ptr()) + kPage - 1) / kPage * kPage;
  if (uintptr_t(bytes) >= kLarge) madvise(reinterpret_cast<void*>(begin), bytes - kPage, MADV_HUGEPAGE);
#endif
  return memory;
}

}  // namespace ttsr_fast
