// SPDX-License-Identifier: Apache-2.0
// pool_gather and pool_scatter: CPU, fake and autograd kernels, registration.
#include "hvp/pool.h"

#include <torch/library.h>

#include <vector>

#include "common/no_gradient.h"
#include "hvp/cpu_kernels.h"
#include "hvp/parallel.h"
#include "hvp/pool_arguments.h"

namespace curvlab::hvp {
namespace {

void pool_gather_cpu(const at::Tensor& x, const at::Tensor& index, const at::Tensor& out) {
  check_gather(x, index, out);
  if (out.numel() == 0) return;
  check_inputs(x);
  const PoolArguments pool = pool_arguments(x, out, index, x, out, false);
  const auto kernel = cpu_kernels().gather_image[pool.type];
  for_items(pool.samples * pool.directions, out.numel(), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t item = begin; item < end; ++item) kernel(pool, item % pool.directions, item / pool.directions);
  });
}

void pool_scatter_cpu(const at::Tensor& g, const at::Tensor& index, const at::Tensor& out, bool unique) {
  check_scatter(g, index, out);
  if (out.numel() == 0) return;
  const PoolArguments pool = pool_arguments(out, g, index, g, out, unique);
  const auto kernel = cpu_kernels().scatter_image[pool.type];
  const bool rounds = pool.type == kBFloat16 && !unique;  // sums of rounded numbers are made in float
  for_items(pool.samples * pool.directions, out.numel(), [&](std::int64_t begin, std::int64_t end) {
    std::vector<float> scratch(rounds ? static_cast<std::size_t>(pool.image()) : 0);
    for (std::int64_t item = begin; item < end; ++item) {
      kernel(pool, item % pool.directions, item / pool.directions, scratch.data());
    }
  });
}

void pool_gather_autograd(c10::DispatchKeySet keys, const at::Tensor& x, const at::Tensor& index,
                          const at::Tensor& out) {
  refuse_gradient("pool_gather", {&x, &out});
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("curvlab::pool_gather", "")
                             .typed<void(const at::Tensor&, const at::Tensor&, const at::Tensor&)>();
  op.redispatch(keys & c10::after_autograd_keyset, x, index, out);
}

void pool_scatter_autograd(c10::DispatchKeySet keys, const at::Tensor& g, const at::Tensor& index,
                           const at::Tensor& out, bool unique) {
  refuse_gradient("pool_scatter", {&g, &out});
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("curvlab::pool_scatter", "")
                             .typed<void(const at::Tensor&, const at::Tensor&, const at::Tensor&, bool)>();
  op.redispatch(keys & c10::after_autograd_keyset, g, index, out, unique);
}

}  // namespace
}  // namespace curvlab::hvp

TORCH_LIBRARY_IMPL(curvlab, CPU, m) {
  m.impl("pool_gather", curvlab::hvp::pool_gather_cpu);
  m.impl("pool_scatter", curvlab::hvp::pool_scatter_cpu);
}
TORCH_LIBRARY_IMPL(curvlab, Meta, m) {
  m.impl("pool_gather", curvlab::hvp::check_gather);
  m.impl("pool_scatter", [](const at::Tensor& g, const at::Tensor& index, const at::Tensor& out, bool) {
    curvlab::hvp::check_scatter(g, index, out);
  });
}
TORCH_LIBRARY_IMPL(curvlab, Autograd, m) {
  m.impl("pool_gather", TORCH_FN(curvlab::hvp::pool_gather_autograd));
  m.impl("pool_scatter", TORCH_FN(curvlab::hvp::pool_scatter_autograd));
}
