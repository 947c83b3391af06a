// SPDX-License-Identifier: Apache-2.0
// first_conv_forward and first_conv_weight: the convolution of a network's inputs, which no direction moves, with the
// maximum pool of 2 x 2 positions behind it if there is one. x [N, H, W, C] is padded already; weights are
// [K, O, C, h, w]. choice [N, R, O] says which of its four positions won each window (2 dy + dx).
//   forward  out[k, n, r, o] = bias[k, o] + sum over taps of w[k, o, tap] x[n, position(n, r, o), tap]
//   weight   out[k, o, tap] (+)= sum over n and r of g[k, n, r, o] x[n, position(n, r, o), tap]
// The library's convolutions reach a tenth of the processor's rate with 3 input channels, and the map before the pool,
// four times the size of what is kept of it, went to memory and back twice.
#pragma once

#include <cstdint>

namespace curvlab::hvp {

struct FirstConvArguments {
  std::int64_t directions, samples, height, width, channels;  // K, N, H, W, C
  std::int64_t kernel_height, kernel_width, stride_height, stride_width;
  std::int64_t rows, columns, outputs;  // positions before the pool, O
  std::int64_t lanes;                   // O rounded up to whole registers: the row length of packed weights and sums
  const float* x;
  const std::uint8_t* choice;  // null: no pool

  std::int64_t segment() const { return kernel_width * channels; }  // taps that lie one after another in x
  std::int64_t taps() const { return kernel_height * segment(); }
  std::int64_t windows() const { return choice != nullptr ? (rows / 2) * (columns / 2) : rows * columns; }
  std::int64_t image() const { return height * width * channels; }
};

constexpr std::int64_t kFirstConvLanes = 16;  // floats in the widest register

}  // namespace curvlab::hvp
