// SPDX-License-Identifier: Apache-2.0
// The launchers of csrc/hvp on host memory, callable through ctypes with the kernels' own argument structs. The
// functions return nullptr, or what went wrong.
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "binding.h"
#include "hvp/activation_factors_cuda.h"
#include "hvp/pool_cuda.h"
#include "hvp/softmax_hessian_cuda.h"
#include "hvp/tangent_cuda.h"

namespace {

template <class Arguments>
std::vector<double> workspace(const Arguments& x, int sums) {
  if (sums == 0 || x.shape.plane() == 0) return {};
  return garbage<double>(workspace_doubles(x.shape, tile_of(x, sums), sums));
}

}  // namespace

using namespace curvlab::hvp;

CURVLAB_EXPORT const char* host_tangent_forward(const ForwardArguments* x, const SumsTo* dot) {
  return guarded([&] {
    std::vector<double> memory = workspace(*x, dot->out ? 1 : 0);
    return launch_tangent_forward(*x, *dot, memory.data(), nullptr);
  });
}

CURVLAB_EXPORT const char* host_tangent_backward(const BackwardArguments* x, const SumsTo* bias, const SumsTo* gain,
                                                 const ChannelRows* dot, int accumulate) {
  return guarded([&] {
    std::vector<double> memory = workspace(*x, (bias->out ? 1 : 0) + (gain->out ? 1 : 0));
    return launch_tangent_backward(*x, *bias, *gain, *dot, accumulate != 0, memory.data(), nullptr);
  });
}

CURVLAB_EXPORT const char* host_pool_gather(const PoolArguments* x) {
  return guarded([&] { return launch_pool_gather(*x, nullptr); });
}

CURVLAB_EXPORT const char* host_pool_scatter(const PoolArguments* x, int multiprocessors) {
  return guarded([&] {
    std::vector<float> scratch = garbage<float>(x->directions * x->samples * x->image());
    return launch_pool_scatter(*x, scratch.data(), multiprocessors, nullptr);
  });
}

CURVLAB_EXPORT const char* host_softmax_hessian(const SoftmaxArguments* x, int multiprocessors) {
  return guarded([&] { return launch_softmax_hessian(*x, multiprocessors, nullptr); });
}

CURVLAB_EXPORT const char* host_activation_factors(const ActivationArguments* x, int multiprocessors) {
  return guarded([&] { return launch_activation_factors(*x, multiprocessors, nullptr); });
}
