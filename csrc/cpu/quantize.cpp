// vq_nearest on the CPU.

#include <cstdint>
#include <memory>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "isa.h"
#include "kernels/quantize.h"
#include "ops.h"
#include "tensors.h"

namespace textok_fast {

namespace {

// Multiply-adds that are worth waking a thread for.
constexpr int64_t kTaskSize = 1 << 20;

}  // namespace

Tensor vq_nearest(const Tensor& x, const Tensor& codebook, bool normalize) {
  check_cpu("x", x);
  check_cpu("codebook", codebook);
  STD_TORCH_CHECK(x.dim() >= 1, "x must be (..., d)");
  STD_TORCH_CHECK(codebook.dim() == 2 && codebook.size(1) == x.size(x.dim() - 1), "codebook must be (K, d) with x's d");
  STD_TORCH_CHECK(codebook.size(0) > 0, "codebook has no codes");
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "x must be Float or BFloat16");
  check_dtype("codebook", codebook, dtype);

  const Tensor rows = x.is_contiguous() ? x : torch::stable::contiguous(x);
  const Tensor book = codebook.is_contiguous() ? codebook : torch::stable::contiguous(codebook);
  const std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end() - 1);
  Tensor index = empty(sizes, ScalarType::Long);

  const QuantizeKernels& kernels = TEXTOK_CHOOSE(quantize);
  const CodeFunctions& run = dtype == ScalarType::Float ? kernels.fp32 : kernels.bf16;
  CodeSearch search = {};
  search.width = codebook.size(1);
  search.count = codebook.size(0);
  search.rows = index.numel();
  if (search.rows == 0) return index;
  search.normalize = normalize;
  search.x = rows.const_data_ptr();
  search.codebook = book.const_data_ptr();
  search.index = static_cast<int64_t*>(index.mutable_data_ptr());

  // Rows are divided among the threads; where they are few, the codes too.
  const int64_t group = kernels.rows_per_group, block = kernels.codes_per_block;
  const int64_t groups = (search.rows + group - 1) / group;
  search.padded = groups * group;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t worth = search.count * search.width * group / kTaskSize;  // parts of the codebook that are work enough
  search.splits = groups % threads == 0 || groups >= 8 * threads || worth < 2 ? 1 : (worth < threads ? worth : threads);
  search.codes_per_split = ((search.count + search.splits - 1) / search.splits + block - 1) / block * block;
  search.splits = (search.count + search.codes_per_split - 1) / search.codes_per_split;

  const bool in_place = dtype == ScalarType::Float && !normalize;
  const int64_t partial = search.splits * search.padded;
  const int64_t copied = in_place ? 0 : search.count * search.width;
  const std::unique_ptr<float[]> memory(new float[copied + search.count + partial]);
  search.codes = in_place ? const_cast<float*>(static_cast<const float*>(search.codebook)) : memory.get();  // only read
  search.squares = memory.get() + copied;
  search.best = search.squares + search.count;
  const std::unique_ptr<int32_t[]> blocks(new int32_t[partial]);
  search.block = blocks.get();

  const int64_t bytes_per_code = search.width * static_cast<int64_t>(sizeof(float));
  torch::stable::parallel_for(0, search.count, grain(bytes_per_code), [&](int64_t begin, int64_t end) {
    run.prepare(search, begin, end);
  });
  const int64_t task = search.codes_per_split * search.width * group;
  const int64_t tasks_per_thread = task > 0 ? (kTaskSize + task - 1) / task : groups;
  torch::stable::parallel_for(0, groups * search.splits, tasks_per_thread, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> scratch(new float[kernels.scratch_floats(search.width)]);
    run.search(search, begin, end, scratch.get());
  });
  torch::stable::parallel_for(0, search.rows, 512, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> scratch(new float[search.width + 1]);
    run.finish(search, begin, end, scratch.get());
  });
  return index;
}

}  // namespace textok_fast
