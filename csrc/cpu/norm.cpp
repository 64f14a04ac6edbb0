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
  ScalarType stream, dtype;    // of the residual stream and its gradient; of all else
  int64_t stream_bytes, row_bytes;  // of a row of the one and of the other
};

// `scale` has the dtype of all but the residual stream.
Sizes sizes_of(const Tensor& x, const Tensor& scale) {
  check_cpu("x", x);
  STD_TORCH_CHECK(x.dim() == 3, "x must be (B, N, D)");
  const ScalarType stream = x.scalar_type(), dtype = scale.scalar_type();
  STD_TORCH_CHECK(
      stream == ScalarType::Float || stream == ScalarType::BFloat16,
      "x must be float32 or bfloat16, got ", torch::headeronly::toString(stream));
  STD_TORCH_CHECK(
      dtype == stream || dtype == ScalarType::BFloat16,
      "scale must be of x's dtype or bfloat16, got ", torch::headeronly::toString(dtype));
  const int64_t width = x.size(2);
  const auto bytes = [width](ScalarType type) { return width * (type == ScalarType::Float ? 4 : 2); };
  return {x.size(0), x.size(1), width, stream, dtype, bytes(stream), bytes(dtype)};
}

Rows rows_of(const char* name, const Tensor& tensor, const Sizes& sizes, ScalarType dtype) {
  check_cpu(name, tensor);
  check_dtype(name, tensor, dtype);
  check_sizes(name, tensor, {sizes.batch, sizes.rows, sizes.width});
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)};
}

Samples samples_of(const char* name, const Tensor& tensor, const Sizes& sizes) {
  check_cpu(name, tensor);
  check_dtype(name, tensor, sizes.dtype);
  check_sizes(name, tensor, {sizes.batch, sizes.width});
  return {tensor.const_data_ptr(), tensor.stride(0)};
}

Tensor new_rows(const Sizes& sizes, ScalarType dtype) { return empty({sizes.batch, sizes.rows, sizes.width}, dtype); }

const NormFunctions& functions_for(const Sizes& sizes) {
  const NormKernels& kernels = TEXTOK_CHOOSE(norm);
  return sizes.stream != sizes.dtype ? kernels.mixed : sizes.dtype == ScalarType::Float ? kernels.fp32 : kernels.bf16;
}

// Whether to write past the caches, which takes aligned addresses and rows that end where a cache line does. Null: not written.
bool streams(const Sizes& sizes, const void* to_stream, const void* other) {
  if (reinterpret_cast<uintptr_t>(to_stream) % 64 != 0 || reinterpret_cast<uintptr_t>(other) % 64 != 0) return false;
  const int64_t row = (to_stream == nullptr ? 0 : sizes.stream_bytes) + (other == nullptr ? 0 : sizes.row_bytes);
  return sizes.row_bytes % 64 == 0 && sizes.batch * sizes.rows * row > kStreamingBytes;
}

// `bytes`: read and written for a row.
void run_forward(NormForward& arguments, const Sizes& sizes, int64_t bytes) {
  arguments.rows = sizes.rows;
  arguments.width = sizes.width;
  arguments.streaming = streams(sizes, arguments.residual, arguments.out);
  const NormFunctions& functions = functions_for(sizes);
  if (sizes.batch * sizes.rows * sizes.width == 0) return;
  torch::stable::parallel_for(
      0, sizes.batch * sizes.rows, grain(bytes), [&](int64_t begin, int64_t end) {
        const Scratch scratch(4, sizes.width);
        functions.forward(arguments, begin, end, scratch.data());
      });
}

