// SPDX-License-Identifier: Apache-2.0
// The masked convolutions on the CPU: checks, results, and the choice between strips and, for sizes that 32-bit offsets
// do not reach, ATen's dense convolution.
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "sparse_conv/arguments.h"
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

at::Tensor masked_conv2d_cpu(const at::Tensor& x, const at::Tensor& values, const at::Tensor& indices,
                             const OptionalTensor& bias, CURVLAB_CONV_PARAMETERS) {
  const CheckedConv checked = check_forward(x, values, indices, bias, CURVLAB_CONV_ARGUMENTS);
  check_dtype("masked_conv2d", x);
  const auto plan = find_plan("masked_conv2d", indices, checked.weight, x.size(2), x.size(3), x.scalar_type());
  if (plan == nullptr) {
    return at::convolution(x, dense_weight(values, indices, weight_shape), bias, stride, padding, dilation, false,
                           {0, 0}, groups)
        .contiguous();
  }
  at::Tensor out = at::empty(C10_AS_INTARRAYREF_SLOW(c10::SymIntArrayRef(checked.out_size)), x.options());
  if (out.numel() != 0) run_forward(*plan, x, values, given(bias) ? *bias : at::Tensor(), out);
  return out;
}

at::Tensor masked_conv2d_input_cpu(const at::Tensor& grad, const at::Tensor& values, const at::Tensor& indices,
                                   at::IntArrayRef input_size, CURVLAB_CONV_PARAMETERS) {
  const CheckedConv checked =
      check_input(grad, values, indices, c10::fromIntArrayRefSlow(input_size), CURVLAB_CONV_ARGUMENTS);
  check_dtype("masked_conv2d_input", grad);
  const auto plan =
      find_plan("masked_conv2d_input", indices, checked.weight, input_size[2], input_size[3], grad.scalar_type());
  if (plan == nullptr) {
    return std::get<0>(at::convolution_backward(grad, at::empty(input_size, grad.options()),
                                                dense_weight(values, indices, weight_shape), std::nullopt, stride,
                                                padding, dilation, false, {0, 0}, groups, {true, false, false}))
        .contiguous();
  }
  at::Tensor gx = at::empty(input_size, grad.options());
  if (gx.numel() == 0) return gx;
  if (grad.numel() == 0) return gx.zero_();
  run_backward(*plan, {}, grad, values, gx, {});
  return gx;
}

at::Tensor masked_conv2d_weight_cpu(const at::Tensor& x, const at::Tensor& grad, const at::Tensor& indices,
                                    CURVLAB_CONV_PARAMETERS) {
  const CheckedConv checked = check_weight(x, grad, indices, CURVLAB_CONV_ARGUMENTS);
  check_dtype("masked_conv2d_weight", x);
  const auto plan = find_plan("masked_conv2d_weight", indices, checked.weight, x.size(2), x.size(3), x.scalar_type());
  if (plan == nullptr) {
    return std::get<1>(at::convolution_backward(grad, x, at::zeros(weight_shape, x.options()), std::nullopt, stride,
                                                padding, dilation, false, {0, 0}, groups, {false, true, false}))
        .reshape(-1)
        .index({indices});
  }
  at::Tensor gv = at::empty({indices.numel()}, x.options());
  if (gv.numel() == 0) return gv;
  if (grad.numel() == 0 || x.numel() == 0) return gv.zero_();
  run_backward(*plan, x, grad, {}, {}, gv);
  return gv;
}

std::tuple<at::Tensor, at::Tensor> masked_conv2d_backward_cpu(const at::Tensor& x, const at::Tensor& grad,
                                                              const at::Tensor& values, const at::Tensor& indices,
                                                              CURVLAB_CONV_PARAMETERS) {
  const CheckedConv checked = check_backward(x, grad, values, indices, CURVLAB_CONV_ARGUMENTS);
  check_dtype("masked_conv2d_backward", x);
  const auto plan = find_plan("masked_conv2d_backward", indices, checked.weight, x.size(2), x.size(3), x.scalar_type());
  if (plan == nullptr || x.numel() == 0 || grad.numel() == 0 || indices.numel() == 0) {
    return {masked_conv2d_input_cpu(grad, values, indices, x.sizes(), CURVLAB_CONV_ARGUMENTS),
            masked_conv2d_weight_cpu(x, grad, indices, CURVLAB_CONV_ARGUMENTS)};
  }
  at::Tensor gx = at::empty(x.sizes(), x.options()), gv = at::empty({indices.numel()}, x.options());
  run_backward(*plan, x, grad, values, gx, gv);
  return {gx, gv};
}

}  // namespace
}  // namespace curvlab::sparse_conv

TORCH_LIBRARY_IMPL(curvlab, CPU, m) {
  m.impl("masked_conv2d", curvlab::sparse_conv::masked_conv2d_cpu);
  m.impl("masked_conv2d_input", curvlab::sparse_conv::masked_conv2d_input_cpu);
  m.impl("masked_conv2d_weight", curvlab::sparse_conv::masked_conv2d_weight_cpu);
  m.impl("masked_conv2d_backward", curvlab::sparse_conv::masked_conv2d_backward_cpu);
}
