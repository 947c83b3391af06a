// SPDX-License-Identifier: Apache-2.0
// The lists that the CUDA kernels walk, built on the host from the positions of the nonzeros: O(nonzeros), once for a
// mask and a geometry. No torch and no CUDA header.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "common/elements.h"
#include "sparse_conv/geometry_cuda.h"

namespace curvlab::sparse_conv {

// A convolution; channels of one group.
struct Convolution {
  std::int32_t groups, out_channels, in_channels;
  Pair kernel, stride, padding, dilation;
  Pair x, y;  // extents of its input and output
};

struct GatherPlan {
  GatherArguments arguments{};  // all but pointers and images
  std::vector<Phase> phases;
  std::vector<std::int32_t> order, first, offsets;
  std::vector<Tap> taps;
  // Input gradient: value k of the list is values[source[k]]; empty where the list has the order of the values.
  std::vector<std::int32_t> source;
};

// Where images fill the lanes of the windowed kernels to two thirds at least; below, the direct kernels (which have no
// lanes of images) do less work.
inline bool images_fill_lanes(std::int64_t images) {
  return images > 0 && 3 * images >= 2 * ((images + kImages - 1) / kImages * kImages);
}

namespace detail {

inline std::int32_t ceil_div(std::int32_t value, std::int32_t divisor) { return (value + divisor - 1) / divisor; }

// A nonzero as the gather sees it.
struct Entry {
  std::int32_t out_channel, in_channel, phase;  // of all groups; of its group
  Pair d;
  bool used;  // false: it meets no output
};

class Decoder {
 public:
  Decoder(const Convolution& conv, bool input_gradient, Pair out_step)
      : conv_(conv), input_gradient_(input_gradient), out_step_(out_step) {}

  bool input_gradient() const { return input_gradient_; }

  Entry operator()(std::int64_t position) const {
    const auto kernel_w = static_cast<std::int32_t>(position % conv_.kernel.w);
    position /= conv_.kernel.w;
    const auto kernel_h = static_cast<std::int32_t>(position % conv_.kernel.h);
    position /= conv_.kernel.h;
    const auto in = static_cast<std::int32_t>(position % conv_.in_channels);
    const auto filter = static_cast<std::int32_t>(position / conv_.in_channels);
    const Pair reach{kernel_h * conv_.dilation.h - conv_.padding.h, kernel_w * conv_.dilation.w - conv_.padding.w};
    if (!input_gradient_) return {filter, in, 0, reach, true};
    const std::int32_t group = filter / conv_.out_channels;
    const Pair r{residue(reach.h, conv_.stride.h), residue(reach.w, conv_.stride.w)};
    return {group * conv_.in_channels + in,
            filter % conv_.out_channels,
            r.h * out_step_.w + r.w,
            {(r.h - reach.h) / conv_.stride.h, (r.w - reach.w) / conv_.stride.w},
            r.h < out_step_.h && r.w < out_step_.w};
  }

 private:
  static std::int32_t residue(std::int32_t value, std::int32_t step) { return (value % step + step) % step; }

