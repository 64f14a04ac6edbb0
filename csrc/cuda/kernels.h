// What norm.cu, guided.cu and few_rows.cu compile for bindings.cu. These see no header of PyTorch, which nvcc would read anew
// for every architecture.

#pragma once

#include <cuda_runtime.h>

#include "few_rows.h"
#include "guided.h"
#include "norm.h"

namespace textok_fast::cuda {

// Launches on a stream and remembers the first error.
struct Stream {
  cudaStream_t stream;
  cudaError_t error = cudaSuccess;
  bool overlap = true;  // of kernels on a Grid with the one before; see tile.h

  template <typename Arguments>
  void operator()(void (*kernel)(Arguments), uint32_t blocks, uint32_t threads, size_t shared, const Arguments& arguments) {
    if (error != cudaSuccess) return;
    kernel<<<blocks, threads, shared, stream>>>(arguments);
    error = cudaGetLastError();
  }

  template <typename Arguments>
  void operator()(
      void (*kernel)(Arguments), const Grid& grid, uint32_t threads, size_t shared, const Arguments& arguments) {
    if (error == cudaSuccess && shared > 48 << 10) {
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    }
    if (error != cudaSuccess) return;
    cudaLaunchAttribute attributes[2]{};
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {grid.cluster, 1, 1};
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(grid.x, grid.y, grid.z);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = overlap ? 2 : 1;
    error = cudaLaunchKernelEx(&config, kernel, arguments);
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

void run_rows_product(const RowsProduct& arguments, const RowsPlan& plan, Stream& stream);
void run_rows_attention(const RowsAttention& arguments, Stream& stream);

// Defined for float and __nv_bfloat16.
template <typename T>
void run_rows_norm(const RowsNorm<T>& arguments, Stream& stream);

}  // namespace textok_fast::cuda
