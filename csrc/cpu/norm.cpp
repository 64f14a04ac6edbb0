// layer_norm_modulate and gated_residual_layer_norm_modulate: checks, allocation, division among threads.

#include <new>

#include "isa.h"
#include "kernels/norm.h"
#include "ops.h"
#include "tensors.h"

namespace textok_fast {

namespace {

// Sums over N are taken in chunks of this many rows, which do not depend on the number of threads, so that the result does not.
constexpr int64_t kChunkRows = 32;

// Results that together are larger than this are written past the caches: they would be evicted before they are read, and a
// store into a line that is not cached reads it first.
constexpr int64_t kStreamingBytes = 8 << 20;

class Scratch {  // rows in fp32, aligned as the kernels want them
 public:
  Scratch(int64_t rows, int64_t width)
      : data_(static_cast<float*>(::operator new(rows * scratch_stride(width) * sizeof(float), std::align_val_t{64}))) {}
  ~Scratch() { ::operator delete(data_, std::align_val_t{64}); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* data() const { return data_; }

 private:
  float* data_;
};

struct Sizes {
  int64_t batch, rows, width;  // B, N, D
  ScalarType dtype;
  int64_t row_bytes;
};

Sizes sizes_of(const Tensor& x) {
  check_cpu("x", x);
  STD_TORCH_CHECK(x.dim() == 3, "x must be (B, N, D)");
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::BFloat16,
      "x must be float32 or bfloat16, got ", torch::headeronly::toString(dtype));
  const int64_t width = x.size(2);
  return {x.size(0), x.size(1), width, dtype, width * (dtype == ScalarType::Float ? 4 : 2)};
}

Rows rows_of(const char* name, const Tensor& tensor, const Sizes& sizes) {
  check_cpu(name, tensor);
  check_dtype(name, tensor, sizes.dtype);
  check_sizes(name, tensor, {sizes.batch, sizes.rows, sizes.width});
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)};
}

Samples samples_of(const char* name, const Tensor& tensor, const Sizes& sizes) {
  check_cpu(name, tensor);
  check_dtype(name, tensor, sizes.dtype);
  check_sizes(name, tensor, {sizes.batch, sizes.width});
  return {tensor.const_data_ptr(), tensor.stride(0)};
}

const NormFunctions& functions_for(ScalarType dtype) {
  const NormKernels& kernels = TEXTOK_CHOOSE(norm);
  return dtype == ScalarType::Float ? kernels.fp32 : kernels.bf16;
}

// Whether to write past the caches, which takes aligned addresses and rows that end where a cache line does.
bool streams(const Sizes& sizes, std::initializer_list<const void*> outputs) {
  int64_t bytes = 0;
  for (const void* output : outputs) {
    if (reinterpret_cast<uintptr_t>(output) % 64 != 0) return false;
    if (output != nullptr) bytes += sizes.batch * sizes.rows * sizes.row_bytes;
  }
  return sizes.row_bytes % 64 == 0 && bytes > kStreamingBytes;
}

// `tensors`: how many of x's size are read and written.
void run_forward(NormForward& arguments, const Sizes& sizes, int tensors) {
  arguments.rows = sizes.rows;
  arguments.width = sizes.width;
  arguments.streaming = streams(sizes, {arguments.residual, arguments.out});
  const NormFunctions& functions = functions_for(sizes.dtype);
  if (sizes.batch * sizes.rows * sizes.width == 0) return;
  torch::stable::parallel_for(
      0, sizes.batch * sizes.rows, grain(tensors * sizes.row_bytes), [&](int64_t begin, int64_t end) {
        const Scratch scratch(4, sizes.width);
        functions.forward(arguments, begin, end, scratch.data());
      });
}

// Fills dx and dbranch; returns what belongs to (B, D): dshift, dscale and, with a gate, dgate.
std::tuple<Tensor, Tensor, Tensor> run_backward(NormBackward& arguments, const Sizes& sizes, int tensors) {
  const auto [batch, rows, width, dtype, row_bytes] = sizes;
  const bool gate = arguments.gate.data != nullptr;
  arguments.rows = rows;
  arguments.width = width;
  arguments.chunk_rows = kChunkRows;
  arguments.chunks = (rows + kChunkRows - 1) / kChunkRows;
  arguments.streaming = streams(sizes, {arguments.dx, arguments.dbranch});
  const int64_t chunks = arguments.chunks, sums = batch * chunks * scratch_stride(width);
  const Scratch partial((gate ? 3 : 2) * batch * chunks, width);
  arguments.dshift = partial.data();
  arguments.dscale = partial.data() + sums;
  arguments.dgate = gate ? partial.data() + 2 * sums : nullptr;

  const NormFunctions& functions = functions_for(dtype);
  if (batch * chunks * width > 0) {
    torch::stable::parallel_for(0, batch * chunks, grain(tensors * kChunkRows * row_bytes), [&](int64_t begin, int64_t end) {
      const Scratch scratch(4, sizes.width);
      functions.backward(arguments, begin, end, scratch.data());
    });
  }
  const Tensor dshift = empty({batch, width}, dtype), dscale = empty({batch, width}, dtype);
  const Tensor dgate = gate ? empty({batch, width}, dtype) : empty({0}, dtype);
  const auto reduce = [&](const float* from, const Tensor& to) { functions.reduce(from, to.mutable_data_ptr(), chunks, width, 0, batch); };
  reduce(arguments.dshift, dshift);
  reduce(arguments.dscale, dscale);
  if (gate) reduce(arguments.dgate, dgate);
  return {dshift, dscale, dgate};
}

}  // namespace

