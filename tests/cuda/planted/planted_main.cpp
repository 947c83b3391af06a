// SPDX-License-Identifier: Apache-2.0
// planted_main FAULT ORDER SEED: runs the kernel that holds the fault (0: all kernels, no fault) on small data and
// compares with a plain loop. Exit status 0 right, 3 wrong values, 4 the harness stopped it; a sanitizer has its own.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "gram.cuh"
#include "row_normalize.cuh"
#include "ticket_sum.cuh"
#include "window_sum.cuh"

namespace {

std::vector<float> numbers(size_t n) {
  std::vector<float> v(n);
  unsigned x = 12345;
  for (float& f : v) f = static_cast<float>((x = x * 1664525u + 1013904223u) >> 8) * 0x1p-23f - 1.0f;
  return v;
}

bool close(double got, double want) { return std::fabs(got - want) <= 1e-5 * std::fmax(1.0, std::fabs(want)); }

template <int kFault>
bool row_normalize(int rows, int cols) {
  const std::vector<float> x = numbers(size_t(rows) * cols);
  std::vector<float> y(x.size(), -7.0f);
  CURVLAB_LAUNCH((planted::row_normalize_kernel<kFault>), rows, 128, 0, nullptr, x.data(), y.data(), cols);
  bool right = true;
  for (int r = 0; r < rows; ++r) {
    double sum = 0.0;
    for (int c = 0; c < cols; ++c) sum += double(x[r * cols + c]) * x[r * cols + c];
    for (int c = 0; c < cols; ++c) right &= close(y[r * cols + c], x[r * cols + c] / std::sqrt(sum));
  }
  return right;
}

template <int kFault>
bool gram(int n, int k) {
  const std::vector<float> x = numbers(size_t(n) * k);
  std::vector<float> g(size_t(n) * n, -7.0f);
  const unsigned tiles = (n + planted::kTile - 1) / planted::kTile;
  CURVLAB_LAUNCH((planted::gram_kernel<kFault>), dim3(tiles, tiles), dim3(planted::kTile, planted::kTile), 0, nullptr,
                 x.data(), g.data(), n, k);
  bool right = true;
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < n; ++j) {
      double sum = 0.0;
      for (int c = 0; c < k; ++c) sum += double(x[i * k + c]) * x[j * k + c];
      right &= close(g[i * n + j], sum);
    }
  return right;
}

template <int kFault>
bool ticket_sum(int blocks, int n) {
  const std::vector<float> x = numbers(n);
  std::vector<double> partial(blocks, std::nan(""));
  double want = 0.0;
  for (float f : x) want += double(f) * f;
  unsigned ticket = 0;
  bool right = true;
  for (int launch = 0; launch < 2; ++launch) {  // the second finds the ticket as the first left it
    double got = -7.0;
    CURVLAB_LAUNCH((planted::ticket_sum_kernel<kFault>), blocks, 64, 64 * sizeof(double), nullptr, x.data(), n,
                   partial.data(), &ticket, &got);
    right &= close(got, want) && ticket == 0;
  }
  return right;
}

template <int kFault>
bool window_sum(int channels, int n) {
  const std::vector<float> x = numbers(size_t(channels) * n);
  std::vector<float> y(n, -7.0f);
  CURVLAB_LAUNCH((planted::window_sum_kernel<kFault>), (n + planted::kPositions - 1) / planted::kPositions,
                 planted::kPositions, 0, nullptr, x.data(), y.data(), channels, n);
  bool right = true;
  for (int i = 0; i < n; ++i) {
    double sum = 0.0;
    for (int c = 0; c < channels; ++c)
      for (int d = -1; d <= 1; ++d)
        if (i + d >= 0 && i + d < n) sum += x[c * n + i + d];
    right &= close(y[i], sum);
  }
  return right;
}

bool run(int fault) {
  switch (fault) {
    case 0:
      return row_normalize<0>(3, 260) && row_normalize<0>(2, 257) && gram<0>(21, 35) && ticket_sum<0>(5, 1003) &&
             window_sum<0>(5, 150);
    case 1:
      return row_normalize<1>(3, 260);
    case 2:
      return row_normalize<2>(3, 260);
    case 3:
      return row_normalize<3>(3, 260);
    case 4:
      return gram<4>(21, 35);
    case 5:
      return gram<5>(21, 35);
    case 6:
      return gram<6>(21, 35);
    case 7:
      return ticket_sum<7>(5, 1003);
    case 8:
      return ticket_sum<8>(5, 1003);
    case 9:
      return row_normalize<9>(3, 257);
    case 10:
      return ticket_sum<10>(5, 1003);
    case 11:
      return ticket_sum<11>(5, 1003);
    case 12:
      return window_sum<12>(5, 150);
    case 13:
      return window_sum<13>(5, 150);
    case 14:
      return window_sum<14>(5, 150);
    case 15:
      return window_sum<15>(5, 150);
  }
  std::fprintf(stderr, "no fault %d\n", fault);
  return false;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  simt::options = {static_cast<simt::Order>(std::atoi(argv[2])), static_cast<uint64_t>(std::atoll(argv[3]))};
  try {
    const bool right = run(std::atoi(argv[1]));
    std::printf("%s: %llu threads, %llu switches\n", right ? "right" : "WRONG VALUES",
                static_cast<unsigned long long>(simt::statistics.threads),
                static_cast<unsigned long long>(simt::statistics.switches));
    return right ? 0 : 3;
  } catch (const simt::Fault& fault) {
    std::fprintf(stderr, "FAULT %s\n", fault.what());
    return 4;
  }
}
