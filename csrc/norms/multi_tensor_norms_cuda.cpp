// SPDX-License-Identifier: Apache-2.0
// multi_tensor_norms on CUDA: from tensors to the launcher.
#include "norms/multi_tensor_norms_cuda.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#include <torch/library.h>

#include <map>
#include <mutex>
#include <utility>

#include "common/cuda_device.h"
#include "norms/tensor_lists.h"

namespace curvlab::norms {
namespace {

bool is_capturing() { return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None; }

// A counter that holds 0, for launches on `stream` outside a graph: they follow each other and each leaves 0, so they
// share one, which is never freed. Not from the caching allocator: the warm-up run of torch.compile's CUDA graphs sends
// all that it gives to the graph's private pool, where what outlives the run is an error or is handed out again.
unsigned* ticket_of(c10::cuda::CUDAStream stream) {
  static std::mutex mutex;
  static auto& tickets = *new std::map<std::pair<int, void*>, unsigned*>();
  const std::lock_guard<std::mutex> lock(mutex);
  unsigned*& ticket = tickets[{stream.device_index(), static_cast<void*>(stream.stream())}];
  if (ticket != nullptr) return ticket;
  // cudaMalloc would break a graph that another thread captures at this moment, but not in relaxed mode.
  const c10::cuda::CUDAStreamCaptureModeGuard relaxed(cudaStreamCaptureModeRelaxed);
  void* memory = nullptr;
  check_cuda("multi_tensor_norms", "cannot allocate its counter", cudaMalloc(&memory, sizeof(unsigned)));
  const cudaError_t zeroed = cudaMemsetAsync(memory, 0, sizeof(unsigned), stream.stream());
  if (zeroed != cudaSuccess) cudaFree(memory);
  check_cuda("multi_tensor_norms", "cannot clear its counter", zeroed);
  return ticket = static_cast<unsigned*>(memory);
}

at::Tensor multi_tensor_norms_cuda(at::TensorList tensors, at::TensorList reference, bool l2_only) {
  // Before the guard, which takes no CPU device. Without tensors, only a reference leads here, and it is refused.
  const NormMode mode = check_norm_lists(tensors, reference, l2_only);
  const c10::cuda::CUDAGuard guard(tensors[0].device());
  NormTensors list(tensors, reference, mode);
  const std::int64_t chunks = assign_cuda_chunks(list.entries.data(), list.size());
  TORCH_CHECK_VALUE(chunks >= 0, "multi_tensor_norms: tensors hold more than 2^32 chunks of ", kCudaChunkBytes,
                    " bytes");
  const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream();
  const at::TensorOptions options = tensors[0].options().dtype(at::kDouble);
  at::Tensor out = at::empty({list.size() + 1, kColumns}, options);
  at::Tensor workspace = at::empty({cuda_workspace_doubles(list.size(), chunks)}, options);
  at::Tensor graph_ticket, table;
  // A graph has a counter of its own, zeroed inside it: its replays may run beside anything.
  if (is_capturing()) graph_ticket = at::zeros({1}, options.dtype(at::kInt));
  if (list.size() > kLargeTable) {
    table = at::empty({list.size() * static_cast<std::int64_t>(sizeof(NormEntry))}, options.dtype(at::kByte));
  }
  MultiTensorNormsLaunch launch{};
  launch.entries = list.entries.data();
  launch.tensors = list.size();
  launch.chunks = chunks;
  launch.mode = list.mode;
  launch.workspace = workspace.mutable_data_ptr<double>();
  launch.device_table = table.defined() ? static_cast<NormEntry*>(table.mutable_data_ptr()) : nullptr;
  launch.ticket = graph_ticket.defined() ? static_cast<unsigned*>(graph_ticket.mutable_data_ptr()) : ticket_of(stream);
  launch.out = out.mutable_data_ptr<double>();
  launch.multiprocessors = multiprocessors("multi_tensor_norms");
  check_launch("multi_tensor_norms", launch_multi_tensor_norms(launch, stream.stream()));
  return out;
}

}  // namespace
}  // namespace curvlab::norms

TORCH_LIBRARY_IMPL(curvlab, CUDA, m) { m.impl("multi_tensor_norms", curvlab::norms::multi_tensor_norms_cuda); }
