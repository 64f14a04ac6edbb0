// Kernel of attention.cpp: softmax(q k^T / sqrt(D)) v over few keys.

#pragma once

#include <stdint.h>

namespace textok_fast {

struct AttentionPart {
  const void* numbers;
  int64_t sample, row, head;  // strides, in numbers; those of a head's row lie side by side
};

struct ShortAttention {
  AttentionPart q, k, v;
  void* result;      // (B, N_q, H D), contiguous
  const bool* mask;  // (B, N_k), contiguous; null: all keys
  int64_t heads, queries, keys, dim;
  int64_t parts;  // into which the queries of one head are divided
  float scale;    // 1 / sqrt(D)
  bool is_bf16;
};

struct AttentionKernels {
  // Parts (b H + h) parts + p from `begin` to before `end`. `scratch` has room for scratch_floats(keys, dim).
  void (*run)(const ShortAttention&, int64_t begin, int64_t end, float* scratch);
  int64_t (*scratch_floats)(int64_t keys, int64_t dim);
};

extern const AttentionKernels attention_baseline, attention_avx2, attention_avx512, attention_avx512bf16;

}  // namespace textok_fast
