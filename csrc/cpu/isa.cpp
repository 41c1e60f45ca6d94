// cpp_isa: the instruction set of the search kernel.

#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "../common.h"

namespace ttsr_fast {

namespace {

struct Candidate {
  Isa isa;
  bool supported;
};

const Isa& choose() {
#ifdef TTSR_X86
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  // Best first.
  static const Candidate candidates[] = {
#ifdef TTSR_X86
      {{"avx512_bf16", 64, true, avx512_bf16::search_kernel}, avx512 && __builtin_cpu_supports("avx512bf16")},
      {{"avx512", 64, false, avx512::search_kernel}, avx512},
      {{"avx2", 32, false, avx2::search_kernel},
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
      {{"baseline", 16, false, baseline::search_kernel}, true},
  };
  const char* wanted = std::getenv("TTSR_FAST_ISA");
  if (wanted && !*wanted) wanted = nullptr;
  for (const Candidate& c : candidates) {
    if (wanted ? std::strcmp(wanted, c.isa.name) == 0 : c.supported) {
      if (!c.supported) break;
      return c.isa;
    }
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
