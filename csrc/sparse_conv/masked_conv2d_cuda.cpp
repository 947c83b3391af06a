// SPDX-License-Identifier: Apache-2.0
// The masked convolutions on CUDA: from tensors to the launchers. Data of any strides are made contiguous (NCHW), and
// results are contiguous. The lists of a mask are built on the host and kept on the device: the first call with a mask,
// a geometry and a kind of kernel copies the indices to the host and waits for that; later calls neither wait nor
// synchronize.
#include "sparse_conv/masked_conv2d_cuda.h"

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <array>
#include <cstdint>
#include <limits>
#include <memory>
#include <tuple>
#include <utility>

#include "common/cuda_device.h"
#include "sparse_conv/arguments.h"
#include "sparse_conv/device_plans.h"
#include "sparse_conv/plan_cuda.h"

namespace curvlab::sparse_conv {
namespace {

std::int32_t element_type(at::ScalarType type) {
  return type == at::kDouble ? kFloat64 : type == at::kBFloat16 ? kBFloat16 : kFloat32;
}

std::int32_t number(const char* op, const char* name, std::int64_t value) {
  TORCH_CHECK_VALUE(value < 1ll << 30, op, ": ", name, " must be below 2^30 on CUDA, got ", value);
  return static_cast<std::int32_t>(value);
}

Pair pair(const char* op, const char* name, const std::int64_t (&values)[2]) {
  return {number(op, name, values[0]), number(op, name, values[1])};
}

Convolution convolution(const char* op, const ConvWeight& weight, at::IntArrayRef x, at::IntArrayRef y) {
  for (int axis = 0; axis < 2; ++axis) {  // the kernels add these to positions in 32 bits
    number(op, "padding + dilation * (kernel - 1)",
           weight.padding[axis] + weight.dilation[axis] * (weight.kernel[axis] - 1));
  }
  number(op, "H * W", x[2] * x[3] + y[2] * y[3]);
  return {number(op, "groups", weight.groups),
          number(op, "C_out", weight.channels_out / weight.groups),
          number(op, "C_in", weight.channels_in_group),
          pair(op, "the kernel's size", weight.kernel),
          pair(op, "stride", weight.stride),
          pair(op, "padding", weight.padding),
          pair(op, "dilation", weight.dilation),
          {number(op, "H", x[2]), number(op, "W", x[3])},
          {number(op, "H", y[2]), number(op, "W", y[3])}};
}

// Of one image, positions are few and images many: then a 1 x 1 convolution of [N, C, 1, 1] (a linear layer) is
// computed as that of [1, C, 1, N], so that the kernels have images side by side in memory.
bool is_linear(const ConvWeight& weight, at::IntArrayRef x) {
  return x[2] == 1 && x[3] == 1 && weight.taps() == 1 && weight.padding[0] == 0 && weight.padding[1] == 0 &&
         weight.stride[0] == 1 && weight.stride[1] == 1;
}

// [N, C, 1, 1] and [1, C, 1, N]: the one from the other.
at::Tensor turned(const at::Tensor& x) { return x.transpose(0, 3).contiguous(); }

class Problem {
 public:
  Problem(const char* op, const CheckedConv& checked, at::IntArrayRef x_size)
      : op_(op), weight_(checked.weight), linear_(is_linear(checked.weight, x_size)) {
    for (int i = 0; i < 4; ++i) {
      x_[i] = x_size[i];
      y_[i] = checked.out_size[i].expect_int();
    }
    if (linear_) {
      std::swap(x_[0], x_[3]);
      std::swap(y_[0], y_[3]);
    }
  }

  at::Tensor input(const at::Tensor& x) const { return linear_ ? turned(x) : x.contiguous(); }
  at::Tensor result(const at::Tensor& y) const { return linear_ ? turned(y) : y; }
  at::IntArrayRef x_size() const { return x_; }
  at::IntArrayRef y_size() const { return y_; }

