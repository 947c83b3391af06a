// SPDX-License-Identifier: Apache-2.0
// The masked convolutions on the CPU: checks, results, and the choice between strips and, for sizes that 32-bit offsets
// do not reach, ATen's dense convolution.
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "sparse_conv/arguments.h"
#include "sparse_conv/cpu_kernels.h"
#include "sparse_conv/strip_run.h"

namespace curvlab::sparse_conv {
namespace {

void check_dtype(const char* op, const at::Tensor& tensor) {
  TORCH_CHECK_NOT_IMPLEMENTED(tensor.scalar_type() != at::kBFloat16, op,
                              ": the CPU kernels take float32 and float64, got bfloat16");
}

at::Tensor dense_weight(const at::Tensor& values, const at::Tensor& indices, at::IntArrayRef shape) {
  at::Tensor weight = at::zeros(shape, values.options());
  weight.view(-1).index_put_({indices}, values);
  return weight;
}

// A part of the batch with its plan.
struct PlannedPart {
  BatchPart part;
  std::shared_ptr<const CpuPlan> plan;
};

// Empty where a strip's 32-bit offsets do not reach.
std::vector<PlannedPart> plans(const char* op, const ConvWeight& weight, const at::Tensor& indices,
                               at::IntArrayRef input_size, at::ScalarType type) {
  std::vector<PlannedPart> planned;
  const CpuKernels& kernels = cpu_kernels();
  const int index = type == at::kDouble ? 1 : 0;
  for (const BatchPart& part : parts_of_batch(weight, input_size[0], input_size[2], input_size[3], kernels.lanes[index],
                                              kernels.fast_blocks[index])) {
    auto plan = find_plan(op, indices, weight, part, input_size, type);
    if (plan == nullptr) return {};
    planned.push_back({part, std::move(plan)});
  }
  return planned;
}

at::Tensor masked_conv2d_cpu(const at::Tensor& x, const at::Tensor& values, const at::Tensor& indices,
                             const OptionalTensor& bias, CURVLAB_CONV_PARAMETERS) {
  const CheckedConv checked = check_forward(x, values, indices, bias, CURVLAB_CONV_ARGUMENTS);
  check_dtype("masked_conv2d", x);
  at::Tensor out = at::empty(C10_AS_INTARRAYREF_SLOW(c10::SymIntArrayRef(checked.out_size)), x.options());
  const auto planned = plans("masked_conv2d", checked.weight, indices, x.sizes(), x.scalar_type());
  if (planned.empty()) {
    return at::convolution(x, dense_weight(values, indices, weight_shape), bias, stride, padding, dilation, false,
                           {0, 0}, groups)
        .contiguous();
  }
  if (out.numel() == 0) return out;
  for (const auto& [part, plan] : planned) {
    run_forward(*plan, part, x, values, given(bias) ? *bias : at::Tensor(), out);
  }
  return out;
}

// gx and gv where they are wanted, and the bias' gradient with both.
std::tuple<at::Tensor, at::Tensor, at::Tensor> gradients(const char* op, const ConvWeight& weight, const at::Tensor& x,
                                                         const at::Tensor& grad, const at::Tensor& values,
                                                         const at::Tensor& indices, at::IntArrayRef input_size,
                                                         bool wants_x, bool wants_values, CURVLAB_CONV_PARAMETERS) {
  check_dtype(op, grad);
  at::Tensor gx, gv, gb;
  const auto planned = plans(op, weight, indices, input_size, grad.scalar_type());
  if (planned.empty()) {
    const at::Tensor weight_or_zeros =
        wants_x ? dense_weight(values, indices, weight_shape) : at::zeros(weight_shape, grad.options());
    std::tie(gx, gv, std::ignore) = at::convolution_backward(
        grad, wants_values ? x : at::empty(input_size, grad.options()), weight_or_zeros, std::nullopt, stride, padding,
        dilation, false, {0, 0}, groups, {wants_x, wants_values, false});
    if (wants_x && wants_values) gb = grad.sum({0, 2, 3});
    return {wants_x ? gx.contiguous() : gx, wants_values ? gv.reshape(-1).index({indices}) : gv, gb};
  }
  if (wants_x) gx = at::empty(input_size, grad.options());
  if (wants_values) gv = at::zeros({indices.numel()}, grad.options());
  if (wants_x && wants_values) gb = at::zeros({weight.channels_out}, grad.options());
  if (grad.numel() == 0) return {wants_x ? gx.zero_() : gx, gv, gb};
  for (const auto& [part, plan] : planned) run_backward(*plan, part, x, grad, values, gx, gv, gb);
  return {gx, gv, gb};
}

at::Tensor masked_conv2d_input_cpu(const at::Tensor& grad, const at::Tensor& values, const at::Tensor& indices,
                                   at::IntArrayRef input_size, CURVLAB_CONV_PARAMETERS) {
  const CheckedConv checked =
      check_input(grad, values, indices, c10::fromIntArrayRefSlow(input_size), CURVLAB_CONV_ARGUMENTS);
  return std::get<0>(gradients("masked_conv2d_input", checked.weight, {}, grad, values, indices, input_size, true,
                               false, CURVLAB_CONV_ARGUMENTS));
}

at::Tensor masked_conv2d_weight_cpu(const at::Tensor& x, const at::Tensor& grad, const at::Tensor& indices,
                                    CURVLAB_CONV_PARAMETERS) {
  const CheckedConv checked = check_weight(x, grad, indices, CURVLAB_CONV_ARGUMENTS);
  return std::get<1>(gradients("masked_conv2d_weight", checked.weight, x, grad, {}, indices, x.sizes(), false, true,
                               CURVLAB_CONV_ARGUMENTS));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> masked_conv2d_backward_cpu(const at::Tensor& x, const at::Tensor& grad,
                                                                          const at::Tensor& values,
                                                                          const at::Tensor& indices,
                                                                          CURVLAB_CONV_PARAMETERS) {
  const CheckedConv checked = check_backward(x, grad, values, indices, CURVLAB_CONV_ARGUMENTS);
  return gradients("masked_conv2d_backward", checked.weight, x, grad, values, indices, x.sizes(), true, true,
                   CURVLAB_CONV_ARGUMENTS);
}

}  // namespace
}  // namespace curvlab::sparse_conv

TORCH_LIBRARY_IMPL(curvlab, CPU, m) {
  m.impl("masked_conv2d", curvlab::sparse_conv::masked_conv2d_cpu);
  m.impl("masked_conv2d_input", curvlab::sparse_conv::masked_conv2d_input_cpu);
  m.impl("masked_conv2d_weight", curvlab::sparse_conv::masked_conv2d_weight_cpu);
  m.impl("masked_conv2d_backward", curvlab::sparse_conv::masked_conv2d_backward_cpu);
}
