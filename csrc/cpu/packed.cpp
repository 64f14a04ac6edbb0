// pack_linear and packed_linear on the CPU.

#include <cstdint>
#include <iterator>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <torch/csrc/stable/ops.h>

#include "isa.h"
#include "kernels/packed.h"
#include "ops.h"
#include "tensors.h"

namespace textok_fast {

namespace {

constexpr int64_t kRowsAtOnce = 128;  // whose sums for a panel, and nearly whose x, stay in the second-level cache
constexpr int64_t kTaskSize = 1 << 18;  // multiply-adds of four bytes that are worth waking a thread for

struct Choice {
  const PackedKernels& kernels;
  uint32_t layout;  // an index of kLayouts
};

constexpr const char* kLayouts[] = {"baseline", "avx2", "avx512", "avx512bf16", "avx512vnni"};

// The kernels for a kind: fp32, bf16, int8.
Choice choose(int64_t kind) {
  STD_TORCH_CHECK(0 <= kind && kind <= 2, "kind must be 0 (fp32), 1 (bf16) or 2 (int8)");
#ifdef TEXTOK_X86_KERNELS
  if (kind == 1 && has_bf16_products()) return {packed_avx512bf16, 3};
  if (kind == 2 && has_int8_products()) return {packed_avx512vnni, 4};
#endif
  return {TEXTOK_CHOOSE(packed), static_cast<uint32_t>(isa())};
}

// Behind the last panel stand a mark and the index of the layout: packed weights are tensors, which can be stored and come back
// on another processor, whose kernels would read as many words in another order. The mark changes when a layout does.
constexpr uint32_t kMark = 0x7e470001;
constexpr int64_t kMarkWords = 2;

int64_t words_with_mark(int64_t words) { return words == 0 ? 0 : words + kMarkWords; }

ScalarType weight_type(int64_t kind) {
  return kind == 0 ? ScalarType::Float : kind == 1 ? ScalarType::BFloat16 : ScalarType::Char;
}

int64_t numbers_per_step(int64_t kind) { return int64_t{1} << kind; }
int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Weights of many megabytes are read page by page; larger pages, where the system gives them, save the look-ups.
void ask_for_large_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 1 << 21;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(memory) + page - 1) / page * page;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes)) / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // only a hint
#endif
}

struct Rows {
  Tensor x;
  int64_t count = 1, inner = 1, inner_stride = 0, outer_stride = 0;
};

// (..., in) as rows at i / inner * outer_stride + i % inner * inner_stride; a copy only where two strides do not say it.
Rows rows_of(const Tensor& x) {
  Rows rows{dense_rows(x)};
  int64_t levels = 0;
  for (int64_t d = rows.x.dim() - 2; d >= 0; --d) {
    const int64_t size = rows.x.size(d), stride = rows.x.stride(d);
    if (size == 1) continue;
    if (levels == 0) {
      levels = 1;
      rows.inner = size;
      rows.inner_stride = stride;
      rows.outer_stride = size * stride;
    } else if (levels == 1 && stride == rows.inner * rows.inner_stride) {
      rows.inner *= size;
      rows.outer_stride = size * stride;
    } else if (levels == 1) {
      levels = 2;
      rows.outer_stride = stride;
    } else if (stride != rows.count / rows.inner * rows.outer_stride) {
      return rows_of(torch::stable::contiguous(x));
    }
    rows.count *= size;
  }
  return rows;
}

}  // namespace

Tensor pack_linear(const Tensor& weight_, int64_t kind) {
  const auto [kernels, layout] = choose(kind);
  check_cpu("weight", weight_);
  check_dtype("weight", weight_, weight_type(kind));
  STD_TORCH_CHECK(weight_.dim() == 2, "weight must be (out, in)");
  const Tensor weight = weight_.is_contiguous() ? weight_ : torch::stable::contiguous(weight_);
  PackWeight pack = {};
  pack.out = weight.size(0);
  pack.in = weight.size(1);
  STD_TORCH_CHECK(kind != 2 || pack.in <= 1 << 17, "in must be at most 131072, or sums of int8 products could overflow");
  const int64_t panels = divide_up(pack.out, kernels.columns_per_panel);
  const int64_t steps = divide_up(pack.in, numbers_per_step(kind)), words = panels * steps * kernels.columns_per_panel;
  Tensor packed = empty({words_with_mark(words) * numbers_per_step(kind)}, weight_type(kind));
  if (words == 0) return packed;
  pack.weight = weight.const_data_ptr();
  pack.packed = static_cast<uint32_t*>(packed.mutable_data_ptr());
  pack.packed[words] = kMark;
  pack.packed[words + 1] = layout;
  ask_for_large_pages(pack.packed, 4 * words);
  const int64_t bytes_per_panel = 4 * steps * kernels.columns_per_panel;
  const PackedFunctions& run = kernels.kinds[kind];
  torch::stable::parallel_for(0, panels, grain(bytes_per_panel), [&](int64_t begin, int64_t end) {
    run.pack(pack, begin, end);
  });
  return packed;
}

