// Kernel of guided.cpp: guidance and one update of a sampler.

#pragma once

#include <stdint.h>

namespace textok_fast {

enum class Float { fp32, bf16, fp16 };

struct GuidedStep {
  const void *output, *x, *noise;  // contiguous; noise null: no noise term
  void* result;
  const float* coefficients;  // a row of the table: s, kx, km, a, b, low, high, n
  int64_t width;              // numbers of x that lie together, (C) tokens or (C, H, W) images ...
  int64_t output_width;       // ... and of the output: as many, or with those of a learned variance behind them twice as many
  int64_t guided;             // the first so many of them are guided
  int64_t pair;               // from the conditional half to the unconditional, in numbers; 0: there is no pair
  Float output_type, x_type, noise_type;  // the result's is x's; x and noise are fp32 or bf16
  bool clip;
};

struct GuidedKernels {
  // Numbers of x from `begin` to before `end`.
  void (*step)(const GuidedStep&, int64_t begin, int64_t end);
};

extern const GuidedKernels guided_baseline, guided_avx2, guided_avx512;

}  // namespace textok_fast
