"""The CUDA emulator: communication between threads, in every order, and detection of faults."""

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.emulated import library

HEADER = r"""
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#define EXPORT extern "C" __attribute__((visibility("default")))

template <class F>
const char* message_of(F&& f) {
  static std::string message;
  message.clear();
  try {
    f();
  } catch (const std::runtime_error& error) { message = error.what(); }
  return message.c_str();
}

template <class... Parameters, class... Arguments>
const char* run(dim3 grid, dim3 block, void (*kernel)(Parameters...), Arguments... arguments) {
  return message_of([&] {
    torch::stable::accelerator::DeviceGuard guard(0);
    guard.set_index(0);
    void* stream;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(0, &stream));
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.stream = static_cast<cudaStream_t>(stream);
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, arguments...));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

// A function run_<name>(x, out).
#define EXPORT_RUN(name, T, grid, block, kernel) \
  EXPORT const char* run_##name(T* x, T* out) { return run(grid, block, kernel, x, out); }
"""

RESULTS = r"""
#include "run.h"

constexpr unsigned kAll = 0xffffffff;
static_assert(CUDART_VERSION >= 12000 && sizeof(uint4) == 16 && alignof(uint4) == 16);

// Position of each thread in the grid [z, y, x], in decimal digits.
__global__ void visit(const int*, int* out) {
  const dim3 at(blockIdx.x * blockDim.x + threadIdx.x, blockIdx.y * blockDim.y + threadIdx.y,
                blockIdx.z * blockDim.z + threadIdx.z);
  out[(at.z * gridDim.y * blockDim.y + at.y) * gridDim.x * blockDim.x + at.x] +=
      1 + threadIdx.x + 10 * threadIdx.y + 100 * threadIdx.z +
      1000 * blockIdx.x + 10000 * blockIdx.y + 100000 * blockIdx.z;
}
EXPORT_RUN(visit, int, dim3(2, 3, 4), dim3(5, 2, 3), visit)

template <class T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) x += __shfl_xor_sync(kAll, x, bits);
  return x;
}

// The sum of every block's values.
template <class T>
__global__ void __launch_bounds__(96, 2) block_sum(const T* __restrict__ x, T* __restrict__ out) {
  __shared__ __align__(16) T partial[3];
  const T sum = warp_sum(__ldg(x + blockIdx.x * blockDim.x + threadIdx.x));
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) out[blockIdx.x] = partial[0] + partial[1] + partial[2];
}
EXPORT_RUN(block_sum_int32, int, 2, 96, block_sum<int>)
EXPORT_RUN(block_sum_int64, int64_t, 2, 96, block_sum<int64_t>)
EXPORT_RUN(block_sum_float32, float, 2, 96, block_sum<float>)
EXPORT_RUN(block_sum_float64, double, 2, 96, block_sum<double>)

// Prefix sums of a warp, then the sum of the lane with twice the number.
__global__ void scan(const int64_t* x, int64_t* out) {
  int64_t sum = x[threadIdx.x];
  for (unsigned step = 1; step < 32; step *= 2) {
    const int64_t before = __shfl_up_sync(kAll, sum, step);
    if (threadIdx.x % 32 >= step) sum += before;
  }
  out[threadIdx.x] = sum;
  out[64 + threadIdx.x] = __shfl_sync(kAll, sum, 2 * threadIdx.x, 32);
}
EXPORT_RUN(scan, int64_t, 1, 64, scan)

__global__ void vote(const int64_t*, int64_t* out) {
  const unsigned lane = threadIdx.x, half = lane < 16 ? 0xffff : 0xffff0000;
  const unsigned thirds = __ballot_sync(kAll, lane % 3 == 0 ? 4 : 0);
  const unsigned high = __ballot_sync(half, lane % 16 >= 12);
  const int any = __any_sync(half, lane == 20);
  __syncwarp();
  __syncwarp(half);
  out[lane] = thirds;
  out[32 + lane] = high;
  out[64 + lane] = any;
}
EXPORT_RUN(vote, int64_t, 1, 32, vote)

// Every thread reads the value of its neighbour from shared memory.
template <bool kBarrier>
__global__ void rotate(const float* x, float* out) {
  __shared__ float shared[64];
  shared[threadIdx.x] = x[threadIdx.x];
  if (kBarrier) __syncthreads();
  out[threadIdx.x] = shared[(threadIdx.x + 1) % 64];
}
EXPORT_RUN(rotate, float, 1, 64, rotate<true>)
EXPORT_RUN(rotate_early, float, 1, 64, rotate<false>)

// Values that the first thread reads from unwritten memory.
template <class T>
__device__ __noinline__ T unwritten() {
  __shared__ T shared[40];
  const T found = shared[39];
  shared[39] = 0;
  return found;
}
__global__ void poison(const double*, double* out) {
  __shared__ int shared[3];
  if (threadIdx.x > 0) return;
  out[3 * blockIdx.x] = unwritten<float>();
  out[3 * blockIdx.x + 1] = unwritten<double>();
  out[3 * blockIdx.x + 2] = shared[1];
  shared[1] = 0;
}
EXPORT_RUN(poison, double, 3, 7, poison)

__global__ void copy(const int* x, int* out) {
  const uint4 vector = __ldg(reinterpret_cast<const uint4*>(x) + threadIdx.x);
  reinterpret_cast<uint4*>(out)[threadIdx.x] = vector;
}
EXPORT_RUN(copy, int, 1, 3, copy)

__global__ void compare(const unsigned* x, unsigned* out) {
  const int negative = x[0];
  out[0] = max(negative, 2);
  out[1] = min(2, negative);
  out[2] = max(x[1], negative);  // both as unsigned
  out[3] = min(negative, x[1]);
  out[4] = min(int64_t(x[1]), int64_t(negative)) >> 32;
}
EXPORT_RUN(compare, unsigned, 1, 1, compare)

__global__ void empty() {}
EXPORT const char* run_grid(int x, int y, int z) { return run(dim3(x, y, z), 1, empty); }
EXPORT const char* run_block(int x, int y, int z) { return run(1, dim3(x, y, z), empty); }

const cudaLaunchConfig_t kNoStream{1, 1, 0, nullptr};
EXPORT const char* run_elsewhere() {
  const torch::stable::accelerator::DeviceGuard guard(0);
  return message_of([] { cudaLaunchKernelEx(&kNoStream, empty); });
}
EXPORT const char* run_unguarded() {
  return message_of([] { cudaLaunchKernelEx(&kNoStream, empty); });
}
"""