Tensor packed_linear(
    const Tensor& x,
    const Tensor& packed,
    const std::optional<Tensor>& scales,
    const std::optional<Tensor>& bias,
    int64_t out_features,
    int64_t kind,
    std::string activation) {
  const Choice choice = choose(kind);
  const PackedKernels& kernels = choice.kernels;
  const PackedFunctions& run = kernels.kinds[kind];
  const int64_t columns = kernels.columns_per_panel, group = kernels.rows_per_group;
  PackedProduct product = {};
  product.out = out_features;

  check_cpu("x", x);
  STD_TORCH_CHECK(x.dim() >= 1, "x must be (..., in)");
  const ScalarType dtype = x.scalar_type();
  product.x_is_bf16 = dtype == ScalarType::BFloat16;
  if (kind == 2) {
    STD_TORCH_CHECK(product.x_is_bf16 || dtype == ScalarType::Float, "x must be Float or BFloat16");
  } else {
    check_dtype("x", x, weight_type(kind));
  }
  product.in = x.size(x.dim() - 1);
  product.steps = divide_up(product.in, numbers_per_step(kind));

  check_cpu("packed", packed);
  check_dtype("packed", packed, weight_type(kind));
  STD_TORCH_CHECK(out_features >= 0, "out_features must not be negative");
  product.packed = static_cast<const uint32_t*>(packed.const_data_ptr());
  const int64_t numbers = packed.is_contiguous() ? packed.numel() : 0, marked = numbers / numbers_per_step(kind) - kMarkWords;
  if (marked > 0 && product.packed[marked] == kMark && product.packed[marked + 1] < std::size(kLayouts)) {
    STD_TORCH_CHECK(
        product.packed[marked + 1] == choice.layout, "packed was made for ", kLayouts[product.packed[marked + 1]],
        " kernels and ", kLayouts[choice.layout], " ones run here; pack the weight again where it is used");
  }
  const int64_t panels = divide_up(out_features, columns), in_panels = panels * product.steps * columns;
  STD_TORCH_CHECK(
      packed.is_contiguous() && numbers == words_with_mark(in_panels) * numbers_per_step(kind) &&
          (in_panels == 0 || product.packed[in_panels] == kMark),
      "packed is not what pack_linear makes here of a weight of ", out_features, " x ", product.in);

  std::optional<Tensor> scales_, bias_;
  if (kind == 2) {
    STD_TORCH_CHECK(scales.has_value(), "int8 weights need scales");
    check_cpu("scales", *scales);
    check_dtype("scales", *scales, ScalarType::Float);
    check_sizes("scales", *scales, {out_features});
    scales_ = dense_rows(*scales);
    product.scales = static_cast<const float*>(scales_->const_data_ptr());
  }
  if (bias.has_value()) {
    check_cpu("bias", *bias);
    product.bias_is_bf16 = bias->scalar_type() == ScalarType::BFloat16;
    STD_TORCH_CHECK(
        bias->scalar_type() == ScalarType::Float || (product.bias_is_bf16 && product.x_is_bf16),
        "bias must be Float or of x's dtype");
    check_sizes("bias", *bias, {out_features});
    bias_ = dense_rows(*bias);
    product.bias = bias_->const_data_ptr();
  }
  STD_TORCH_CHECK(
      activation == "none" || activation == "gelu" || activation == "gelu_tanh",
      "activation must be none, gelu or gelu_tanh, got ", activation);
  product.activation = activation == "none"   ? Activation::none
                       : activation == "gelu" ? Activation::gelu
                                              : Activation::gelu_tanh;

  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = out_features;
  Tensor result = empty(sizes, dtype);
  product.result = result.mutable_data_ptr();
  if (result.numel() == 0) return result;
  const Rows rows = rows_of(x);
  product.x = rows.x.const_data_ptr();
  product.inner = rows.inner;
  product.inner_stride = rows.inner_stride;
  product.outer_stride = rows.outer_stride;

  const int64_t most = rows.count < kRowsAtOnce ? rows.count : kRowsAtOnce;
  const int64_t words_per_row = product.steps * run.words_per_step, most_groups = divide_up(most, group);
  const std::unique_ptr<uint32_t[]> words(new uint32_t[most_groups * group * words_per_row]);
  const std::unique_ptr<float[]> row_scales(new float[most]);
  const std::unique_ptr<uint32_t[]> starts(new uint32_t[most]);
  product.words = words.get();
  product.row_scales = row_scales.get();
  product.starts = starts.get();
  const int64_t threads = torch::stable::get_num_threads();
  for (int64_t first = 0; first < rows.count; first += kRowsAtOnce) {
    product.first_row = first;
    product.last_row = first + kRowsAtOnce < rows.count ? first + kRowsAtOnce : rows.count;
    const int64_t count = product.last_row - first, groups = divide_up(count, group);
    torch::stable::parallel_for(0, groups, grain(4 * words_per_row * group), [&](int64_t begin, int64_t end) {
      const std::unique_ptr<uint32_t[]> scratch(new uint32_t[group * (product.steps + kernels.padding)]);
      run.take_rows(product, begin, end, scratch.get());
    });
    // Few panels do not divide well among many threads; then groups of rows are divided too.
    const int64_t wanted = divide_up(4 * threads, panels), possible = divide_up(groups, 4);
    product.segments = threads == 1 ? 1 : wanted < possible ? wanted : possible;
    const int64_t task = divide_up(count, product.segments) * product.steps * columns;
    const int64_t tasks_per_thread = task > 0 ? divide_up(kTaskSize, task) : panels;
    torch::stable::parallel_for(0, panels * product.segments, tasks_per_thread, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<uint32_t[]> sums(new uint32_t[groups * group * columns]);
      run.multiply(product, begin, end, sums.get());
    });
  }
  return result;
}

}  // namespace textok_fast
