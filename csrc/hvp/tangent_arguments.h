// SPDX-License-Identifier: Apache-2.0
// tangent_forward and tangent_backward: checks and arguments, for the CPU, CUDA and fake kernels.
#pragma once

#include "hvp/arguments.h"
#include "hvp/tangent.h"

namespace curvlab::hvp {

struct ForwardTensors {
  const at::Tensor& a;
  const OptionalTensor &b, &bias, &scale, &gain, &centered, &residual, &first, &delta;
  const at::Tensor& out;
  const OptionalTensor &pre, &dot;
};

struct BackwardTensors {
  const at::Tensor& g;
  const OptionalTensor &g2, &first, &second, &pre, &scale, &gain, &delta, &centered, &t, &dot, &inv_std, &gy, &gt,
      &bias_sum, &gain_sum;
};

inline void check(const ForwardTensors& x) {
  const Checks checks("tangent_forward", "a", x.a);
  checks.data("b", x.b);
  checks.data("residual", x.residual);
  checks.data("out", x.out);
  checks.data("pre", x.pre);
  checks.shared("centered", x.centered);
  checks.shared("delta", x.delta);
  checks.shared("first", x.first, true);
  checks.channel("scale", x.scale);
  checks.channel_rows("bias", x.bias);
  checks.channel_rows("gain", x.gain);
  checks.sums("dot", x.dot);
  checks.together("gain", given(x.gain), "centered", given(x.centered));
  checks.together("dot", given(x.dot), "delta", given(x.delta));
}

inline void check(const BackwardTensors& x) {
  const Checks checks("tangent_backward", "g", x.g);
  checks.data("g2", x.g2);
  checks.data("pre", x.pre);
  checks.data("t", x.t);
  checks.data("out_gy", x.gy);
  checks.data("out_gt", x.gt);
  checks.shared("first", x.first, true);
  checks.shared("second", x.second);
  checks.shared("centered", x.centered);
  checks.shared("delta", x.delta);
  checks.channel("scale", x.scale);
  checks.channel("inv_std", x.inv_std);
  checks.channel_rows("gain", x.gain);
  checks.channel_rows("dot", x.dot);
  checks.sums("out_bias", x.bias_sum);
  checks.sums("out_gain", x.gain_sum);
  checks.together("second", given(x.second), "pre", given(x.pre));
  checks.together("gain", given(x.gain), "delta", given(x.delta));
  checks.together("t", given(x.t), "delta", given(x.delta));
  checks.together("t", given(x.t), "inv_std", given(x.inv_std));
  checks.together("dot", given(x.dot), "inv_std", given(x.inv_std));
}

inline Rows rows_of(const at::Tensor& main, const OptionalTensor& first) {
  const std::int64_t directions = main.size(0), channels = main.size(-1), numel = main.numel();
  return {directions, numel == 0 ? 0 : numel / (directions * channels), channels, element_type(main.scalar_type()),
          given(first) && Checks::is_mask(*first)};
}

inline ChannelRows channel_rows(const at::Tensor& x) { return {data_or_null(x), x.defined() ? x.stride(0) : 0}; }

// The arguments, and the copies of those per channel that had to be converted.
struct PreparedForward {
  at::Tensor scale, bias, gain;
  ForwardArguments arguments;

  explicit PreparedForward(const ForwardTensors& x) {
    const at::ScalarType acc = accumulation_type(x.a.scalar_type());
    scale = channels(x.scale, acc);
    bias = channels(x.bias, acc);
    gain = channels(x.gain, acc);
    arguments = {.shape = rows_of(x.a, x.first),
                 .a = data_of(x.a),
                 .b = data_of(x.b),
                 .residual = data_of(x.residual),
                 .centered = data_of(x.centered),
                 .first = data_of(x.first),
                 .delta = data_of(x.delta),
                 .scale = data_or_null(scale),
                 .bias = channel_rows(bias),
                 .gain = channel_rows(gain),
                 .out = x.out.mutable_data_ptr(),
                 .pre = writable(x.pre)};
  }
};

struct PreparedBackward {
  at::Tensor scale, inv_std, gain;
  BackwardArguments arguments;

  explicit PreparedBackward(const BackwardTensors& x) {
    const at::ScalarType acc = accumulation_type(x.g.scalar_type());
    scale = channels(x.scale, acc);
    inv_std = channels(x.inv_std, acc);
    gain = channels(x.gain, acc);
    arguments = {.shape = rows_of(x.g, x.first),
                 .g = data_of(x.g),
                 .g2 = data_of(x.g2),
                 .pre = given(x.second) ? data_of(x.pre) : nullptr,
                 .t = given(x.gain_sum) ? data_of(x.t) : nullptr,
                 .first = data_of(x.first),
                 .second = data_of(x.second),
                 .centered = data_of(x.centered),
                 .delta = data_of(x.delta),
                 .scale = data_or_null(scale),
                 .inv_std = data_or_null(inv_std),
                 .gain = channel_rows(gain),
                 .gy = writable(x.gy),
                 .gt = writable(x.gt)};
  }
};

}  // namespace curvlab::hvp
