// SPDX-License-Identifier: Apache-2.0
// Batch normalization, ReLU and 2 x 2 max pooling of stride 2 as one op on contiguous [N, C, H, W]:
//   z = (x - mean) inv_std weight + bias,   out = max(z, 0), or its maximum over each window
// Backward, with g the gradient where z > 0 (and, pooled, where z is the first of its window's largest), zero
// elsewhere, n = N H W and sums over a channel:
//   gbias = sum g,   gweight = inv_std sum g (x - mean),
//   gx = weight inv_std (g - gbias / n - (x - mean) inv_std gweight / n), in eval mode weight inv_std g
// z is worked out anew from x, so nothing is kept for it: a mask and windows' indices would be written and read again.
#pragma once

#include <cstdint>

namespace curvlab::norm_act {

struct Planes {
  std::int64_t images, channels, height, width;
  bool pool;

  std::int64_t plane() const { return height * width; }
  std::int64_t out_height() const { return pool ? height / 2 : height; }
  std::int64_t out_width() const { return pool ? width / 2 : width; }
  std::int64_t out_plane() const { return out_height() * out_width(); }
};

// What one call of a kernel does: images [first_image, end_image) of channels [first_channel, end_channel).
struct Block {
  std::int64_t first_image, end_image;
  std::int64_t first_channel, end_channel;
};

constexpr std::int64_t kMaxBlockChannels = 64;

// The affine function of a channel in the kernels' precision: z = (x - center) gain + offset. And the gradient
// gx = gain g - (x - center) slope - level.
struct ChannelTerms {
  double center, gain, offset, slope, level;
};

struct ForwardWork {
  Planes planes;
  const void* x;
  void* out;
  const ChannelTerms* terms;
};

struct BackwardWork {
  Planes planes;
  const void *x, *grad;
  void* gx;
  const ChannelTerms* terms;
  bool training;
};

// A channel's two sums.
struct SumPair {
  double first, second;
};

}  // namespace curvlab::norm_act
