// Runs the threads of a block as fibers of one thread of the host. Each fiber has its own stack and runs
// until it must wait for others.

#undef _FORTIFY_SOURCE  // its longjmp rejects a jump to another stack

#include <link.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <csetjmp>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <mutex>
#include <numeric>
#include <random>
#include <span>
#include <stdexcept>
#include <system_error>
#include <utility>
#include <vector>

#include "cuda_runtime.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {
namespace {

constexpr unsigned kThreads = 1024, kLanes = 32;  // most threads of a block, threads of a warp
constexpr size_t kStack = 1 << 17, kGuard = 1 << 16;

enum class State { kReady, kWaiting, kEnded };

// A place in a source, in the layout of the compiler's sanitizer.
struct Place {
  const char* file;
  uint32_t line, column;

  bool operator==(const Place&) const = default;
};

// The call in which a thread waits.
struct Wait {
  const char* name;
  unsigned mask;
  Place place;

  bool operator==(const Wait&) const = default;
};

struct Fiber {
  unsigned number;
  uint3 index;
  State state;
  Wait wait;
  uint64_t value;
  unsigned source, votes;
  char* stack;   // kept for the next launch
  bool entered;  // `context` is valid
  jmp_buf context;
};

std::mutex mutex;
Fiber fibers[kThreads];
Fiber* current;
jmp_buf scheduler;
const std::function<void()>* kernel;
std::exception_ptr failure;
unsigned threads;                     // in a block
unsigned arrived;                     // of them at __syncthreads
unsigned waiting[kThreads / kLanes];  // lanes of every warp
int order;                            // see emulator_set_order
std::mt19937 random_numbers;
int guards;
cudaError_t last_error = cudaSuccess;

cudaStream_t current_stream() { return reinterpret_cast<cudaStream_t>(&order); }  // unique

std::string block_name() {
  return "block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " +
         std::to_string(blockIdx.z) + ")";
}

Place place_of(const Site& site) { return {site.file_name(), site.line(), site.column()}; }

std::string at(const Place& place) {
  const std::string file = place.file;
  return " at " + file.substr(file.rfind('/') + 1) + ":" + std::to_string(place.line) + ":" +
         std::to_string(place.column);
}

std::vector<uint64_t> in_order(uint64_t count) {
  std::vector<uint64_t> numbers(count);
  std::iota(numbers.begin(), numbers.end(), 0);
  if (order == 1) std::reverse(numbers.begin(), numbers.end());
  if (order > 1) std::shuffle(numbers.begin(), numbers.end(), random_numbers);
  return numbers;
}

void suspend() {
  if (_setjmp(current->context) == 0) _longjmp(scheduler, 1);
}

std::string thread_name() {
  return " in " + block_name() + ", thread (" + std::to_string(threadIdx.x) + ", " +
         std::to_string(threadIdx.y) + ", " + std::to_string(threadIdx.z) + ")";
}

// No exception in a kernel: the compiler assumes that functions of its sanitizer do not throw. The launch
// abandons all fibers.
[[noreturn]] void fail_at(const char* what, const Place& place) {
  std::exception_ptr error = std::make_exception_ptr(
      std::runtime_error("CUDA emulator: " + (what + at(place)) + (current ? thread_name() : "")));
  if (current == nullptr) std::rethrow_exception(error);
  failure = std::move(error);
  suspend();
  __builtin_unreachable();
}

// The main function of a fiber. It runs the kernel again for every block.
void live() {
  for (;;) {
    try {
      (*kernel)();
    } catch (...) { failure = std::current_exception(); }
    current->state = State::kEnded;
    suspend();
  }
}

void enter(Fiber& fiber) {
  if (fiber.stack == nullptr) {
    void* memory = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kGuard, PROT_NONE) != 0) {
      throw std::system_error(errno, std::generic_category(), "CUDA emulator: no memory for a stack");
    }
    fiber.stack = static_cast<char*>(memory) + kGuard;
  }
  fiber.entered = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack;
  context.uc_stack.ss_size = kStack;
  makecontext(&context, live, 0);
  setcontext(&context);
}

// Runs a thread until it waits or ends. A context enters a fiber; jumps continue it, because a change of
// context makes a system call.
void resume(Fiber& fiber) {
  current = &fiber;
  threadIdx = fiber.index;
  if (_setjmp(scheduler) == 0) {
    if (fiber.entered) _longjmp(fiber.context, 1);
    enter(fiber);
  }
  current = nullptr;
}

