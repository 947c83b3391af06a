// SPDX-License-Identifier: Apache-2.0
// filter_norms on CUDA: from tensors to the launcher.
#include "norms/filter_norms_cuda.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "common/cuda_device.h"
#include "norms/tensor_lists.h"

namespace curvlab::norms {
namespace {

at::Tensor filter_norms_cuda(at::TensorList tensors) {
  check_filter_list(tensors);  // before the guard, which takes no CPU device
  const c10::cuda::CUDAGuard guard(tensors[0].device());
  const FilterTensors list(tensors);
  const std::int64_t count = static_cast<std::int64_t>(list.entries.size());
  const at::TensorOptions options = tensors[0].options().dtype(at::kDouble);
  at::Tensor out = at::empty({list.rows}, options), table;
  if (count > kFilterLargeTable) {
    table = at::empty({count * static_cast<std::int64_t>(sizeof(FilterEntry))}, options.dtype(at::kByte));
  }
  FilterNormsLaunch launch{};
  launch.entries = list.entries.data();
  launch.tensors = count;
  launch.items = list.items;
  launch.device_table = table.defined() ? static_cast<FilterEntry*>(table.mutable_data_ptr()) : nullptr;
  launch.out = out.mutable_data_ptr<double>();
  launch.multiprocessors = multiprocessors("filter_norms");
  check_launch("filter_norms", launch_filter_norms(launch, c10::cuda::getCurrentCUDAStream().stream()));
  return out;
}

}  // namespace
}  // namespace curvlab::norms

TORCH_LIBRARY_IMPL(curvlab, CUDA, m) { m.impl("filter_norms", curvlab::norms::filter_norms_cuda); }
