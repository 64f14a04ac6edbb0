// patchify_uint8 and unpatchify_uint8 on the CPU.

#include <cstdint>
#include <memory>

#include <torch/csrc/stable/ops.h>

#include "isa.h"
#include "kernels/patches.h"
#include "ops.h"
#include "tensors.h"

namespace textok_fast {

namespace {

// Patches of more than this leave the caches before anyone reads them: they are written past them.
constexpr int64_t kStreamingBytes = 16 << 20;
// Far above any picture's; 3 * p * p stays far below the largest int64_t.
constexpr int64_t kLargestPatch = 1 << 15;

const PatchesKernels::Functions& functions_for(ScalarType dtype) {
  const PatchesKernels& kernels = TEXTOK_CHOOSE(patches);
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
      "patches must be float32, bfloat16 or float16, got ", torch::headeronly::toString(dtype));
  return dtype == ScalarType::Float ? kernels.fp32 : dtype == ScalarType::BFloat16 ? kernels.bf16 : kernels.fp16;
}

int64_t size_of(ScalarType dtype) { return dtype == ScalarType::Float ? 4 : 2; }

// The same amount of memory for every strip, so `run` is given one scratch for a range of them.
template <typename F>
void for_strips(int64_t strips, int64_t columns, int64_t patch_size, ScalarType dtype, const F& run) {
  const int64_t bytes = 3 * patch_size * patch_size * columns * (1 + size_of(dtype));
  torch::stable::parallel_for(0, strips, grain(bytes), [&](int64_t begin, int64_t end) {
    const std::unique_ptr<uint8_t[]> scratch(new uint8_t[strip_scratch(columns, patch_size)]);
    run(begin, end, scratch.get());
  });
}

}  // namespace

Tensor patchify_uint8(const Tensor& images, int64_t patch_size, ScalarType dtype) {
  check_cpu("images", images);
  check_dtype("images", images, ScalarType::Byte);
  STD_TORCH_CHECK(images.dim() == 4 && images.size(3) == 3, "images must be (B, H, W, 3)");
  const int64_t p = patch_size, height = images.size(1), width = images.size(2);
  STD_TORCH_CHECK(p <= kLargestPatch, "patch_size ", p, " is larger than ", kLargestPatch);
  STD_TORCH_CHECK(p > 0 && height % p == 0 && width % p == 0, "patch_size ", p, " does not divide ", height, " x ", width);
  const PatchesKernels::Functions& functions = functions_for(dtype);

  Patchify arguments{};
  arguments.images = static_cast<const uint8_t*>(images.const_data_ptr());
  arguments.batch_stride = images.stride(0);
  arguments.row_stride = images.stride(1);
  arguments.column_stride = images.stride(2);
  arguments.channel_stride = images.stride(3);
  arguments.strips = height / p;
  arguments.columns = width / p;
  arguments.patch_size = p;
  const Tensor patches = empty({images.size(0), arguments.strips * arguments.columns, 3 * p * p}, dtype);
  arguments.patches = patches.mutable_data_ptr();
  const int64_t bytes = images.numel() * size_of(dtype);
  if (bytes == 0) return patches;
  const bool aligned = reinterpret_cast<uintptr_t>(arguments.patches) % 64 == 0 && 3 * p * width * size_of(dtype) % 64 == 0;
  arguments.streaming = aligned && bytes > kStreamingBytes;
  for_strips(images.size(0) * arguments.strips, arguments.columns, p, dtype, [&](int64_t begin, int64_t end, uint8_t* scratch) {
    functions.patchify(arguments, begin, end, scratch);
  });
  return patches;
}

Tensor unpatchify_uint8(const Tensor& patches_, int64_t patch_size, int64_t rows) {
  check_cpu("patches", patches_);
  const ScalarType dtype = patches_.scalar_type();
  const PatchesKernels::Functions& functions = functions_for(dtype);
  const int64_t p = patch_size;
  STD_TORCH_CHECK(p <= kLargestPatch, "patch_size ", p, " is larger than ", kLargestPatch);
  STD_TORCH_CHECK(p > 0 && patches_.dim() == 3 && patches_.size(2) == 3 * p * p, "patches must be (B, N, 3 * p * p)");
  const int64_t count = patches_.size(1);
  STD_TORCH_CHECK(rows > 0 && count % rows == 0, count, " patches do not fill ", rows, " rows");
  const Tensor patches = patches_.is_contiguous() ? patches_ : torch::stable::contiguous(patches_);

  Unpatchify arguments{};
  arguments.patches = patches.const_data_ptr();
  arguments.columns = count / rows;
  arguments.patch_size = p;
  const Tensor images = empty({patches.size(0), rows * p, arguments.columns * p, 3}, ScalarType::Byte);
  arguments.images = static_cast<uint8_t*>(images.mutable_data_ptr());
  if (images.numel() == 0) return images;
  for_strips(patches.size(0) * rows, arguments.columns, p, dtype, [&](int64_t begin, int64_t end, uint8_t* scratch) {
    functions.unpatchify(arguments, begin, end, scratch);
  });
  return images;
}

}  // namespace textok_fast
