// The operations of this library on CUDA, as PyTorch calls them: checks, allocation, the current stream. What each computes and
// takes: textok_fast/ops/*.py; the schemas: csrc/cpu/ops.cpp.

#include <dlfcn.h>

#include <cstdlib>
#include <initializer_list>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "kernels.h"

// Weak, so that this file loads with a CPU build of PyTorch, which lacks the first, and before 2.13, which lacks the second.
extern "C" {
__attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
__attribute__((weak)) AOTITorchError torch_stream_native_handle(StreamHandle stream, void** handle);
}

namespace textok_fast::cuda {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// -- PyTorch's device and stream ---------------------------------------------------------------------------------------------

using StreamOf = AOTITorchError (*)(int32_t, void**);

// libtorch_cuda is not among the libraries this one is linked to, and Python loads it so that its names are not seen globally:
// the linker may leave the weak name empty although the function is there.
StreamOf find_stream_function() {
  if (aoti_torch_get_current_cuda_stream != nullptr) return aoti_torch_get_current_cuda_stream;
  for (const char* name : {"libtorch_cuda.so", "libtorch.so"}) {
    void* const library = dlopen(name, RTLD_LAZY | RTLD_NOLOAD);  // only if it is loaded already; then it stays
    void* const function = library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream");
    if (function != nullptr) return reinterpret_cast<StreamOf>(function);
  }
  return nullptr;
}

cudaStream_t current_stream(int32_t device) {
  static const StreamOf function = find_stream_function();
  void* stream = nullptr;
  if (function != nullptr) {
    TORCH_ERROR_CODE_CHECK(function(device, &stream));
  } else {
    STD_TORCH_CHECK(torch_stream_native_handle != nullptr, "textok_fast: this PyTorch does not tell its CUDA stream");
    StreamHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_stream(device, &handle));
    const torch::stable::accelerator::Stream owner(handle);
    TORCH_ERROR_CODE_CHECK(torch_stream_native_handle(handle, &stream));
  }
  return static_cast<cudaStream_t>(stream);
}

// Makes the tensor's device current and launches on its current stream.
class Launcher {
 public:
  explicit Launcher(const Tensor& tensor)
      : guard_(tensor.get_device_index()), stream_{current_stream(tensor.get_device_index())} {}
  Stream& stream() { return stream_; }
  void check(const char* operation) const {
    STD_TORCH_CHECK(stream_.error == cudaSuccess, operation, ": ", cudaGetErrorString(stream_.error));
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  Stream stream_;
};

// -- tensors -----------------------------------------------------------------------------------------------------------------

// Contiguous, on the device of `like`. (torch::stable::new_empty goes through the dispatcher's boxed call, which takes longer.)
Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  int64_t strides[8];
  int64_t stride = 1;
  STD_TORCH_CHECK(sizes.size() <= 8, "too many dimensions");
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes.begin()[i] > 0 ? sizes.begin()[i] : 1;
  }
  AtenTensorHandle handle = nullptr;
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.begin(), strides, code, aoti_torch_device_type_cuda(), like.get_device_index(),
      &handle));
  return Tensor(handle);
}

// The tensor itself when the numbers of its last dimension lie next to each other, else a contiguous copy.
Tensor dense_rows(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  if (last < 0 || tensor.size(last) <= 1 || tensor.stride(last) == 1) return tensor;
  return torch::stable::contiguous(tensor);
}

