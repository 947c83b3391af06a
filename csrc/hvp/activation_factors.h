// SPDX-License-Identifier: Apache-2.0
// activation_factors: first = phi'(z) and second = phi''(z) delta of an activation phi, in closed forms that keep their
// digits where the activation saturates (1 - tanh^2 and s (1 - s) would not). Computed in double, rounded once; a mask
// of uint8 for relu. Hendrycks and Gimpel, Gaussian error linear units (2016); Elfwing et al., SiLU (2018).
#pragma once

#include <cmath>
#include <cstdint>

#include "common/elements.h"

namespace curvlab::hvp {

enum class Activation : std::int32_t { kRelu, kLeakyRelu, kTanh, kSigmoid, kSoftplus, kGelu, kGeluTanh, kSilu };

struct ActivationParameters {
  double slope, beta, threshold;  // of leaky_relu; of softplus: log(1 + exp(beta z)) / beta, z where beta z > threshold
};

struct Derivatives {
  double first, second;
};

struct ActivationArguments {
  std::int64_t elements;
  std::int32_t type;  // ElementType of all but a mask, not kFloat16
  Activation kind;
  ActivationParameters parameters;
  const void *z, *delta;  // delta: null without second
  void *first, *second;   // relu: uint8 and null
};

// As torch: 0 at 0; a NaN is kept by passing it on.
CURVLAB_HD bool passes(double z) { return !(z <= 0.0); }

CURVLAB_HD Derivatives tanh_derivatives(double z) {
  const double e = exp(-2.0 * fabs(z)), first = 4.0 * e / ((1.0 + e) * (1.0 + e));
  return {first, -2.0 * tanh(z) * first};
}

CURVLAB_HD double logistic(double z) {  // digits on both sides
  const double e = exp(-fabs(z));
  return (z < 0.0 ? e : 1.0) / (1.0 + e);
}

CURVLAB_HD Derivatives logistic_derivatives(double z) {
  const double e = exp(-fabs(z)), first = e / ((1.0 + e) * (1.0 + e));
  return {first, -tanh(0.5 * z) * first};
}

CURVLAB_HD Derivatives softplus_derivatives(double z, const ActivationParameters& parameters) {
  const double x = parameters.beta * z;
  if (x > parameters.threshold) return {1.0, 0.0};
  return {logistic(x), parameters.beta * logistic_derivatives(x).first};
}

CURVLAB_HD Derivatives gelu_derivatives(double z) {
  constexpr double kSqrtHalf = 0.70710678118654752440, kInverseSqrt2Pi = 0.39894228040143267794;
  const double density = kInverseSqrt2Pi * exp(-0.5 * z * z);
  return {0.5 * erfc(-kSqrtHalf * z) + z * density, density * (2.0 - z * z)};
}

// z (1 + tanh u) / 2 with u = k (z + a z^3)
CURVLAB_HD Derivatives gelu_tanh_derivatives(double z) {
  constexpr double k = 0.79788456080286535588, a = 0.044715;  // sqrt(2 / pi)
  const double u = k * (z + a * z * z * z), u1 = k * (1.0 + 3.0 * a * z * z), u2 = 6.0 * k * a * z;
  const Derivatives t = tanh_derivatives(u);
  return {logistic(2.0 * u) + 0.5 * z * t.first * u1, t.first * u1 + 0.5 * z * (t.first * u2 + t.second * u1 * u1)};
}

CURVLAB_HD Derivatives silu_derivatives(double z) {
  const Derivatives s = logistic_derivatives(z);
  return {logistic(z) + z * s.first, 2.0 * s.first + z * s.second};
}

template <Activation kind>
CURVLAB_HD Derivatives derivatives(double z, const ActivationParameters& parameters) {
  if constexpr (kind == Activation::kLeakyRelu) return {passes(z) ? 1.0 : parameters.slope, 0.0};
  if constexpr (kind == Activation::kTanh) return tanh_derivatives(z);
  if constexpr (kind == Activation::kSigmoid) return logistic_derivatives(z);
  if constexpr (kind == Activation::kSoftplus) return softplus_derivatives(z, parameters);
  if constexpr (kind == Activation::kGelu) return gelu_derivatives(z);
  if constexpr (kind == Activation::kGeluTanh) return gelu_tanh_derivatives(z);
  if constexpr (kind == Activation::kSilu) return silu_derivatives(z);
  return {passes(z) ? 1.0 : 0.0, 0.0};
}

CURVLAB_HD void store_element(float& to, double value) { to = static_cast<float>(value); }
CURVLAB_HD void store_element(double& to, double value) { to = value; }
CURVLAB_HD void store_element(BFloat16Bits& to, double value) { to = bfloat16_from_float(static_cast<float>(value)); }

}  // namespace curvlab::hvp
