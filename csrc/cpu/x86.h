// Instruction sets of an x86-64 processor that the operating system supports, from CPUID and XCR0. The
// compiler's __builtin_cpu_supports finds none of them with some of Clang's run-time libraries.
#pragma once

#include <cpuid.h>

#include <cstdint>

#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ttsr_fast {

struct X86Features {
  bool avx2 = false, avx512 = false, avx512_bf16 = false, amx_bf16 = false;

  X86Features() {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !has(c, kFma, kOsxsave)) return;
    unsigned saved, high;  // XCR0: registers that the system saves
    asm volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    const bool ymm = has(saved, 1, 2), zmm = ymm && has(saved, 5, 6, 7), tiles = has(saved, 17, 18);
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    avx2 = ymm && has(b, kAvx2);
    avx512 = zmm && has(b, kAvx512F, kAvx512Dq, kAvx512Bw, kAvx512Vl);
    amx_bf16 = tiles && has(d, kAmxBf16, kAmxTile);
    if (a < 1 || !__get_cpuid_count(7, 1, &a, &b, &c, &d)) return;  // a: last subleaf
    avx512_bf16 = avx512 && has(a, kAvx512Bf16);
  }

 private:
  enum { kFma = 12, kOsxsave = 27 };                                                  // leaf 1, ECX
  enum { kAvx2 = 5, kAvx512F = 16, kAvx512Dq = 17, kAvx512Bw = 30, kAvx512Vl = 31 };  // leaf 7.0, EBX
  enum { kAmxBf16 = 22, kAmxTile = 24 };                                              // leaf 7.0, EDX
  enum { kAvx512Bf16 = 5 };                                                           // leaf 7.1, EAX

  template <class... Bits>
  static bool has(unsigned value, Bits... bits) {
    return ((value >> bits & 1) && ...);
  }
};

inline const X86Features& x86_features() {
  static const X86Features features;
  return features;
}

// Asks Linux, once for all threads, for the tile registers of AMX. False where they are missing or refused:
// an old kernel, a container's policy, a thread whose signal stack is too small for them.
inline bool request_amx() {
#ifdef __linux__
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  static const bool granted =
      x86_features().amx_bf16 && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}

}  // namespace ttsr_fast