Tensor dense(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

void check(const char* name, const Tensor& tensor, const Tensor& like, ScalarType dtype) {
  STD_TORCH_CHECK(
      tensor.is_cuda() && tensor.get_device_index() == like.get_device_index(), name, " must lie on the device of x");
  const ScalarType found = tensor.scalar_type();
  STD_TORCH_CHECK(
      found == dtype, name, " must be ", torch::headeronly::toString(dtype), ", got ", torch::headeronly::toString(found));
}

void check_sizes(const char* name, const Tensor& tensor, std::initializer_list<int64_t> wanted) {
  bool equal = tensor.dim() == static_cast<int64_t>(wanted.size());
  for (size_t i = 0; equal && i < wanted.size(); ++i) equal = tensor.size(static_cast<int64_t>(i)) == wanted.begin()[i];
  STD_TORCH_CHECK(equal, name, " has the wrong shape");
}

// Strides of dimensions with one element mean nothing, and could only spoil the alignment.
int64_t stride_of(const Tensor& tensor, int64_t dim) { return tensor.size(dim) <= 1 ? 0 : tensor.stride(dim); }

// Calls run(T{}) for the CUDA type of a dtype.
template <typename Run>
void with_type(const char* name, ScalarType dtype, Run&& run) {
  switch (dtype) {
    case ScalarType::Float: return run(float{});
    case ScalarType::BFloat16: return run(__nv_bfloat16{});
    case ScalarType::Half: return run(__half{});
    default:
      STD_TORCH_CHECK(
          false, name, " must be float32, bfloat16 or float16, got ", torch::headeronly::toString(dtype));
  }
}

// -- layer_norm_modulate, gated_residual_layer_norm_modulate -----------------------------------------------------------------

struct Sizes {
  int64_t batch, rows, width;  // B, N, D
  ScalarType dtype;
};

Sizes sizes_of(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 3, "x must be (B, N, D)");
  const Sizes sizes{x.size(0), x.size(1), x.size(2), x.scalar_type()};
  // Rows and blocks are counted in 32 bits; offsets are not.
  STD_TORCH_CHECK(
      sizes.batch * sizes.rows <= INT32_MAX && sizes.rows <= INT32_MAX && sizes.width <= INT32_MAX / 4 &&
          sizes.batch <= INT32_MAX / (3 * (sizes.width / 32 + 1)),
      "x has too many rows or columns");
  return sizes;
}

template <typename T>
Rows<T> rows_of(const char* name, const Tensor& tensor, const Tensor& x, const Sizes& sizes) {
  check(name, tensor, x, sizes.dtype);
  check_sizes(name, tensor, {sizes.batch, sizes.rows, sizes.width});
  return {static_cast<const T*>(tensor.const_data_ptr()), stride_of(tensor, 0), stride_of(tensor, 1)};
}

template <typename T>
Samples<T> samples_of(const char* name, const Tensor& tensor, const Tensor& x, const Sizes& sizes) {
  check(name, tensor, x, sizes.dtype);
  check_sizes(name, tensor, {sizes.batch, sizes.width});
  return {static_cast<const T*>(tensor.const_data_ptr()), stride_of(tensor, 0)};
}

Tensor like_rows(const Tensor& x, const Sizes& sizes) {
  return empty(x, {sizes.batch, sizes.rows, sizes.width}, sizes.dtype);
}

template <typename T>
T* data_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <typename P>
void set_sizes(P& p, const Sizes& sizes, double offset, double eps) {
  p.batch = static_cast<uint32_t>(sizes.batch);
  p.rows = static_cast<uint32_t>(sizes.rows);
  p.width = static_cast<uint32_t>(sizes.width);
  p.offset = static_cast<float>(offset);
  p.eps = static_cast<float>(eps);
}

// branch and gate are null where there are none; residual then is not written either.
void forward(
    const char* operation, const Tensor& x_, const Tensor* branch_, const Tensor* gate_, const Tensor& shift_,
    const Tensor& scale_, double offset, double eps, Tensor* residual, Tensor* out) {
  const Sizes sizes = sizes_of(x_);
  Launcher launcher(x_);
  with_type("x", sizes.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Tensor x = dense_rows(x_), shift = dense_rows(shift_), scale = dense_rows(scale_);
    std::optional<Tensor> branch, gate;  // kept until the launch
    NormForward<T> p{};
    set_sizes(p, sizes, offset, eps);
    p.x = rows_of<T>("x", x, x, sizes);
    p.shift = samples_of<T>("shift", shift, x, sizes);
    p.scale = samples_of<T>("scale", scale, x, sizes);
    if (branch_ != nullptr) {
      branch = dense_rows(*branch_);
      p.branch = rows_of<T>("branch", *branch, x, sizes);
      *residual = like_rows(x, sizes);
      p.residual = data_of<T>(*residual);
    }
    if (gate_ != nullptr) {
      gate = dense_rows(*gate_);
      p.gate = samples_of<T>("gate", *gate, x, sizes);
    }
    *out = like_rows(x, sizes);
    p.out = data_of<T>(*out);
    run_norm_forward(p, branch_ != nullptr, launcher.stream());
  });
  launcher.check(operation);
}

struct Gradients {
  Tensor x, branch, gate, shift, scale;
};

