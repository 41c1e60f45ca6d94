// cuda_version: the CUDA toolkit that compiled this library, in thousands of the major version.

#include <cuda_runtime.h>

#include "../common.h"

namespace ttsr_fast {

namespace {

int64_t cuda_version() { return CUDART_VERSION; }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ttsr_fast, CompositeExplicitAutograd, m) {
  m.impl("cuda_version", TORCH_BOX(&cuda_version));
}

}  // namespace ttsr_fast
