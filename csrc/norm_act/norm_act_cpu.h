// SPDX-License-Identifier: Apache-2.0
// The CPU kernels of batch_norm_relu and its backward. Plain loops, which the compiler turns into vectors of the
// instruction set; sums in doubles by hand. Included by cpu_<isa>.cpp only.
#pragma once

#include "common/simd.h"
#include "norm_act/norm_act.h"

namespace curvlab::norm_act::CURVLAB_CPU_CAPABILITY {

using namespace curvlab::CURVLAB_CPU_CAPABILITY;

template <class scalar_t>
struct Terms {
  scalar_t center, gain, offset, slope, level;
  explicit Terms(const ChannelTerms& terms)
      : center(static_cast<scalar_t>(terms.center)),
        gain(static_cast<scalar_t>(terms.gain)),
        offset(static_cast<scalar_t>(terms.offset)),
        slope(static_cast<scalar_t>(terms.slope)),
        level(static_cast<scalar_t>(terms.level)) {}

  // One function for forward and backward: both must find the same sign and the same winner of a window.
  scalar_t normalized(scalar_t x) const { return (x - center) * gain + offset; }
};

// ---- sums
CURVLAB_INLINE DoubleLanes wide(const float* x) { return widen_float(load_lanes<FloatLanes>(x)); }
CURVLAB_INLINE DoubleLanes wide(const double* x) { return load_lanes<DoubleLanes>(x); }

struct LaneSums {
  DoubleLanes first{}, second{};
  double rest_first = 0.0, rest_second = 0.0;

  SumPair total() const { return {sum_lanes(first) + rest_first, sum_lanes(second) + rest_second}; }
};

// Sums of d = x - shift and of d d.
template <class scalar_t>
CURVLAB_INLINE void add_squares(LaneSums& sums, const scalar_t* x, std::int64_t n, double shift) {
  DoubleLanes first[2] = {}, second[2] = {};  // two of each: an addition waits four cycles for the one before
  std::int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    for (int half = 0; half < 2; ++half) {
      const DoubleLanes d = wide(x + i + half * kLanes) - shift;
      first[half] += d;
      second[half] += d * d;
    }
  }
  sums.first += first[0] + first[1];
  sums.second += second[0] + second[1];
  for (; i < n; ++i) {
    const double d = static_cast<double>(x[i]) - shift;
    sums.rest_first += d;
    sums.rest_second += d * d;
  }
}

// Sums of a and of b.
template <class scalar_t>
CURVLAB_INLINE void add_pair(LaneSums& sums, const scalar_t* a, const scalar_t* b, std::int64_t n) {
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    sums.first += wide(a + i);
    sums.second += wide(b + i);
  }
  for (; i < n; ++i) {
    sums.rest_first += static_cast<double>(a[i]);
    sums.rest_second += static_cast<double>(b[i]);
  }
}

template <class scalar_t>
static void block_statistics(const Planes& planes, const void* x_data, const double* shift, const Block& block,
                             SumPair* sums) {
  const scalar_t* x = static_cast<const scalar_t*>(x_data);
  const std::int64_t plane = planes.plane();
  LaneSums lanes[kMaxBlockChannels];
  for (std::int64_t image = block.first_image; image < block.end_image; ++image) {
    for (std::int64_t c = block.first_channel; c < block.end_channel; ++c) {
      add_squares(lanes[c - block.first_channel], x + (image * planes.channels + c) * plane, plane, shift[c]);
    }
  }
  for (std::int64_t c = block.first_channel; c < block.end_channel; ++c) {
    sums[c - block.first_channel] = lanes[c - block.first_channel].total();
  }
}

// ---- windows
// The first of the largest, in the order of rows, as torch's max_pool2d finds it: a later NaN wins.
template <class scalar_t>
struct Winner {
  scalar_t z, x, place;
};

template <class scalar_t>
CURVLAB_INLINE void contest(Winner<scalar_t>& best, scalar_t z, scalar_t x, scalar_t place) {
  const bool wins = (z > best.z) | (z != z);
  best.z = wins ? z : best.z;
  best.x = wins ? x : best.x;
  best.place = wins ? place : best.place;
}

