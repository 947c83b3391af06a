// SPDX-License-Identifier: Apache-2.0
// The launchers of csrc/hvp on host memory, callable through ctypes with the kernels' own argument structs. The
// functions return nullptr, or what went wrong.
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "hvp/activation_factors_cuda.h"
#include "hvp/pool_cuda.h"
#include "hvp/softmax_hessian_cuda.h"
#include "hvp/tangent_cuda.h"
#include "simt_host.h"

#define CURVLAB_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

std::string message;

template <class F>
const char* guarded(F launch) {
  try {
    return launch();
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

template <class T>
std::vector<T> garbage(std::int64_t n) {  // device memory that nobody has written: NaN
  std::vector<T> v(static_cast<size_t>(n));
  if (n) std::memset(static_cast<void*>(v.data()), 0xFF, sizeof(T) * v.size());
  return v;
}

template <class Arguments>
std::vector<double> workspace(const Arguments& x, int sums) {
  if (sums == 0 || x.shape.plane() == 0) return {};
  return garbage<double>(workspace_doubles(x.shape, tile_of(x, sums), sums));
}

}  // namespace

using namespace curvlab::hvp;

CURVLAB_EXPORT void host_set_order(int order, std::uint64_t seed) {
  simt::options = {static_cast<simt::Order>(order), seed};
}

// launches, blocks, threads, switches, barriers, warp operations since the last call
CURVLAB_EXPORT void host_take_statistics(std::uint64_t* six) {
  std::memcpy(six, &simt::statistics, sizeof simt::statistics);
  simt::statistics = {};
}

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
