// SPDX-License-Identifier: Apache-2.0
// strips_main: the CPU kernels of csrc/sparse_conv, compiled for one instruction set, under the sanitizers: every
// tensor, list and scratch is an allocation of its own, whose ends ASan guards. A line a case; exit status 3: wrong
// values.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "sparse_conv/batch_parts.h"
#include "sparse_conv/strip_cpu.h"
#include "sparse_conv/strip_cut.h"
#include "sparse_conv/strip_plan.h"

namespace {

using namespace curvlab::sparse_conv;
namespace kernels = curvlab::sparse_conv::CURVLAB_CPU_CAPABILITY;

int wrong = 0;

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Aligned as torch aligns: to 64 bytes.
template <class scalar_t>
class Memory {
 public:
  scalar_t* get(std::int64_t count) {
    void* p = nullptr;
    if (posix_memalign(&p, 64, static_cast<std::size_t>(count) * sizeof(scalar_t)) != 0) std::abort();
    memory_.emplace_back(p);
    std::memset(p, 0xFF, static_cast<std::size_t>(count) * sizeof(scalar_t));  // NaN, for who reads it
    return static_cast<scalar_t*>(p);
  }
  scalar_t* data(std::int64_t count) {
    scalar_t* p = get(count);
    for (std::int64_t i = 0; i < count; ++i) p[i] = static_cast<scalar_t>(static_cast<int>(next() & 15) - 8) / 4;
    return p;
  }
  unsigned next() { return (seed_ = seed_ * 1664525u + 1013904223u) >> 16; }

 private:
  unsigned seed_ = 1;
  std::deque<std::unique_ptr<void, Free>> memory_;
};

struct Case {
  const char* name;
  std::int64_t images, height, width;
  ConvWeight weight;
  std::int64_t percent;  // of the weights that are kept
};

// [N, C, H, W] lying contiguous, or with channels last.
PlaneView view(void* data, std::int64_t n, std::int64_t c, std::int64_t h, std::int64_t w, bool channels_last) {
  if (channels_last) return {data, n, c, h, w, h * w * c, 1, w * c, c};
  return {data, n, c, h, w, c * h * w, h * w, w, 1};
}

template <class scalar_t>
scalar_t& at(const PlaneView& t, std::int64_t n, std::int64_t c, std::int64_t y, std::int64_t x) {
  return static_cast<scalar_t*>(
      t.data)[n * t.image_stride + c * t.channel_stride + y * t.row_stride + x * t.column_stride];
}

// Values in the order of a list, and nothing behind them.
template <class scalar_t>
scalar_t* gathered(Memory<scalar_t>& memory, const OwnedList& list, const scalar_t* values) {
  scalar_t* to = memory.get(static_cast<std::int64_t>(list.gather.size()));
  for (std::size_t k = 0; k < list.gather.size(); ++k) to[k] = values[list.gather[k]];
  return to;
}

template <class scalar_t>
struct Problem {
  const Case& of;
  Memory<scalar_t> memory;
  std::int64_t out_height, out_width, nonzeros = 0;
  std::vector<std::int64_t> indices;
  PlaneView x, grad, out, gx;
  scalar_t *values, *bias;
  std::vector<double> gv, gb;

  Problem(const Case& which, bool channels_last) : of(which) {
    const ConvWeight& w = of.weight;
    out_height = output_size(w, of.height, 0);
    out_width = output_size(w, of.width, 1);
    for (std::int64_t k = 0; k < w.elements(); ++k) {
      if (memory.next() % 100 < static_cast<unsigned>(of.percent)) indices.push_back(k);
    }
    nonzeros = static_cast<std::int64_t>(indices.size());
    const std::int64_t inputs = of.images * w.channels_in() * of.height * of.width;
    const std::int64_t outputs = of.images * w.channels_out * out_height * out_width;
    x = view(memory.data(inputs), of.images, w.channels_in(), of.height, of.width, channels_last);
    grad = view(memory.data(outputs), of.images, w.channels_out, out_height, out_width, channels_last);
    out = view(memory.get(outputs), of.images, w.channels_out, out_height, out_width, false);
    gx = view(memory.get(inputs), of.images, w.channels_in(), of.height, of.width, false);
    values = memory.data(nonzeros);
    bias = memory.data(w.channels_out);
    gv.assign(static_cast<std::size_t>(nonzeros), 0);
    gb.assign(static_cast<std::size_t>(w.channels_out), 0);
  }