template <class scalar_t>
CURVLAB_INLINE Winner<scalar_t> winner(const scalar_t* top, const scalar_t* bottom, std::int64_t j,
                                       const Terms<scalar_t>& terms) {
  const scalar_t x[4] = {top[2 * j], top[2 * j + 1], bottom[2 * j], bottom[2 * j + 1]};
  Winner<scalar_t> best{terms.normalized(x[0]), x[0], scalar_t{0}};
  contest(best, terms.normalized(x[1]), x[1], scalar_t{1});
  contest(best, terms.normalized(x[2]), x[2], scalar_t{2});
  contest(best, terms.normalized(x[3]), x[3], scalar_t{3});
  return best;
}

template <class scalar_t>
CURVLAB_INLINE scalar_t rectified(scalar_t z) {
  return z <= scalar_t{0} ? scalar_t{0} : z;  // NaN stays
}

template <class scalar_t>
CURVLAB_INLINE scalar_t masked(scalar_t z, scalar_t g) {
  return z <= scalar_t{0} ? scalar_t{0} : g;
}

// g plus what comes through mean and variance.
template <bool training, class scalar_t>
CURVLAB_INLINE scalar_t moved(scalar_t x, scalar_t g, const Terms<scalar_t>& terms) {
  if constexpr (!training) return g;  // apart: slope and level are 0, but 0 times an infinity is not
  return g - ((x - terms.center) * terms.slope + terms.level);
}

// The windows of a row, by chunk(Count<n>{}, j): n = 16, 8 or 4 of them from the j-th on, vectors of floats; the last
// chunk goes back over windows that are done and finds the same again. Rows of fewer than 4: one window at a time.
template <int value>
struct Count {
  static constexpr int kValue = value;
};

template <int kStep, class Chunk>
CURVLAB_INLINE void for_steps(std::int64_t count, const Chunk& chunk) {
  std::int64_t j = 0;
  for (; j + kStep <= count; j += kStep) chunk(Count<kStep>{}, j);
  if (j < count) chunk(Count<kStep>{}, kStep == 1 ? j : count - kStep);
}

template <class Chunk>
CURVLAB_INLINE void for_windows(std::int64_t count, const Chunk& chunk) {
  if (count >= 16) return for_steps<16>(count, chunk);
  if (count >= 8) return for_steps<8>(count, chunk);
  if (count >= 4) return for_steps<4>(count, chunk);
  for_steps<1>(count, chunk);
}

// Without the pragma a loop of 4 is unrolled before it is vectorized, and then is not: 7 times slower.
template <int kCount, class scalar_t>
CURVLAB_INLINE void pooled_forward(const scalar_t* __restrict__ top, const scalar_t* __restrict__ bottom,
                                   scalar_t* __restrict__ out, const Terms<scalar_t>& terms) {
#pragma GCC unroll 1
  for (int j = 0; j < kCount; ++j) out[j] = rectified(winner(top, bottom, j, terms).z);
}

// g and g (x - center)
template <int kCount, class scalar_t>
CURVLAB_INLINE void pooled_products(const scalar_t* __restrict__ top, const scalar_t* __restrict__ bottom,
                                    const scalar_t* __restrict__ grad, scalar_t* __restrict__ first,
                                    scalar_t* __restrict__ second, const Terms<scalar_t>& terms) {
#pragma GCC unroll 1
  for (int j = 0; j < kCount; ++j) {
    const Winner<scalar_t> best = winner(top, bottom, j, terms);
    const scalar_t g = masked(best.z, grad[j]);
    first[j] = g;
    second[j] = g * (best.x - terms.center);
  }
}

