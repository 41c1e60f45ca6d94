// The search kernel for any processor, with vectors of 16 bytes: those of SSE2, NEON on AArch64.

#if defined(__aarch64__) && !defined(__clang__)
#pragma GCC optimize("no-schedule-insns")  // early loads would push sums out of the 32 registers
#endif

#include "isa.h"

#define TTSR_ISA baseline
#define TTSR_VECTOR_BYTES 16
#ifdef TTSR_X86
#define TTSR_VECTORS 2  // 16 registers
#else
#define TTSR_VECTORS 4  // 32 registers on AArch64
#endif
#include "search_kernel_body.h"
