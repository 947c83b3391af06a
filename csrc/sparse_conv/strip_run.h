// SPDX-License-Identifier: Apache-2.0
// Runs a plan over all strips of a batch, on torch's threads. Which thread runs a strip never changes a result: strips
// write results of their own, and the weight gradient has a fixed number of partial sums, added in order.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>

#include "sparse_conv/batch_parts.h"
#include "sparse_conv/strip_plan.h"

namespace curvlab::sparse_conv {

// The plan of (indices, geometry) for a part of the batch, or null where 32-bit offsets do not reach. Checks indices
// when it makes one.
std::shared_ptr<const CpuPlan> find_plan(const char* op, const at::Tensor& indices, const ConvWeight& weight,
                                         const BatchPart& part, at::IntArrayRef input_size, at::ScalarType type);

// out = conv(x, values) + bias on a part; `bias` may be undefined.
void run_forward(const CpuPlan& plan, const BatchPart& part, const at::Tensor& x, const at::Tensor& values,
                 const at::Tensor& bias, const at::Tensor& out);

// The input gradient where `gx` is defined (it needs values), the weight gradient where `gv` is (it needs x) and,
// beside that one only, the bias' where `gb` is; both are added to what is there.
void run_backward(const CpuPlan& plan, const BatchPart& part, const at::Tensor& x, const at::Tensor& grad,
                  const at::Tensor& values, const at::Tensor& gx, const at::Tensor& gv, const at::Tensor& gb);

}  // namespace curvlab::sparse_conv
