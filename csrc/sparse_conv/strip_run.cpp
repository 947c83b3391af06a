// SPDX-License-Identifier: Apache-2.0
#include "sparse_conv/strip_run.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <unistd.h>

#include <algorithm>
#include <string>
#include <vector>

#include "sparse_conv/cpu_kernels.h"
#include "sparse_conv/plan_cache.h"
#include "sparse_conv/scratch.h"
#include "sparse_conv/strip_cut.h"

namespace curvlab::sparse_conv {
namespace {

constexpr std::int64_t kStreamBytes = 4 << 20;  // larger results bypass the caches
constexpr std::int64_t kPartials = 8;           // of the weight gradient

int type_index(at::ScalarType type) { return type == at::kDouble ? 1 : 0; }

// Of the first-level data cache.
std::int64_t cache_bytes() {
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  static const std::int64_t found = sysconf(_SC_LEVEL1_DCACHE_SIZE);
  if (found > 0) return std::clamp<std::int64_t>(found, 16 * 1024, 128 * 1024);
#endif
  return 32 * 1024;
}

StripType strips_of(at::ScalarType type) {
  const CpuKernels& kernels = cpu_kernels();
  const int index = type_index(type);
  return {kernels.lanes[index], kernels.tile, index == 1 ? 8 : 4};
}

PlanTarget target_of(at::ScalarType type, bool folded) {
  const StripType strips = strips_of(type);
  return {strips.lanes, strips.tile, strips.element, cache_bytes(), folded};
}

PlaneView view_of(const at::Tensor& tensor, const BatchPart& part) {
  const PlaneView whole{const_cast<void*>(tensor.const_data_ptr()),
                        tensor.size(0),
                        tensor.size(1),
                        tensor.size(2),
                        tensor.size(3),
                        tensor.stride(0),
                        tensor.stride(1),
                        tensor.stride(2),
                        tensor.stride(3)};
  return part.of(whole, strips_of(tensor.scalar_type()).lanes, tensor.element_size());
}

void check_positions(const char* op, const at::Tensor& indices, std::int64_t elements) {
  const std::int64_t* index = indices.const_data_ptr<std::int64_t>();
  std::int64_t last = -1;
  for (std::int64_t k = 0; k < indices.numel(); ++k) {
    TORCH_CHECK_VALUE(index[k] > last && index[k] < elements, op,
                      ": indices must be strictly increasing positions below ", elements, " (of weight_shape), got ",
                      index[k], " at [", k, "]", k == 0 ? "" : " after ", k == 0 ? "" : std::to_string(last));
    last = index[k];
  }
}

// Values in the order of a list.
template <class scalar_t>
void gather(const OwnedList& list, const scalar_t* values, scalar_t* to) {
  const std::size_t count = list.gather.size();
  for (std::size_t k = 0; k < count; ++k) to[k] = values[list.gather[k]];
}

// Keeps what it gathers alive.
class OrderedValues {
 public:
  explicit OrderedValues(const at::Tensor& values) : values_(values.contiguous()) {}

  const void* of(const OwnedList& list) {
    if (list.in_order) return values_.const_data_ptr();
    gathered_.push_back(at::empty({static_cast<std::int64_t>(list.gather.size())}, values_.options()));
    const at::Tensor& to = gathered_.back();
    if (values_.scalar_type() == at::kDouble) {
      gather(list, values_.const_data_ptr<double>(), to.mutable_data_ptr<double>());
    } else {
      gather(list, values_.const_data_ptr<float>(), to.mutable_data_ptr<float>());
    }
    return to.const_data_ptr();
  }

