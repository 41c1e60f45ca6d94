// The part of CUDA that the kernels use, for a C++ compiler. `emulator.cpp` runs their threads on the CPU.
//
// Sources are compiled unchanged; the include path selects this file. The rules are stricter than on a GPU:
// all threads that synchronise must do so at the same place of the source; a launch needs a DeviceGuard and
// the current stream; a library has no thread-local variables except the ones of `__shared__`.
#pragma once

#include <torch/headeronly/macros/Macros.h>

#include <bit>
#include <concepts>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>  // uses the name __noinline__, so it must come before the macro
#include <source_location>
#include <type_traits>

#define CUDART_VERSION 13000

#define __global__
#define __device__
#define __host__
#define __forceinline__ __inline__ __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
// One thread of the host runs a whole block. Thread-local variables of templates and of plain functions are
// in one place, so every block can poison them. An alignas comes before it; __align__ may follow.
#define __shared__ static thread_local

#undef CUDA_KERNEL_ASSERT
#define CUDA_KERNEL_ASSERT(condition) \
  ((condition) ? void() : emulator::fail("assertion `" #condition "` failed"))

struct uint3 {
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);

namespace emulator {

using Site = std::source_location;

// Ends the launch with an exception; for code of kernels.
[[noreturn]] void fail(const char* what, const Site& site = Site::current());

cudaError_t launch(const cudaLaunchConfig_t& config, const std::function<void()>& kernel);

struct Met {
  uint64_t value;  // of the lane `source`
  unsigned votes;  // lanes with a value other than zero
};

// Waits for all lanes in the mask.
Met meet(const char* name, unsigned mask, uint64_t value, unsigned source, const Site& site);
void meet_block(const char* name, const Site& site);

unsigned lane();

// The only width of a shuffle: all lanes of a warp.
struct Width {
  consteval Width(int lanes) {
    if (lanes != 32) throw "the width of a shuffle is 32";
  }
};

template <class T>
T shuffle(const char* name, unsigned mask, T value, unsigned source, const Site& site) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = meet(name, mask, bits, source, site).value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// Pairs of types that CUDA compares: of equal width, not narrower than int.
template <class A, class B>
concept Comparable = std::integral<A> && std::integral<B> && sizeof(A) >= sizeof(int) &&
                     std::same_as<std::make_signed_t<A>, std::make_signed_t<B>>;

}  // namespace emulator

// As in CUDA, arguments are converted to parameters once, and every thread gets a copy.
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  return [&](Parameters... parameters) {
    return emulator::launch(*config, [&] { kernel(parameters...); });
  }(std::forward<Arguments>(arguments)...);
}

inline void __syncthreads(emulator::Site site = emulator::Site::current()) {
  emulator::meet_block("__syncthreads", site);
}

inline void __syncwarp(unsigned mask = 0xffffffff, emulator::Site site = emulator::Site::current()) {
  emulator::meet("__syncwarp", mask, 0, emulator::lane(), site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, emulator::Site site = emulator::Site::current()) {
  return emulator::meet("__ballot_sync", mask, predicate != 0, emulator::lane(), site).votes;
}

inline int __popc(unsigned bits) { return std::popcount(bits); }

inline int __any_sync(unsigned mask, int predicate, emulator::Site site = emulator::Site::current()) {
  return emulator::meet("__any_sync", mask, predicate != 0, emulator::lane(), site).votes != 0;
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, emulator::Width = 32,
              emulator::Site site = emulator::Site::current()) {
  return emulator::shuffle("__shfl_sync", mask, value, unsigned(source) % 32, site);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, emulator::Width = 32,
                 emulator::Site site = emulator::Site::current()) {
  const unsigned lane = emulator::lane();
  return emulator::shuffle("__shfl_up_sync", mask, value, lane < delta ? lane : lane - delta, site);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, emulator::Width = 32,
                   emulator::Site site = emulator::Site::current()) {
  const unsigned lane = emulator::lane();
  return emulator::shuffle("__shfl_down_sync", mask, value, lane + delta < 32 ? lane + delta : lane, site);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, emulator::Width = 32,
                  emulator::Site site = emulator::Site::current()) {
  return emulator::shuffle("__shfl_xor_sync", mask, value, (emulator::lane() ^ unsigned(bits)) % 32, site);
}

template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}

// Threads run one after the other.
inline long long atomicMax(long long* address, long long value) {
  const long long before = *address;
  if (value > before) *address = value;
  return before;
}

inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }

template <class A, class B>
  requires emulator::Comparable<A, B>
auto min(A a, B b) {
  using T = std::common_type_t<A, B>;
  return T(b) < T(a) ? T(b) : T(a);
}

template <class A, class B>
  requires emulator::Comparable<A, B>
auto max(A a, B b) {
  using T = std::common_type_t<A, B>;
  return T(a) < T(b) ? T(b) : T(a);
}