template <int kCount, bool training, class scalar_t>
CURVLAB_INLINE void pooled_backward(const scalar_t* __restrict__ top, const scalar_t* __restrict__ bottom,
                                    const scalar_t* __restrict__ grad, scalar_t* __restrict__ gtop,
                                    scalar_t* __restrict__ gbottom, const Terms<scalar_t>& terms) {
  const scalar_t zero{0};
#pragma GCC unroll 1
  for (int j = 0; j < kCount; ++j) {
    const Winner<scalar_t> best = winner(top, bottom, j, terms);
    const scalar_t g = terms.gain * masked(best.z, grad[j]);
    gtop[2 * j] = moved<training>(top[2 * j], best.place == zero ? g : zero, terms);
    gtop[2 * j + 1] = moved<training>(top[2 * j + 1], best.place == scalar_t{1} ? g : zero, terms);
    gbottom[2 * j] = moved<training>(bottom[2 * j], best.place == scalar_t{2} ? g : zero, terms);
    gbottom[2 * j + 1] = moved<training>(bottom[2 * j + 1], best.place == scalar_t{3} ? g : zero, terms);
  }
}

// ---- planes
template <bool pool, class scalar_t>
CURVLAB_INLINE void forward_plane(const Planes& planes, const scalar_t* __restrict__ x, scalar_t* __restrict__ out,
                                  const Terms<scalar_t> terms) {
  if constexpr (!pool) {
    for (std::int64_t i = 0; i < planes.plane(); ++i) out[i] = rectified(terms.normalized(x[i]));
  } else {
    const std::int64_t width = planes.width, count = width / 2;
    for (std::int64_t row = 0; row < planes.out_height(); ++row, x += 2 * width, out += count) {
      for_windows(count, [&](auto chunk, std::int64_t j) {
        pooled_forward<decltype(chunk)::kValue>(x + 2 * j, x + width + 2 * j, out + j, terms);
      });
    }
  }
}

constexpr std::int64_t kProducts = 1024;  // kept in the first cache between two loops

template <bool pool, class scalar_t>
CURVLAB_INLINE void sum_plane(const Planes& planes, const scalar_t* __restrict__ x, const scalar_t* __restrict__ grad,
                              const Terms<scalar_t> terms, LaneSums& sums) {
  scalar_t first[kProducts], second[kProducts];
  if constexpr (!pool) {
    for (std::int64_t begin = 0; begin < planes.plane(); begin += kProducts) {
      const std::int64_t left = planes.plane() - begin, n = left < kProducts ? left : kProducts;
      for (std::int64_t i = 0; i < n; ++i) {
        const scalar_t g = masked(terms.normalized(x[begin + i]), grad[begin + i]);
        first[i] = g;
        second[i] = g * (x[begin + i] - terms.center);
      }
      add_pair(sums, first, second, n);
    }
  } else {
    const std::int64_t width = planes.width, count = width / 2;
    std::int64_t filled = 0;
    for (std::int64_t row = 0; row < planes.out_height(); ++row, x += 2 * width, grad += count) {
      for (std::int64_t begin = 0; begin < count; begin += kProducts) {
        const std::int64_t left = count - begin, n = left < kProducts ? left : kProducts;
        if (filled + n > kProducts) {
          add_pair(sums, first, second, filled);
          filled = 0;
        }
        for_windows(n, [&](auto chunk, std::int64_t j) {
          const scalar_t* top = x + 2 * (begin + j);
          pooled_products<decltype(chunk)::kValue>(top, top + width, grad + begin + j, first + filled + j,
                                                   second + filled + j, terms);
        });
        filled += n;
      }
    }
    add_pair(sums, first, second, filled);
  }
}

