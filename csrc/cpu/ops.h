// The operations of this library on the CPU, as PyTorch calls them. What each computes and takes: textok_fast/ops/*.py.

#pragma once

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/tensor.h>

namespace textok_fast {

using torch::stable::Tensor;

std::string build_info();

// norm.cpp
Tensor layer_norm_modulate(const Tensor& x, const Tensor& shift, const Tensor& scale, double eps);
std::tuple<Tensor, Tensor, Tensor> layer_norm_modulate_backward(
    const Tensor& grad, const Tensor& x, const Tensor& scale, double eps);
std::tuple<Tensor, Tensor> gated_residual_layer_norm_modulate(
    const Tensor& x,
    const Tensor& branch,
    const std::optional<Tensor>& gate,
    const Tensor& shift,
    const Tensor& scale,
    double offset,
    double eps);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_residual_layer_norm_modulate_backward(
    const Tensor& grad_residual,
    const Tensor& grad,
    const Tensor& residual,
    const Tensor& branch,
    const std::optional<Tensor>& gate,
    const Tensor& scale,
    double offset,
    double eps);

// patches.cpp
Tensor patchify_uint8(const Tensor& images, int64_t patch_size, torch::headeronly::ScalarType dtype);
Tensor unpatchify_uint8(const Tensor& patches, int64_t patch_size, int64_t rows);

// quantize.cpp
Tensor vq_nearest(const Tensor& x, const Tensor& codebook, bool normalize);

// packed.cpp
Tensor pack_linear(const Tensor& weight, int64_t kind);
Tensor packed_linear(
    const Tensor& x,
    const Tensor& packed,
    const std::optional<Tensor>& scales,
    const std::optional<Tensor>& bias,
    int64_t out_features,
    int64_t kind,
    std::string activation);

// attention.cpp
Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask);

// block.cpp
std::tuple<Tensor, Tensor> packed_block(
    const Tensor& x,
    const Tensor& hidden,
    const Tensor& modulation,
    const Tensor& shift,
    const Tensor& scale,
    std::vector<Tensor> weights,
    int64_t heads,
    int64_t kind,
    std::string activation,
    double eps);

// guided.cpp
Tensor guided_step(
    const Tensor& output,
    const Tensor& x,
    const std::optional<Tensor>& noise,
    const Tensor& table,
    const Tensor& index,
    int64_t guided_channels,
    bool clip_denoised);

}  // namespace textok_fast
