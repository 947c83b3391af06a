// SPDX-License-Identifier: Apache-2.0
// Convolutions whose weight is zero outside a mask. The weight w [C_out, C_in / groups, kH, kW] is given by its values
// at the strictly increasing flat positions `indices`; with c' = (o / (C_out / groups)) (C_in / groups) + c and the
// sums over the nonzeros (o, c, r, s) only, positions outside a tensor reading as zero:
//   masked_conv2d:         out[n, o, h, w]  = bias[o] + sum w[o, c, r, s] x[n, c', h sh - ph + r dh, w sw - pw + s dw]
//   masked_conv2d_input:   gx [n, c', y, z] = sum over (o, r, s), h sh - ph + r dh = y, w sw - pw + s dw = z
//                                             of w[o, c, r, s] grad[n, o, h, w]
//   masked_conv2d_weight:  gv [k]           = sum over n, h, w of grad[n, o, h, w] x[n, c', h sh - ph + r dh, ...],
//                                             (o, c, r, s) the k-th nonzero
// The three are closed under differentiation: each one's derivatives are the other two.
#pragma once

#include <cstdint>

namespace curvlab::sparse_conv {

// Everything of a convolution but the batch and the planes' sizes.
struct ConvWeight {
  std::int64_t channels_out, channels_in_group, kernel[2];  // weight_shape
  std::int64_t stride[2], padding[2], dilation[2], groups;

  std::int64_t channels_in() const { return channels_in_group * groups; }
  std::int64_t taps() const { return kernel[0] * kernel[1]; }
  std::int64_t elements() const { return channels_out * channels_in_group * taps(); }
};

// Output size along one axis; `Size` may be symbolic.
template <class Size>
Size output_size(const ConvWeight& weight, const Size& input, int axis) {
  return (input + 2 * weight.padding[axis] - weight.dilation[axis] * (weight.kernel[axis] - 1) - 1) /
             weight.stride[axis] +
         1;
}

}  // namespace curvlab::sparse_conv