template <bool pool, bool training, class scalar_t>
CURVLAB_INLINE void backward_plane(const Planes& planes, const scalar_t* __restrict__ x,
                                   const scalar_t* __restrict__ grad, scalar_t* __restrict__ gx,
                                   const Terms<scalar_t> terms) {
  if constexpr (!pool) {
    for (std::int64_t i = 0; i < planes.plane(); ++i) {
      gx[i] = moved<training>(x[i], terms.gain * masked(terms.normalized(x[i]), grad[i]), terms);
    }
  } else {
    const std::int64_t width = planes.width, count = width / 2;
    const scalar_t* const end = x + planes.plane();
    for (std::int64_t row = 0; row < planes.out_height(); ++row, x += 2 * width, gx += 2 * width, grad += count) {
      for_windows(count, [&](auto chunk, std::int64_t j) {
        pooled_backward<decltype(chunk)::kValue, training>(x + 2 * j, x + width + 2 * j, grad + j, gx + 2 * j,
                                                           gx + width + 2 * j, terms);
      });
      if (width % 2 != 0) {  // the last column is in no window
        gx[width - 1] = moved<training>(x[width - 1], scalar_t{0}, terms);
        gx[2 * width - 1] = moved<training>(x[2 * width - 1], scalar_t{0}, terms);
      }
    }
    for (; x != end; ++x, ++gx) *gx = moved<training>(*x, scalar_t{0}, terms);  // nor is the last row
  }
}

// ---- blocks
template <bool pool, class scalar_t>
static void forward_block(const ForwardWork& work, const Block& block) {
  const Planes planes = work.planes;
  for (std::int64_t image = block.first_image; image < block.end_image; ++image) {
    for (std::int64_t c = block.first_channel; c < block.end_channel; ++c) {
      const std::int64_t at = image * planes.channels + c;
      forward_plane<pool>(planes, static_cast<const scalar_t*>(work.x) + at * planes.plane(),
                          static_cast<scalar_t*>(work.out) + at * planes.out_plane(), Terms<scalar_t>(work.terms[c]));
    }
  }
}

template <bool pool, class scalar_t>
static void sum_block(const BackwardWork& work, const Block& block, SumPair* sums) {
  const Planes planes = work.planes;
  LaneSums lanes[kMaxBlockChannels];
  for (std::int64_t image = block.first_image; image < block.end_image; ++image) {
    for (std::int64_t c = block.first_channel; c < block.end_channel; ++c) {
      const std::int64_t at = image * planes.channels + c;
      sum_plane<pool>(planes, static_cast<const scalar_t*>(work.x) + at * planes.plane(),
                      static_cast<const scalar_t*>(work.grad) + at * planes.out_plane(), Terms<scalar_t>(work.terms[c]),
                      lanes[c - block.first_channel]);
    }
  }
  for (std::int64_t c = block.first_channel; c < block.end_channel; ++c) {
    sums[c - block.first_channel] = lanes[c - block.first_channel].total();
  }
}

template <bool pool, bool training, class scalar_t>
static void backward_block(const BackwardWork& work, const Block& block) {
  const Planes planes = work.planes;
  for (std::int64_t image = block.first_image; image < block.end_image; ++image) {
    for (std::int64_t c = block.first_channel; c < block.end_channel; ++c) {
      const std::int64_t at = image * planes.channels + c;
      backward_plane<pool, training>(planes, static_cast<const scalar_t*>(work.x) + at * planes.plane(),
                                     static_cast<const scalar_t*>(work.grad) + at * planes.out_plane(),
                                     static_cast<scalar_t*>(work.gx) + at * planes.plane(),
                                     Terms<scalar_t>(work.terms[c]));
    }
  }
}

template <class scalar_t>
static void block_forward(const ForwardWork& work, const Block& block) {
  work.planes.pool ? forward_block<true, scalar_t>(work, block) : forward_block<false, scalar_t>(work, block);
}

template <class scalar_t>
static void block_backward_sums(const BackwardWork& work, const Block& block, SumPair* sums) {
  work.planes.pool ? sum_block<true, scalar_t>(work, block, sums) : sum_block<false, scalar_t>(work, block, sums);
}

template <class scalar_t>
static void block_backward(const BackwardWork& work, const Block& block) {
  if (work.planes.pool) {
    work.training ? backward_block<true, true, scalar_t>(work, block)
                  : backward_block<true, false, scalar_t>(work, block);
  } else {
    work.training ? backward_block<false, true, scalar_t>(work, block)
                  : backward_block<false, false, scalar_t>(work, block);
  }
}

}  // namespace curvlab::norm_act::CURVLAB_CPU_CAPABILITY
