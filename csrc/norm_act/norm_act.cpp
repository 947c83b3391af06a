// SPDX-License-Identifier: Apache-2.0
// batch_norm_relu and its backward on the CPU. Sums are made by blocks whose bounds depend on the sizes only, and added
// in their order: the same bits for any number of threads.
#include "norm_act/norm_act.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "norm_act/arguments.h"
#include "norm_act/cpu_kernels.h"
#include "norm_act/dispatch.h"

namespace curvlab::norm_act {
namespace {

// At the least, of a block: its sums must be worth writing down, and a thread worth waking for it. 128 KiB: what one
// pass over a block leaves in the second cache is what the block's next tensor needs.
constexpr std::int64_t kBlockElements = 32768;

// Blocks of whole planes; neighbors in memory are neighbors in a block.
class Blocks {
 public:
  explicit Blocks(const Planes& planes) : planes_(planes) {
    const std::int64_t plane = std::max<std::int64_t>(planes.plane(), 1);
    const std::int64_t widest = std::min(kMaxBlockChannels, planes.channels);
    block_channels_ = std::clamp<std::int64_t>(kBlockElements / plane, 1, widest);
    block_images_ = std::clamp<std::int64_t>(kBlockElements / (plane * block_channels_), 1, planes.images);
    by_channel_ = (planes.channels + block_channels_ - 1) / block_channels_;
    by_image_ = (planes.images + block_images_ - 1) / block_images_;
  }

  std::int64_t count() const { return by_channel_ * by_image_; }
  std::int64_t by_image() const { return by_image_; }

  Block at(std::int64_t index) const {
    const std::int64_t image = index / by_channel_ * block_images_, channel = index % by_channel_ * block_channels_;
    return {image, std::min(image + block_images_, planes_.images), channel,
            std::min(channel + block_channels_, planes_.channels)};
  }

  // Where the block's sums stand in [by_image, channels].
  std::int64_t row(std::int64_t index) const {
    return index / by_channel_ * planes_.channels + index % by_channel_ * block_channels_;
  }

 private:
  Planes planes_;
  std::int64_t block_channels_, block_images_, by_channel_, by_image_;
};

template <class Body>
void for_blocks(const Blocks& blocks, const Body& body) {
  at::parallel_for(0, blocks.count(), 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t index = begin; index < end; ++index) body(index);
  });
}

// From the last block to the first: the cache still holds the end of what the sums have just read.
template <class Body>
void for_blocks_backwards(const Blocks& blocks, const Body& body) {
  for_blocks(blocks, [&](std::int64_t index) { body(blocks.at(blocks.count() - 1 - index)); });
}

// body(block, sums of its channels), then each channel's sums over the blocks.
template <class Body>
std::vector<SumPair> sum_blocks(const Planes& planes, const Blocks& blocks, const Body& body) {
  std::vector<SumPair> parts(static_cast<std::size_t>(blocks.by_image() * planes.channels));
  for_blocks(blocks, [&](std::int64_t index) { body(blocks.at(index), parts.data() + blocks.row(index)); });
  std::vector<SumPair> total(static_cast<std::size_t>(planes.channels), SumPair{0.0, 0.0});
  for (std::size_t i = 0; i < parts.size(); ++i) {
    SumPair& sum = total[i % total.size()];
    sum.first += parts[i].first;
    sum.second += parts[i].second;
  }
  return total;
}

Planes planes_of(const at::Tensor& x, bool pool) { return {x.size(0), x.size(1), x.size(2), x.size(3), pool}; }

int type_index(const at::Tensor& x) { return x.scalar_type() == at::kDouble ? 1 : 0; }

// [C] as doubles; `missing` where there is none.
std::vector<double> doubles(const OptionalTensor& tensor, std::int64_t channels, double missing) {
  std::vector<double> values(static_cast<std::size_t>(channels), missing);
  if (!given(tensor)) return values;
  const at::Tensor wide = tensor->to(at::kDouble).contiguous();
  std::copy_n(wide.const_data_ptr<double>(), channels, values.begin());
  return values;
}