  // The plan on the device, for this number of images.
  std::shared_ptr<const DevicePlan> plan(const at::Tensor& indices, at::ScalarType type, bool input_gradient) const {
    const Convolution conv = convolution(op_, weight_, x_, y_);
    const bool windows = images_fill_lanes(x_[0]), captured = is_capturing();
    const std::int32_t kind = element_type(type);
    const PlanKey key{conv.groups,     conv.out_channels, conv.in_channels, conv.kernel.h,  conv.kernel.w,
                      conv.stride.h,   conv.stride.w,     conv.padding.h,   conv.padding.w, conv.dilation.h,
                      conv.dilation.w, conv.x.h,          conv.x.w,         kind,           input_gradient,
                      windows};
    auto plan = device_plans().get(indices, key, [&] {
      TORCH_CHECK(!captured, op_,
                  ": a CUDA graph is being captured, and this mask and geometry have no plan yet, which is built on "
                  "the host: call the op (and its backward pass) once before the capture");
      return make(indices, conv, input_gradient, windows, kind);
    });
    if (captured) keep_for_graph(plan);
    return plan;
  }

  GatherArguments arguments(const DevicePlan& plan) const {
    GatherArguments x = plan.arguments();
    x.images = x_[0];
    return x;
  }

 private:
  static bool is_capturing() {
    return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
  }

  DevicePlan make(const at::Tensor& indices, const Convolution& conv, bool input_gradient, bool windows,
                  std::int32_t type) const {
    const at::Tensor on_host = indices.cpu().contiguous();
    const std::int64_t count = on_host.numel();
    TORCH_CHECK_VALUE(count <= std::numeric_limits<std::int32_t>::max(), op_,
                      ": indices must be fewer than 2^31 on CUDA, got ", count);
    const std::int64_t* positions = on_host.const_data_ptr<std::int64_t>();
    const char* wanted = check_indices(positions, count, weight_.elements());
    TORCH_CHECK_VALUE(wanted == nullptr, op_, ": indices must be ", wanted, ", got others");
    return {make_gather_plan(conv, positions, count, input_gradient, windows, type), indices.device()};
  }