AT = r"at faults\.cu:\d+:\d+"
STUCK = r"block \(1, 0, 0\) is stuck: of 64 threads"
SYNC, XOR, SHUFFLE = (
    f"wait for __{name} {AT}" for name in ("syncthreads", "shfl_xor_sync", "shfl_sync")
)
IN_THREAD = rf"{AT} in block \(1, 0, 0\), thread \("
UNNAMED = f"a lane is needed that the mask does not include {IN_THREAD}"

# Code of one of three blocks of 64 threads before a shuffle and a barrier, and the message.
FAULTS = {
    "an early end": ("if (t == 3) return;", f"{STUCK} 1 ended, 31 {XOR}, 32 {SYNC}$"),
    "lanes that end": ("if (t % 32 >= 24) return;", f"{STUCK} 16 ended, 48 {XOR}$"),
    "one barrier for half": ("if (t < 32) __syncthreads();", f"{STUCK} 32 {SYNC}, 32 {SYNC}$"),
    "two barriers": (
        "if (t < 5) { __syncthreads(); } else { __syncthreads(); }",
        f"{STUCK} (5 {SYNC}, 59 {SYNC}|59 {SYNC}, 5 {SYNC})$",
    ),
    "two shuffles": (
        "*out = t % 32 < 8 ? __shfl_sync(kAll, t, 0) : __shfl_sync(kAll, t, 1);",
        f"{STUCK} (16 {SHUFFLE}, 48 {SHUFFLE}|48 {SHUFFLE}, 16 {SHUFFLE})$",
    ),
    "a lane outside the mask": (
        "*out = __shfl_sync(t % 32 < 16 ? 0xffff : 0xffff0000, t, 3);",
        UNNAMED,
    ),
    "a mask of others": (
        "__syncwarp(1 << (t + 1) % 32);",
        UNNAMED,
    ),
    "an assertion": (
        "CUDA_KERNEL_ASSERT(x != nullptr && t != 33);",
        rf"assertion `x != nullptr && t != 33` failed {IN_THREAD}33, 0, 0\)$",
    ),
    "a misaligned vector": (
        "if (t == 40) *out = reinterpret_cast<const uint4*>(x + 1)->x;",
        rf"misaligned or null pointer {IN_THREAD}40, 0, 0\)$",
    ),
    "an index out of bounds": (
        "alignas(16) __shared__ int shared[40]; if (t < 41) shared[t] = 1; *out = shared[3];",
        rf"index out of bounds {IN_THREAD}40, 0, 0\)$",
    ),
    "integers that overflow": (
        "if (t == 50) *out = x[7] + 0x7fffffff;",
        rf"integer overflow {IN_THREAD}50, 0, 0\)$",
    ),
}
CASES = "\n".join(f"if (fault == {i}) {{ {code} }}" for i, (code, _) in enumerate(FAULTS.values()))
FAULTY = f"""
#include "run.h"

constexpr unsigned kAll = 0xffffffff;

__global__ void faulty(int fault, const int* x, int* out) {{
  const unsigned t = threadIdx.x;
  if (blockIdx.x == 1) {{
    {CASES}
    *out = __shfl_xor_sync(kAll, *x, 1);
  }}
  __syncthreads();
}}
EXPORT const char* run_faulty(int threads, int fault, int* x, int* out) {{
  return run(3, threads, faulty, fault, x, out);
}}
"""

