// The kernels of norm.cpp. Tensors are float or bf16 by the kernel, or the residual stream (x, residual, grad_residual, dx) is float
// and all others bf16; strides are in elements; a row's numbers lie together.

#pragma once

#include <stdint.h>

namespace textok_fast {

struct Rows {  // (B, N, D)
  const void* data;
  int64_t batch_stride, row_stride;
};

struct Samples {  // (B, D)
  const void* data;
  int64_t batch_stride;
};

// r = x + gate * branch;  out = LayerNorm(r) * (offset + scale) + shift
struct NormForward {
  Rows x, branch;        // without branch.data: r = x, not written
  Samples gate, shift, scale;  // without gate.data: r = x + branch
  void* residual;        // (B, N, D), contiguous
  void* out;             // (B, N, D), contiguous
  int64_t rows, width;   // N, D
  float offset, eps;
  bool streaming;        // write past the cache; only for rows whose length is a multiple of 64 bytes
};

struct NormBackward {
  Rows grad, residual;          // of out; r, which was normalized
  Rows grad_residual, branch;   // data null without a residual; branch null without a gate
  Samples gate, scale;
  void *dx, *dbranch;           // (B, N, D), contiguous; dbranch null without a gate
  float *dshift, *dscale, *dgate;  // (B, chunks, scratch_stride(D)), sums over a chunk's rows; dgate null without a gate
  int64_t rows, width;          // N, D
  int64_t chunk_rows, chunks;   // of each sample: rows a chunk, and chunks
  float offset, eps;
  bool streaming;
};

// Working memory is four rows in fp32, this far apart, from an address that is a multiple of 64: whole vectors, none across a cache
// line; the 32 beyond keep the rows from lying a multiple of 4 KiB apart, which makes loads wait for stores.
static constexpr int64_t scratch_stride(int64_t width) { return (width + 31) / 32 * 32 + 32; }

struct NormFunctions {
  // Rows [begin, end) of the B * N.
  void (*forward)(const NormForward&, int64_t begin, int64_t end, float* scratch);
  // Chunks [begin, end) of the B * chunks.
  void (*backward)(const NormBackward&, int64_t begin, int64_t end, float* scratch);
  // Samples [begin, end): (B, chunks, scratch_stride(D)) to (B, D), contiguous, one chunk after the other.
  void (*reduce)(const float* partial, void* out, int64_t chunks, int64_t width, int64_t begin, int64_t end);
};

struct NormKernels {
  NormFunctions fp32, bf16, mixed;
};

extern const NormKernels norm_baseline, norm_avx2, norm_avx512;

}  // namespace textok_fast
