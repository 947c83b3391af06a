// SPDX-License-Identifier: Apache-2.0
// sparse_main ORDER SEED: the kernels of csrc/sparse_conv over small sizes, every route, for the sanitizers: each
// tensor and each list is an allocation of its own, whose ends ASan guards. Output and exit status: cases.h.
#include <cmath>
#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "cases.h"
#include "sparse_conv/masked_conv2d_cuda.h"
#include "sparse_conv/plan_cuda.h"

namespace {

using namespace curvlab;
using namespace curvlab::sparse_conv;

// Multiples of 1/4 in [-2, 2): sums of products of a few are exact in every type but where bfloat16 rounds.
class Case {
 public:
  explicit Case(int type) : type_(type) {}

  void* empty(std::int64_t bytes) {  // the allocation's end is the tensor's, to the byte
    memory_.emplace_back(new unsigned char[static_cast<size_t>(bytes)]);
    std::memset(memory_.back().get(), 0xFF, static_cast<size_t>(bytes));
    return memory_.back().get();
  }
  void* data(std::int64_t n) {
    void* p = empty(n * element_size(type_));
    for (std::int64_t i = 0; i < n; ++i) {
      const double value = (static_cast<int>(next() & 15) - 8) / 4.0;
      if (type_ == kFloat64) static_cast<double*>(p)[i] = value;
      if (type_ == kFloat32) static_cast<float*>(p)[i] = static_cast<float>(value);
      if (type_ == kBFloat16) static_cast<BFloat16Bits*>(p)[i] = bfloat16_from_float(static_cast<float>(value));
    }
    return p;
  }
  template <class T>
  const T* list(const std::vector<T>& from) {
    void* p = empty(static_cast<std::int64_t>(from.size() * sizeof(T)));
    if (!from.empty()) std::memcpy(p, from.data(), from.size() * sizeof(T));
    return static_cast<const T*>(p);
  }
  double at(const void* p, std::int64_t i) const {
    if (type_ == kFloat64) return static_cast<const double*>(p)[i];
    if (type_ == kBFloat16) return load_element(static_cast<const BFloat16Bits*>(p)[i]);
    return static_cast<const float*>(p)[i];
  }
  bool is(double got, double want) const {
    return std::fabs(got - want) <= (type_ == kBFloat16 ? 1e-2 : 1e-5) * std::fmax(1.0, std::fabs(want));
  }
  unsigned next() { return (seed_ = seed_ * 1664525u + 1013904223u) >> 16; }
  int type() const { return type_; }

