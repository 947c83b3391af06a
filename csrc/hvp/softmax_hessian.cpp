// SPDX-License-Identifier: Apache-2.0
// softmax_hessian_product: CPU, fake and autograd kernels, registration.
#include "hvp/softmax_hessian.h"

#include <torch/library.h>

#include "common/no_gradient.h"
#include "hvp/cpu_kernels.h"
#include "hvp/parallel.h"
#include "hvp/softmax_arguments.h"

namespace curvlab::hvp {
namespace {

void softmax_cpu(const at::Tensor& p, const at::Tensor& label, const at::Tensor& weight, const at::Tensor& u,
                 const at::Tensor& out) {
  check_softmax(p, label, weight, u, out);
  if (out.numel() == 0) return;
  const SoftmaxArguments arguments = softmax_arguments(p, label, weight, u, out);
  const auto kernel = cpu_kernels().softmax_rows[arguments.type];
  for_items(arguments.samples * arguments.directions, out.numel(),
            [&](std::int64_t begin, std::int64_t end) { kernel(arguments, begin, end); });
}

void softmax_autograd(c10::DispatchKeySet keys, const at::Tensor& p, const at::Tensor& label, const at::Tensor& weight,
                      const at::Tensor& u, const at::Tensor& out) {
  refuse_gradient("softmax_hessian_product", {&p, &weight, &u, &out});
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("curvlab::softmax_hessian_product", "")
          .typed<void(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&)>();
  op.redispatch(keys & c10::after_autograd_keyset, p, label, weight, u, out);
}

}  // namespace
}  // namespace curvlab::hvp

TORCH_LIBRARY_IMPL(curvlab, CPU, m) { m.impl("softmax_hessian_product", curvlab::hvp::softmax_cpu); }
TORCH_LIBRARY_IMPL(curvlab, Meta, m) { m.impl("softmax_hessian_product", curvlab::hvp::check_softmax); }
TORCH_LIBRARY_IMPL(curvlab, Autograd, m) {
  m.impl("softmax_hessian_product", TORCH_FN(curvlab::hvp::softmax_autograd));
}