  // One part of the batch, each strip's destinations in `parts` ranges.
  void run(const BatchPart& part, std::int64_t parts) {
    const StripType type{kernels::Vectors<scalar_t>::kWidth, kernels::kTile, sizeof(scalar_t)};
    const PlanTarget target{type.lanes, type.tile, type.element, 48 * 1024, part.columns != 0};
    ConvWeight w = of.weight;
    if (part.columns != 0) w.stride[0] = w.stride[1] = 1;
    const CpuPlan plan =
        make_plan(w, part.height(of.height), part.width(of.width), part.grid, indices.data(), nonzeros, target);
    const auto of_part = [&](const PlaneView& whole) { return part.of(whole, type.lanes, type.element); };
    StripWork work{};
    work.grid = plan.grid;
    work.x = of_part(x);
    work.grad = of_part(grad);
    work.x_layout = plan.x_layout;
    work.grad_layout = plan.grad_layout;
    const StripSizes forward = forward_sizes(plan, work.x.images, type);
    const StripPass pass{plan.forward.view(),
                         gathered(memory, plan.forward, values),
                         bias,
                         of_part(out),
                         0,
                         0,
                         1,
                         1,
                         plan.out_height,
                         plan.out_width,
                         true};
    work.pass = &pass;
    work.passes = 1;
    work.acc_size = forward.acc;
    for (std::int64_t p = 0; p < parts; ++p) {
      scalar_t* scratch = memory.get(forward.elements());
      for (std::int64_t unit = 0; unit < forward.cut.units(); ++unit) {
        kernels::forward_strip<scalar_t>(forward.cut.task(unit, parts == 1 ? 0 : unit, p, parts), work, scratch);
      }
    }
    std::vector<StripPass> passes;
    for (const InputPass& each : plan.input) {
      passes.push_back({each.list.view(), gathered(memory, each.list, values), nullptr, of_part(gx), each.first_row,
                        each.first_column, w.stride[0], w.stride[1], each.rows, each.columns, true});
    }
    const StripSizes backward = backward_sizes(plan, work.grad.images, true, true, type);
    work.pass = passes.data();
    work.passes = static_cast<std::int64_t>(passes.size());
    work.acc_size = backward.acc;
    work.grad_size = backward.grad;
    scalar_t *sums = memory.get(nonzeros), *channel_sums = memory.get(w.channels_out);
    for (std::int64_t k = 0; k < nonzeros; ++k) sums[k] = 0;
    for (std::int64_t c = 0; c < w.channels_out; ++c) channel_sums[c] = 0;
    for (std::int64_t p = 0; p < parts; ++p) {
      scalar_t* scratch = memory.get(backward.elements());
      const StripDot dot{plan.forward.view(), sums, p == 0 ? channel_sums : nullptr, plan.out_height, plan.out_width};
      for (std::int64_t unit = 0; unit < backward.cut.units(); ++unit) {
        kernels::backward_strip<scalar_t>(backward.cut.task(unit, 0, p, parts), work, &dot, scratch);
      }
    }
    for (std::size_t k = 0; k < plan.forward.gather.size(); ++k) {
      gv[static_cast<std::size_t>(plan.forward.gather[k])] += sums[k];
    }
    for (std::int64_t c = 0; c < w.channels_out; ++c) gb[static_cast<std::size_t>(c)] += channel_sums[c];
  }

