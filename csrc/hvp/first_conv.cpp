// SPDX-License-Identifier: Apache-2.0
// first_conv_forward and first_conv_weight: checks, CPU, fake and autograd kernels, registration.
#include "hvp/first_conv.h"

#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "common/no_gradient.h"
#include "hvp/arguments.h"
#include "hvp/cpu_kernels.h"
#include "hvp/parallel.h"

namespace curvlab::hvp {
namespace {

void check_float(const char* op, const char* name, const at::Tensor& tensor, std::int64_t rank) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat, op, ": ", name, " must be float32, got ",
                   dtype_name(tensor.scalar_type()));
  TORCH_CHECK_VALUE(tensor.dim() == rank, op, ": ", name, " must have ", rank, " dimensions, got ", tensor.sym_sizes());
}

// wide: weights [K, O, C, h, w] (dense from the second dimension on); map: out or g [K, N, R, O].
void check(const char* op, const at::Tensor& x, const at::Tensor& wide, const at::Tensor& map,
           const OptionalTensor& choice, std::int64_t stride_height, std::int64_t stride_width) {
  check_float(op, "x", x, 4);
  check_float(op, "weight", wide, 5);
  check_float(op, "map", map, 4);
  TORCH_CHECK_VALUE(stride_height > 0 && stride_width > 0, op, ": stride must be positive, got ", stride_height,
                    " and ", stride_width);
  TORCH_CHECK_VALUE(x.is_contiguous() && map.is_contiguous(), op, ": x and map must be contiguous, got strides ",
                    x.sym_strides(), " and ", map.sym_strides());
  TORCH_CHECK_VALUE(wide.sym_size(0) == 0 || wide.select(0, 0).is_contiguous(), op,
                    ": each direction of weight must be contiguous, got strides ", wide.sym_strides());
  const c10::SymInt h = wide.sym_size(3), w = wide.sym_size(4);
  TORCH_CHECK_VALUE(wide.sym_size(2) == x.sym_size(3) && h > 0 && w > 0 && h <= x.sym_size(1) && w <= x.sym_size(2), op,
                    ": weight must be [K, O, C, h, w] that fits x ", x.sym_sizes(), ", got ", wide.sym_sizes());
  c10::SymInt rows = (x.sym_size(1) - h) / stride_height + 1, columns = (x.sym_size(2) - w) / stride_width + 1;
  if (given(choice)) {
    rows = rows / 2;
    columns = columns / 2;
  }
  const bool fits = map.sym_size(0) == wide.sym_size(0) && map.sym_size(1) == x.sym_size(0) &&
                    map.sym_size(2) == rows * columns && map.sym_size(3) == wide.sym_size(1);
  TORCH_CHECK_VALUE(fits, op, ": map must be [K, N, R, O] = [", wide.sym_size(0), ", ", x.sym_size(0), ", ",
                    rows * columns, ", ", wide.sym_size(1), "], got ", map.sym_sizes());
  if (!given(choice)) return;
  TORCH_CHECK_TYPE(choice->scalar_type() == at::kByte, op, ": choice must be uint8, got ",
                   dtype_name(choice->scalar_type()));
  TORCH_CHECK_VALUE(choice->is_contiguous() && choice->sym_sizes() == map.sym_sizes().slice(1), op,
                    ": choice must be contiguous and [N, R, O] like map ", map.sym_sizes(), ", got ",
                    choice->sym_sizes());
}

void check_bias(const at::Tensor& weight, const OptionalTensor& bias) {
  if (!given(bias)) return;
  check_float("first_conv_forward", "bias", *bias, 2);
  TORCH_CHECK_VALUE(bias->sym_size(0) == weight.sym_size(0) && bias->sym_size(1) == weight.sym_size(1) &&
                        (bias->sym_size(1) <= 1 || bias->sym_stride(1) == 1),
                    "first_conv_forward: bias must be [K, O] like weight ", weight.sym_sizes(), ", got ",
                    bias->sym_sizes());
}