C_TYPES = {Tensor: ctypes.c_void_p, int: ctypes.c_int}
ORDERS = (0, 1, 2, 3)  # ascending, descending, two random ones
Run = Callable[..., None]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "run.h").write_text(HEADER)
    (folder / "results.cu").write_text(RESULTS)
    (folder / "faults.cu").write_text(FAULTY)
    return ctypes.CDLL(str(library(folder)))


@pytest.fixture(params=ORDERS)
def run(request: pytest.FixtureRequest, compiled: ctypes.CDLL) -> Run:
    """Calls a function of the kernels with tensors and numbers; raises the error of a launch."""
    compiled.emulator_set_order(request.param)

    def call(name: str, *arguments: Tensor | int) -> None:
        function = compiled[f"run_{name}"]
        function.restype = ctypes.c_char_p
        function.argtypes = [C_TYPES[type(x)] for x in arguments]
        values = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
        message = function(*values).decode()
        if message:
            raise RuntimeError(message)

    return call


def check_sums(run: Run, dtype: torch.dtype) -> None:
    x = torch.arange(192).to(dtype)
    out = torch.zeros(2, dtype=dtype)
    run(f"block_sum_{str(dtype).removeprefix('torch.')}", x, out)
    assert out.tolist() == [4560, 13776]


def test_every_thread_runs_once(run: Run) -> None:
    out = torch.zeros(12, 6, 10, dtype=torch.int32)
    run("visit", out, out)
    z, y, x = torch.meshgrid(*map(torch.arange, out.shape), indexing="ij")
    threads = 1 + x % 5 + 10 * (y % 2) + 100 * (z % 3)
    blocks = 1000 * (x // 5) + 10000 * (y // 2) + 100000 * (z // 3)
    assert torch.equal(out, (threads + blocks).int())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.float64], ids=str)
def test_sums_through_shuffles_and_shared_memory(run: Run, dtype: torch.dtype) -> None:
    check_sums(run, dtype)


def test_shuffles(run: Run) -> None:
    x = torch.randint(-(2**60), 2**60, (2, 32))
    out = torch.zeros(2, 2, 32, dtype=torch.int64)
    run("scan", x, out)
    assert torch.equal(out[0], x.cumsum(1))
    assert torch.equal(out[1], x.cumsum(1)[:, torch.arange(0, 64, 2) % 32])


