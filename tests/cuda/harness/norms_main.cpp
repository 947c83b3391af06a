// SPDX-License-Identifier: Apache-2.0
// norms_main ORDER SEED: the norm kernels over small sizes, every route, for the sanitizers: each tensor is an
// allocation of its own, whose ends ASan guards.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "cases.h"
#include "norms/filter_norms_cuda.h"
#include "norms/multi_tensor_norms_cuda.h"

namespace {

using namespace curvlab;
using namespace curvlab::norms;

// n numbers, `offset` elements behind an allocation's start; the end is the allocation's end, to the byte.
struct Storage {
  Storage(std::int64_t n, int type, int offset, unsigned seed) {
    const int size = element_size(type);
    bytes.reset(new unsigned char[static_cast<size_t>((n + offset) * size)]);
    data = bytes.get() + offset * size;
    for (std::int64_t i = 0; i < n; ++i) {
      seed = seed * 1664525u + 1013904223u;
      // multiples of 1/16 in [-8, 8): exact in every type, and so are the sums that the reference makes
      const float value = static_cast<float>(static_cast<int>(seed >> 24) - 128) / 16.0f;
      values.push_back(value);
      put(i, type, value);
    }
  }
  void put(std::int64_t i, int type, float value) {
    unsigned char* at = data + i * element_size(type);
    const double wide = value;
    const __nv_bfloat16 brain(value);
    const __half half_precision(value);
    if (type == kFloat32) std::memcpy(at, &value, 4);
    if (type == kFloat64) std::memcpy(at, &wide, 8);
    if (type == kBFloat16) std::memcpy(at, &brain, 2);
    if (type == kFloat16) std::memcpy(at, &half_precision, 2);
  }
  std::unique_ptr<unsigned char[]> bytes;
  unsigned char* data;
  std::vector<double> values;
};

struct Launched {
  std::vector<double> out;
  unsigned ticket;
};

Launched run_norms(std::vector<NormEntry> entries, NormMode mode, int multiprocessors) {
  const auto tensors = static_cast<std::int64_t>(entries.size());
  const std::int64_t chunks = assign_cuda_chunks(entries.data(), tensors);
  const std::unique_ptr<double[]> workspace(new double[cuda_workspace_doubles(tensors, chunks)]);
  const std::unique_ptr<NormEntry[]> table(tensors > kLargeTable ? new NormEntry[tensors] : nullptr);
  Launched result{std::vector<double>((tensors + 1) * kColumns, -7.0), 0};
  // The second launch takes the ticket as the first left it. TSan, to which each CUDA thread is a thread, sees one.
  for (int launch = 0; launch < (simt::tsan::kEnabled ? 1 : 2); ++launch) {
    const char* error = launch_multi_tensor_norms({entries.data(), tensors, chunks, mode, workspace.get(), table.get(),
                                                   &result.ticket, result.out.data(), multiprocessors},
                                                  nullptr);
    if (error) throw simt::Fault(error);
  }
  return result;
}

bool is(double got, double want) { return std::fabs(got - want) <= 1e-13 * std::fmax(1.0, std::fabs(want)); }

bool right_row(const double* got, const std::vector<double>& x, const std::vector<double>& r, NormMode mode) {
  double l1 = 0, l2 = 0, linf = 0, nonzeros = 0, distance = 0, inner = 0, reference = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    l1 += std::fabs(x[i]);
    l2 += x[i] * x[i];
    linf = std::fmax(linf, std::fabs(x[i]));
    nonzeros += x[i] != 0;
    distance += (x[i] - r[i]) * (x[i] - r[i]);
    inner += x[i] * r[i];
    reference += r[i] * r[i];
  }
  bool right = is(got[kL2], std::sqrt(l2));
  if (mode != NormMode::kL2Only) right &= is(got[kL1], l1) && is(got[kLinf], linf) && is(got[kNonzeros], nonzeros);
  if (mode == NormMode::kWithReference)
    right &= is(got[kDistance], std::sqrt(distance)) && is(got[kInner], inner) &&
             is(got[kReferenceL2], std::sqrt(reference));
  return right;
}

