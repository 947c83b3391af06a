// SPDX-License-Identifier: Apache-2.0
// The table of CPU kernels that each instruction set fills (cpu_<isa>.cpp) and that the ops choose from.
#pragma once

#include <cstdint>

#include "common/cpu_kernels.h"
#include "hvp/pool.h"
#include "hvp/softmax_hessian.h"
#include "hvp/tangent.h"

namespace curvlab::hvp {

struct CpuKernels {  // [ElementType]: float32, float64, bfloat16
  void (*forward_rows[3])(const ForwardArguments&, std::int64_t k, std::int64_t begin, std::int64_t end, double* dot);
  void (*backward_rows[3])(const BackwardArguments&, std::int64_t k, std::int64_t begin, std::int64_t end,
                           double* bias_sum, double* gain_sum);
  void (*gather_image[3])(const PoolArguments&, std::int64_t k, std::int64_t n);
  void (*scatter_image[3])(const PoolArguments&, std::int64_t k, std::int64_t n, float* scratch);
  void (*softmax_rows[3])(const SoftmaxArguments&, std::int64_t begin, std::int64_t end);
};

#define CURVLAB_HVP_TYPES(kernel) {kernel<float>, kernel<double>, kernel<BFloat16Bits>}
#define CURVLAB_HVP_KERNELS                                                                            \
  {CURVLAB_HVP_TYPES(forward_rows), CURVLAB_HVP_TYPES(backward_rows), CURVLAB_HVP_TYPES(gather_image), \
   CURVLAB_HVP_TYPES(scatter_image), CURVLAB_HVP_TYPES(softmax_rows)}

extern const CpuKernels kCpuKernelsDefault;
extern const CpuKernels kCpuKernelsAvx2;  // where MULTI_ISA is defined
extern const CpuKernels kCpuKernelsAvx512;

inline const CpuKernels& cpu_kernels() {
  return choose_cpu_kernels<kCpuKernelsDefault, kCpuKernelsAvx2, kCpuKernelsAvx512>();
}

}  // namespace curvlab::hvp
