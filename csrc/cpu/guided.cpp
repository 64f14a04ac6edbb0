// guided_step on the CPU.

#include <cstdint>
#include <limits>
#include <optional>

#include <torch/csrc/stable/ops.h>

#include "isa.h"
#include "kernels/guided.h"
#include "ops.h"
#include "tensors.h"

namespace textok_fast {

namespace {

// Below this, waking a thread costs more than it saves.
constexpr int64_t kNumbersPerThread = 1 << 16;

Tensor dense(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

Float float_of(const char* name, const Tensor& tensor, bool half) {
  const ScalarType dtype = tensor.scalar_type();
  if (dtype == ScalarType::Float) return Float::fp32;
  if (dtype == ScalarType::BFloat16) return Float::bf16;
  STD_TORCH_CHECK(half && dtype == ScalarType::Half, name, " has the dtype ", torch::headeronly::toString(dtype));
  return Float::fp16;
}

}  // namespace

Tensor guided_step(
    const Tensor& output_,
    const Tensor& x_,
    const std::optional<Tensor>& noise_,
    const Tensor& table_,
    const Tensor& index,
    int64_t guided_channels,
    bool clip_denoised) {
  check_cpu("output", output_);
  check_cpu("x", x_);
  check_cpu("table", table_);
  check_cpu("index", index);
  check_dtype("table", table_, ScalarType::Float);
  check_dtype("index", index, ScalarType::Long);
  STD_TORCH_CHECK(table_.dim() == 2 && table_.size(1) == 8, "table must be (T, 8)");
  STD_TORCH_CHECK(index.numel() == 1, "index must have one element");
  const int64_t dims = x_.dim();
  STD_TORCH_CHECK(dims == 3 || dims == 4, "x must be (B, N, C) or (B, C, H, W)");
  STD_TORCH_CHECK(output_.dim() == dims, "output must have as many dimensions as x");
  const int64_t dim = dims == 3 ? 2 : 1, batch = x_.size(0), channels = x_.size(dim);
  STD_TORCH_CHECK(0 <= guided_channels && guided_channels <= channels, "guided_channels must be 0 to ", channels);
  for (int64_t i = 0; i < dims; ++i) {
    const bool may_be_double = i == 0 || i == dim;
    STD_TORCH_CHECK(
        output_.size(i) == x_.size(i) || (may_be_double && output_.size(i) == 2 * x_.size(i)),
        "output must be as x, or with twice its samples or channels");
  }
  const Tensor output = dense(output_), x = dense(x_), table = dense(table_);
  GuidedStep step{};
  step.output_type = float_of("output", output, true);
  step.x_type = float_of("x", x, false);
  step.output = output.const_data_ptr();
  step.x = x.const_data_ptr();
  std::optional<Tensor> noise;
  if (noise_.has_value()) {
    check_cpu("noise", *noise_);
    STD_TORCH_CHECK(noise_->dim() == dims, "noise must have x's shape");
    for (int64_t i = 0; i < dims; ++i) STD_TORCH_CHECK(noise_->size(i) == x.size(i), "noise must have x's shape");
    noise = dense(*noise_);
    step.noise_type = float_of("noise", *noise, false);
    step.noise = noise->const_data_ptr();
  }
  const Tensor result = dims == 3 ? empty({batch, x.size(1), channels}, x.scalar_type())
                                  : empty({batch, channels, x.size(2), x.size(3)}, x.scalar_type());
  step.result = result.mutable_data_ptr();
  const int64_t count = x.numel();
  if (count == 0) return result;

  const bool pair = output.size(0) != batch, learned = output.size(dim) != channels;
  step.width = dims == 3 ? channels : count / batch;
  step.guided = step.width / channels * guided_channels;
  step.pair = pair ? output.numel() / 2 : 0;
  if (!learned && (!pair || guided_channels == channels)) step.guided = step.width = count;  // nothing changes within it
  step.output_width = learned ? 2 * step.width : step.width;
  step.clip = clip_denoised;

  constexpr float nan = std::numeric_limits<float>::quiet_NaN();
  static const float outside[8] = {nan, nan, nan, nan, nan, nan, nan, nan};
  const int64_t row = *static_cast<const int64_t*>(index.const_data_ptr());
  step.coefficients =
      0 <= row && row < table.size(0) ? static_cast<const float*>(table.const_data_ptr()) + 8 * row : outside;

  const GuidedKernels& kernels = TEXTOK_CHOOSE(guided);
  torch::stable::parallel_for(0, count, kNumbersPerThread, [&](int64_t begin, int64_t end) { kernels.step(step, begin, end); });
  return result;
}

}  // namespace textok_fast