// The thread-local variables of this library, see `__shared__`.
std::span<char> shared_memory() {
  static thread_local char member;
  struct Search {
    char* member;
    std::span<char> found;
  } search{&member, {}};
  dl_iterate_phdr(
      [](dl_phdr_info* library, size_t, void* data) {
        Search& search = *static_cast<Search*>(data);
        char* const begin = static_cast<char*>(library->dlpi_tls_data);
        for (int i = 0; begin != nullptr && i < library->dlpi_phnum; ++i) {
          const size_t size = library->dlpi_phdr[i].p_memsz;
          if (library->dlpi_phdr[i].p_type == PT_TLS && begin <= search.member &&
              search.member < begin + size) {
            search.found = {begin, size};
          }
        }
        return 0;
      },
      &search);
  return search.found;
}

// Runs a warp until all its threads wait or have ended. Returns false if they did before.
bool run_warp(unsigned warp, const std::vector<uint64_t>& lanes) {
  bool any = false;
  for (bool again = true; again;) {
    again = false;
    for (const unsigned lane : lanes) {
      const unsigned number = warp * kLanes + lane;
      if (number >= threads || fibers[number].state != State::kReady) continue;
      resume(fibers[number]);
      if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
      again = any = true;
    }
  }
  return any;
}

// Every warp runs as far ahead of the others as possible.
void run_block() {
  arrived = 0;
  for (unsigned i = 0; i < threads; ++i) {
    fibers[i].state = State::kReady;
    waiting[i / kLanes] = 0;
  }
  const std::vector<uint64_t> warps = in_order((threads + kLanes - 1) / kLanes), lanes = in_order(kLanes);
  for (bool any = true; any;) {
    any = false;
    for (const unsigned warp : warps) any |= run_warp(warp, lanes);
  }
  const std::span<Fiber> block(fibers, threads);
  if (std::ranges::all_of(block, [](const Fiber& fiber) { return fiber.state == State::kEnded; })) return;
  std::map<std::string, unsigned> counts;
  for (const Fiber& fiber : block) {
    ++counts[fiber.state == State::kEnded ? "ended" : "wait for " + (fiber.wait.name + at(fiber.wait.place))];
  }
  std::string message =
      "CUDA emulator: " + block_name() + " is stuck: of " + std::to_string(threads) + " threads";
  for (const auto& [what, count] : counts) {
    message += (message.back() == 's' ? " " : ", ") + std::to_string(count) + " " + what;
  }
  throw std::runtime_error(message);
}

void run_grid() {
  const std::span<char> memory = shared_memory();
  for (const uint64_t block : in_order(uint64_t(gridDim.x) * gridDim.y * gridDim.z)) {
    const uint64_t row = block / gridDim.x;
    blockIdx = {unsigned(block % gridDim.x), unsigned(row % gridDim.y), unsigned(row / gridDim.y)};
    std::memset(memory.data(), 0xff, memory.size());  // NaN, and -1
    run_block();
  }
}

bool fits(const dim3& grid, const dim3& block) {
  return grid.x > 0 && grid.x < 1u << 31 && grid.y > 0 && grid.y < 1 << 16 && grid.z > 0 &&
         grid.z < 1 << 16 && block.x > 0 && block.y > 0 && block.z > 0 && block.z <= 64 &&
         uint64_t(block.x) * block.y * block.z <= kThreads;
}

}  // namespace

void fail(const char* what, const Site& site) { fail_at(what, place_of(site)); }

unsigned lane() { return current->number % kLanes; }

