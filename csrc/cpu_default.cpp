// SPDX-License-Identifier: Apache-2.0
// Every family's CPU kernels for one instruction set; setup.py gives this file its flags and CURVLAB_CPU_CAPABILITY.
#include "hvp/cpu_kernels.h"
#include "hvp/first_conv_cpu.h"
#include "hvp/pool_cpu.h"
#include "hvp/softmax_hessian_cpu.h"
#include "hvp/tangent_backward_cpu.h"
#include "hvp/tangent_forward_cpu.h"
#include "norm_act/cpu_kernels.h"
#include "norm_act/norm_act_cpu.h"
#include "norms/multi_tensor_norms_cpu.h"
#include "sparse_conv/strip_cpu.h"

namespace curvlab::norms {
using namespace CURVLAB_CPU_CAPABILITY;
const CpuKernels kCpuKernelsDefault = CURVLAB_NORM_KERNELS;
}  // namespace curvlab::norms

namespace curvlab::hvp {
using namespace CURVLAB_CPU_CAPABILITY;
const CpuKernels kCpuKernelsDefault = CURVLAB_HVP_KERNELS;
}  // namespace curvlab::hvp

namespace curvlab::sparse_conv {
using namespace CURVLAB_CPU_CAPABILITY;
const CpuKernels kCpuKernelsDefault = CURVLAB_SPARSE_CONV_KERNELS;
}  // namespace curvlab::sparse_conv

namespace curvlab::norm_act {
using namespace CURVLAB_CPU_CAPABILITY;
const CpuKernels kCpuKernelsDefault = CURVLAB_NORM_ACT_KERNELS;
}  // namespace curvlab::norm_act
