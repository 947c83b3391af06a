// SPDX-License-Identifier: Apache-2.0
#include "common/launch.cuh"
#include "hvp/pool_cuda.h"
#include "hvp/pool_kernel.cuh"

namespace curvlab::hvp {
namespace {

dim3 grid_of(const Tile& tile, std::int64_t images) {
  return {static_cast<unsigned>(tile.chunks), static_cast<unsigned>(tile.column_tiles),
          static_cast<unsigned>(smaller(images, kLargestGridYZ))};
}

template <class scalar_t>
const char* gather(const PoolArguments& pool, const Tile& tile, cudaStream_t stream) {
  CURVLAB_LAUNCH(pool_gather_kernel<scalar_t>, grid_of(tile, pool.directions * pool.samples), kBlockSize, 0, stream,
                 pool, tile);
  return launch_error();
}

template <class scalar_t>
const char* scatter_unique(const PoolArguments& pool, const Tile& tile, cudaStream_t stream) {
  CURVLAB_LAUNCH(pool_scatter_unique_kernel<scalar_t>, grid_of(tile, pool.directions * pool.samples), kBlockSize, 0,
                 stream, pool, tile);
  return launch_error();
}

template <class scalar_t, class sum_t>
const char* scatter(const PoolArguments& pool, sum_t* sums, int multiprocessors, cudaStream_t stream) {
  const std::int64_t columns = pool.directions * pool.samples * pool.channels;
  const unsigned grid = grid_for(ceil_div(columns, kBlockSize), kPoolBlocksPerMultiprocessor, multiprocessors);
  CURVLAB_LAUNCH((pool_scatter_kernel<scalar_t, sum_t>), grid, kBlockSize, 0, stream, pool, sums);
  return launch_error();
}

const char* zero(void* data, std::int64_t bytes, int multiprocessors, cudaStream_t stream) {
  const unsigned grid = grid_for(ceil_div(bytes, 16 * kBlockSize), kPoolBlocksPerMultiprocessor, multiprocessors);
  CURVLAB_LAUNCH(pool_zero_kernel, grid, kBlockSize, 0, stream, data, bytes);
  return launch_error();
}

const char* scatter_rounded(const PoolArguments& pool, float* scratch, int multiprocessors, cudaStream_t stream) {
  const std::int64_t elements = pool.directions * pool.samples * pool.image();
  if (const char* error = zero(scratch, elements * 4, multiprocessors, stream)) return error;
  if (const char* error = scatter<BFloat16Bits>(pool, scratch, multiprocessors, stream)) return error;
  const unsigned grid = grid_for(ceil_div(elements, kBlockSize), kPoolBlocksPerMultiprocessor, multiprocessors);
  CURVLAB_LAUNCH(pool_round_kernel, grid, kBlockSize, 0, stream, scratch, elements,
                 static_cast<BFloat16Bits*>(pool.out));
  return launch_error();
}

}  // namespace

const char* launch_pool_gather(const PoolArguments& pool, void* stream_handle) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  if (pool.directions * pool.samples * pool.pooled() == 0) return nullptr;
  const Tile tile = make_tile(pool.windows, pool.channels, 1);
  switch (pool.type) {
    case kFloat64:
      return gather<double>(pool, tile, stream);
    case kBFloat16:
      return gather<BFloat16Bits>(pool, tile, stream);
    default:
      return gather<float>(pool, tile, stream);
  }
}

const char* launch_pool_scatter(const PoolArguments& pool, float* scratch, int multiprocessors, void* stream_handle) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  const std::int64_t elements = pool.directions * pool.samples * pool.image();
  if (elements == 0) return nullptr;
  const bool rounded = pool.type == kBFloat16 && !pool.unique && pool.windows > 0;
  if (rounded) return scatter_rounded(pool, scratch, multiprocessors, stream);
  const char* error = zero(pool.out, elements * element_size(pool.type), multiprocessors, stream);
  if (error || pool.windows == 0) return error;
  if (!pool.unique) {
    if (pool.type == kFloat64) return scatter<double>(pool, static_cast<double*>(pool.out), multiprocessors, stream);
    return scatter<float>(pool, static_cast<float*>(pool.out), multiprocessors, stream);
  }
  const Tile tile = make_tile(pool.windows, pool.channels, 1);
  switch (pool.type) {
    case kFloat64:
      return scatter_unique<double>(pool, tile, stream);
    case kBFloat16:
      return scatter_unique<BFloat16Bits>(pool, tile, stream);
    default:
      return scatter_unique<float>(pool, tile, stream);
  }
}

}  // namespace curvlab::hvp
