// What the launchers share: allocation, checks of what the Python side has promised, how rows are divided among threads.

#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace textok_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A contiguous tensor of these sizes. (torch::stable::empty goes through the dispatcher's boxed call, which costs more than a kernel
// over 32 rows.)
inline Tensor empty(const int64_t* sizes, size_t dims, ScalarType dtype) {
  int64_t strides[64];  // as many dimensions as PyTorch has
  int64_t stride = 1;
  STD_TORCH_CHECK(dims <= 64, "too many dimensions");
  for (size_t i = dims; i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i] > 0 ? sizes[i] : 1;
  }
  AtenTensorHandle handle = nullptr;
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(dims), sizes, strides, code, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}
inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) { return empty(sizes.begin(), sizes.size(), dtype); }
inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype) { return empty(sizes.data(), sizes.size(), dtype); }

// The tensor itself when the numbers of its last dimension lie next to each other, else a contiguous copy.
inline Tensor dense_rows(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return last < 0 || tensor.size(last) <= 1 || tensor.stride(last) == 1 ? tensor : torch::stable::contiguous(tensor);
}

inline void check_cpu(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " must lie on the CPU");
}

inline void check_dtype(const char* name, const Tensor& tensor, ScalarType dtype) {
  const ScalarType found = tensor.scalar_type();
  STD_TORCH_CHECK(
      found == dtype, name, " must be ", torch::headeronly::toString(dtype), ", got ", torch::headeronly::toString(found));
}

inline void check_sizes(const char* name, const Tensor& tensor, std::initializer_list<int64_t> wanted) {
  bool equal = tensor.dim() == static_cast<int64_t>(wanted.size());
  for (size_t i = 0; equal && i < wanted.size(); ++i) equal = tensor.size(static_cast<int64_t>(i)) == wanted.begin()[i];
  STD_TORCH_CHECK(equal, name, " has the wrong shape");
}

// Rows a thread takes at least, so that it has `bytes` to read and write: below that, waking it costs more than it saves.
inline int64_t grain(int64_t bytes_per_row, int64_t bytes = 1 << 17) {
  return bytes_per_row <= 0 ? bytes : (bytes + bytes_per_row - 1) / bytes_per_row;
}

}  // namespace textok_fast