// grad_residual, branch and gate are null where there are none; without a gate the branch's gradient is x's: none is written.
Gradients backward(
    const char* operation, const Tensor* grad_residual_, const Tensor& grad_, const Tensor& x_, const Tensor* branch_,
    const Tensor* gate_, const Tensor& scale_, double offset, double eps) {
  const Sizes sizes = sizes_of(x_);
  Launcher launcher(x_);
  Gradients result;
  with_type("x", sizes.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Tensor grad = dense_rows(grad_), x = dense_rows(x_), scale = dense_rows(scale_);
    std::optional<Tensor> grad_residual, branch, gate;  // kept until the launch
    NormBackward<T> p{};
    set_sizes(p, sizes, offset, eps);
    p.grad = rows_of<T>("grad", grad, x, sizes);
    p.x = rows_of<T>("x", x, x, sizes);
    p.scale = samples_of<T>("scale", scale, x, sizes);
    result.x = like_rows(x, sizes);
    p.dx = data_of<T>(result.x);
    result.shift = empty(x, {sizes.batch, sizes.width}, sizes.dtype);
    result.scale = empty(x, {sizes.batch, sizes.width}, sizes.dtype);
    p.sums[0] = data_of<T>(result.shift);
    p.sums[1] = data_of<T>(result.scale);
    if (grad_residual_ != nullptr) {
      grad_residual = dense_rows(*grad_residual_);
      p.grad_residual = rows_of<T>("grad_residual", *grad_residual, x, sizes);
    }
    if (gate_ != nullptr) {
      branch = dense_rows(*branch_);
      gate = dense_rows(*gate_);
      p.branch = rows_of<T>("branch", *branch, x, sizes);
      p.gate = samples_of<T>("gate", *gate, x, sizes);
      result.branch = like_rows(x, sizes);
      result.gate = empty(x, {sizes.batch, sizes.width}, sizes.dtype);
      p.dbranch = data_of<T>(result.branch);
      p.sums[2] = data_of<T>(result.gate);
    } else {
      result.branch = empty(x, {0}, sizes.dtype);
      result.gate = empty(x, {0}, sizes.dtype);
    }
    norm_backward_chunks(p);
    // The caching allocator gives this memory away again in the stream's order, so it may be let go before the kernels ran.
    const Tensor partial = empty(x, {sizes.batch, p.chunks, p.kinds(), sizes.width}, ScalarType::Float);
    p.partial = data_of<float>(partial);
    run_norm_backward(p, launcher.stream());
  });
  launcher.check(operation);
  return result;
}

