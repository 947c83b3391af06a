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

namespace curvlab::sparse_conv {
namespace {

constexpr std::int64_t kStripBytes = 1536 * 1024;  // packed sources of a strip: most of a 2 MB L2 cache
constexpr std::int64_t kStreamBytes = 4 << 20;     // larger results bypass the caches
constexpr std::int64_t kFoldedColumns = 8;         // of BatchPart
constexpr std::int64_t kLeastBlockColumns = 6;     // of blocks whose results are no whole lines
constexpr std::int64_t kPartials = 8;              // of the weight gradient

int type_index(at::ScalarType type) { return type == at::kDouble ? 1 : 0; }

// Of the first-level data cache.
std::int64_t cache_bytes() {
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  static const std::int64_t found = sysconf(_SC_LEVEL1_DCACHE_SIZE);
  if (found > 0) return std::clamp<std::int64_t>(found, 16 * 1024, 128 * 1024);
#endif
  return 32 * 1024;
}

PlanTarget target_of(at::ScalarType type, bool folded) {
  const CpuKernels& kernels = cpu_kernels();
  const int index = type_index(type);
  return {kernels.lanes[index], kernels.tile, index == 1 ? 8 : 4, cache_bytes(), folded};
}

PlaneView view_of(const at::Tensor& tensor, const BatchPart& part) {
  const std::int64_t lanes = cpu_kernels().lanes[type_index(tensor.scalar_type())], image = tensor.stride(0);
  char* data = static_cast<char*>(const_cast<void*>(tensor.const_data_ptr())) +
               part.first * image * static_cast<std::int64_t>(tensor.element_size());
  if (part.columns == 0) {
    return {data,  part.images,      tensor.size(1),   tensor.size(2),  tensor.size(3),
            image, tensor.stride(1), tensor.stride(2), tensor.stride(3)};
  }
  return {data,         lanes, tensor.size(1),   part.rows,
          part.columns, image, tensor.stride(1), part.columns * lanes * image,
          lanes * image};
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

// How a batch is cut into strips: so many images together, of rows of their blocks.
struct Cut {
  std::int64_t images, together, groups, strips, strip_rows;

  Cut(std::int64_t images, std::int64_t rows, std::int64_t bytes_per_row, std::int64_t together, std::int64_t tile_rows,
      bool single_tiles)
      : images(images), together(together), groups((images + together - 1) / together) {
    const std::int64_t fit = kStripBytes / std::max<std::int64_t>(bytes_per_row, 1);
    const std::int64_t most = single_tiles ? tile_rows : std::max(fit, tile_rows);
    strips = (rows + most - 1) / most;
    strip_rows = (rows + strips - 1) / strips;
    strip_rows = std::min((strip_rows + tile_rows - 1) / tile_rows * tile_rows, rows);
    strips = (rows + strip_rows - 1) / strip_rows;
  }

  std::int64_t units() const { return groups * strips; }
  // `first` of the units that this thread runs one after another.
  StripTask task(std::int64_t unit, std::int64_t first, std::int64_t part, std::int64_t parts) const {
    const std::int64_t image = unit / strips * together, strip = unit % strips;
    return {image, std::min(together, images - image), strip * strip_rows, strip_rows, part,
            parts, unit > first && strip > 0,          strip + 1 == strips};
  }
};

// Ranges of destination channels for each of `units` tasks, so that every thread has work.
std::int64_t parts_for(std::int64_t units) {
  const std::int64_t threads = at::get_num_threads();
  return units >= threads ? 1 : (threads + units - 1) / units;
}

std::int64_t tile_rows_of(std::int64_t columns, std::int64_t tile) {
  const std::int64_t tiles = std::max<std::int64_t>((columns + tile - 1) / tile, 1);
  return std::clamp<std::int64_t>(tile / std::max<std::int64_t>((columns + tiles - 1) / tiles, 1), 1, 4);
}

// Whether every position of the input has one of the output: only then may planes be cut into blocks, as the weight
// gradient would else multiply zeros by what no output reads (infinities there would give NaN).
bool maps_planes_to_planes(const ConvWeight& weight, std::int64_t height, std::int64_t width) {
  const std::int64_t out_height = output_size(weight, height, 0), out_width = output_size(weight, width, 1);
  return (height + weight.stride[0] - 1) / weight.stride[0] == out_height &&
         (width + weight.stride[1] - 1) / weight.stride[1] == out_width;
}

// Blocks that pack at full speed, for strides of one: of eight columns or of whole lines, whose results are written as
// lines too, else of whatever planes divide into; images alone where they do not. Of the grids that fit, these won: 4 x
// 4 for planes of 32 columns, 2 x 2 for 16, 4 x 1 for 8.
LaneGrid fast_grid(const ConvWeight& weight, std::int64_t height, std::int64_t width, std::int64_t lanes) {
  const LaneGrid whole{lanes, 1, 1, 0, 0};
  if (weight.stride[0] != 1 || weight.stride[1] != 1) return whole;
  constexpr std::int64_t kGrids[][2] = {{4, 4}, {2, 2}, {4, 1}};
  for (const bool lines : {true, false}) {
    for (const auto& [rows, columns] : kGrids) {
      if (lanes % (rows * columns) != 0 || height % rows != 0 || width % columns != 0) continue;
      const std::int64_t block = width / columns;
      const bool in_lines = block == 8 || (columns == 4 && block % 16 == 0);
      if (block <= kMostBlockColumns && (lines ? in_lines : block >= kLeastBlockColumns && columns > 1)) {
        return {lanes / (rows * columns), rows, columns, 0, 0};
      }
    }
  }
  return whole;
}

// As many blocks as planes divide into, for fewer images than lanes.
LaneGrid grid_of_few(const ConvWeight& weight, std::int64_t height, std::int64_t width, std::int64_t images,
                     std::int64_t lanes) {
  const std::int64_t out_height = output_size(weight, height, 0), out_width = output_size(weight, width, 1);
  LaneGrid best{lanes, 1, 1, 0, 0};
  if (!maps_planes_to_planes(weight, height, width)) return best;
  for (std::int64_t rows = 1; rows <= lanes; rows *= 2) {
    for (std::int64_t columns = 1; rows * columns <= lanes; columns *= 2) {
      if (out_height % rows != 0 || out_width % columns != 0) continue;
      const std::int64_t held = lanes / (rows * columns);
      if (held >= images && held < best.images) best = {held, rows, columns, 0, 0};
    }
  }
  return best;
}

std::int64_t acc_size(std::int64_t channels, const CpuKernels& kernels, int type) {
  const std::int64_t lanes = kernels.lanes[type];
  return std::max<std::int64_t>(channels, 1) * kernels.tile * lanes + lanes * lanes;
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
  if (!plan_fits(weight, height, width, indices.numel(), target)) return nullptr;
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

std::vector<BatchPart> parts_of_batch(const ConvWeight& weight, at::IntArrayRef input_size, at::ScalarType type) {
  const CpuKernels& kernels = cpu_kernels();
  const std::int64_t images = input_size[0], height = input_size[2], width = input_size[3];
  const std::int64_t lanes = kernels.lanes[type_index(type)];
  const LaneGrid whole{lanes, 1, 1, 0, 0};
  std::vector<BatchPart> parts;
  std::int64_t first = 0;
  if (weight.taps() == 1 && height * width == 1 && weight.padding[0] + weight.padding[1] == 0) {
    const std::int64_t blocks = images / lanes, columns = kFoldedColumns;
    if (blocks >= columns) parts.push_back({0, blocks / columns * columns * lanes, blocks / columns, columns, whole});
    if (!parts.empty()) first = parts.back().images;
    if (blocks % columns != 0) {
      parts.push_back({first, blocks % columns * lanes, 1, blocks % columns, whole});
      first += parts.back().images;
    }
  } else {
    const bool fast = kernels.fast_blocks[type_index(type)] && maps_planes_to_planes(weight, height, width);
    const LaneGrid grid = fast ? fast_grid(weight, height, width, lanes) : whole;
    first = images / grid.images * grid.images;
    if (first > 0) parts.push_back({0, first, 0, 0, grid});
  }
  if (first < images || images == 0) {
    parts.push_back({first, images - first, 0, 0, grid_of_few(weight, height, width, images - first, lanes)});
  }
  return parts;
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
  work.acc_size = acc_size(plan.weight.channels_out, kernels, type);
  const LaneGrid& grid = plan.grid;
  const Cut cut(work.x.images, std::min(plan.out_height, grid.block_rows),
                plan.x_layout.row_pitch * plan.x_layout.row_step * element, grid.images,
                tile_rows_of(std::min(plan.out_width, grid.block_columns), kernels.tile),
                plan.x_layout.chunk < plan.x_layout.channels);  // accumulators of one tile stay from chunk to chunk
  const std::int64_t elements = work.acc_size + plan.x_layout.rows(cut.strip_rows) * plan.x_layout.row_pitch;
  const std::int64_t units = cut.units(), parts = parts_for(units);
  at::parallel_for(0, units * parts, 1, [&](std::int64_t begin, std::int64_t end) {
    void* scratch = Scratch::of_this_thread().get(static_cast<std::size_t>(elements * element));
    for (std::int64_t i = begin; i < end; ++i) {
      kernels.forward[type](cut.task(i % units, parts == 1 ? begin : i, i / units, parts), work, scratch);
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
  work.acc_size = acc_size(plan.weight.channels_in(), kernels, type);
  const std::int64_t x_row = gv.defined() ? plan.x_layout.row_pitch * plan.x_layout.row_step : 0;
  const LaneGrid& grid = plan.grid;
  const Cut cut(work.grad.images, std::min(gx.defined() ? plan.grad_rows : plan.out_height, grid.block_rows),
                (plan.grad_layout.row_pitch + x_row) * element, grid.images,
                tile_rows_of(std::min(plan.out_width, grid.block_columns), kernels.tile), false);
  work.grad_size = plan.grad_layout.rows(cut.strip_rows) * plan.grad_layout.row_pitch;
  const std::int64_t x_size = gv.defined() ? plan.x_layout.rows(cut.strip_rows) * plan.x_layout.row_pitch : 0;
  const std::size_t bytes = static_cast<std::size_t>((work.acc_size + work.grad_size + x_size) * element);
  const std::int64_t units = cut.units(), partials = std::min(units, kPartials);
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
        kernels.backward[type](cut.task(unit, first, i / partials, parts), work, gv.defined() ? &dot : nullptr,
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
