// attention on the CPU.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>

#include <torch/csrc/stable/ops.h>

#include "attention.h"
#include "isa.h"
#include "kernels/attention.h"
#include "ops.h"
#include "tensors.h"

namespace textok_fast {

namespace {

constexpr int64_t kFewestQueries = 64;  // of a part: for each its head's keys are packed again

AttentionPart part_of(const Tensor& tensor) {  // (B, N, H, D)
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

const AttentionKernels& chosen([[maybe_unused]] bool is_bf16) {
#ifdef TEXTOK_X86_KERNELS
  if (is_bf16 && has_bf16_products()) return attention_avx512bf16;
#endif
  return TEXTOK_CHOOSE(attention);
}

// Fills `result` (B, N_q, H D), contiguous.
void run(ShortAttention& problem, int64_t batch, const Tensor& result) {
  problem.result = result.mutable_data_ptr();
  problem.scale = 1 / std::sqrt(static_cast<float>(problem.dim));
  if (result.numel() == 0) return;
  const AttentionKernels& kernels = chosen(problem.is_bf16);
  const int64_t keys = problem.keys, queries = problem.queries, dim = problem.dim;
  const int64_t bytes = 4 * (keys + queries) * dim + 2 * queries * keys;  // a score costs about as much as half a number
  const int64_t heads = batch * problem.heads, threads = torch::stable::get_num_threads();
  problem.parts = std::min((threads + heads - 1) / heads, (queries + kFewestQueries - 1) / kFewestQueries);
  torch::stable::parallel_for(0, heads * problem.parts, grain(bytes / problem.parts), [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> scratch(new float[kernels.scratch_floats(keys, dim)]);
    kernels.run(problem, begin, end, scratch.get());
  });
}

}  // namespace

Tensor attention(const Tensor& q_, const Tensor& k_, const Tensor& v_, const std::optional<Tensor>& mask_) {
  check_cpu("q", q_);
  STD_TORCH_CHECK(q_.dim() == 4 && k_.dim() == 4, "q and k must be (B, N, H, D)");
  const int64_t batch = q_.size(0), queries = q_.size(1), heads = q_.size(2), dim = q_.size(3), keys = k_.size(1);
  const ScalarType dtype = q_.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "q has the dtype ", torch::headeronly::toString(dtype));
  const auto checked = [&](const char* name, const Tensor& tensor) {
    check_cpu(name, tensor);
    check_dtype(name, tensor, dtype);
    check_sizes(name, tensor, {batch, keys, heads, dim});
    return dense_rows(tensor);
  };
  STD_TORCH_CHECK(keys > 0 && dim > 0, "k must have at least one key of at least one channel");
  const Tensor q = dense_rows(q_), k = checked("k", k_), v = checked("v", v_);

  ShortAttention problem = {};
  problem.q = part_of(q);
  problem.k = part_of(k);
  problem.v = part_of(v);
  problem.heads = heads;
  problem.queries = queries;
  problem.keys = keys;
  problem.dim = dim;
  problem.is_bf16 = dtype == ScalarType::BFloat16;
  Tensor mask;
  if (mask_.has_value()) {
    check_cpu("mask", *mask_);
    check_dtype("mask", *mask_, ScalarType::Bool);
    check_sizes("mask", *mask_, {batch, keys});
    mask = mask_->is_contiguous() ? *mask_ : torch::stable::contiguous(*mask_);
    problem.mask = static_cast<const bool*>(mask.const_data_ptr());
  }
  const Tensor result = empty({batch, queries, heads * dim}, dtype);
  run(problem, batch, result);
  return result;
}

Tensor self_attention(const Tensor& qkv, int64_t heads) {
  const int64_t batch = qkv.size(0), rows = qkv.size(1), width = qkv.size(2) / 3, dim = width / heads;
  ShortAttention problem = {};
  problem.is_bf16 = qkv.scalar_type() == ScalarType::BFloat16;
  const auto part = [&](int64_t index) -> AttentionPart {
    const char* numbers = static_cast<const char*>(qkv.const_data_ptr()) + index * width * (problem.is_bf16 ? 2 : 4);
    return {numbers, rows * 3 * width, 3 * width, dim};
  };
  problem.q = part(0);
  problem.k = part(1);
  problem.v = part(2);
  problem.heads = heads;
  problem.queries = problem.keys = rows;
  problem.dim = dim;
  const Tensor result = empty({batch, rows, width}, qkv.scalar_type());
  run(problem, batch, result);
  return result;
}

}  // namespace textok_fast
