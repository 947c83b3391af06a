// SPDX-License-Identifier: Apache-2.0
// multi_tensor_norms on CUDA: from tensors to the launcher.
#include "norms/multi_tensor_norms_cuda.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <map>
#include <mutex>
#include <utility>

#include "common/cuda_device.h"
#include "norms/tensor_lists.h"

namespace curvlab::norms {
namespace {

// A counter that holds 0, for one launch on `stream`. Launches on one stream follow each other and each leaves 0, so
// they share one; a graph that is being captured gets its own, zeroed inside the graph, as its replays may run beside
// anything.
at::Tensor ticket_for(c10::cuda::CUDAStream stream, const at::TensorOptions& options) {
  if (c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None) {
    return at::zeros({1}, options.dtype(at::kInt));
  }
  static std::mutex mutex;
  static auto& tickets = *new std::map<std::pair<int, void*>, at::Tensor>();  // never freed: outlives the allocator
  const std::lock_guard<std::mutex> lock(mutex);
  at::Tensor& ticket = tickets[{stream.device_index(), static_cast<void*>(stream.stream())}];
  if (!ticket.defined()) ticket = at::zeros({1}, options.dtype(at::kInt));
  return ticket;
}

at::Tensor multi_tensor_norms_cuda(at::TensorList tensors, at::TensorList reference, bool l2_only) {
  TORCH_CHECK_VALUE(!tensors.empty(), "multi_tensor_norms: reference must have 0 tensors like tensors, got ",
                    reference.size());
  const c10::cuda::CUDAGuard guard(tensors[0].device());
  NormTensors list(tensors, reference, l2_only);
  const std::int64_t chunks = assign_cuda_chunks(list.entries.data(), list.size());
  TORCH_CHECK_VALUE(chunks >= 0, "multi_tensor_norms: tensors hold more than 2^32 chunks of ", kCudaChunkBytes,
                    " bytes");
  const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream();
  const at::TensorOptions options = tensors[0].options().dtype(at::kDouble);
  at::Tensor out = at::empty({list.size() + 1, kColumns}, options);
  at::Tensor workspace = at::empty({cuda_workspace_doubles(list.size(), chunks)}, options);
  at::Tensor ticket = ticket_for(stream, options), table;
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
  launch.ticket = static_cast<unsigned*>(ticket.mutable_data_ptr());
  launch.out = out.mutable_data_ptr<double>();
  launch.multiprocessors = multiprocessors("multi_tensor_norms");
  check_launch("multi_tensor_norms", launch_multi_tensor_norms(launch, stream.stream()));
  return out;
}

}  // namespace
}  // namespace curvlab::norms

TORCH_LIBRARY_IMPL(curvlab, CUDA, m) { m.impl("multi_tensor_norms", curvlab::norms::multi_tensor_norms_cuda); }