// The kernels' numbers of every channel. The center is the mean in their precision, and what it lost is put right in
// the offset: else z of data far from zero would lose digits.
template <class scalar_t>
std::vector<ChannelTerms> channel_terms(const OptionalTensor& weight, const OptionalTensor& bias,
                                        const at::Tensor& mean, const at::Tensor& inv_std) {
  const std::int64_t channels = mean.size(0);
  const std::vector<double> weights = doubles(weight, channels, 1.0), biases = doubles(bias, channels, 0.0);
  const double *means = mean.const_data_ptr<double>(), *scales = inv_std.const_data_ptr<double>();
  std::vector<ChannelTerms> terms(static_cast<std::size_t>(channels));
  for (std::int64_t c = 0; c < channels; ++c) {
    const double center = static_cast<double>(static_cast<scalar_t>(means[c])), gain = weights[c] * scales[c];
    terms[c] = {center, gain, biases[c] - (means[c] - center) * gain, 0.0, 0.0};
  }
  return terms;
}

std::vector<ChannelTerms> channel_terms(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                                        const at::Tensor& mean, const at::Tensor& inv_std) {
  return x.scalar_type() == at::kDouble ? channel_terms<double>(weight, bias, mean, inv_std)
                                        : channel_terms<float>(weight, bias, mean, inv_std);
}

// ---- forward
// A number near each channel's mean, so that a sum of squares loses no digits to it: the mean of its first few values.
template <class scalar_t>
std::vector<double> near_means(const at::Tensor& x) {
  const Planes planes = planes_of(x, false);
  const std::int64_t count = std::min<std::int64_t>(planes.plane(), 64);
  std::vector<double> shift(static_cast<std::size_t>(planes.channels));
  for (std::int64_t c = 0; c < planes.channels; ++c) {
    const scalar_t* values = x.const_data_ptr<scalar_t>() + c * planes.plane();
    double sum = 0.0;
    for (std::int64_t i = 0; i < count; ++i) sum += static_cast<double>(values[i]);
    shift[c] = sum / static_cast<double>(count);
  }
  return shift;
}

template <class scalar_t>
void update_running(const at::Tensor& running, const std::vector<double>& found, double momentum) {
  scalar_t* values = running.mutable_data_ptr<scalar_t>();
  for (std::size_t c = 0; c < found.size(); ++c) {
    scalar_t& value = values[static_cast<std::int64_t>(c) * running.stride(0)];
    value = static_cast<scalar_t>(momentum * found[c] + (1.0 - momentum) * static_cast<double>(value));
  }
}

void update_running(const OptionalTensor& running, const std::vector<double>& found, double momentum) {
  if (!given(running)) return;
  running->scalar_type() == at::kDouble ? update_running<double>(*running, found, momentum)
                                        : update_running<float>(*running, found, momentum);
  running->unsafeGetTensorImpl()->bump_version();
}

struct Statistics {
  std::vector<double> mean, var, unbiased;
};

Statistics batch_statistics(const at::Tensor& x, const Planes& planes, const Blocks& blocks) {
  const std::vector<double> shift = type_index(x) == 1 ? near_means<double>(x) : near_means<float>(x);
  const auto kernel = cpu_kernels().statistics[type_index(x)];
  const std::vector<SumPair> sums = sum_blocks(planes, blocks, [&](const Block& block, SumPair* parts) {
    kernel(planes, x.const_data_ptr(), shift.data(), block, parts);
  });
  const double count = static_cast<double>(planes.images * planes.plane());
  Statistics found;
  for (std::size_t c = 0; c < sums.size(); ++c) {
    const double moved = sums[c].first / count, squares = sums[c].second - sums[c].first * moved;
    const double positive = squares < 0.0 ? 0.0 : squares;  // NaN stays
    found.mean.push_back(shift[c] + moved);
    found.var.push_back(positive / count);
    found.unbiased.push_back(positive / (count - 1.0));
  }
  return found;
}