Tensor layer_norm_modulate(const Tensor& x, const Tensor& shift, const Tensor& scale, double eps) {
  Tensor out;
  forward("layer_norm_modulate", x, nullptr, nullptr, shift, scale, 1.0, eps, nullptr, &out);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_modulate_backward(
    const Tensor& grad, const Tensor& x, const Tensor& scale, double eps) {
  const Gradients result = backward("layer_norm_modulate_backward", nullptr, grad, x, nullptr, nullptr, scale, 1.0, eps);
  return {result.x, result.shift, result.scale};
}

std::tuple<Tensor, Tensor> gated_residual_layer_norm_modulate(
    const Tensor& x, const Tensor& branch, const std::optional<Tensor>& gate, const Tensor& shift, const Tensor& scale,
    double offset, double eps) {
  Tensor residual, out;
  forward(
      "gated_residual_layer_norm_modulate", x, &branch, gate.has_value() ? &*gate : nullptr, shift, scale, offset, eps,
      &residual, &out);
  return {residual, out};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_residual_layer_norm_modulate_backward(
    const Tensor& grad_residual, const Tensor& grad, const Tensor& residual, const Tensor& branch,
    const std::optional<Tensor>& gate, const Tensor& scale, double offset, double eps) {
  const Gradients result = backward(
      "gated_residual_layer_norm_modulate_backward", &grad_residual, grad, residual, &branch,
      gate.has_value() ? &*gate : nullptr, scale, offset, eps);
  return {result.x, result.branch, result.gate, result.shift, result.scale};
}

// -- guided_step -------------------------------------------------------------------------------------------------------------

// A contiguous input is read in place, so that nothing is allocated but the result.
Tensor guided_step(
    const Tensor& output_, const Tensor& x_, const std::optional<Tensor>& noise_, const Tensor& table_, const Tensor& index,
    int64_t guided_channels, bool clip_denoised) {
  const int64_t dims = x_.dim();
  STD_TORCH_CHECK(dims == 3 || dims == 4, "x must be (B, N, C) or (B, C, H, W)");
  const int64_t channel_dim = dims == 3 ? 2 : 1, batch = x_.size(0), channels = x_.size(channel_dim);
  STD_TORCH_CHECK(output_.dim() == dims, "output must have as many dimensions as x");
  const bool pair = output_.size(0) != batch, learned = output_.size(channel_dim) != channels;
  for (int64_t dim = 0; dim < dims; ++dim) {
    const int64_t factor = (dim == 0 && pair) || (dim == channel_dim && learned) ? 2 : 1;
    STD_TORCH_CHECK(
        output_.size(dim) == factor * x_.size(dim), "output must be of x's shape, with B or 2B samples and C or 2C channels");
  }
  STD_TORCH_CHECK(
      guided_channels >= 0 && guided_channels <= channels, "guided_channels must be 0 to ", channels, ", got ",
      guided_channels);
  check("output", output_, x_, output_.scalar_type());
  check("table", table_, x_, ScalarType::Float);
  check("index", index, x_, ScalarType::Long);
  STD_TORCH_CHECK(table_.dim() == 2 && table_.size(1) == kTableColumns, "table must be (T, 8)");
  STD_TORCH_CHECK(index.numel() == 1, "index must have one element");

  Launcher launcher(x_);
  const Tensor output = dense(output_), x = dense(x_), table = dense(table_);
  std::optional<Tensor> noise;
  if (noise_.has_value()) {
    check("noise", *noise_, x_, noise_->scalar_type());
    STD_TORCH_CHECK(noise_->dim() == dims, "noise must be like x");
    for (int64_t dim = 0; dim < dims; ++dim) STD_TORCH_CHECK(noise_->size(dim) == x_.size(dim), "noise must be like x");
    noise = dense(*noise_);
    with_type("noise", noise->scalar_type(), [](auto) {});  // refuses other types
  }
  const Tensor out = dims == 3 ? empty(x, {batch, x.size(1), x.size(2)}, x.scalar_type())
                               : empty(x, {batch, x.size(1), x.size(2), x.size(3)}, x.scalar_type());
  const int64_t inner = dims == 3 ? 1 : x.size(2) * x.size(3);
  with_type("output", output.scalar_type(), [&](auto output_zero) {
    with_type("x", x.scalar_type(), [&](auto x_zero) {
      using TO = decltype(output_zero);
      using TX = decltype(x_zero);
      GuidedStep<TO, TX> p{};
      p.output = static_cast<const TO*>(output.const_data_ptr());
      p.x = static_cast<const TX*>(x.const_data_ptr());
      if (noise.has_value()) {
        p.noise = noise->const_data_ptr();
        p.noise_type = noise->scalar_type() == ScalarType::Float      ? NumberType::kFloat
                       : noise->scalar_type() == ScalarType::BFloat16 ? NumberType::kBFloat16
                                                                      : NumberType::kHalf;
      }
      p.table = static_cast<const float*>(table.const_data_ptr());
      p.index = static_cast<const int64_t*>(index.const_data_ptr());
      p.out = data_of<TX>(out);
      p.count = x.numel();
      p.group = channels * inner;
      p.guided = guided_channels * inner;
      p.steps = table.size(0);
      p.pair = pair;
      p.learned = learned;
      p.clip = clip_denoised;
      run_guided_step(p, launcher.stream());
    });
  });
  launcher.check("guided_step");
  return out;
}

// -- few_rows_linear, few_rows_attention, few_rows_norm, packed_block --------------------------------------------------------

bool switched(const char* name, bool otherwise) {
  const char* const value = std::getenv(name);
  return value == nullptr ? otherwise : std::string_view(value) != "0";
}

uint32_t processors_of(const Tensor& tensor) {
  int count = 0;
  STD_TORCH_CHECK(
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, tensor.get_device_index()) == cudaSuccess,
      "textok_fast: the GPU does not tell its number of multiprocessors");
  return static_cast<uint32_t>(count);
}

bool is_hopper(const Tensor& tensor) {
  int major = 0, minor = 0;
  const int device = tensor.get_device_index();
  return cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess && major == 9 && minor == 0;
}

// A contiguous bfloat16 (or other) tensor, of 16-byte alignment, of this shape.
template <typename T>
const T* dense_data(
    const char* name, const Tensor& tensor, const Tensor& like, std::initializer_list<int64_t> sizes,
    ScalarType dtype = ScalarType::BFloat16) {
  check(name, tensor, like, dtype);
  check_sizes(name, tensor, sizes);
  const void* const data = tensor.const_data_ptr();
  STD_TORCH_CHECK(
      tensor.is_contiguous() && reinterpret_cast<uintptr_t>(data) % 16 == 0, name, " must be contiguous, 16-byte aligned");
  return static_cast<const T*>(data);
}

// x (M, K), weight (N, K), bias (N) -> (M, N), or the parts of the sum (splits, M, N) in float32 where `partial`.
Tensor rows_linear(
    const Tensor& x, int64_t rows, const Tensor& weight, const Tensor* bias, Activation activation, bool partial, RowsPlan plan,
    Stream& stream) {
  STD_TORCH_CHECK(weight.dim() == 2, "weight must be (out, in)");
  const int64_t outputs = weight.size(0), inputs = weight.size(1);
  STD_TORCH_CHECK(
      rows > 0 && rows <= 65535 * static_cast<int64_t>(kTileRows) && inputs > 0 && inputs % kSlice == 0 && outputs > 0 &&
          outputs % 8 == 0 && inputs <= INT32_MAX / 16 && outputs <= INT32_MAX / 16,
      "in must be a multiple of 32 and out of 8, got ", inputs, " and ", outputs);
  plan = plan_rows_product(
      static_cast<uint32_t>(rows), static_cast<uint32_t>(inputs), static_cast<uint32_t>(outputs), partial, processors_of(x),
      plan);
  STD_TORCH_CHECK(plan.columns != 0, "no tile for this product");
  STD_TORCH_CHECK(!plan.groups || is_hopper(x), "only GPUs of compute capability 9.0 multiply by warpgroups");
  RowsProduct p{};
  p.x = static_cast<const __nv_bfloat16*>(x.const_data_ptr());
  p.weight = dense_data<__nv_bfloat16>("weight", weight, x, {outputs, inputs});
  if (bias != nullptr) p.bias = dense_data<__nv_bfloat16>("bias", *bias, x, {outputs});
  p.rows = static_cast<uint32_t>(rows);
  p.inputs = static_cast<uint32_t>(inputs);
  p.outputs = static_cast<uint32_t>(outputs);
  p.activation = activation;
  const Tensor out = partial ? empty(x, {plan.splits, rows, outputs}, ScalarType::Float)
                             : empty(x, {rows, outputs}, ScalarType::BFloat16);
  partial ? void(p.partial = data_of<float>(out)) : void(p.out = data_of<__nv_bfloat16>(out));
  run_rows_product(p, plan, stream);
  return out;
}

Activation activation_of(const std::string& name) {
  if (name == "none") return Activation::kNone;
  if (name == "gelu") return Activation::kGelu;
  STD_TORCH_CHECK(name == "gelu_tanh", "activation must be none, gelu or gelu_tanh, got ", name);
  return Activation::kGeluTanh;
}

// qkv (B, N, 3 D), contiguous, in any shape of as many numbers -> (B, N, D)
Tensor rows_attend(const Tensor& qkv, int64_t batch, int64_t tokens, int64_t width, int64_t heads, Stream& stream) {
  STD_TORCH_CHECK(heads > 0 && width % heads == 0, "heads must divide D = ", width);
  const int64_t each = width / heads;
  STD_TORCH_CHECK(
      tokens <= kMaxTokens && each <= kMaxHead && each % 8 == 0 && batch <= 65535, "at most ", kMaxTokens,
      " tokens, and D / heads must be a multiple of 8 up to ", kMaxHead, "; got ", tokens, " and ", each);
  const Tensor out = empty(qkv, {batch, tokens, width}, ScalarType::BFloat16);
  RowsAttention p{};
  p.qkv = static_cast<const __nv_bfloat16*>(qkv.const_data_ptr());
  p.out = data_of<__nv_bfloat16>(out);
  p.batch = static_cast<uint32_t>(batch);
  p.tokens = static_cast<uint32_t>(tokens);
  p.heads = static_cast<uint32_t>(heads);
  p.width = static_cast<uint32_t>(each);
  p.scale = attention_scale(p.width);
  run_rows_attention(p, stream);
  return out;
}

// Row `index` of x's samples in a table (B, many D), or the whole of one (B, D): its address; the stride is the table's.
const __nv_bfloat16* table_part(const char* name, const Tensor& table, const Tensor& x, int64_t index, int64_t width) {
  check(name, table, x, ScalarType::BFloat16);
  STD_TORCH_CHECK(
      table.dim() == 2 && table.size(0) == x.size(0) && table.size(1) >= (index + 1) * width, name, " has the wrong shape");
  const __nv_bfloat16* const data = static_cast<const __nv_bfloat16*>(table.const_data_ptr()) + index * width;
  STD_TORCH_CHECK(
      table.stride(1) == 1 && stride_of(table, 0) % 4 == 0 && reinterpret_cast<uintptr_t>(data) % 8 == 0, name,
      " must have rows of 8-byte alignment");
  return data;
}

struct Modulation {
  const Tensor& table;
  int64_t index;
};

std::tuple<Tensor, Tensor> rows_gated_norm(
    const Tensor& x, const Tensor& partial, const Tensor& bias, Modulation gate, Modulation shift, Modulation scale, double eps,
    Stream& stream) {
  const int64_t batch = x.size(0), tokens = x.size(1), width = x.size(2);
  STD_TORCH_CHECK(
      batch > 0 && batch <= 65535 && tokens > 0 && width > 0 && width % 4 == 0 && width <= kMaxNormWidth,
      "D must be a multiple of 4 up to ", kMaxNormWidth, ", got ", width);
  STD_TORCH_CHECK(partial.dim() == 3, "partial must be (splits, B N, D)");
  const Tensor residual = empty(x, {batch, tokens, width}, x.scalar_type());
  const Tensor out = empty(x, {batch, tokens, width}, ScalarType::BFloat16);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    RowsNorm<T> p{};
    p.x = dense_data<T>("x", x, x, {batch, tokens, width}, x.scalar_type());
    p.partial = dense_data<float>("partial", partial, x, {partial.size(0), batch * tokens, width}, ScalarType::Float);
    p.bias = dense_data<__nv_bfloat16>("bias", bias, x, {width});
    p.gate = table_part("gate", gate.table, x, gate.index, width);
    p.shift = table_part("shift", shift.table, x, shift.index, width);
    p.scale = table_part("scale", scale.table, x, scale.index, width);
    p.gate_stride = stride_of(gate.table, 0);
    p.shift_stride = stride_of(shift.table, 0);
    p.scale_stride = stride_of(scale.table, 0);
    p.residual = data_of<T>(residual);
    p.out = data_of<__nv_bfloat16>(out);
    p.rows = static_cast<uint32_t>(batch * tokens);
    p.tokens = static_cast<uint32_t>(tokens);
    p.width = static_cast<uint32_t>(width);
    p.splits = static_cast<uint32_t>(partial.size(0));
    p.eps = static_cast<float>(eps);
    run_rows_norm(p, stream);
  };
  if (x.scalar_type() == ScalarType::Float) {
    run(float{});
  } else {
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16, "x must be float32 or bfloat16");
    run(__nv_bfloat16{});
  }
  return {residual, out};
}