FirstConvArguments arguments(const at::Tensor& x, const at::Tensor& wide, const OptionalTensor& choice,
                             std::int64_t stride_height, std::int64_t stride_width) {
  const std::int64_t outputs = wide.size(1);
  return {.directions = wide.size(0),
          .samples = x.size(0),
          .height = x.size(1),
          .width = x.size(2),
          .channels = x.size(3),
          .kernel_height = wide.size(3),
          .kernel_width = wide.size(4),
          .stride_height = stride_height,
          .stride_width = stride_width,
          .rows = (x.size(1) - wide.size(3)) / stride_height + 1,
          .columns = (x.size(2) - wide.size(4)) / stride_width + 1,
          .outputs = outputs,
          .lanes = (outputs + 2 * kFirstConvLanes - 1) / (2 * kFirstConvLanes) * (2 * kFirstConvLanes),
          .x = x.const_data_ptr<float>(),
          .choice = given(choice) ? choice->const_data_ptr<std::uint8_t>() : nullptr};
}

// [taps, lanes], taps in the order of x: kernel row, kernel column, channel.
std::vector<float> pack(const FirstConvArguments& conv, const at::Tensor& weight) {
  const std::int64_t area = conv.kernel_height * conv.kernel_width;
  std::vector<float> packed(static_cast<std::size_t>(conv.directions * conv.taps() * conv.lanes));
  for (std::int64_t k = 0; k < conv.directions; ++k) {
    const float* from = weight.const_data_ptr<float>() + k * weight.stride(0);
    float* to = packed.data() + k * conv.taps() * conv.lanes;
    for (std::int64_t o = 0; o < conv.outputs; ++o) {
      for (std::int64_t c = 0; c < conv.channels; ++c) {
        for (std::int64_t s = 0; s < area; ++s) to[(s * conv.channels + c) * conv.lanes + o] = *from++;
      }
    }
  }
  return packed;
}

void forward_cpu(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                 const OptionalTensor& choice, std::int64_t stride_height, std::int64_t stride_width,
                 const at::Tensor& out) {
  check("first_conv_forward", x, weight, out, choice, stride_height, stride_width);
  check_bias(weight, bias);
  if (out.numel() == 0) return;
  const FirstConvArguments conv = arguments(x, weight, choice, stride_height, stride_width);
  const std::vector<float> packed = pack(conv, weight);
  const auto kernel = cpu_kernels().first_conv_image;
  const std::int64_t map = conv.windows() * conv.outputs;
  float* const to = out.mutable_data_ptr<float>();
  for_items(conv.samples * conv.directions, out.numel() * conv.taps() / 16, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t item = begin; item < end; ++item) {
      const std::int64_t k = item % conv.directions, n = item / conv.directions;
      const float* own = given(bias) ? bias->const_data_ptr<float>() + k * bias->stride(0) : nullptr;
      kernel(conv, n, packed.data() + k * conv.taps() * conv.lanes, own, to + (k * conv.samples + n) * map);
    }
  });
}

void finish(const FirstConvArguments& conv, const std::vector<double>& sums, std::int64_t chunks, bool accumulate,
            const at::Tensor& out) {
  const std::int64_t area = conv.kernel_height * conv.kernel_width, size = conv.taps() * conv.lanes;
  for (std::int64_t k = 0; k < conv.directions; ++k) {
    float* to = out.mutable_data_ptr<float>() + k * out.stride(0);
    for (std::int64_t o = 0; o < conv.outputs; ++o) {
      for (std::int64_t c = 0; c < conv.channels; ++c) {
        for (std::int64_t s = 0; s < area; ++s, ++to) {
          double total = accumulate ? static_cast<double>(*to) : 0.0;
          const double* part = sums.data() + k * size + (s * conv.channels + c) * conv.lanes + o;
          for (std::int64_t chunk = 0; chunk < chunks; ++chunk) total += part[chunk * conv.directions * size];
          *to = static_cast<float>(total);
        }
      }
    }
  }
}