  const Convolution& conv_;
  bool input_gradient_;
  Pair out_step_;
};

// Columns first (8 fill a sector), then rows, then what is left goes to columns.
inline Pair tile_for(Pair positions, int count) {
  int w = 1, h = 1;
  while (w < 8 && w < positions.w) w *= 2;
  while (h < count / w && h < positions.h) h *= 2;
  return {h, count / h};
}

struct Spans {
  std::vector<Pair> low, high;  // of d, per phase; low > high: no taps
  std::int64_t used = 0;
};

inline Spans spans_of(const std::int64_t* indices, std::int64_t nonzeros, const Decoder& decode, int phases) {
  constexpr std::int32_t kFar = 0x7fffffff;
  Spans spans{std::vector<Pair>(phases, {kFar, kFar}), std::vector<Pair>(phases, {-kFar, -kFar})};
  for (std::int64_t k = 0; k < nonzeros; ++k) {
    const Entry e = decode(indices[k]);
    if (!e.used) continue;
    Pair &low = spans.low[e.phase], &high = spans.high[e.phase];
    low = {std::min(low.h, e.d.h), std::min(low.w, e.d.w)};
    high = {std::max(high.h, e.d.h), std::max(high.w, e.d.w)};
    ++spans.used;
  }
  return spans;
}

// Tiles, windows and stages; false where the direct kernels are to be taken.
inline bool lay_windows(GatherArguments& x, const Spans& spans) {
  const int accumulator = x.type == kFloat64 ? 8 : 4, count = tile_positions(accumulator);
  const Pair positions{phase_extent(x.out.h, x.out_step.h, 0), phase_extent(x.out.w, x.out_step.w, 0)};
  x.tile = tile_for(positions, count);
  x.tiles = {ceil_div(positions.h, x.tile.h), ceil_div(positions.w, x.tile.w)};
  if (2 * static_cast<std::int64_t>(positions.h) * positions.w < x.position_tiles() * count) return false;
  if (x.in_channels == 0 || 2 * x.out_channels < kBlockChannels) return false;  // nothing to stage; idle warps
  std::int64_t h = 0, w = 0;
  for (std::size_t i = 0; i < spans.low.size(); ++i) {
    h = std::max<std::int64_t>(h, static_cast<std::int64_t>(spans.high[i].h) - spans.low[i].h);
    w = std::max<std::int64_t>(w, static_cast<std::int64_t>(spans.high[i].w) - spans.low[i].w);
  }
  h += static_cast<std::int64_t>(x.tile.h - 1) * x.in_step.h + 1;
  w += static_cast<std::int64_t>(x.tile.w - 1) * x.in_step.w + 1;
  if (h > kSharedBytes || w > kSharedBytes) return false;
  const std::int64_t channel = h * w * kPitch * accumulator;
  std::int64_t most = kSharedBytes / channel;                   // in one buffer
  if (most < x.in_channels) most = kSharedBytes / 2 / channel;  // the next stage arrives in a second one meanwhile
  if (most == 0) return false;
  x.window = {static_cast<std::int32_t>(h), static_cast<std::int32_t>(w)};
  x.stages = ceil_div(x.in_channels, static_cast<std::int32_t>(std::min<std::int64_t>(most, x.in_channels)));
  x.stage_channels = ceil_div(x.in_channels, x.stages);
  const std::int64_t scratch = static_cast<std::int64_t>(kWarps) * count * kPitch * accumulator;
  x.shared_bytes = static_cast<std::int32_t>(std::max(scratch, (x.stages > 1 ? 2 : 1) * x.stage_channels * channel));
  return true;
}

// Output channels of every group by falling number of nonzeros (equal: rising), so that the warps of a block end
// together.
inline std::vector<std::int32_t> by_nonzeros(const std::vector<std::int64_t>& counts, std::int32_t per_group) {
  std::vector<std::int32_t> order(counts.size());
  std::iota(order.begin(), order.end(), 0);
  for (std::size_t begin = 0; begin < order.size(); begin += per_group) {
    std::stable_sort(order.begin() + begin, order.begin() + begin + per_group,
                     [&](std::int32_t a, std::int32_t b) { return counts[a] > counts[b]; });
  }
  return order;
}

// The cell of a tap in a table [phases, output channels in their own order, stages + 1].
inline std::size_t cell_of(const GatherArguments& x, const Entry& e) {
  const std::int64_t channels = static_cast<std::int64_t>(x.groups) * x.out_channels;
  return static_cast<std::size_t>((e.phase * channels + e.out_channel) * (x.stages + 1) +
                                  e.in_channel / x.stage_channels);
}

// Fills `order` and `first`; returns where the taps of every cell begin. Lists lie in the channels' own order, so that
// a forward list has the order of the values.
inline std::vector<std::int32_t> order_channels(GatherPlan& plan, const std::int64_t* indices, std::int64_t nonzeros,
                                                const Decoder& decode) {
  const GatherArguments& x = plan.arguments;
  const std::int64_t channels = static_cast<std::int64_t>(x.groups) * x.out_channels, row = x.stages + 1;
  std::vector<std::int64_t> counts(static_cast<std::size_t>(channels));
  std::vector<std::int32_t> begins(static_cast<std::size_t>(x.phase_count() * channels * row), 0);
  for (std::int64_t k = 0; k < nonzeros; ++k) {
    const Entry e = decode(indices[k]);
    if (!e.used) continue;
    ++begins[cell_of(x, e)];
    ++counts[e.out_channel];
  }
  std::int32_t begin = 0;
  for (std::int32_t& cell : begins) {
    const std::int32_t count = cell;
    cell = begin;
    begin += count;
  }
  plan.order = by_nonzeros(counts, x.out_channels);
  plan.first.reserve(begins.size());
  for (std::int64_t phase = 0; phase < x.phase_count(); ++phase) {
    for (const std::int32_t channel : plan.order) {
      const auto from = begins.begin() + (phase * channels + channel) * row;
      plan.first.insert(plan.first.end(), from, from + row);
    }
  }
  return begins;
}

// Fills `offsets` or `taps`, and `source`. Within a cell taps keep the order of the values.
inline void place_taps(GatherPlan& plan, const std::int64_t* indices, std::int64_t nonzeros, const Decoder& decode,
                       std::vector<std::int32_t> next) {
  const GatherArguments& x = plan.arguments;
  if (x.windowed) plan.offsets.resize(static_cast<std::size_t>(x.nonzeros));
  if (!x.windowed) plan.taps.resize(static_cast<std::size_t>(x.nonzeros));
  if (decode.input_gradient()) plan.source.resize(static_cast<std::size_t>(x.nonzeros));
  for (std::int64_t k = 0; k < nonzeros; ++k) {
    const Entry e = decode(indices[k]);
    if (!e.used) continue;
    const std::int32_t place = next[cell_of(x, e)]++;
    const Pair origin = plan.phases[e.phase].origin;
    if (x.windowed) {
      plan.offsets[place] = (e.in_channel % x.stage_channels * x.window_positions() + (e.d.h - origin.h) * x.window.w +
                             (e.d.w - origin.w)) *
                            kPitch;
    } else {
      plan.taps[place] = {e.in_channel * x.in_plane() + static_cast<std::int64_t>(e.d.h) * x.in.w + e.d.w, e.d};
    }
    if (decode.input_gradient()) plan.source[place] = static_cast<std::int32_t>(k);
  }
}

}  // namespace detail

// nullptr, or what is wrong with the indices: they must rise strictly within the weight. Kernels trust the lists.
inline const char* check_indices(const std::int64_t* indices, std::int64_t nonzeros, std::int64_t weights) {
  for (std::int64_t k = 0; k < nonzeros; ++k) {
    if (indices[k] < 0 || indices[k] >= weights) return "positions within weight_shape";
    if (k > 0 && indices[k] <= indices[k - 1]) return "strictly increasing";
  }
  return nullptr;
}

// `windows`: take the windowed kernels where the geometry allows it. nonzeros < 2^31; extents, paddings and
// kernel * dilation < 2^30.
inline GatherPlan make_gather_plan(const Convolution& conv, const std::int64_t* indices, std::int64_t nonzeros,
                                   bool input_gradient, bool windows, std::int32_t type) {
  GatherPlan plan;
  GatherArguments& x = plan.arguments;
  x.groups = conv.groups;
  x.type = type;
  x.in_channels = input_gradient ? conv.out_channels : conv.in_channels;
  x.out_channels = input_gradient ? conv.in_channels : conv.out_channels;
  x.in = input_gradient ? conv.y : conv.x;
  x.out = input_gradient ? conv.x : conv.y;
  x.in_step = input_gradient ? Pair{1, 1} : conv.stride;
  // No more phases than positions: residues beyond the image meet nothing.
  x.out_step = input_gradient ? Pair{std::max(1, std::min(conv.stride.h, conv.x.h)),
                                     std::max(1, std::min(conv.stride.w, conv.x.w))}
                              : Pair{1, 1};
  const detail::Decoder decode(conv, input_gradient, x.out_step);
  const detail::Spans spans = detail::spans_of(indices, nonzeros, decode, x.phase_count());
  x.nonzeros = spans.used;
  x.windowed = windows && detail::lay_windows(x, spans);
  if (!x.windowed) x.stages = 1, x.stage_channels = std::max(1, x.in_channels);
  for (std::size_t i = 0; i < spans.low.size(); ++i) {
    const bool taken = spans.low[i].h <= spans.high[i].h;
    plan.phases.push_back({taken ? spans.low[i] : Pair{0, 0}, taken ? x.stages : 0, 0});
  }
  detail::place_taps(plan, indices, nonzeros, decode, detail::order_channels(plan, indices, nonzeros, decode));
  return plan;
}

}  // namespace curvlab::sparse_conv
