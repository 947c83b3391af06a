// SPDX-License-Identifier: Apache-2.0
// Launchers of tangent_forward and tangent_backward on CUDA: raw pointers and a stream, no torch and no CUDA header.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "hvp/tangent.h"
#include "hvp/tile.h"

namespace curvlab::hvp {

// Elements that a thread takes at once: 16 bytes, or 1 where pointers or channels do not allow that.
inline int vector_width(const Rows& shape, bool flat, bool aligned) {
  const int width = shape.type == kFloat64 ? 2 : shape.type == kBFloat16 ? 8 : 4;
  return aligned && (flat ? shape.plane() : shape.channels) % width == 0 ? width : 1;
}

inline bool is_aligned(const void* pointer, int bytes) {
  return reinterpret_cast<std::uintptr_t>(pointer) % static_cast<unsigned>(bytes) == 0;
}

inline bool all_aligned(const ForwardArguments& x) {
  bool aligned = is_aligned(x.first, 16) || (x.shape.first_is_mask && is_aligned(x.first, 8));
  for (const void* pointer : {x.a, x.b, x.residual, x.centered, x.delta}) aligned = aligned && is_aligned(pointer, 16);
  return aligned && is_aligned(x.out, 16) && is_aligned(x.pre, 16);
}

inline bool all_aligned(const BackwardArguments& x) {
  bool aligned = is_aligned(x.first, 16) || (x.shape.first_is_mask && is_aligned(x.first, 8));
  for (const void* pointer : {x.g, x.g2, x.pre, x.t, x.second, x.centered, x.delta}) {
    aligned = aligned && is_aligned(pointer, 16);
  }
  return aligned && is_aligned(x.gy, 16) && is_aligned(x.gt, 16);
}

// The tile of a launch; `sums`: kinds of sums over rows that it makes.
inline Tile tile_of(const ForwardArguments& x, int sums) {
  const bool flat = !x.scale && !x.bias.data && !x.gain.data && sums == 0;
  const int width = vector_width(x.shape, flat, all_aligned(x));
  return flat ? make_flat_tile(x.shape.plane(), width) : make_tile(x.shape.rows, x.shape.channels, width);
}

inline Tile tile_of(const BackwardArguments& x, int sums) {
  const bool flat = !x.scale && !x.gain.data && sums == 0;
  const int width = vector_width(x.shape, flat, all_aligned(x));
  return flat ? make_flat_tile(x.shape.plane(), width) : make_tile(x.shape.rows, x.shape.channels, width);
}

// Doubles of workspace for the sums of the blocks.
inline std::int64_t workspace_doubles(const Rows& shape, const Tile& tile, int sums) {
  return sums * tile.chunks * shape.directions * shape.channels;
}

struct SumsTo {
  void* out;  // [K, C] of acc_t, rows `stride` apart; null: not wanted
  std::int64_t stride;
};

// One launch, and one more for the sums, on `stream` (a cudaStream_t): no synchronization, no allocation, capturable in
// a graph. Shapes without an element launch nothing but what writes the sums. Return nullptr, or CUDA's words.
// workspace: workspace_doubles of device memory, need not be initialized.
const char* launch_tangent_forward(const ForwardArguments& arguments, const SumsTo& dot, double* workspace,
                                   void* stream);
// inv_std_dot: dot [K, C], whose rows times arguments.inv_std are added to the sums for the gain; data may be null.
const char* launch_tangent_backward(const BackwardArguments& arguments, const SumsTo& bias, const SumsTo& gain,
                                    const ChannelRows& dot, bool accumulate, double* workspace, void* stream);

}  // namespace curvlab::hvp