  const char* op_;
  const ConvWeight& weight_;
  bool linear_;
  std::array<std::int64_t, 4> x_, y_;
};

cudaStream_t stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

at::Tensor forward(const CheckedConv& checked, const at::Tensor& x, const at::Tensor& values, const at::Tensor& indices,
                   const OptionalTensor& bias) {
  constexpr const char* op = "masked_conv2d";
  const Problem problem(op, checked, x.sizes());
  at::Tensor y = at::empty(problem.y_size(), x.options().memory_format(at::MemoryFormat::Contiguous));
  if (y.numel() == 0) return problem.result(y);
  const auto plan = problem.plan(indices, x.scalar_type(), false);
  const at::Tensor in = problem.input(x), v = values.contiguous(), b = given(bias) ? bias->contiguous() : at::Tensor();
  GatherArguments arguments = problem.arguments(*plan);
  arguments.in_data = in.const_data_ptr();
  arguments.values = v.const_data_ptr();
  arguments.bias = b.defined() ? b.const_data_ptr() : nullptr;
  arguments.out_data = y.mutable_data_ptr();
  check_launch(op, launch_gather(arguments, stream()));
  return problem.result(y);
}

at::Tensor input_gradient(const CheckedConv& checked, const at::Tensor& grad, const at::Tensor& values,
                          const at::Tensor& indices, at::IntArrayRef input_size) {
  constexpr const char* op = "masked_conv2d_input";
  const Problem problem(op, checked, input_size);
  at::Tensor gx = at::empty(problem.x_size(), grad.options().memory_format(at::MemoryFormat::Contiguous));
  if (gx.numel() == 0) return problem.result(gx);
  const auto plan = problem.plan(indices, grad.scalar_type(), true);
  const at::Tensor in = problem.input(grad), v = values.contiguous();
  GatherArguments arguments = problem.arguments(*plan);
  const at::Tensor permuted = at::empty({arguments.nonzeros}, v.options());
  arguments.in_data = in.const_data_ptr();
  arguments.values = permuted.const_data_ptr();
  arguments.out_data = gx.mutable_data_ptr();
  check_launch(op, launch_permute_values(v.const_data_ptr(), plan->source(), arguments.nonzeros, arguments.type,
                                         permuted.mutable_data_ptr(), stream()));
  check_launch(op, launch_gather(arguments, stream()));
  return problem.result(gx);
}

at::Tensor weight_gradient(const CheckedConv& checked, const at::Tensor& x, const at::Tensor& grad,
                           const at::Tensor& indices) {
  constexpr const char* op = "masked_conv2d_weight";
  const Problem problem(op, checked, x.sizes());
  at::Tensor gv = at::empty({indices.numel()}, x.options().memory_format(at::MemoryFormat::Contiguous));
  if (gv.numel() == 0) return gv;
  const auto plan = problem.plan(indices, x.scalar_type(), false);
  const at::Tensor in = problem.input(x), g = problem.input(grad);
  GatherArguments arguments = problem.arguments(*plan);
  arguments.in_data = in.const_data_ptr();
  arguments.out_data = const_cast<void*>(g.const_data_ptr());  // read only
  const int splits = weight_splits(arguments);
  const at::Tensor workspace = at::empty({splits * arguments.nonzeros},
                                         gv.options().dtype(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat));
  check_launch(
      op, launch_weight_gradient(arguments, splits, workspace.mutable_data_ptr(), gv.mutable_data_ptr(), stream()));
  return gv;
}

at::Tensor masked_conv2d_cuda(const at::Tensor& x, const at::Tensor& values, const at::Tensor& indices,
                              const OptionalTensor& bias, CURVLAB_CONV_PARAMETERS) {
  const CheckedConv checked = check_forward(x, values, indices, bias, CURVLAB_CONV_ARGUMENTS);
  const c10::cuda::CUDAGuard guard(x.device());  // after the checks: it takes no CPU device
  return forward(checked, x, values, indices, bias);
}

at::Tensor masked_conv2d_input_cuda(const at::Tensor& grad, const at::Tensor& values, const at::Tensor& indices,
                                    at::IntArrayRef input_size, CURVLAB_CONV_PARAMETERS) {
  const CheckedConv checked =
      check_input(grad, values, indices, c10::fromIntArrayRefSlow(input_size), CURVLAB_CONV_ARGUMENTS);
  const c10::cuda::CUDAGuard guard(grad.device());
  return input_gradient(checked, grad, values, indices, input_size);
}

at::Tensor masked_conv2d_weight_cuda(const at::Tensor& x, const at::Tensor& grad, const at::Tensor& indices,
                                     CURVLAB_CONV_PARAMETERS) {
  const CheckedConv checked = check_weight(x, grad, indices, CURVLAB_CONV_ARGUMENTS);
  const c10::cuda::CUDAGuard guard(x.device());
  return weight_gradient(checked, x, grad, indices);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> masked_conv2d_backward_cuda(const at::Tensor& x, const at::Tensor& grad,
                                                                           const at::Tensor& values,
                                                                           const at::Tensor& indices,
                                                                           CURVLAB_CONV_PARAMETERS) {
  const CheckedConv checked = check_backward(x, grad, values, indices, CURVLAB_CONV_ARGUMENTS);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor dense = grad.contiguous();  // once for both
  return {input_gradient(checked, dense, values, indices, x.sizes()), weight_gradient(checked, x, dense, indices),
          dense.sum({0, 2, 3})};
}

}  // namespace
}  // namespace curvlab::sparse_conv

TORCH_LIBRARY_IMPL(curvlab, CUDA, m) {
  m.impl("masked_conv2d", curvlab::sparse_conv::masked_conv2d_cuda);
  m.impl("masked_conv2d_input", curvlab::sparse_conv::masked_conv2d_input_cuda);
  m.impl("masked_conv2d_weight", curvlab::sparse_conv::masked_conv2d_weight_cuda);
  m.impl("masked_conv2d_backward", curvlab::sparse_conv::masked_conv2d_backward_cuda);
}
