// SPDX-License-Identifier: Apache-2.0
// Launchers of the masked convolutions on CUDA: raw pointers and a stream, no torch and no CUDA header. On `stream` (a
// cudaStream_t): no synchronization, no allocation, capturable in a graph. They return nullptr, or CUDA's words.
#pragma once

#include <algorithm>
#include <cstdint>

#include "sparse_conv/geometry_cuda.h"

namespace curvlab::sparse_conv {

// out_data = the sum over the list, plus bias: masked_conv2d, or its input gradient.
const char* launch_gather(const GatherArguments& x, void* stream);

// permuted[k] = values[source[k]]: what the list of the input gradient multiplies by.
const char* launch_permute_values(const void* values, const std::int32_t* source, std::int64_t count, std::int32_t type,
                                  void* permuted, void* stream);

// dvalues[k] from in_data and the gradient in out_data, which is only read. `workspace` holds splits * x.nonzeros
// numbers of the accumulation type; splits is at least 1 and at most weight_splits(x), which is the number to take.
const char* launch_weight_gradient(const GatherArguments& x, int splits, void* workspace, void* dvalues, void* stream);

constexpr std::int64_t kWeightBlocks = 2048;              // several waves of any device's blocks
constexpr std::int64_t kWorkspaceBytes = 64ll << 20;      // at most, unless one row is larger
constexpr std::int64_t kLeastPositionsOfSplit = 32 * 16;  // direct: 16 a lane

// Rows of the workspace. They follow from shapes alone, never from the device.
inline int weight_splits(const GatherArguments& x) {
  const std::int64_t row = std::max<std::int64_t>(1, x.nonzeros) * (x.type == kFloat64 ? 8 : 4);
  const std::int64_t slices = x.windowed
                                  ? x.image_blocks() * x.position_tiles()
                                  : (x.images * x.out_plane() + kLeastPositionsOfSplit - 1) / kLeastPositionsOfSplit;
  const std::int64_t wide = std::max<std::int64_t>(
      1, x.windowed ? x.channel_tiles(kBlockChannels) : static_cast<std::int64_t>(x.groups) * x.out_channels);
  const std::int64_t wanted = std::min(slices, (kWeightBlocks + wide - 1) / wide);
  return static_cast<int>(std::max<std::int64_t>(1, std::min(wanted, kWorkspaceBytes / row)));
}

}  // namespace curvlab::sparse_conv
