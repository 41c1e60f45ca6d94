// Instruction sets that the search kernel is compiled for.
#pragma once

#include "search_kernel.h"

#if defined(__x86_64__)
#define TTSR_X86
#endif

// Compiles the code between them for another target than the rest of the library.
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

using SearchKernel = void(const SearchKernelParams& params, Element element, int kernel_size);

namespace baseline { SearchKernel search_kernel; }
#ifdef TTSR_X86
namespace avx2 { SearchKernel search_kernel; }
namespace avx512 { SearchKernel search_kernel; }
namespace avx512_bf16 { SearchKernel search_kernel; }
namespace amx { SearchKernel search_kernel; }
#endif

struct Isa {
  const char* name;
  int64_t vector_bytes;
  bool bfloat16;  // it multiplies pairs of bfloat16
  bool tiles;     // in a tile unit, float as two parts too
  SearchKernel* search_kernel;
};

// The best instruction set of this processor, or the one that TTSR_FAST_ISA names. Throws if the processor
// lacks that one.
const Isa& best_isa();

}  // namespace ttsr_fast