def test_votes(run: Run) -> None:
    out = torch.zeros(3, 32, dtype=torch.int64)
    run("vote", out, out)
    assert out[0].tolist() == [sum(1 << lane for lane in range(0, 32, 3))] * 32
    assert out[1].tolist() == [0xF000] * 16 + [0xF0000000] * 16
    assert out[2].tolist() == [0] * 16 + [1] * 16


def test_barrier(run: Run) -> None:
    x = torch.arange(64.0)
    out = torch.zeros(64)
    run("rotate", x, out)
    assert torch.equal(out, x.roll(-1))


@pytest.mark.parametrize(("run", "early"), [(0, 63), (1, 1)], indirect=["run"])
def test_missing_barrier_shows_in_some_order(run: Run, early: int) -> None:
    """The order decides how many threads read before their neighbour writes."""
    x = torch.arange(64.0)
    out = torch.zeros(64)
    run("rotate_early", x, out)
    assert int(out.isnan().sum()) == early
    assert torch.equal(out[~out.isnan()], x.roll(-1)[~out.isnan()])


def test_shared_memory_is_poisoned_for_every_block(run: Run) -> None:
    out = torch.zeros(3, 3, dtype=torch.float64)
    run("poison", out, out)
    assert bool(out[:, :2].isnan().all())
    assert out[:, 2].tolist() == [-1, -1, -1]


def test_vectors(run: Run) -> None:
    x = torch.arange(12, dtype=torch.int32)
    out = torch.zeros(12, dtype=torch.int32)
    run("copy", x, out)
    assert torch.equal(out, x)


def test_comparisons(run: Run) -> None:
    x = torch.tensor([-3, 7], dtype=torch.int32)
    out = torch.zeros(5, dtype=torch.int32)
    run("compare", x, out)
    assert out.tolist() == [2, -3, -3, 7, -1]


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(run: Run, fault: str) -> None:
    x = torch.arange(8, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=FAULTS[fault][1]):
        run("faulty", 64, list(FAULTS).index(fault), x, torch.zeros(4, dtype=torch.int32))
    check_sums(run, torch.float32)  # the next launch is right


def test_half_a_warp(run: Run) -> None:
    x, out = torch.zeros(2, 4, dtype=torch.int32)
    message = rf"block \(1, 0, 0\) is stuck: of 48 threads 16 {XOR}, 32 {SYNC}$"
    with pytest.raises(RuntimeError, match=message):
        run("faulty", 48, -1, x, out)


@pytest.mark.parametrize("run", [0], indirect=True)
def test_launches_that_cuda_rejects(run: Run) -> None:
    sizes = {"grid": [(0, 1, 1), (1, 65536, 1), (1, 1, 65536)], "block": [(1, 1, 65), (32, 33, 1)]}
    for name, each in sizes.items():
        for size in each:
            with pytest.raises(RuntimeError, match="CUDA error: invalid configuration argument"):
                run(name, *size)
    with pytest.raises(RuntimeError, match="a launch on another stream than the current one"):
        run("elsewhere")
    with pytest.raises(RuntimeError, match="a launch without a DeviceGuard"):
        run("unguarded")
    run("grid", 65536, 1, 1)
    run("block", 4, 4, 64)


def test_another_thread_of_the_host(run: Run) -> None:
    check_sums(run, torch.int32)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(check_sums, run, torch.int64).result()


def test_library_belongs_to_the_sources(tmp_path: Path) -> None:
    source = tmp_path / "answer.cpp"
    source.write_text('extern "C" [[gnu::visibility("default")]] int answer() { return 1; }\n')
    first = library(tmp_path)
    made = first.stat().st_mtime_ns
    assert (library(tmp_path), first.stat().st_mtime_ns) == (first, made)

    source.write_text(source.read_text().replace("1", "2"))
    second = library(tmp_path)
    assert [ctypes.CDLL(str(path)).answer() for path in (first, second)] == [1, 2]


def test_warnings_are_errors(tmp_path: Path) -> None:
    (tmp_path / "unused.cu").write_text("static __device__ int unused() { return 1; }\n")
    with pytest.raises(RuntimeError, match=r"unused\.cu(.|\n)*'?__device__'?"):
        library(tmp_path)