Tensor few_rows_linear(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, std::string activation, bool partial,
    int64_t columns, int64_t cluster, int64_t splits, bool warpgroups, bool overlap) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2, "x must be (M, in) and weight (out, in)");
  dense_data<__nv_bfloat16>("x", x, x, {x.size(0), weight.size(1)});
  Launcher launcher(x);
  launcher.stream().overlap = overlap;
  const RowsPlan plan{
      static_cast<uint32_t>(columns), static_cast<uint32_t>(cluster), static_cast<uint32_t>(splits), warpgroups};
  const Tensor out = rows_linear(
      x, x.size(0), weight, bias.has_value() ? &*bias : nullptr, activation_of(activation), partial, plan, launcher.stream());
  launcher.check("few_rows_linear");
  return out;
}

Tensor few_rows_attention(const Tensor& qkv, int64_t heads, bool overlap) {
  STD_TORCH_CHECK(qkv.dim() == 3 && qkv.size(2) % 3 == 0, "qkv must be (B, N, 3 D)");
  dense_data<__nv_bfloat16>("qkv", qkv, qkv, {qkv.size(0), qkv.size(1), qkv.size(2)});
  Launcher launcher(qkv);
  launcher.stream().overlap = overlap;
  const Tensor out = rows_attend(qkv, qkv.size(0), qkv.size(1), qkv.size(2) / 3, heads, launcher.stream());
  launcher.check("few_rows_attention");
  return out;
}

