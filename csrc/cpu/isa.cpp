#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace ttsr_fast {

namespace baseline { void walk(const BoxMaxParams&, Element, int); }
#ifdef TTSR_X86
namespace avx2 { void walk(const BoxMaxParams&, Element, int); }
namespace avx512 { void walk(const BoxMaxParams&, Element, int); }
namespace avx512_bf16 { void walk(const BoxMaxParams&, Element, int); }
#endif

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
      {{"avx512_bf16", 64, true, avx512_bf16::walk}, avx512 && __builtin_cpu_supports("avx512bf16")},
      {{"avx512", 64, false, avx512::walk}, avx512},
      {{"avx2", 32, false, avx2::walk}, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
      {{"baseline", 16, false, baseline::walk}, true},
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

}  // namespace

const Isa& best_isa() {
  static const Isa& isa = choose();
  return isa;
}

}  // namespace ttsr_fast
