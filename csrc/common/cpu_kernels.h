// SPDX-License-Identifier: Apache-2.0
// How a family's ops choose among its tables of CPU kernels, one for each instruction set.
#pragma once

#include "common/cpu_capability.h"

namespace curvlab {

// A family declares `extern const CpuKernels kCpuKernelsDefault, kCpuKernelsAvx2, kCpuKernelsAvx512;` (the last two are
// defined where MULTI_ISA is), which cpu_<isa>.cpp fill, and names them here in that order. By reference, so that a
// build without MULTI_ISA asks the linker for the first alone.
template <const auto& standard, const auto& avx2, const auto& avx512>
const auto& choose_cpu_kernels() {
#if defined(MULTI_ISA)
  switch (cpu_capability()) {
    case CpuCapability::kAvx512:
      return avx512;
    case CpuCapability::kAvx2:
      return avx2;
    default:
      break;
  }
#else
  (void)cpu_capability();  // refuses a setting that this build lacks
#endif
  return standard;
}

}  // namespace curvlab