void weight_cpu(const at::Tensor& g, const at::Tensor& x, const OptionalTensor& choice, std::int64_t stride_height,
                std::int64_t stride_width, const at::Tensor& out, bool accumulate) {
  check("first_conv_weight", x, out, g, choice, stride_height, stride_width);
  if (out.numel() == 0) return;
  if (g.numel() == 0) {  // an empty tensor has no address, and no choice would mean no pool
    if (!accumulate) out.zero_();
    return;
  }
  const FirstConvArguments conv = arguments(x, out, choice, stride_height, stride_width);
  // Always the same parts, whatever the number of threads: so are the sums.
  const std::int64_t chunks = std::clamp<std::int64_t>(conv.samples / 8, 1, 16);
  const std::int64_t size = conv.taps() * conv.lanes, map = conv.windows() * conv.outputs;
  std::vector<double> sums(static_cast<std::size_t>(chunks * conv.directions * size));
  const auto kernel = cpu_kernels().first_conv_weight_image;
  const float* const from = g.const_data_ptr<float>();
  for_items(chunks * conv.directions, g.numel() * conv.taps() / 16, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t item = begin; item < end; ++item) {
      const std::int64_t k = item % conv.directions, chunk = item / conv.directions;
      const std::int64_t first = conv.samples * chunk / chunks, last = conv.samples * (chunk + 1) / chunks;
      for (std::int64_t n = first; n < last; ++n) {
        kernel(conv, n, from + (k * conv.samples + n) * map, sums.data() + item * size);
      }
    }
  });
  finish(conv, sums, chunks, accumulate, out);
}

void forward_autograd(c10::DispatchKeySet keys, const at::Tensor& x, const at::Tensor& weight,
                      const OptionalTensor& bias, const OptionalTensor& choice, std::int64_t stride_height,
                      std::int64_t stride_width, const at::Tensor& out) {
  refuse_gradient("first_conv_forward", {&x, &weight, pointer_to(bias), &out});
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("curvlab::first_conv_forward", "")
                             .typed<void(const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                                         const OptionalTensor&, std::int64_t, std::int64_t, const at::Tensor&)>();
  op.redispatch(keys & c10::after_autograd_keyset, x, weight, bias, choice, stride_height, stride_width, out);
}

void weight_autograd(c10::DispatchKeySet keys, const at::Tensor& g, const at::Tensor& x, const OptionalTensor& choice,
                     std::int64_t stride_height, std::int64_t stride_width, const at::Tensor& out, bool accumulate) {
  refuse_gradient("first_conv_weight", {&g, &x, &out});
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("curvlab::first_conv_weight", "")
                             .typed<void(const at::Tensor&, const at::Tensor&, const OptionalTensor&, std::int64_t,
                                         std::int64_t, const at::Tensor&, bool)>();
  op.redispatch(keys & c10::after_autograd_keyset, g, x, choice, stride_height, stride_width, out, accumulate);
}

}  // namespace
}  // namespace curvlab::hvp

TORCH_LIBRARY_IMPL(curvlab, CPU, m) {
  m.impl("first_conv_forward", curvlab::hvp::forward_cpu);
  m.impl("first_conv_weight", curvlab::hvp::weight_cpu);
}
TORCH_LIBRARY_IMPL(curvlab, Meta, m) {
  using at::Tensor;
  using curvlab::hvp::OptionalTensor;
  m.impl("first_conv_forward",
         [](const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& choice,
            std::int64_t stride_height, std::int64_t stride_width, const Tensor& out) {
           curvlab::hvp::check("first_conv_forward", x, weight, out, choice, stride_height, stride_width);
           curvlab::hvp::check_bias(weight, bias);
         });
  m.impl("first_conv_weight", [](const Tensor& g, const Tensor& x, const OptionalTensor& choice,
                                 std::int64_t stride_height, std::int64_t stride_width, const Tensor& out, bool) {
    curvlab::hvp::check("first_conv_weight", x, out, g, choice, stride_height, stride_width);
  });
}
TORCH_LIBRARY_IMPL(curvlab, Autograd, m) {
  m.impl("first_conv_forward", TORCH_FN(curvlab::hvp::forward_autograd));
  m.impl("first_conv_weight", TORCH_FN(curvlab::hvp::weight_autograd));
}