Met meet(const char* name, unsigned mask, uint64_t value, unsigned source, const Site& site) {
  Fiber& self = *current;
  const unsigned lane = self.number % kLanes;
  if (((mask >> lane) & (mask >> source) & 1) == 0) {
    fail("a lane is needed that the mask does not include", site);
  }
  self.state = State::kWaiting;
  self.wait = {name, mask, place_of(site)};
  self.value = value;
  self.source = source;

  const std::span<Fiber, kLanes> warp(&self - lane, kLanes);
  unsigned& here = waiting[self.number / kLanes];
  here |= 1u << lane;
  bool complete = (here & mask) == mask;
  for (unsigned i = 0; complete && i < kLanes; ++i) complete = !(mask >> i & 1) || warp[i].wait == self.wait;
  if (!complete) {
    suspend();
    return {self.value, self.votes};
  }
  uint64_t values[kLanes];
  unsigned votes = 0;
  for (unsigned i = 0; i < kLanes; ++i) {
    values[i] = warp[i].value;
    if (mask >> i & 1 && values[i] != 0) votes |= 1u << i;
  }
  for (unsigned i = 0; i < kLanes; ++i) {
    if (!(mask >> i & 1)) continue;
    warp[i].value = values[warp[i].source];
    warp[i].votes = votes;
    warp[i].state = State::kReady;
  }
  here &= ~mask;
  return {self.value, self.votes};
}

void meet_block(const char* name, const Site& site) {
  current->state = State::kWaiting;
  current->wait = {name, 0, place_of(site)};
  const std::span<Fiber> block(fibers, threads);
  if (++arrived < threads ||
      std::ranges::any_of(block, [](const Fiber& fiber) { return fiber.wait != current->wait; })) {
    return suspend();
  }
  arrived = 0;
  for (Fiber& fiber : block) fiber.state = State::kReady;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const std::function<void()>& thread) {
  const std::lock_guard lock(mutex);
  const auto reject = [](const char* why) { throw std::runtime_error(std::string("CUDA emulator: ") + why); };
  if (config.dynamicSmemBytes != 0) reject("there is no dynamic shared memory");
  if (guards == 0) reject("a launch without a DeviceGuard");
  if (config.stream != current_stream()) reject("a launch on another stream than the current one");
  if (!fits(config.gridDim, config.blockDim)) return last_error = cudaErrorInvalidConfiguration;
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  threads = blockDim.x * blockDim.y * blockDim.z;
  for (unsigned i = 0; i < threads; ++i) {
    fibers[i].number = i;
    fibers[i].index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
  }
  random_numbers.seed(order);
  kernel = &thread;
  try {
    run_grid();
  } catch (...) {
    for (Fiber& fiber : fibers) fiber.entered = false;
    throw;
  }
  return cudaSuccess;
}

}  // namespace emulator

cudaError_t cudaGetLastError() {
  const std::lock_guard lock(emulator::mutex);
  return std::exchange(emulator::last_error, cudaSuccess);
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid configuration argument";
}

extern "C" {

// Order of blocks, warps and lanes: 0 ascending, 1 descending, else the seed of a random order.
__attribute__((visibility("default"))) void emulator_set_order(int order) { emulator::order = order; }

// Functions that a CPU build of PyTorch lacks or rejects. They are local to this library.

int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = emulator::current_stream();
  return 0;
}

int32_t torch_c10_cuda_check_msg(int32_t error, const char* file, const char*, uint32_t line, bool,
                                 char** message) {
  *message = nullptr;
  if (error == cudaSuccess) return 0;
  cudaGetLastError();  // clears the error
  const std::string text = std::string("CUDA error: ") + cudaGetErrorString(cudaError_t(error)) + " (" +
                           file + ":" + std::to_string(line) + ")";
  *message = strdup(text.c_str());
  return 0;
}

void torch_c10_cuda_free_error_msg(char* message) { std::free(message); }

int32_t aoti_torch_create_device_guard(int32_t, void** guard) {
  const std::lock_guard lock(emulator::mutex);
  ++emulator::guards;
  *guard = &emulator::guards;
  return 0;
}

int32_t aoti_torch_delete_device_guard(void*) {
  const std::lock_guard lock(emulator::mutex);
  --emulator::guards;
  return 0;
}

int32_t aoti_torch_device_guard_set_index(void*, int32_t) { return 0; }

// Findings of the undefined-behaviour sanitizer.

#define FAULT(name, what) \
  void __ubsan_handle_##name##_abort(const emulator::Place* place) { emulator::fail_at(what, *place); }
FAULT(type_mismatch_v1, "misaligned or null pointer")
FAULT(out_of_bounds, "index out of bounds")
FAULT(shift_out_of_bounds, "shift out of bounds")
FAULT(add_overflow, "integer overflow")
FAULT(sub_overflow, "integer overflow")
FAULT(mul_overflow, "integer overflow")
FAULT(negate_overflow, "integer overflow")
FAULT(divrem_overflow, "division by zero or overflow")

}  // extern "C"
