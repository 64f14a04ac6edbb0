// Kernels of patches.cpp: pictures of bytes to patches of numbers in [-1, 1], and back.
//
// A strip is one row of patches of one picture; `scratch` is room for strip_scratch bytes.

#pragma once

#include <stdint.h>

namespace textok_fast {

struct Patchify {
  const uint8_t* images;  // (B, H, W, 3), any strides
  int64_t batch_stride, row_stride, column_stride, channel_stride;
  void* patches;          // (B, strips * columns, 3 * p * p) contiguous
  int64_t strips, columns, patch_size;
  bool streaming;         // write past the cache; strips begin at multiples of 64 bytes
};

struct Unpatchify {
  const void* patches;  // (B, strips * columns, 3 * p * p) contiguous
  uint8_t* images;      // (B, H, W, 3) contiguous
  int64_t columns, patch_size;
};

struct PatchesKernels {
  struct Functions {
    void (*patchify)(const Patchify&, int64_t first_strip, int64_t last_strip, uint8_t* scratch);
    void (*unpatchify)(const Unpatchify&, int64_t first_strip, int64_t last_strip, uint8_t* scratch);
  };
  Functions fp32, bf16, fp16;
};

extern const PatchesKernels patches_baseline, patches_avx2, patches_avx512;

// Steps write whole vectors of 16 bytes where fewer are meant, and what follows overwrites the rest.
constexpr int64_t kOvershoot = 16;

// Three planes of p lines, and the strip in the order of patches.
static inline int64_t strip_scratch(int64_t columns, int64_t patch_size) {
  return 3 * patch_size * (columns * patch_size + kOvershoot) + 3 * patch_size * patch_size * columns + kOvershoot;
}

}  // namespace textok_fast
