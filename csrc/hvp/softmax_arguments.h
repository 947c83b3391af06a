// SPDX-License-Identifier: Apache-2.0
// softmax_hessian_product: checks and arguments, for the CPU, CUDA and fake kernels.
#pragma once

#include "hvp/arguments.h"
#include "hvp/softmax_hessian.h"

namespace curvlab::hvp {

inline void check_softmax(const at::Tensor& p, const at::Tensor& label, const at::Tensor& weight, const at::Tensor& u,
                          const at::Tensor& out) {
  constexpr const char* op = "softmax_hessian_product";
  const Checks checks(op, "u", u);
  TORCH_CHECK_VALUE(u.dim() == 3, op, ": u must be [K, N, C], got ", u.sym_sizes());
  const at::ScalarType acc = accumulation_type(u.scalar_type());
  checks.check_device("p", p);
  checks.check_type("p", p, acc);
  checks.check_dense("p", p);
  TORCH_CHECK_VALUE(p.dim() == 2 && p.sym_size(0) == u.sym_size(1) && p.sym_size(1) == u.sym_size(2), op,
                    ": p must have shape ", u.sym_sizes().slice(1), " (u without its first dimension), got ",
                    p.sym_sizes());
  TORCH_CHECK_TYPE(label.scalar_type() == at::kLong, op, ": label must be int64, got ",
                   dtype_name(label.scalar_type()));
  checks.check_type("weight", weight, acc);
  const std::pair<const char*, const at::Tensor&> vectors[] = {{"label", label}, {"weight", weight}};
  for (const auto& [name, x] : vectors) {
    checks.check_device(name, x);
    checks.check_dense(name, x);
    TORCH_CHECK_VALUE(x.dim() == 1 && x.sym_size(0) == u.sym_size(1), op, ": ", name, " must have shape [",
                      u.sym_size(1), "] (the samples of u), got ", x.sym_sizes());
  }
  checks.data("out", out);
}

inline SoftmaxArguments softmax_arguments(const at::Tensor& p, const at::Tensor& label, const at::Tensor& weight,
                                          const at::Tensor& u, const at::Tensor& out) {
  return {.directions = u.size(0),
          .samples = u.size(1),
          .classes = u.size(2),
          .type = element_type(u.scalar_type()),
          .p = p.const_data_ptr(),
          .label = label.const_data_ptr<std::int64_t>(),
          .weight = weight.const_data_ptr(),
          .u = u.const_data_ptr(),
          .out = out.mutable_data_ptr()};
}

}  // namespace curvlab::hvp
