// SPDX-License-Identifier: Apache-2.0
// activation_factors: CPU, fake and autograd kernels, registration. Run once a batch, not once a product: the C
// library's exp, tanh and erfc, one element at a time.
#include "hvp/activation_factors.h"

#include <torch/library.h>

#include "common/no_gradient.h"
#include "hvp/activation_arguments.h"
#include "hvp/parallel.h"

namespace curvlab::hvp {
namespace {

template <Activation kind, class scalar_t>
void fill_factors(const ActivationArguments& arguments, std::int64_t begin, std::int64_t end) {
  const scalar_t* z = static_cast<const scalar_t*>(arguments.z);
  if constexpr (kind == Activation::kRelu) {
    std::uint8_t* mask = static_cast<std::uint8_t*>(arguments.first);
    for (std::int64_t i = begin; i < end; ++i) mask[i] = passes(load_element(z[i]));
    return;
  }
  const scalar_t* delta = static_cast<const scalar_t*>(arguments.delta);
  scalar_t* first = static_cast<scalar_t*>(arguments.first);
  scalar_t* second = static_cast<scalar_t*>(arguments.second);
  for (std::int64_t i = begin; i < end; ++i) {
    const Derivatives value = derivatives<kind>(load_element(z[i]), arguments.parameters);
    store_element(first[i], value.first);
    if (second != nullptr) store_element(second[i], value.second * load_element(delta[i]));
  }
}

template <Activation kind>
void fill_factors(const ActivationArguments& arguments, std::int64_t begin, std::int64_t end) {
  switch (arguments.type) {
    case kFloat64:
      return fill_factors<kind, double>(arguments, begin, end);
    case kBFloat16:
      return fill_factors<kind, BFloat16Bits>(arguments, begin, end);
    default:
      return fill_factors<kind, float>(arguments, begin, end);
  }
}

void fill_factors(const ActivationArguments& arguments, std::int64_t begin, std::int64_t end) {
  switch (arguments.kind) {
    case Activation::kRelu:
      return fill_factors<Activation::kRelu>(arguments, begin, end);
    case Activation::kLeakyRelu:
      return fill_factors<Activation::kLeakyRelu>(arguments, begin, end);
    case Activation::kTanh:
      return fill_factors<Activation::kTanh>(arguments, begin, end);
    case Activation::kSigmoid:
      return fill_factors<Activation::kSigmoid>(arguments, begin, end);
    case Activation::kSoftplus:
      return fill_factors<Activation::kSoftplus>(arguments, begin, end);
    case Activation::kGelu:
      return fill_factors<Activation::kGelu>(arguments, begin, end);
    case Activation::kGeluTanh:
      return fill_factors<Activation::kGeluTanh>(arguments, begin, end);
    default:
      return fill_factors<Activation::kSilu>(arguments, begin, end);
  }
}

#define CURVLAB_ACTIVATION_PARAMETERS                                                                 \
  const at::Tensor &z, const OptionalTensor &delta, std::string_view kind, double slope, double beta, \
      double threshold, const at::Tensor &first, const OptionalTensor &second

void activation_factors_cpu(CURVLAB_ACTIVATION_PARAMETERS) {
  const Activation activation = check_activation(z, delta, kind, first, second);
  const ActivationArguments arguments =
      activation_arguments(z, delta, activation, {slope, beta, threshold}, first, second);
  constexpr std::int64_t kBlock = 4096;
  const std::int64_t blocks = (arguments.elements + kBlock - 1) / kBlock;
  for_items(blocks, arguments.elements, [&](std::int64_t begin, std::int64_t end) {
    fill_factors(arguments, begin * kBlock, end * kBlock < arguments.elements ? end * kBlock : arguments.elements);
  });
}

void activation_factors_meta(CURVLAB_ACTIVATION_PARAMETERS) {
  (void)slope, (void)beta, (void)threshold;
  check_activation(z, delta, kind, first, second);
}

void activation_factors_autograd(c10::DispatchKeySet keys, CURVLAB_ACTIVATION_PARAMETERS) {
  refuse_gradient("activation_factors", {&z, pointer_to(delta), &first, pointer_to(second)});
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("curvlab::activation_factors", "")
                             .typed<void(CURVLAB_ACTIVATION_PARAMETERS)>();
  op.redispatch(keys & c10::after_autograd_keyset, z, delta, kind, slope, beta, threshold, first, second);
}

}  // namespace
}  // namespace curvlab::hvp

TORCH_LIBRARY_IMPL(curvlab, CPU, m) { m.impl("activation_factors", curvlab::hvp::activation_factors_cpu); }
TORCH_LIBRARY_IMPL(curvlab, Meta, m) { m.impl("activation_factors", curvlab::hvp::activation_factors_meta); }
TORCH_LIBRARY_IMPL(curvlab, Autograd, m) {
  m.impl("activation_factors", TORCH_FN(curvlab::hvp::activation_factors_autograd));
}