std::tuple<Tensor, Tensor> few_rows_norm(
    const Tensor& x, const Tensor& partial, const Tensor& bias, const Tensor& gate, const Tensor& shift, const Tensor& scale,
    double eps, bool overlap) {
  STD_TORCH_CHECK(x.dim() == 3, "x must be (B, N, D)");
  Launcher launcher(x);
  launcher.stream().overlap = overlap;
  auto result = rows_gated_norm(x, partial, bias, {gate, 0}, {shift, 0}, {scale, 0}, eps, launcher.stream());
  launcher.check("few_rows_norm");
  return result;
}

// Weights as nn.Linear has them, with their biases. Nothing that runs on the stream may be writing to one of them: the kernels
// read them before the kernel ahead of them has ended.
std::tuple<Tensor, Tensor> packed_block(
    const Tensor& x, const Tensor& hidden, const Tensor& modulation, const Tensor& shift, const Tensor& scale,
    std::vector<Tensor> weights, int64_t heads, int64_t kind, std::string activation, double eps) {
  STD_TORCH_CHECK(x.dim() == 3 && hidden.dim() == 3, "x and hidden must be (B, N, D)");
  STD_TORCH_CHECK(kind == 1 && weights.size() == 8, "on CUDA a block has 4 bfloat16 weights, each with a bias");
  const int64_t batch = x.size(0), tokens = x.size(1), width = x.size(2), rows = batch * tokens;
  dense_data<__nv_bfloat16>("hidden", hidden, x, {batch, tokens, width});
  STD_TORCH_CHECK(weights[0].dim() == 2 && weights[4].dim() == 2, "weights must be (out, in)");
  const int64_t inner = weights[4].size(0);
  const int64_t sizes[4][2] = {{3 * width, width}, {width, width}, {inner, width}, {width, inner}};
  for (size_t i = 0; i < 4; ++i) check_sizes("a weight", weights[2 * i], {sizes[i][0], sizes[i][1]});

  Launcher launcher(x);
  Stream& stream = launcher.stream();
  stream.overlap = switched("TEXTOK_OVERLAP", true);
  const RowsPlan plan{0, 0, 0, switched("TEXTOK_WARPGROUPS", is_hopper(x))};
  const auto linear = [&](const Tensor& from, size_t index, Activation with = Activation::kNone) {
    return rows_linear(from, rows, weights[index], &weights[index + 1], with, false, plan, stream);
  };
  const auto partial = [&](const Tensor& from, size_t index) {
    return rows_linear(from, rows, weights[index], nullptr, Activation::kNone, true, plan, stream);
  };
  const Tensor attended = rows_attend(linear(hidden, 0), batch, tokens, width, heads, stream);
  const auto [between, normed] = rows_gated_norm(
      x, partial(attended, 2), weights[3], {modulation, 2}, {modulation, 3}, {modulation, 4}, eps, stream);
  const Tensor branch = partial(linear(normed, 4, activation_of(activation)), 6);
  auto result = rows_gated_norm(between, branch, weights[7], {modulation, 5}, {shift, 0}, {scale, 0}, eps, stream);
  launcher.check("packed_block");
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(textok_fast, CUDA, m) {
  m.impl("layer_norm_modulate", TORCH_BOX(&layer_norm_modulate));
  m.impl("layer_norm_modulate_backward", TORCH_BOX(&layer_norm_modulate_backward));
  m.impl("gated_residual_layer_norm_modulate", TORCH_BOX(&gated_residual_layer_norm_modulate));
  m.impl("gated_residual_layer_norm_modulate_backward", TORCH_BOX(&gated_residual_layer_norm_modulate_backward));
  m.impl("guided_step", TORCH_BOX(&guided_step));
  m.impl("few_rows_linear", TORCH_BOX(&few_rows_linear));
  m.impl("few_rows_attention", TORCH_BOX(&few_rows_attention));
  m.impl("few_rows_norm", TORCH_BOX(&few_rows_norm));
  m.impl("packed_block", TORCH_BOX(&packed_block));
}

}  // namespace textok_fast::cuda
