// What norm.cu and guided.cu compile for bindings.cu. These two see no header of PyTorch, which nvcc would read anew for every
// architecture.

#pragma once

#include <cuda_runtime.h>

#include "guided.h"
#include "norm.h"

namespace textok_fast::cuda {

// Launches on a stream and remembers the first error.
struct Stream {
  cudaStream_t stream;
  cudaError_t error = cudaSuccess;

  template <typename Arguments>
  void operator()(void (*kernel)(Arguments), uint32_t blocks, uint32_t threads, size_t shared, const Arguments& arguments) {
    if (error != cudaSuccess) return;
    kernel<<<blocks, threads, shared, stream>>>(arguments);
    error = cudaGetLastError();
  }
};

// With `residual`, x + gate * branch is formed first. Defined for float, __nv_bfloat16 and __half.
template <typename T>
void run_norm_forward(const NormForward<T>& arguments, bool residual, Stream& stream);
template <typename T>
void run_norm_backward(const NormBackward<T>& arguments, Stream& stream);

// Defined for each of those as the output's and as x's type.
template <typename TO, typename TX>
void run_guided_step(const GuidedStep<TO, TX>& arguments, Stream& stream);

}  // namespace textok_fast::cuda