  bool right() {
    const ConvWeight& w = of.weight;
    const std::size_t outputs = static_cast<std::size_t>(of.images * w.channels_out * out_height * out_width);
    std::vector<double> want_out(outputs), want_gv(gv.size()), want_gb(gb.size());
    std::vector<double> want_gx(static_cast<std::size_t>(of.images * w.channels_in() * of.height * of.width));
    const auto place = [](const PlaneView& t, std::int64_t n, std::int64_t c, std::int64_t y, std::int64_t z) {
      return static_cast<std::size_t>(((n * t.channels + c) * t.height + y) * t.width + z);
    };
    bool all = true;
    for (std::int64_t n = 0; n < of.images; ++n) {
      for (std::int64_t o = 0; o < w.channels_out; ++o) {
        for (std::int64_t y = 0; y < out_height; ++y) {
          for (std::int64_t z = 0; z < out_width; ++z) {
            want_out[place(out, n, o, y, z)] = static_cast<double>(bias[o]);
            want_gb[static_cast<std::size_t>(o)] += static_cast<double>(at<scalar_t>(grad, n, o, y, z));
          }
        }
      }
      for (std::int64_t k = 0; k < nonzeros; ++k) {
        const std::int64_t index = indices[static_cast<std::size_t>(k)], s = index % w.kernel[1];
        const std::int64_t r = index / w.kernel[1] % w.kernel[0], o = index / (w.taps() * w.channels_in_group);
        const std::int64_t c =
            o / (w.channels_out / w.groups) * w.channels_in_group + index / w.taps() % w.channels_in_group;
        for (std::int64_t y = 0; y < out_height; ++y) {
          const std::int64_t row = y * w.stride[0] - w.padding[0] + r * w.dilation[0];
          if (row < 0 || row >= of.height) continue;
          for (std::int64_t z = 0; z < out_width; ++z) {
            const std::int64_t column = z * w.stride[1] - w.padding[1] + s * w.dilation[1];
            if (column < 0 || column >= of.width) continue;
            const double g = static_cast<double>(at<scalar_t>(grad, n, o, y, z));
            const double in = static_cast<double>(at<scalar_t>(x, n, c, row, column));
            const double value = static_cast<double>(values[k]);
            want_out[place(out, n, o, y, z)] += value * in;
            want_gx[place(gx, n, c, row, column)] += value * g;
            want_gv[static_cast<std::size_t>(k)] += in * g;
          }
        }
      }
    }
    const auto same = [&all](double got, double want) {
      all = all && std::fabs(got - want) <= 1e-4 * std::fmax(1.0, std::fabs(want));  // false for NaN
    };
    for (std::size_t i = 0; i < want_out.size(); ++i) same(static_cast<scalar_t*>(out.data)[i], want_out[i]);
    for (std::size_t i = 0; i < want_gx.size(); ++i) same(static_cast<scalar_t*>(gx.data)[i], want_gx[i]);
    for (std::size_t i = 0; i < want_gv.size(); ++i) same(gv[i], want_gv[i]);
    for (std::size_t i = 0; i < want_gb.size(); ++i) same(gb[i], want_gb[i]);
    return all;
  }
};

template <class scalar_t>
void check(const Case& which, bool channels_last, std::int64_t parts) {
  Problem<scalar_t> problem(which, channels_last);
  const std::int64_t lanes = kernels::Vectors<scalar_t>::kWidth;
  for (const bool fast : {false, kernels::kFastBlocks && sizeof(scalar_t) == 4}) {
    std::fill(problem.gv.begin(), problem.gv.end(), 0);
    std::fill(problem.gb.begin(), problem.gb.end(), 0);
    for (const BatchPart& part : parts_of_batch(which.weight, which.images, which.height, which.width, lanes, fast)) {
      problem.run(part, parts);
    }
    const bool right = problem.right();
    wrong += !right;
    std::printf("%-24s float%zu %-13s parts %lld blocks %d %s\n", which.name, 8 * sizeof(scalar_t),
                channels_last ? "channels last" : "contiguous", static_cast<long long>(parts), fast,
                right ? "right" : "WRONG VALUES");
  }
}

}  // namespace

int main() {
  const Case cases[] = {
      {"images", 17, 7, 9, {5, 4, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1}, 40},
      {"32 columns", 3, 32, 32, {5, 18, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1}, 10},
      {"16 columns", 6, 16, 16, {18, 17, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1}, 20},
      {"8 columns", 18, 8, 8, {6, 20, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1}, 40},
      {"64 columns", 1, 16, 64, {4, 3, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1}, 50},
      {"28 columns", 2, 28, 28, {4, 3, {5, 5}, {1, 1}, {2, 2}, {1, 1}, 1}, 30},
      {"wide halos", 5, 16, 16, {4, 3, {3, 3}, {1, 1}, {9, 9}, {9, 9}, 1}, 60},
      {"steps", 3, 16, 12, {6, 8, {3, 2}, {2, 3}, {1, 2}, {2, 1}, 2}, 60},
      {"pointwise steps", 3, 9, 8, {4, 17, {1, 1}, {2, 2}, {0, 0}, {1, 1}, 1}, 60},
      {"several strips", 1, 64, 64, {3, 150, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1}, 3},
      {"linear", 150, 1, 1, {40, 700, {1, 1}, {1, 1}, {0, 0}, {1, 1}, 1}, 5},
      {"linear, many outputs", 37, 1, 1, {600, 300, {1, 1}, {1, 1}, {0, 0}, {1, 1}, 1}, 5},
      {"nothing kept", 5, 8, 8, {3, 4, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1}, 0},
  };
  for (const Case& which : cases) {
    for (const bool channels_last : {false, true}) {
      check<float>(which, channels_last, 1);
      check<double>(which, channels_last, 1);
    }
    check<float>(which, false, 3);
  }
  return wrong == 0 ? 0 : 3;
}
