// Kernels of quantize.cpp: the nearest code of each row, without the matrix of distances.

#pragma once

#include <stdint.h>

namespace textok_fast {

struct CodeSearch {
  const void* x;         // (rows, width) contiguous, float or bf16 by the function's type
  const void* codebook;  // (count, width) contiguous, likewise
  float* codes;          // (count, width): the codebook in fp32, normalized on request; may be the codebook itself
  float* squares;        // (count): |c|^2
  float* best;           // (splits, padded rows): the smallest distance in a part of the codebook
  int32_t* block;        // (splits, padded rows): which block of codes has it
  int64_t* index;        // (rows)
  int64_t rows, padded, width, count;
  int64_t codes_per_split, splits;  // parts of the codebook that threads search; the former a multiple of codes_per_block
  bool normalize;
};

struct CodeFunctions {
  // Codes to fp32 and |c|^2.
  void (*prepare)(const CodeSearch&, int64_t first_code, int64_t last_code);
  // A task is one group of rows in one part of the codebook: task = part * groups + group. `scratch` as scratch_floats says.
  void (*search)(const CodeSearch&, int64_t first_task, int64_t last_task, float* scratch);
  // Joins the parts and finds the code within its block; `scratch` has room for width floats.
  void (*finish)(const CodeSearch&, int64_t first_row, int64_t last_row, float* scratch);
};

struct QuantizeKernels {
  CodeFunctions fp32, bf16;
  int64_t rows_per_group, codes_per_block;
  int64_t (*scratch_floats)(int64_t width);
};

extern const QuantizeKernels quantize_baseline, quantize_avx2, quantize_avx512;

}  // namespace textok_fast
