// What every operator of the library uses: tensors of the stable ABI, element types, parallel loops.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <optional>
#include <type_traits>

namespace ttsr_fast {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The type that values of type T are summed in.
template <class T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Calls f with a value of the tensor's element type.
template <class F>
void with_element(const Tensor& x, F&& f) {
  switch (x.scalar_type()) {
    case ScalarType::Double: return f(double());
    case ScalarType::Float: return f(float());
    case ScalarType::Half: return f(Half());
    case ScalarType::BFloat16: return f(BFloat16());
    default: STD_TORCH_CHECK(false, "ttsr_fast: not a floating-point tensor");
  }
}

// A batch of maps [N, C, H, W] with any strides, in elements; a batch of one serves every n.
template <class T>
struct Maps {
  T* data;
  int64_t channels, height, width;
  int64_t stride_n, stride_c, stride_h, stride_w;

  explicit Maps(const Tensor& x)
      : data(const_cast<T*>(static_cast<const T*>(x.const_data_ptr()))), channels(x.size(1)),
        height(x.size(2)), width(x.size(3)), stride_n(x.size(0) == 1 ? 0 : x.stride(0)),
        stride_c(x.stride(1)), stride_h(x.stride(2)), stride_w(x.stride(3)) {}

  T* at(int64_t n, int64_t c, int64_t y, int64_t x) const {
    return data + n * stride_n + c * stride_c + y * stride_h + x * stride_w;
  }
};

// Work that is worth a thread: on a busy machine, waking one up can take as long as a slice of its scheduler.
constexpr double kNanosecondsPerThread = 30e3;

// As many threads as the tasks are worth, which one thread does in so many nanoseconds, roughly.
inline int64_t threads_for(int64_t tasks, double nanoseconds) {
  const double worth = std::clamp(nanoseconds / kNanosecondsPerThread, 1.0, double(tasks));
  return std::min<int64_t>(int64_t(worth), torch::stable::get_num_threads());
}

// Runs f(task, thread) for every task; threads take the next task as they finish, in ascending order.
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
