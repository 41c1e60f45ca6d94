// cpp_isa: the instruction set of the search kernel.

#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "../common.h"
#ifdef TTSR_X86
#include "x86.h"
#endif

namespace ttsr_fast {

namespace {

#ifdef __aarch64__
constexpr const char* kBaseline = "neon";  // every such processor has it
#else
constexpr const char* kBaseline = "baseline";
#endif

#ifdef TTSR_X86
constexpr Isa kAmx = {"amx", 64, true, true, amx::search_kernel};
#endif

struct Candidate {
  Isa isa;
  bool (*supported)();  // called only where the choice depends on it
};

const Isa& choose() {
  // Best first.
  static const Candidate candidates[] = {
#ifdef TTSR_X86
#ifndef TTSR_PORTABLE_TILES
      {kAmx, [] { return x86_features().avx512 && request_amx(); }},
#endif
      {{"avx512_bf16", 64, true, false, avx512_bf16::search_kernel},
       [] { return x86_features().avx512_bf16; }},
      {{"avx512", 64, false, false, avx512::search_kernel}, [] { return x86_features().avx512; }},
      {{"avx2", 32, false, false, avx2::search_kernel}, [] { return x86_features().avx2; }},
#endif
      {{kBaseline, 16, false, false, baseline::search_kernel}, [] { return true; }},
#if defined(TTSR_X86) && defined(TTSR_PORTABLE_TILES)
      {kAmx, [] { return x86_features().avx512; }},  // if named: it is slow
#endif
  };
  const char* wanted = std::getenv("TTSR_FAST_ISA");
  if (wanted && !*wanted) wanted = nullptr;
  for (const Candidate& c : candidates) {
    const bool named = wanted && std::strcmp(wanted, c.isa.name) == 0;
    if ((named || !wanted) && c.supported()) return c.isa;
  }
  throw std::runtime_error("TTSR_FAST_ISA must name an instruction set of this processor, got '" +
                           std::string(wanted) + "'");
}

std::string cpp_isa() { return best_isa().name; }

}  // namespace

const Isa& best_isa() {
  static const Isa& isa = choose();
  return isa;
}

STABLE_TORCH_LIBRARY_IMPL(ttsr_fast, CompositeExplicitAutograd, m) { m.impl("cpp_isa", TORCH_BOX(&cpp_isa)); }

}  // namespace ttsr_fast
