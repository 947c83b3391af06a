// SPDX-License-Identifier: Apache-2.0
// pool_gather and pool_scatter: checks and arguments, for the CPU, CUDA and fake kernels.
#pragma once

#include "hvp/arguments.h"
#include "hvp/pool.h"

namespace curvlab::hvp {

// wide: [K, N, HW, C]; pooled: [K, N, R, C]; index [N, R, C].
inline void check_pool(const char* op, const char* name, const at::Tensor& main, const at::Tensor& index,
                       const char* other, const at::Tensor& out, bool main_is_pooled) {
  const Checks checks(op, name, main);
  const char* shape = main_is_pooled ? "[K, N, R, C]" : "[K, N, HW, C]";
  TORCH_CHECK_VALUE(main.dim() == 4, op, ": ", name, " must be ", shape, ", got ", main.sym_sizes());
  TORCH_CHECK_TYPE(index.scalar_type() == at::kInt, op, ": index must be int32, got ", dtype_name(index.scalar_type()));
  checks.check_device("index", index);
  checks.check_dense("index", index);
  TORCH_CHECK_VALUE(index.dim() == 3 && index.sym_size(0) == main.sym_size(1) &&
                        index.sym_size(2) == main.sym_size(3) &&
                        (!main_is_pooled || index.sym_size(1) == main.sym_size(2)),
                    op, ": index must be [N, R, C] like ", name, " ", main.sym_sizes(), ", got ", index.sym_sizes());
  checks.check_device(other, out);
  checks.check_type(other, out, main.scalar_type());
  checks.check_dense(other, out);
  TORCH_CHECK_VALUE(out.dim() == 4 && out.sym_size(0) == main.sym_size(0) && out.sym_size(1) == main.sym_size(1) &&
                        out.sym_size(3) == main.sym_size(3) && (main_is_pooled || out.sym_size(2) == index.sym_size(1)),
                    op, ": ", other, " must fit ", name, " ", main.sym_sizes(), " and index ", index.sym_sizes(),
                    ", got ", out.sym_sizes());
  TORCH_CHECK_VALUE(!out.is_same(main), op, ": ", other, " must not be ", name, ": nothing here works in place");
}

inline void check_gather(const at::Tensor& x, const at::Tensor& index, const at::Tensor& out) {
  check_pool("pool_gather", "x", x, index, "out", out, false);
}

inline void check_scatter(const at::Tensor& g, const at::Tensor& index, const at::Tensor& out) {
  check_pool("pool_scatter", "g", g, index, "out", out, true);
}

// With outputs, there must be something to gather.
inline void check_inputs(const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.size(2) > 0, "pool_gather: x must have inputs to gather from, got ", x.sizes());
}

inline PoolArguments pool_arguments(const at::Tensor& wide, const at::Tensor& pooled, const at::Tensor& index,
                                    const at::Tensor& in, const at::Tensor& out, bool unique) {
  return {.directions = wide.size(0),
          .samples = wide.size(1),
          .size = wide.size(2),
          .windows = pooled.size(2),
          .channels = wide.size(3),
          .type = element_type(wide.scalar_type()),
          .unique = unique,
          .index = index.const_data_ptr<std::int32_t>(),
          .in = in.const_data_ptr(),
          .out = out.mutable_data_ptr()};
}

}  // namespace curvlab::hvp
