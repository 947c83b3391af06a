// SPDX-License-Identifier: Apache-2.0
#include "common/cpu_capability.h"

#include <c10/util/Exception.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>
#include <string>

#if defined(MULTI_ISA)
#include <cpuid.h>
#endif

namespace curvlab {
namespace {

constexpr CpuCapability kAll[] = {CpuCapability::kDefault, CpuCapability::kAvx2, CpuCapability::kAvx512};

#if defined(MULTI_ISA)
// By hand: not every compiler that builds this knows __builtin_cpu_supports("f16c").
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

bool has(CpuCapability capability) {
#if defined(MULTI_ISA)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  if (capability == CpuCapability::kAvx2) return avx2;
  if (capability == CpuCapability::kAvx512) {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  }
#endif
  return capability == CpuCapability::kDefault;
}

CpuCapability choose() {
  CpuCapability best = CpuCapability::kDefault;
  for (CpuCapability capability : kAll) {
    if (has(capability)) best = capability;
  }
  const char* wanted = std::getenv("CURVLAB_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (CpuCapability capability : kAll) {
    if (std::strcmp(wanted, name(capability)) != 0) continue;
    TORCH_CHECK_VALUE(has(capability), "CURVLAB_CPU_CAPABILITY=", wanted,
                      ": this CPU or build lacks it; the best here is ", name(best));
    return capability;
  }
  TORCH_CHECK_VALUE(false, "CURVLAB_CPU_CAPABILITY must be default, avx2 or avx512, got '", wanted, "'");
}

}  // namespace

const char* name(CpuCapability capability) {
  switch (capability) {
    case CpuCapability::kAvx512:
      return "avx512";
    case CpuCapability::kAvx2:
      return "avx2";
    default:
      return "default";
  }
}

CpuCapability cpu_capability() {
  static const CpuCapability chosen = choose();  // a throw leaves it unset: the next call says it again
  return chosen;
}

}  // namespace curvlab

TORCH_LIBRARY_IMPL(curvlab, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", [] { return std::string(curvlab::name(curvlab::cpu_capability())); });
}
