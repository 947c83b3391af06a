// SPDX-License-Identifier: Apache-2.0
// hvp_main ORDER SEED: the kernels of csrc/hvp over small sizes, every route, for the sanitizers: each tensor is an
// allocation of its own, whose ends ASan guards.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <string>
#include <vector>

#include "cases.h"
#include "hvp/activation_factors_cuda.h"
#include "hvp/pool_cuda.h"
#include "hvp/softmax_hessian_cuda.h"
#include "hvp/tangent_cuda.h"

namespace {

using namespace curvlab;
using namespace curvlab::hvp;

// Multiples of 1/4 in [-2, 2): sums and products of a few are exact in every type but where bfloat16 rounds.
class Case {
 public:
  explicit Case(int type) : type_(type) {}

  void* data(std::int64_t n) {
    std::vector<double> values = draw(n);
    return store(values, type_);
  }
  void* channels(std::int64_t n) { return store(draw(n), type_ == kFloat64 ? kFloat64 : kFloat32); }
  void* empty(std::int64_t bytes) {  // the allocation's end is the tensor's, to the byte
    memory_.emplace_back(new unsigned char[static_cast<size_t>(bytes)]);
    std::memset(memory_.back().get(), 0xFF, static_cast<size_t>(bytes));
    return memory_.back().get();
  }
  std::uint8_t* mask(std::int64_t n) {
    auto* bytes = static_cast<std::uint8_t*>(empty(n));
    for (std::int64_t i = 0; i < n; ++i) bytes[i] = static_cast<std::uint8_t>(next() & 1);
    return bytes;
  }
  std::int32_t* index(std::int64_t n, std::int64_t size) {
    auto* values = static_cast<std::int32_t*>(empty(4 * n));
    for (std::int64_t i = 0; i < n; ++i) values[i] = static_cast<std::int32_t>(next() % (size + 1)) - 1;
    return values;
  }
  double at(const void* p, std::int64_t i) const {
    if (type_ == kFloat64) return static_cast<const double*>(p)[i];
    if (type_ == kBFloat16) return load_element(static_cast<const BFloat16Bits*>(p)[i]);
    return static_cast<const float*>(p)[i];
  }
  double channel_at(const void* p, std::int64_t i) const {
    return type_ == kFloat64 ? static_cast<const double*>(p)[i] : static_cast<const float*>(p)[i];
  }
  bool is(double got, double want) const {
    return std::fabs(got - want) <= (type_ == kBFloat16 ? 2e-2 : 1e-5) * std::fmax(1.0, std::fabs(want));
  }
  int size() const { return element_size(type_); }
  int type() const { return type_; }