Tensor layer_norm_modulate(const Tensor& x_, const Tensor& shift_, const Tensor& scale_, double eps) {
  const Sizes sizes = sizes_of(x_);
  const Tensor x = dense_rows(x_), shift = dense_rows(shift_), scale = dense_rows(scale_);
  NormForward arguments{};
  arguments.x = rows_of("x", x, sizes);
  arguments.shift = samples_of("shift", shift, sizes);
  arguments.scale = samples_of("scale", scale, sizes);
  arguments.offset = 1;
  arguments.eps = static_cast<float>(eps);
  const Tensor out = empty({sizes.batch, sizes.rows, sizes.width}, sizes.dtype);
  arguments.out = out.mutable_data_ptr();
  run_forward(arguments, sizes, 2);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_modulate_backward(
    const Tensor& grad_, const Tensor& x_, const Tensor& scale_, double eps) {
  const Sizes sizes = sizes_of(x_);
  const Tensor grad = dense_rows(grad_), x = dense_rows(x_), scale = dense_rows(scale_);
  NormBackward arguments{};
  arguments.grad = rows_of("grad", grad, sizes);
  arguments.residual = rows_of("x", x, sizes);
  arguments.scale = samples_of("scale", scale, sizes);
  arguments.offset = 1;
  arguments.eps = static_cast<float>(eps);
  const Tensor dx = empty({sizes.batch, sizes.rows, sizes.width}, sizes.dtype);
  arguments.dx = dx.mutable_data_ptr();
  const auto [dshift, dscale, none] = run_backward(arguments, sizes, 3);
  return {dx, dshift, dscale};
}

std::tuple<Tensor, Tensor> gated_residual_layer_norm_modulate(
    const Tensor& x_,
    const Tensor& branch_,
    const std::optional<Tensor>& gate_,
    const Tensor& shift_,
    const Tensor& scale_,
    double offset,
    double eps) {
  const Sizes sizes = sizes_of(x_);
  const Tensor x = dense_rows(x_), branch = dense_rows(branch_), shift = dense_rows(shift_), scale = dense_rows(scale_);
  std::optional<Tensor> gate;
  NormForward arguments{};
  if (gate_.has_value()) {
    gate = dense_rows(*gate_);
    arguments.gate = samples_of("gate", *gate, sizes);
  }
  arguments.x = rows_of("x", x, sizes);
  arguments.branch = rows_of("branch", branch, sizes);
  arguments.shift = samples_of("shift", shift, sizes);
  arguments.scale = samples_of("scale", scale, sizes);
  arguments.offset = static_cast<float>(offset);
  arguments.eps = static_cast<float>(eps);
  const Tensor residual = empty({sizes.batch, sizes.rows, sizes.width}, sizes.dtype);
  const Tensor out = empty({sizes.batch, sizes.rows, sizes.width}, sizes.dtype);
  arguments.residual = residual.mutable_data_ptr();
  arguments.out = out.mutable_data_ptr();
  run_forward(arguments, sizes, 4);
  return {residual, out};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_residual_layer_norm_modulate_backward(
    const Tensor& grad_residual_,
    const Tensor& grad_,
    const Tensor& residual_,
    const Tensor& branch_,
    const std::optional<Tensor>& gate_,
    const Tensor& scale_,
    double offset,
    double eps) {
  const Sizes sizes = sizes_of(residual_);
  const Tensor grad_residual = dense_rows(grad_residual_), grad = dense_rows(grad_), residual = dense_rows(residual_);
  const Tensor branch = dense_rows(branch_), scale = dense_rows(scale_);
  std::optional<Tensor> gate;
  NormBackward arguments{};
  const Rows branch_rows = rows_of("branch", branch, sizes);
  if (gate_.has_value()) {
    gate = dense_rows(*gate_);
    arguments.gate = samples_of("gate", *gate, sizes);
    arguments.branch = branch_rows;
  }
  arguments.grad = rows_of("grad", grad, sizes);
  arguments.grad_residual = rows_of("grad_residual", grad_residual, sizes);
  arguments.residual = rows_of("residual", residual, sizes);
  arguments.scale = samples_of("scale", scale, sizes);
  arguments.offset = static_cast<float>(offset);
  arguments.eps = static_cast<float>(eps);
  const Tensor dx = empty({sizes.batch, sizes.rows, sizes.width}, sizes.dtype);
  const Tensor dbranch = gate ? empty({sizes.batch, sizes.rows, sizes.width}, sizes.dtype) : empty({0}, sizes.dtype);
  arguments.dx = dx.mutable_data_ptr();
  arguments.dbranch = gate ? dbranch.mutable_data_ptr() : nullptr;
  const auto [dshift, dscale, dgate] = run_backward(arguments, sizes, gate ? 6 : 4);
  return {dx, dbranch, dgate, dshift, dscale};
}

}  // namespace textok_fast