// Fills dx and dbranch; returns what belongs to (B, D): dshift, dscale and, with a gate, dgate.
std::tuple<Tensor, Tensor, Tensor> run_backward(NormBackward& arguments, const Sizes& sizes, int64_t bytes) {
  const int64_t batch = sizes.batch, rows = sizes.rows, width = sizes.width;
  const ScalarType dtype = sizes.dtype;
  const bool gate = arguments.gate.data != nullptr;
  arguments.rows = rows;
  arguments.width = width;
  arguments.chunk_rows = kChunkRows;
  arguments.chunks = (rows + kChunkRows - 1) / kChunkRows;
  arguments.streaming = streams(sizes, arguments.dx, arguments.dbranch);
  const int64_t chunks = arguments.chunks, sums = batch * chunks * scratch_stride(width);
  const Scratch partial((gate ? 3 : 2) * batch * chunks, width);
  arguments.dshift = partial.data();
  arguments.dscale = partial.data() + sums;
  arguments.dgate = gate ? partial.data() + 2 * sums : nullptr;

  const NormFunctions& functions = functions_for(sizes);
  if (batch * chunks * width > 0) {
    torch::stable::parallel_for(0, batch * chunks, grain(kChunkRows * bytes), [&](int64_t begin, int64_t end) {
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
  const Sizes sizes = sizes_of(x_, scale_);
  const Tensor x = dense_rows(x_), shift = dense_rows(shift_), scale = dense_rows(scale_);
  NormForward arguments{};
  arguments.x = rows_of("x", x, sizes, sizes.stream);
  arguments.shift = samples_of("shift", shift, sizes);
  arguments.scale = samples_of("scale", scale, sizes);
  arguments.offset = 1;
  arguments.eps = static_cast<float>(eps);
  const Tensor out = new_rows(sizes, sizes.dtype);
  arguments.out = out.mutable_data_ptr();
  run_forward(arguments, sizes, sizes.stream_bytes + sizes.row_bytes);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_modulate_backward(
    const Tensor& grad_, const Tensor& x_, const Tensor& scale_, double eps) {
  const Sizes sizes = sizes_of(x_, scale_);
  const Tensor grad = dense_rows(grad_), x = dense_rows(x_), scale = dense_rows(scale_);
  NormBackward arguments{};
  arguments.grad = rows_of("grad", grad, sizes, sizes.dtype);
  arguments.residual = rows_of("x", x, sizes, sizes.stream);
  arguments.scale = samples_of("scale", scale, sizes);
  arguments.offset = 1;
  arguments.eps = static_cast<float>(eps);
  const Tensor dx = new_rows(sizes, sizes.stream);
  arguments.dx = dx.mutable_data_ptr();
  const auto [dshift, dscale, none] = run_backward(arguments, sizes, 2 * sizes.stream_bytes + sizes.row_bytes);
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
  const Sizes sizes = sizes_of(x_, scale_);
  const Tensor x = dense_rows(x_), branch = dense_rows(branch_), shift = dense_rows(shift_), scale = dense_rows(scale_);
  std::optional<Tensor> gate;
  NormForward arguments{};
  if (gate_.has_value()) {
    gate = dense_rows(*gate_);
    arguments.gate = samples_of("gate", *gate, sizes);
  }
  arguments.x = rows_of("x", x, sizes, sizes.stream);
  arguments.branch = rows_of("branch", branch, sizes, sizes.dtype);
  arguments.shift = samples_of("shift", shift, sizes);
  arguments.scale = samples_of("scale", scale, sizes);
  arguments.offset = static_cast<float>(offset);
  arguments.eps = static_cast<float>(eps);
  const Tensor residual = new_rows(sizes, sizes.stream);
  const Tensor out = new_rows(sizes, sizes.dtype);
  arguments.residual = residual.mutable_data_ptr();
  arguments.out = out.mutable_data_ptr();
  run_forward(arguments, sizes, 2 * (sizes.stream_bytes + sizes.row_bytes));
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
  const Sizes sizes = sizes_of(residual_, scale_);
  const Tensor grad_residual = dense_rows(grad_residual_), grad = dense_rows(grad_), residual = dense_rows(residual_);
  const Tensor branch = dense_rows(branch_), scale = dense_rows(scale_);
  std::optional<Tensor> gate;
  NormBackward arguments{};
  if (gate_.has_value()) {  // else the branch is not read
    gate = dense_rows(*gate_);
    arguments.gate = samples_of("gate", *gate, sizes);
    arguments.branch = rows_of("branch", branch, sizes, sizes.dtype);
  }
  arguments.grad = rows_of("grad", grad, sizes, sizes.dtype);
  arguments.grad_residual = rows_of("grad_residual", grad_residual, sizes, sizes.stream);
  arguments.residual = rows_of("residual", residual, sizes, sizes.stream);
  arguments.scale = samples_of("scale", scale, sizes);
  arguments.offset = static_cast<float>(offset);
  arguments.eps = static_cast<float>(eps);
  const Tensor dx = new_rows(sizes, sizes.stream);
  const Tensor dbranch = gate ? new_rows(sizes, sizes.dtype) : empty({0}, branch.scalar_type());
  arguments.dx = dx.mutable_data_ptr();
  arguments.dbranch = gate ? dbranch.mutable_data_ptr() : nullptr;
  const auto [dshift, dscale, dgate] = run_backward(arguments, sizes, 3 * sizes.stream_bytes + (gate ? 3 : 1) * sizes.row_bytes);
  return {dx, dbranch, dgate, dshift, dscale};
}

}  // namespace textok_fast