 private:
  int type_;
  unsigned seed_ = 1;
  std::deque<std::unique_ptr<unsigned char[]>> memory_;
};

void stop_on(const char* error) {
  if (error) throw simt::Fault(error);
}

GatherArguments arguments(Case& c, const GatherPlan& plan, std::int64_t images) {
  GatherArguments x = plan.arguments;
  x.images = images;
  x.phases = c.list(plan.phases);
  x.order = c.list(plan.order);
  x.first = c.list(plan.first);
  x.offsets = c.list(plan.offsets);
  x.taps = c.list(plan.taps);
  return x;
}

// All three ops against loops over images, nonzeros and positions of the result.
bool convolution(int type, const Convolution& conv, std::int64_t images, bool windows) {
  Case c(type);
  const std::int64_t outs = conv.groups * conv.out_channels, ins = conv.groups * conv.in_channels;
  const std::int64_t taps = static_cast<std::int64_t>(conv.kernel.h) * conv.kernel.w;
  std::vector<std::int64_t> indices;
  const std::int64_t weights = outs * conv.in_channels * taps;
  for (std::int64_t k = 0; k < weights; ++k) {
    if (c.next() % (1 + weights / 150) == 0) indices.push_back(k);  // 150: a few blocks add the rows up
  }
  const auto count = static_cast<std::int64_t>(indices.size());
  const std::int64_t plane = static_cast<std::int64_t>(conv.x.h) * conv.x.w,
                     result = static_cast<std::int64_t>(conv.y.h) * conv.y.w;
  const void *x = c.data(images * ins * plane), *g = c.data(images * outs * result), *v = c.data(count);
  const int size = element_size(type);
  void *y = c.empty(images * outs * result * size), *gx = c.empty(images * ins * plane * size);
  void *gv = c.empty(count * size), *permuted = c.empty(count * size);

  const GatherPlan forward = make_gather_plan(conv, indices.data(), count, false, windows, type);
  const GatherPlan backward = make_gather_plan(conv, indices.data(), count, true, windows, type);
  GatherArguments f = arguments(c, forward, images), b = arguments(c, backward, images);
  f.in_data = x, f.values = v, f.out_data = y;
  stop_on(launch_gather(f, nullptr));
  stop_on(launch_permute_values(v, c.list(backward.source), static_cast<std::int64_t>(backward.source.size()), type,
                                permuted, nullptr));
  b.in_data = g, b.values = permuted, b.out_data = gx;
  stop_on(launch_gather(b, nullptr));
  f.out_data = const_cast<void*>(g);
  const int splits = std::min(2, weight_splits(f));
  stop_on(launch_weight_gradient(f, splits, c.empty(splits * f.nonzeros * 8), gv, nullptr));

  std::vector<double> want_y(static_cast<size_t>(images * outs * result)), want_gx(images * ins * plane);
  bool right = true;
  for (std::int64_t k = 0; k < count; ++k) {
    const std::int64_t s = indices[k] % conv.kernel.w, r = indices[k] / conv.kernel.w % conv.kernel.h;
    const std::int64_t in = indices[k] / taps % conv.in_channels, out = indices[k] / taps / conv.in_channels;
    const std::int64_t from = out / conv.out_channels * conv.in_channels + in;
    double sum = 0;
    for (std::int64_t n = 0; n < images; ++n)
      for (std::int64_t p = 0; p < result; ++p) {
        const std::int64_t h = p / conv.y.w * conv.stride.h - conv.padding.h + r * conv.dilation.h;
        const std::int64_t w = p % conv.y.w * conv.stride.w - conv.padding.w + s * conv.dilation.w;
        if (h < 0 || h >= conv.x.h || w < 0 || w >= conv.x.w) continue;
        const std::int64_t i = (n * ins + from) * plane + h * conv.x.w + w, o = (n * outs + out) * result + p;
        want_y[o] += c.at(v, k) * c.at(x, i);
        want_gx[i] += c.at(v, k) * c.at(g, o);
        sum += c.at(g, o) * c.at(x, i);
      }
    right &= c.is(c.at(gv, k), sum);
  }
  for (size_t i = 0; i < want_y.size(); ++i) right &= c.is(c.at(y, static_cast<std::int64_t>(i)), want_y[i]);
  for (size_t i = 0; i < want_gx.size(); ++i) right &= c.is(c.at(gx, static_cast<std::int64_t>(i)), want_gx[i]);
  return right && (forward.arguments.windowed != 0) == windows && (backward.arguments.windowed != 0) == windows;
}

// Sizes of a few blocks a launch: TSan has room for 29, and is slow.
void run_all() {
  const Convolution stages{1, 20, 40, {3, 3}, {1, 1}, {1, 1}, {1, 1}, {2, 7}, {2, 7}};
  const Convolution strided{1, 16, 18, {3, 2}, {2, 2}, {1, 1}, {1, 1}, {4, 15}, {2, 8}};
  const Convolution groups{2, 16, 16, {2, 2}, {1, 1}, {0, 1}, {1, 2}, {3, 8}, {2, 8}};
  const Convolution few{2, 3, 5, {2, 2}, {1, 1}, {0, 1}, {1, 2}, {3, 8}, {2, 8}};
  const Convolution small{1, 3, 5, {3, 3}, {2, 1}, {1, 2}, {1, 2}, {7, 6}, {4, 6}};
  for (const auto& [type, name] :
       {std::pair{int(kFloat32), std::string("float32")}, {kFloat64, "float64"}, {kBFloat16, "bfloat16"}}) {
    report("windows, several stages, image blocks and slices " + name, convolution(type, stages, 33, true));
    report("windows, stride " + name, convolution(type, strided, 22, true));
    report("windows, groups and dilation " + name, convolution(type, groups, 24, true));
    report("direct, stride and dilation " + name, convolution(type, small, 2, false));
    report("direct, groups " + name, convolution(type, few, 3, false));
  }
}

}  // namespace

int main(int argc, char** argv) { return run_cases(argc, argv, run_all); }