ThreeTensors batch_norm_relu_cpu(const at::Tensor& x_given, const OptionalTensor& weight, const OptionalTensor& bias,
                                 const OptionalTensor& running_mean, const OptionalTensor& running_var, bool training,
                                 double momentum, double eps, bool pool) {
  check_forward(x_given, weight, bias, running_mean, running_var, training, pool);
  const at::Tensor x = x_given.contiguous();
  const Planes planes = planes_of(x, pool);
  at::Tensor out = at::empty({planes.images, planes.channels, planes.out_height(), planes.out_width()}, x.options());
  at::Tensor mean = at::zeros({planes.channels}, x.options().dtype(at::kDouble)), inv_std = mean.clone();
  if (x.numel() == 0) return {out, mean, inv_std};  // nothing to learn from: running statistics stay, as torch's
  const Blocks blocks(planes);
  Statistics found;
  if (training) {
    found = batch_statistics(x, planes, blocks);
    update_running(running_mean, found.mean, momentum);
    update_running(running_var, found.unbiased, momentum);
  } else {
    found.mean = doubles(running_mean, planes.channels, 0.0);
    found.var = doubles(running_var, planes.channels, 0.0);
  }
  for (std::int64_t c = 0; c < planes.channels; ++c) {
    mean.mutable_data_ptr<double>()[c] = found.mean[c];
    inv_std.mutable_data_ptr<double>()[c] = 1.0 / std::sqrt(found.var[c] + eps);
  }
  const std::vector<ChannelTerms> terms = channel_terms(x, weight, bias, mean, inv_std);
  const ForwardWork work{planes, x.const_data_ptr(), out.mutable_data_ptr(), terms.data()};
  const auto kernel = cpu_kernels().forward[type_index(x)];
  for_blocks_backwards(blocks, [&](const Block& block) { kernel(work, block); });
  return {out, mean, inv_std};
}

// ---- backward
ThreeTensors batch_norm_relu_backward_cpu(const at::Tensor& grad_given, const at::Tensor& x_given,
                                          const OptionalTensor& weight, const OptionalTensor& bias,
                                          const at::Tensor& mean_given, const at::Tensor& inv_std_given, bool training,
                                          bool pool) {
  check_backward(grad_given, x_given, weight, bias, mean_given, inv_std_given, pool);
  const at::Tensor grad = grad_given.contiguous(), x = x_given.contiguous();
  const at::Tensor mean = mean_given.contiguous(), inv_std = inv_std_given.contiguous();
  const Planes planes = planes_of(x, pool);
  at::Tensor gx = at::empty(x.sizes(), x.options());
  at::Tensor sums_by = at::zeros({2, planes.channels}, x.options().dtype(at::kDouble));  // gweight, gbias
  if (x.numel() == 0) return {gx, sums_by[0].to(x.scalar_type()), sums_by[1].to(x.scalar_type())};
  const Blocks blocks(planes);
  std::vector<ChannelTerms> terms = channel_terms(x, weight, bias, mean, inv_std);
  const BackwardWork work{planes,  x.const_data_ptr(), grad.const_data_ptr(), gx.mutable_data_ptr(), terms.data(),
                          training};
  const auto sum_kernel = cpu_kernels().backward_sums[type_index(x)];
  const std::vector<SumPair> sums =
      sum_blocks(planes, blocks, [&](const Block& block, SumPair* parts) { sum_kernel(work, block, parts); });
  const double count = static_cast<double>(planes.images * planes.plane());
  const double *means = mean.const_data_ptr<double>(), *scales = inv_std.const_data_ptr<double>();
  double* gradients = sums_by.mutable_data_ptr<double>();
  for (std::int64_t c = 0; c < planes.channels; ++c) {
    const double lost = means[c] - terms[c].center;  // x - mean = (x - center) - lost
    const double centered = sums[c].second - lost * sums[c].first;
    gradients[c] = centered * scales[c];
    gradients[planes.channels + c] = sums[c].first;
    terms[c].slope = terms[c].gain * scales[c] * scales[c] * centered / count;
    terms[c].level = terms[c].gain * sums[c].first / count - lost * terms[c].slope;
  }
  const auto kernel = cpu_kernels().backward[type_index(x)];
  for_blocks_backwards(blocks, [&](const Block& block) { kernel(work, block); });
  return {gx, sums_by[0].to(x.scalar_type()), sums_by[1].to(x.scalar_type())};
}

}  // namespace
}  // namespace curvlab::norm_act

TORCH_LIBRARY_IMPL(curvlab, CPU, m) {
  m.impl("batch_norm_relu", curvlab::norm_act::batch_norm_relu_cpu);
  m.impl("batch_norm_relu_backward", curvlab::norm_act::batch_norm_relu_backward_cpu);
}
