// SPDX-License-Identifier: Apache-2.0
// The table of CPU kernels that each instruction set fills (cpu_<isa>.cpp) and that the ops choose from.
#pragma once

#include "common/cpu_kernels.h"
#include "norm_act/norm_act.h"

namespace curvlab::norm_act {

struct CpuKernels {  // [float32, float64]; sums: one pair for each of the block's channels
  // sum of (x - shift), sum of (x - shift)^2, by channel
  void (*statistics[2])(const Planes&, const void* x, const double* shift, const Block&, SumPair* sums);
  void (*forward[2])(const ForwardWork&, const Block&);
  // sum of g, sum of g (x - center)
  void (*backward_sums[2])(const BackwardWork&, const Block&, SumPair* sums);
  void (*backward[2])(const BackwardWork&, const Block&);
};

#define CURVLAB_NORM_ACT_TYPES(kernel) {kernel<float>, kernel<double>}
#define CURVLAB_NORM_ACT_KERNELS                                                    \
  {CURVLAB_NORM_ACT_TYPES(block_statistics), CURVLAB_NORM_ACT_TYPES(block_forward), \
   CURVLAB_NORM_ACT_TYPES(block_backward_sums), CURVLAB_NORM_ACT_TYPES(block_backward)}

extern const CpuKernels kCpuKernelsDefault;
extern const CpuKernels kCpuKernelsAvx2;  // where MULTI_ISA is defined
extern const CpuKernels kCpuKernelsAvx512;

inline const CpuKernels& cpu_kernels() {
  return choose_cpu_kernels<kCpuKernelsDefault, kCpuKernelsAvx2, kCpuKernelsAvx512>();
}

}  // namespace curvlab::norm_act
