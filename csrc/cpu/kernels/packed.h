// Kernels of packed.cpp: products with weights laid out for them, x W^T + bias and an activation.
//
// A panel is kColumns outputs of W. Panels follow each other, and within one so do steps of four bytes of every output's row (one
// fp32, two bf16 or four int8 numbers), so that a product reads the weights from first to last. Rows of x are laid out likewise,
// in groups of kRows: a step's word of every row of the group, then the next step's.

#pragma once

#include <stdint.h>

namespace textok_fast {

enum class Activation { none, gelu, gelu_tanh };

struct PackWeight {
  const void* weight;  // (out, in) contiguous
  uint32_t* packed;    // (panels, steps, columns per panel)
  int64_t out, in;
};

struct PackedProduct {
  const void* x;  // rows of `in` numbers; row i begins i / inner * outer_stride + i % inner * inner_stride numbers from here
  int64_t inner, inner_stride, outer_stride;
  int64_t in, out, steps;
  int64_t first_row, last_row;  // that `words` has
  const uint32_t* packed;
  const float* scales;  // (out): kind int8
  const void* bias;     // (out), or null
  void* result;         // (rows, out) contiguous, of x's type
  uint32_t* words;      // (groups, steps * words_per_step, rows_per_group): x as the products take it
  float* row_scales;    // (last_row - first_row): kind int8
  uint32_t* starts;     // (last_row - first_row): what the sums of a row begin with
  int64_t segments;     // parts that the groups are divided into; a task is a segment of one panel: panel * segments + segment
  Activation activation;
  bool x_is_bf16, bias_is_bf16;
};

struct PackedFunctions {
  void (*pack)(const PackWeight&, int64_t first_panel, int64_t last_panel);
  // Groups of rows to words; those of `first_row` are group 0. `scratch`: see padding.
  void (*take_rows)(const PackedProduct&, int64_t first_group, int64_t last_group, uint32_t* scratch);
  void (*multiply)(const PackedProduct&, int64_t first_task, int64_t last_task, uint32_t* sums);
  int64_t words_per_step;
};

struct PackedKernels {
  PackedFunctions kinds[3];  // fp32, bf16, int8
  int64_t rows_per_group, columns_per_panel;
  int64_t padding;  // `scratch` has so many words more than a row has steps, for each row of a group
};

extern const PackedKernels packed_baseline, packed_avx2, packed_avx512;
extern const PackedKernels packed_avx512vnni, packed_avx512bf16;  // one instruction more than packed_avx512, for int8 and bf16

}  // namespace textok_fast