 private:
  at::Tensor values_;
  std::vector<at::Tensor> gathered_;
};

// Ranges of destination channels for each of `units` tasks, so that every thread has work.
std::int64_t parts_for(std::int64_t units) {
  const std::int64_t threads = at::get_num_threads();
  return units >= threads ? 1 : (threads + units - 1) / units;
}

template <class scalar_t>
void add_partials(const OwnedList& list, const at::Tensor& partials, const at::Tensor& gv) {
  const std::int64_t count = partials.size(0), entries = partials.size(1);
  const scalar_t* sums = partials.const_data_ptr<scalar_t>();
  scalar_t* to = gv.mutable_data_ptr<scalar_t>();
  for (std::int64_t k = 0; k < entries; ++k) {
    scalar_t sum = 0;
    for (std::int64_t p = 0; p < count; ++p) sum += sums[p * entries + k];
    to[list.gather[static_cast<std::size_t>(k)]] += sum;
  }
}

}  // namespace

std::shared_ptr<const CpuPlan> find_plan(const char* op, const at::Tensor& indices, const ConvWeight& whole,
                                         const BatchPart& part, at::IntArrayRef input_size, at::ScalarType type) {
  static PlanCache<CpuPlan> cache;
  const bool folded = part.columns != 0;
  ConvWeight weight = whole;
  if (folded) weight.stride[0] = weight.stride[1] = 1;  // images are no pixels to step over
  const std::int64_t height = part.height(input_size[2]), width = part.width(input_size[3]);
  const LaneGrid& grid = part.grid;
  const PlanTarget target = target_of(type, folded);
  if (!plan_fits(weight, height, width, indices.numel(), target)) {
    check_positions(op, indices.contiguous(), weight.elements());
    return nullptr;
  }
  const PlanKey key{weight.channels_out,
                    weight.channels_in_group,
                    weight.kernel[0],
                    weight.kernel[1],
                    weight.stride[0],
                    weight.stride[1],
                    weight.padding[0],
                    weight.padding[1],
                    weight.dilation[0],
                    weight.dilation[1],
                    weight.groups,
                    height,
                    width,
                    type_index(type),
                    grid.images,
                    grid.rows,
                    grid.columns,
                    folded};
  return cache.get(indices, key, [&] {
    const at::Tensor positions = indices.contiguous();
    check_positions(op, positions, weight.elements());
    return make_plan(weight, height, width, grid, positions.const_data_ptr<std::int64_t>(), positions.numel(), target);
  });
}

void run_forward(const CpuPlan& plan, const BatchPart& part, const at::Tensor& x, const at::Tensor& values,
                 const at::Tensor& bias, const at::Tensor& out) {
  const CpuKernels& kernels = cpu_kernels();
  const int type = type_index(x.scalar_type());
  const std::int64_t element = x.element_size();
  OrderedValues ordered(values);
  const at::Tensor bias_row = bias.defined() ? bias.contiguous() : bias;
  const StripPass pass{plan.forward.view(),
                       ordered.of(plan.forward),
                       bias_row.defined() ? bias_row.const_data_ptr() : nullptr,
                       view_of(out, part),
                       0,
                       0,
                       1,
                       1,
                       plan.out_height,
                       plan.out_width,
                       out.numel() * element > kStreamBytes};
  StripWork work{};
  work.grid = plan.grid;
  work.x = view_of(x, part);
  work.x_layout = plan.x_layout;
  work.pass = &pass;
  work.passes = 1;
  const StripSizes sizes = forward_sizes(plan, work.x.images, strips_of(x.scalar_type()));
  work.acc_size = sizes.acc;
  const std::int64_t units = sizes.cut.units(), parts = parts_for(units);
  at::parallel_for(0, units * parts, 1, [&](std::int64_t begin, std::int64_t end) {
    void* scratch = Scratch::of_this_thread().get(static_cast<std::size_t>(sizes.elements() * element));
    for (std::int64_t i = begin; i < end; ++i) {
      kernels.forward[type](sizes.cut.task(i % units, parts == 1 ? begin : i, i / units, parts), work, scratch);
    }
  });
}

void run_backward(const CpuPlan& plan, const BatchPart& part, const at::Tensor& x, const at::Tensor& grad,
                  const at::Tensor& values, const at::Tensor& gx, const at::Tensor& gv, const at::Tensor& gb) {
  const CpuKernels& kernels = cpu_kernels();
  const int type = type_index(grad.scalar_type());
  const std::int64_t element = grad.element_size();
  std::vector<StripPass> passes;
  std::optional<OrderedValues> ordered;
  if (gx.defined()) {
    ordered.emplace(values);
    for (const InputPass& pass : plan.input) {
      passes.push_back({pass.list.view(), ordered->of(pass.list), nullptr, view_of(gx, part), pass.first_row,
                        pass.first_column, plan.weight.stride[0], plan.weight.stride[1], pass.rows, pass.columns,
                        gx.numel() * element > kStreamBytes});
    }
  }
  StripWork work{};
  work.grid = plan.grid;
  work.grad = view_of(grad, part);
  work.grad_layout = plan.grad_layout;
  if (gv.defined()) work.x = view_of(x, part);
  work.x_layout = plan.x_layout;
  work.pass = passes.data();
  work.passes = static_cast<std::int64_t>(passes.size());
  const StripSizes sizes =
      backward_sizes(plan, work.grad.images, gx.defined(), gv.defined(), strips_of(grad.scalar_type()));
  work.acc_size = sizes.acc;
  work.grad_size = sizes.grad;
  const std::size_t bytes = static_cast<std::size_t>(sizes.elements() * element);
  const std::int64_t units = sizes.cut.units(), partials = std::min(units, kPartials);
  at::Tensor sums, channel_sums;
  if (gv.defined()) sums = at::zeros({partials, plan.entries}, grad.options());
  if (gb.defined()) channel_sums = at::zeros({partials, plan.weight.channels_out}, grad.options());
  const std::int64_t parts = parts_for(partials);
  at::parallel_for(0, partials * parts, 1, [&](std::int64_t begin, std::int64_t end) {
    void* scratch = Scratch::of_this_thread().get(bytes);
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t p = i % partials, first = units * p / partials;
      StripDot dot{plan.forward.view(), nullptr, nullptr, plan.out_height, plan.out_width};
      if (gv.defined()) dot.sums = static_cast<char*>(sums.mutable_data_ptr()) + p * plan.entries * element;
      if (gb.defined() && i < partials) {  // the first of the parts
        dot.channel_sums = static_cast<char*>(channel_sums.mutable_data_ptr()) + p * plan.weight.channels_out * element;
      }
      for (std::int64_t unit = first; unit < units * (p + 1) / partials; ++unit) {
        kernels.backward[type](sizes.cut.task(unit, first, i / partials, parts), work, gv.defined() ? &dot : nullptr,
                               scratch);
      }
    }
  });
  if (!gv.defined()) return;
  for (std::int64_t p = 0; gb.defined() && p < partials; ++p) gb.add_(channel_sums[p]);  // in this order
  if (type == 1) {
    add_partials<double>(plan.forward, sums, gv);
  } else {
    add_partials<float>(plan.forward, sums, gv);
  }
}

}  // namespace curvlab::sparse_conv
