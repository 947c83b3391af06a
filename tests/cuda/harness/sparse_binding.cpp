// SPDX-License-Identifier: Apache-2.0
// The plans and launchers of csrc/sparse_conv on host memory, callable through ctypes with the kernels' own structs.
// The launchers return nullptr, or what went wrong.
#include <cstdint>
#include <vector>

#include "binding.h"
#include "sparse_conv/masked_conv2d_cuda.h"
#include "sparse_conv/plan_cuda.h"

using namespace curvlab::sparse_conv;

namespace {

template <class T>
std::int64_t view(const std::vector<T>& list, const void** data) {
  *data = list.data();
  return static_cast<std::int64_t>(list.size() * sizeof(T));
}

}  // namespace

CURVLAB_EXPORT const char* host_check_indices(const std::int64_t* indices, std::int64_t count, std::int64_t weights) {
  return check_indices(indices, count, weights);
}

CURVLAB_EXPORT GatherPlan* host_make_plan(const Convolution* conv, const std::int64_t* indices, std::int64_t nonzeros,
                                          int input_gradient, int windows, int type) {
  return new GatherPlan(make_gather_plan(*conv, indices, nonzeros, input_gradient != 0, windows != 0, type));
}

CURVLAB_EXPORT void host_free_plan(GatherPlan* plan) { delete plan; }

// Bytes of a list of the plan: phases, order, first, offsets, taps, source.
CURVLAB_EXPORT std::int64_t host_plan_list(const GatherPlan* plan, int which, const void** data) {
  switch (which) {
    case 0:
      return view(plan->phases, data);
    case 1:
      return view(plan->order, data);
    case 2:
      return view(plan->first, data);
    case 3:
      return view(plan->offsets, data);
    case 4:
      return view(plan->taps, data);
    default:
      return view(plan->source, data);
  }
}

CURVLAB_EXPORT void host_plan_arguments(const GatherPlan* plan, GatherArguments* arguments) {
  *arguments = plan->arguments;
}

CURVLAB_EXPORT int host_images_fill_lanes(std::int64_t images) { return images_fill_lanes(images); }

CURVLAB_EXPORT int host_weight_splits(const GatherArguments* x) { return weight_splits(*x); }

CURVLAB_EXPORT const char* host_gather(const GatherArguments* x) {
  return guarded([&] { return launch_gather(*x, nullptr); });
}

CURVLAB_EXPORT const char* host_permute_values(const void* values, const std::int32_t* source, std::int64_t count,
                                               int type, void* permuted) {
  return guarded([&] { return launch_permute_values(values, source, count, type, permuted, nullptr); });
}

CURVLAB_EXPORT const char* host_weight_gradient(const GatherArguments* x, int splits, void* dvalues) {
  return guarded([&] {
    std::vector<double> workspace = garbage<double>(splits * x->nonzeros);
    return launch_weight_gradient(*x, splits, workspace.data(), dvalues, nullptr);
  });
}
