// The instruction sets that the search kernel is compiled for, and the one to use here.
#pragma once

#include "../box_max.h"

#if defined(__x86_64__)
#define TTSR_X86
#endif

// Compiles what stands between them for another target than the rest of the library.
#define TTSR_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define TTSR_TARGET_BEGIN(isa) \
  TTSR_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define TTSR_TARGET_END _Pragma("clang attribute pop")
#else
#define TTSR_TARGET_BEGIN(isa) _Pragma("GCC push_options") TTSR_PRAGMA(GCC target(isa))
#define TTSR_TARGET_END _Pragma("GCC pop_options")
#endif

namespace ttsr_fast {

// The best instruction set of this processor, or the one that TTSR_FAST_ISA names (avx512_bf16, avx512, avx2,
// baseline); throws if the processor lacks it.
const Isa& best_isa();

}  // namespace ttsr_fast