 private:
  unsigned next() { return (seed_ = seed_ * 1664525u + 1013904223u) >> 16; }
  std::vector<double> draw(std::int64_t n) {
    std::vector<double> values;
    for (std::int64_t i = 0; i < n; ++i) values.push_back((static_cast<int>(next() & 15) - 8) / 4.0);
    return values;
  }
  void* store(const std::vector<double>& values, int type) {
    void* p = empty(static_cast<std::int64_t>(values.size()) * element_size(type));
    for (size_t i = 0; i < values.size(); ++i) {
      if (type == kFloat64) static_cast<double*>(p)[i] = values[i];
      if (type == kFloat32) static_cast<float*>(p)[i] = static_cast<float>(values[i]);
      if (type == kBFloat16) static_cast<BFloat16Bits*>(p)[i] = bfloat16_from_float(static_cast<float>(values[i]));
    }
    return p;
  }
  int type_;
  unsigned seed_ = 1;
  std::deque<std::unique_ptr<unsigned char[]>> memory_;
};

void stop_on(const char* error) {
  if (error) throw simt::Fault(error);
}

bool forward(int type, std::int64_t k, std::int64_t r, std::int64_t c, bool per_channel) {
  Case x(type);
  ForwardArguments f{};
  f.shape = {k, r, c, type, 1};
  f.a = x.data(k * r * c), f.b = x.data(k * r * c), f.first = x.mask(r * c), f.out = x.empty(k * r * c * x.size());
  SumsTo dot{nullptr, 0};
  if (per_channel) {
    f.delta = x.data(r * c), f.scale = x.channels(c), f.bias = {x.channels(k * c), c}, f.gain = {x.channels(k * c), c};
    f.centered = x.data(r * c), f.pre = x.empty(k * r * c * x.size());
    dot = {x.empty(k * c * 8), c};
  }
  const std::int64_t doubles = per_channel ? workspace_doubles(f.shape, tile_of(f, 1), 1) : 0;
  stop_on(launch_tangent_forward(f, dot, static_cast<double*>(x.empty(8 * doubles)), nullptr));
  bool right = true;
  for (std::int64_t i = 0; i < k; ++i)
    for (std::int64_t ch = 0; ch < c; ++ch) {
      double sum = 0;
      for (std::int64_t row = 0; row < r; ++row) {
        const std::int64_t shared = row * c + ch, own = i * r * c + shared;
        double y = x.at(f.a, own) + x.at(f.b, own);
        if (per_channel) {
          sum += x.at(f.delta, shared) * y;
          y = x.channel_at(f.scale, ch) * y + x.channel_at(f.gain.data, i * c + ch) * x.at(f.centered, shared) +
              x.channel_at(f.bias.data, i * c + ch);
          right &= x.is(x.at(f.pre, own), y);
        }
        right &= x.is(x.at(f.out, own), static_cast<const std::uint8_t*>(f.first)[shared] ? y : 0.0);
      }
      if (per_channel) right &= x.is(x.channel_at(dot.out, i * c + ch), sum);
    }
  return right;
}

bool backward(int type, std::int64_t k, std::int64_t r, std::int64_t c) {
  Case x(type);
  BackwardArguments b{};
  b.shape = {k, r, c, type, 0};
  b.g = x.data(k * r * c), b.g2 = x.data(k * r * c), b.first = x.data(r * c), b.centered = x.data(r * c);
  b.delta = x.data(r * c), b.t = x.data(k * r * c), b.inv_std = x.channels(c), b.scale = x.channels(c);
  b.gain = {x.channels(k * c), c}, b.gt = x.empty(k * r * c * x.size());
  const SumsTo bias{x.empty(k * c * 8), c}, gain{x.empty(k * c * 8), c};
  const std::int64_t doubles = workspace_doubles(b.shape, tile_of(b, 2), 2);
  stop_on(
      launch_tangent_backward(b, bias, gain, {nullptr, 0}, false, static_cast<double*>(x.empty(8 * doubles)), nullptr));
  bool right = true;
  for (std::int64_t i = 0; i < k; ++i)
    for (std::int64_t ch = 0; ch < c; ++ch) {
      double sum = 0, moved = 0;
      for (std::int64_t row = 0; row < r; ++row) {
        const std::int64_t shared = row * c + ch, own = i * r * c + shared;
        const double y = x.at(b.first, shared) * (x.at(b.g, own) + x.at(b.g2, own));
        sum += y;
        moved += y * x.at(b.centered, shared) + x.channel_at(b.inv_std, ch) * x.at(b.delta, shared) * x.at(b.t, own);
        right &= x.is(x.at(b.gt, own),
                      x.channel_at(b.scale, ch) * y + x.channel_at(b.gain.data, i * c + ch) * x.at(b.delta, shared));
      }
      right &= x.is(x.channel_at(bias.out, i * c + ch), sum) && x.is(x.channel_at(gain.out, i * c + ch), moved);
    }
  return right;
}

bool pools(int type, std::int64_t k, std::int64_t n, std::int64_t size, std::int64_t windows, std::int64_t c) {
  Case x(type);
  PoolArguments p{k, n, size, windows, c, type, false, x.index(n * windows * c, size), nullptr, nullptr};
  void* wide = x.data(k * n * size * c);
  void* pooled = x.empty(k * n * windows * c * x.size());
  p.in = wide, p.out = pooled;
  stop_on(launch_pool_gather(p, nullptr));
  PoolArguments q = p;
  q.in = pooled, q.out = x.empty(k * n * size * c * x.size());
  stop_on(launch_pool_scatter(q, static_cast<float*>(x.empty(4 * k * n * size * c)), 1, nullptr));
  bool right = true;
  std::vector<double> sums(static_cast<size_t>(k * n * size * c));
  for (std::int64_t image = 0; image < k * n; ++image)
    for (std::int64_t e = 0; e < windows * c; ++e) {
      const std::int64_t i = p.index[image % n * windows * c + e], from = (image * size + i) * c + e % c;
      const double value = x.at(pooled, image * windows * c + e);
      right &= value == (i < 0 ? 0.0 : x.at(wide, from));
      if (i >= 0) sums[from] += value;
    }
  for (size_t i = 0; i < sums.size(); ++i) right &= x.is(x.at(q.out, static_cast<std::int64_t>(i)), sums[i]);
  return right;
}

bool softmax(int type, std::int64_t k, std::int64_t n, std::int64_t c) {
  Case x(type);
  auto* label = static_cast<std::int64_t*>(x.empty(8 * n));
  for (std::int64_t i = 0; i < n; ++i) label[i] = i % (c + 1) - 1;
  SoftmaxArguments s{k, n, c, type, x.channels(n * c), label, x.channels(n), x.data(k * n * c), nullptr};
  s.out = x.empty(k * n * c * x.size());
  stop_on(launch_softmax_hessian(s, 1, nullptr));
  bool right = true;
  for (std::int64_t row = 0; row < k * n; ++row) {
    const std::int64_t i = row % n, y = label[i] < 0 ? 0 : label[i];
    const double center = x.at(s.u, row * c + y);
    double mean = 0;
    for (std::int64_t j = 0; j < c; ++j) mean += x.channel_at(s.p, i * c + j) * (x.at(s.u, row * c + j) - center);
    for (std::int64_t j = 0; j < c; ++j) {
      const double u = x.at(s.u, row * c + j) - center - mean;
      right &= x.is(x.at(s.out, row * c + j), x.channel_at(s.weight, i) * x.channel_at(s.p, i * c + j) * u);
    }
  }
  return right;
}

bool activation(int type, std::int64_t n) {
  Case x(type);
  ActivationArguments a{n, type, Activation::kSigmoid, {}, x.data(n), x.data(n), x.empty(n * x.size()), nullptr};
  a.second = x.empty(n * x.size());
  stop_on(launch_activation_factors(a, 1, nullptr));
  bool right = true;
  for (std::int64_t i = 0; i < n; ++i) {
    const double s = 1 / (1 + std::exp(-x.at(a.z, i)));
    right &= x.is(x.at(a.first, i), s * (1 - s));
    right &= x.is(x.at(a.second, i), s * (1 - s) * (1 - 2 * s) * x.at(a.delta, i));
  }
  return right;
}

void run_all() {
  for (const auto& [type, name] :
       {std::pair{int(kFloat32), std::string("float32")}, {kFloat64, "float64"}, {kBFloat16, "bfloat16"}}) {
    report("forward, flat " + name, forward(type, 2, 30, 10, false));
    report("forward, 16 bytes " + name, forward(type, 2, 150, 16, true));
    report("backward, one by one " + name, backward(type, 2, 150, 5));
    report("backward, 16 bytes " + name, backward(type, 2, 70, 16));
    report("backward, several tiles of channels " + name, backward(type, 1, 3, 259));
    report("pool " + name, pools(type, 2, 2, 9, 5, 7));
    report("softmax " + name, softmax(type, 2, 5, 40));
    report("activation " + name, activation(type, 300));
  }
}

}  // namespace

int main(int argc, char** argv) { return run_cases(argc, argv, run_all); }
