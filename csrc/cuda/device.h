// What the kernels share: numbers, vectors of 16 bytes, sums over a warp or a block.
//
// The kernels use nothing of CUDA but the built-in variables, shuffles, barriers and shared memory, so that
// tests/ops/emulate_cuda.cpp can run the same source on the host, with what it defines before it includes this file.

#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
// Of 1,024-byte alignment, of the size given at the launch.
#define TEXTOK_DYNAMIC_SHARED(name)                          \
  extern __shared__ __align__(1024) float4 name##_bytes[]; \
  float* const name = reinterpret_cast<float*>(name##_bytes)
#endif

namespace textok_fast::cuda {

constexpr int kWarp = 32;

template <int N>
struct Constant {
  static constexpr int value = N;
};

// -- numbers ---------------------------------------------------------------------------------------------------------------

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float to_float(__half value) { return __half2float(value); }

template <typename T>
__device__ inline T from_float(float value);
template <>
__device__ inline float from_float<float>(float value) { return value; }
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float value) { return __float2bfloat16_rn(value); }
template <>
__device__ inline __half from_float<__half>(float value) { return __float2half_rn(value); }

// V numbers that are read and written at once; the address must be a multiple of their size.
template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T v[V];
};

template <int V, typename T>
__device__ inline Pack<T, V> load(const T* address) {
#if !defined(__CUDACC__)
  emulation::touch(address, sizeof(Pack<T, V>));
#endif
  return *reinterpret_cast<const Pack<T, V>*>(address);
}

// For memory that nothing writes while the kernel runs: the compiler may then read it as early as it likes.
template <int V, typename T>
__device__ inline Pack<T, V> load_input(const T* address) {
#if defined(__CUDACC__)
  constexpr int bytes = sizeof(Pack<T, V>);
  Pack<T, V> pack;
  if constexpr (bytes == 16) {
    *reinterpret_cast<uint4*>(&pack) = __ldg(reinterpret_cast<const uint4*>(address));
  } else if constexpr (bytes == 8) {
    *reinterpret_cast<uint2*>(&pack) = __ldg(reinterpret_cast<const uint2*>(address));
  } else if constexpr (bytes == 4) {
    *reinterpret_cast<unsigned*>(&pack) = __ldg(reinterpret_cast<const unsigned*>(address));
  } else {
    static_assert(bytes == 2);
    *reinterpret_cast<unsigned short*>(&pack) = __ldg(reinterpret_cast<const unsigned short*>(address));
  }
  return pack;
#else
  return load<V>(address);
#endif
}

template <int V, typename T>
__device__ inline void store(T* address, const Pack<T, V>& pack) {
#if !defined(__CUDACC__)
  emulation::touch(address, sizeof(Pack<T, V>));
#endif
  *reinterpret_cast<Pack<T, V>*>(address) = pack;
}

template <int V, typename T>
__device__ inline Pack<T, V> zeros() {
  Pack<T, V> pack;
#pragma unroll
  for (int j = 0; j < V; ++j) pack.v[j] = from_float<T>(0.0f);
  return pack;
}

// -- sums ------------------------------------------------------------------------------------------------------------------

// The same bits in every lane, because a + b == b + a.
__device__ inline float warp_sum(float value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// For all threads of the block, of which there are a multiple of 32; `shared` has a number for each warp. Every thread of the
// block calls it; ends with a barrier, so that it can be called again with the same memory.
__device__ inline float block_sum(float value, float* shared) {
  value = warp_sum(value);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = value;
  __syncthreads();
  float sum = 0.0f;
  for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) sum += shared[warp];
  __syncthreads();
  return sum;
}

}  // namespace textok_fast::cuda
