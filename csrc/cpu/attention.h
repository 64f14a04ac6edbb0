// Attention of packed projections for other launchers.

#pragma once

#include <torch/csrc/stable/tensor.h>

namespace textok_fast {

// qkv (B, N, 3 D) float32 or bfloat16, contiguous: queries, keys and values of `heads` heads -> (B, N, D).
torch::stable::Tensor self_attention(const torch::stable::Tensor& qkv, int64_t heads);

}  // namespace textok_fast
