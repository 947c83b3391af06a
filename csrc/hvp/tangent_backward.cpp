// SPDX-License-Identifier: Apache-2.0
// tangent_backward: CPU, fake and autograd kernels, registration.
#include <torch/library.h>

#include "common/no_gradient.h"
#include "hvp/chunk_sums.h"
#include "hvp/cpu_kernels.h"
#include "hvp/parallel.h"
#include "hvp/tangent_arguments.h"

namespace curvlab::hvp {
namespace {

#define CURVLAB_BACKWARD_PARAMETERS                                                                                    \
  const at::Tensor &g, const OptionalTensor &g2, const OptionalTensor &first, const OptionalTensor &second,            \
      const OptionalTensor &pre, const OptionalTensor &scale, const OptionalTensor &gain, const OptionalTensor &delta, \
      const OptionalTensor &centered, const OptionalTensor &t, const OptionalTensor &dot,                              \
      const OptionalTensor &inv_std, const OptionalTensor &gy, const OptionalTensor &gt,                               \
      const OptionalTensor &bias_sum, const OptionalTensor &gain_sum, bool accumulate
#define CURVLAB_BACKWARD_TENSORS \
  g, g2, first, second, pre, scale, gain, delta, centered, t, dot, inv_std, gy, gt, bias_sum, gain_sum

void tangent_backward_cpu(CURVLAB_BACKWARD_PARAMETERS) {
  const BackwardTensors tensors{CURVLAB_BACKWARD_TENSORS};
  check(tensors);
  const PreparedBackward prepared(tensors);
  const BackwardArguments& arguments = prepared.arguments;
  const Rows& shape = arguments.shape;
  const std::int64_t elements = g.numel(), chunks = elements == 0 ? 0 : chunk_count(shape);
  const bool sum_bias = given(bias_sum), sum_gain = given(gain_sum);
  ChunkSums sums(sum_bias + sum_gain, chunks, shape.directions, shape.channels);
  const auto kernel = cpu_kernels().backward_rows[shape.type];
  for_items(chunks * shape.directions, elements, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t item = begin; item < end; ++item) {
      const std::int64_t chunk = item / shape.directions, k = item % shape.directions;
      const std::int64_t rows = chunk_rows(shape.channels), from = chunk * rows;
      kernel(arguments, k, from, from + rows < shape.rows ? from + rows : shape.rows,
             sum_bias ? sums.row(0, chunk, k) : nullptr, sum_gain ? sums.row(sum_bias, chunk, k) : nullptr);
    }
  });
  if (sum_bias) sums.finish(0, *bias_sum, accumulate, {}, {});
  if (sum_gain) {
    const at::Tensor moved = channels(dot, accumulation_type(g.scalar_type()));
    sums.finish(sum_bias, *gain_sum, accumulate, prepared.inv_std, moved);
  }
}

void tangent_backward_meta(CURVLAB_BACKWARD_PARAMETERS) {
  (void)accumulate;
  check(BackwardTensors{CURVLAB_BACKWARD_TENSORS});
}

void tangent_backward_autograd(c10::DispatchKeySet keys, CURVLAB_BACKWARD_PARAMETERS) {
  refuse_gradient("tangent_backward",
                  {&g, pointer_to(g2), pointer_to(first), pointer_to(second), pointer_to(pre), pointer_to(scale),
                   pointer_to(gain), pointer_to(delta), pointer_to(centered), pointer_to(t), pointer_to(dot),
                   pointer_to(inv_std), pointer_to(gy), pointer_to(gt), pointer_to(bias_sum), pointer_to(gain_sum)});
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("curvlab::tangent_backward", "")
                             .typed<void(CURVLAB_BACKWARD_PARAMETERS)>();
  op.redispatch(keys & c10::after_autograd_keyset, CURVLAB_BACKWARD_TENSORS, accumulate);
}

}  // namespace
}  // namespace curvlab::hvp

TORCH_LIBRARY_IMPL(curvlab, CPU, m) { m.impl("tangent_backward", curvlab::hvp::tangent_backward_cpu); }
TORCH_LIBRARY_IMPL(curvlab, Meta, m) { m.impl("tangent_backward", curvlab::hvp::tangent_backward_meta); }
TORCH_LIBRARY_IMPL(curvlab, Autograd, m) {
  m.impl("tangent_backward", TORCH_FN(curvlab::hvp::tangent_backward_autograd));
}