// Tensors of the given sizes; `offset` and `reference_offset` in elements.
bool norms(const std::vector<std::int64_t>& sizes, int type, NormMode mode, int offset = 0, int reference_offset = 0,
           int multiprocessors = 1) {
  std::vector<Storage> x, r;
  std::vector<NormEntry> entries;
  std::vector<double> all_x, all_r;
  for (std::int64_t n : sizes) {
    const auto seed = static_cast<unsigned>(x.size());
    x.emplace_back(n, type, offset, 2 * seed);
    r.emplace_back(n, type, reference_offset, 2 * seed + 1);
  }
  for (size_t t = 0; t < x.size(); ++t) {
    const void* reference = mode == NormMode::kWithReference ? r[t].data : nullptr;
    entries.push_back({x[t].data, reference, sizes[t], 0, type});
    all_x.insert(all_x.end(), x[t].values.begin(), x[t].values.end());
    all_r.insert(all_r.end(), r[t].values.begin(), r[t].values.end());
  }
  const Launched got = run_norms(entries, mode, multiprocessors);
  bool right = got.ticket == 0 && right_row(&got.out[x.size() * kColumns], all_x, all_r, mode);
  for (size_t t = 0; t < x.size(); ++t) right &= right_row(&got.out[t * kColumns], x[t].values, r[t].values, mode);
  return right;
}

bool filters(const std::vector<std::pair<std::int64_t, std::int64_t>>& shapes, int type, int offset,
             int multiprocessors = 1) {
  std::vector<Storage> x;
  std::vector<FilterEntry> entries;
  std::int64_t rows = 0;
  for (const auto& [n, length] : shapes) {
    x.emplace_back(n * length, type, offset, static_cast<unsigned>(x.size()));
    entries.push_back({x.back().data, n, length, 0, 0, type});
    rows += n;
  }
  const auto tensors = static_cast<std::int64_t>(entries.size());
  const std::int64_t items = assign_items(entries.data(), tensors);
  const std::unique_ptr<FilterEntry[]> table(tensors > kFilterLargeTable ? new FilterEntry[tensors] : nullptr);
  const std::unique_ptr<double[]> out(new double[rows]);
  if (const char* error =
          launch_filter_norms({entries.data(), tensors, items, table.get(), out.get(), multiprocessors}, nullptr))
    throw simt::Fault(error);
  bool right = true;
  std::int64_t row = 0;
  for (size_t t = 0; t < shapes.size(); ++t)
    for (std::int64_t j = 0; j < shapes[t].first; ++j, ++row) {
      double sum = 0;
      for (std::int64_t i = 0; i < shapes[t].second; ++i) {
        const double value = x[t].values[j * shapes[t].second + i];
        sum += value * value;
      }
      right &= is(out[row], std::sqrt(sum));
    }
  return right;
}

void run_all() {
  const std::vector<std::int64_t> sizes = {1, 0, 5, 16384, 8193, 3, 20001, 0};
  const char* types[] = {"float32", "float64", "bfloat16", "float16"};
  for (int type = 0; type < 4; ++type) {
    const std::string name = types[type];
    report("with_reference " + name, norms(sizes, type, NormMode::kWithReference));
    // five long rows for four blocks: one block sums two, and must not overwrite what it still reads
    report("filter_norms " + name, filters({{3, 9}, {0, 4}, {5, 8200}, {9, 31}, {3, 0}}, type, 1));
    if (simt::tsan::kEnabled && type != kFloat32) continue;  // the types differ in addresses, not in what orders them
    report("norms " + name, norms(sizes, type, NormMode::kNorms));
    report("l2_only " + name, norms(sizes, type, NormMode::kL2Only, 1));
    report("with_reference, same offset " + name, norms({9, 4003}, type, NormMode::kWithReference, 1, 1));
    report("with_reference, other offset " + name, norms({9, 4003}, type, NormMode::kWithReference, 1, 0));
  }
  report("many blocks", norms({12 * 16384 + 5}, kFloat32, NormMode::kNorms, 0, 0, 100));
  report("nothing but empty tensors", norms({0, 0}, kFloat32, NormMode::kNorms));
  // not the first tensor: then the thread that stores its sums is not the one that reads them for the global row
  report("a tensor finished by a warp", norms({3, 20 * 16384}, kFloat32, NormMode::kWithReference));
  report("a tensor finished by the block", norms({1, 257 * 8192}, kFloat64, NormMode::kNorms));
  report("large parameter block", norms(std::vector<std::int64_t>(130, 3), kFloat32, NormMode::kWithReference));
  report("stored table", norms(std::vector<std::int64_t>(1003, 2), kFloat32, NormMode::kNorms));
  report("filter_norms, stored table",
         filters(std::vector<std::pair<std::int64_t, std::int64_t>>(643, {2, 3}), kFloat32, 0));
}

}  // namespace

int main(int argc, char** argv) { return run_cases(argc, argv, run_all); }
