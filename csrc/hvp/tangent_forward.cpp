// SPDX-License-Identifier: Apache-2.0
// tangent_forward: CPU, fake and autograd kernels, registration.
#include <torch/library.h>

#include <vector>

#include "common/no_gradient.h"
#include "hvp/chunk_sums.h"
#include "hvp/cpu_kernels.h"
#include "hvp/parallel.h"
#include "hvp/tangent_arguments.h"

namespace curvlab::hvp {
namespace {

#define CURVLAB_FORWARD_PARAMETERS                                                                                \
  const at::Tensor &a, const OptionalTensor &b, const OptionalTensor &bias, const OptionalTensor &scale,          \
      const OptionalTensor &gain, const OptionalTensor &centered, const OptionalTensor &residual,                 \
      const OptionalTensor &first, const OptionalTensor &delta, const at::Tensor &out, const OptionalTensor &pre, \
      const OptionalTensor &dot
#define CURVLAB_FORWARD_ARGUMENTS a, b, bias, scale, gain, centered, residual, first, delta, out, pre, dot

void tangent_forward_cpu(CURVLAB_FORWARD_PARAMETERS) {
  const ForwardTensors tensors{CURVLAB_FORWARD_ARGUMENTS};
  check(tensors);
  const PreparedForward prepared(tensors);
  const ForwardArguments& arguments = prepared.arguments;
  const Rows& shape = arguments.shape;
  const std::int64_t elements = a.numel(), chunks = elements == 0 ? 0 : chunk_count(shape);
  ChunkSums sums(given(dot) ? 1 : 0, chunks, shape.directions, shape.channels);
  const auto kernel = cpu_kernels().forward_rows[shape.type];
  for_items(chunks * shape.directions, elements, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t item = begin; item < end; ++item) {  // directions innermost: shared factors stay in the cache
      const std::int64_t chunk = item / shape.directions, k = item % shape.directions;
      const std::int64_t rows = chunk_rows(shape.channels), from = chunk * rows;
      kernel(arguments, k, from, from + rows < shape.rows ? from + rows : shape.rows, sums.row(0, chunk, k));
    }
  });
  if (given(dot)) sums.finish(0, *dot, false, {}, {});
}

void tangent_forward_meta(CURVLAB_FORWARD_PARAMETERS) { check(ForwardTensors{CURVLAB_FORWARD_ARGUMENTS}); }

void tangent_forward_autograd(c10::DispatchKeySet keys, CURVLAB_FORWARD_PARAMETERS) {
  refuse_gradient("tangent_forward",
                  {&a, pointer_to(b), pointer_to(bias), pointer_to(scale), pointer_to(gain), pointer_to(centered),
                   pointer_to(residual), pointer_to(first), pointer_to(delta), &out, pointer_to(pre), pointer_to(dot)});
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("curvlab::tangent_forward", "")
                             .typed<void(CURVLAB_FORWARD_PARAMETERS)>();
  op.redispatch(keys & c10::after_autograd_keyset, CURVLAB_FORWARD_ARGUMENTS);
}

}  // namespace
}  // namespace curvlab::hvp

TORCH_LIBRARY_IMPL(curvlab, CPU, m) { m.impl("tangent_forward", curvlab::hvp::tangent_forward_cpu); }
TORCH_LIBRARY_IMPL(curvlab, Meta, m) { m.impl("tangent_forward", curvlab::hvp::tangent_forward_meta); }
TORCH_LIBRARY_IMPL(curvlab, Autograd, m) {
  m.impl("tangent_forward", TORCH_FN(curvlab::hvp::tangent_forward_autograd));
}
