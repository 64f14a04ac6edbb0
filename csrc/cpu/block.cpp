// packed_block: a whole DiT block in one call. With few tokens a block takes a millisecond or two, and its seven operations called
// one by one from Python a tenth of that.

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "attention.h"
#include "ops.h"
#include "tensors.h"

namespace textok_fast {

namespace {

struct Linear {
  const Tensor &packed, &bias;
  std::optional<Tensor> scales;  // int8

  Tensor operator()(const Tensor& x, int64_t kind, std::string activation = "none") const {
    return packed_linear(x, packed, scales, bias, bias.size(0), kind, std::move(activation));
  }
};

}  // namespace

std::tuple<Tensor, Tensor> packed_block(
    const Tensor& x,
    const Tensor& hidden,
    const Tensor& modulation_,
    const Tensor& shift,
    const Tensor& scale,
    std::vector<Tensor> weights,
    int64_t heads,
    int64_t kind,
    std::string activation,
    double eps) {
  STD_TORCH_CHECK(x.dim() == 3 && hidden.dim() == 3, "x and hidden must be (B, N, D)");
  const int64_t width = hidden.size(2), each = kind == 2 ? 3 : 2;
  STD_TORCH_CHECK(heads > 0 && width % heads == 0, "heads must divide D = ", width);
  STD_TORCH_CHECK(static_cast<int64_t>(weights.size()) == 4 * each, "weights must be 4 times ", each, " tensors");
  check_sizes("modulation", modulation_, {x.size(0), 6 * width});
  const auto linear = [&](size_t index) -> Linear {
    const Tensor* first = &weights[index * static_cast<size_t>(each)];
    return {first[0], first[1], each == 3 ? std::optional<Tensor>(first[2]) : std::nullopt};
  };
  const Linear qkv = linear(0), proj = linear(1), fc1 = linear(2), fc2 = linear(3);
  STD_TORCH_CHECK(qkv.bias.size(0) == 3 * width, "the first weight must have 3 D outputs");
  Tensor modulation = modulation_;
  const auto part = [&](int64_t index) { return torch::stable::narrow(modulation, 1, index * width, width); };

  const Tensor branch = proj(self_attention(qkv(hidden, kind), heads), kind);
  const auto [between, inner] = gated_residual_layer_norm_modulate(x, branch, part(2), part(3), part(4), 1, eps);
  return gated_residual_layer_norm_modulate(
      between, fc2(fc1(inner, kind, std::move(activation)), kind), part(5), shift, scale, 1, eps);
}

}  // namespace textok_fast
