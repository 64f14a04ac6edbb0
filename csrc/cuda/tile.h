// What kernels with tensor cores, clusters of thread blocks and overlapping launches are made of. Each function is one or two
// instructions; on the host, tests/ops/emulate_cuda.cpp says what they do.

#pragma once

#include "device.h"

namespace textok_fast::cuda {

// -- asynchronous copies -----------------------------------------------------------------------------------------------------

// 16 bytes from global to shared memory, past L1; zeros unless `valid`, and the address must be one of a tensor even then.
__device__ inline void copy_async(void* shared, const void* global, bool valid) {
#if defined(__CUDACC__)
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(valid ? 16 : 0) : "memory");
#else
  emulation::copy_async(shared, global, valid);
#endif
}

// For what the kernel before wrote: past L1, which may hold what an earlier kernel read there.
template <int V, typename T>
__device__ inline Pack<T, V> load_fresh(const T* address) {
#if defined(__CUDACC__)
  constexpr int bytes = sizeof(Pack<T, V>);
  Pack<T, V> pack;
  if constexpr (bytes == 16) {
    *reinterpret_cast<uint4*>(&pack) = __ldcg(reinterpret_cast<const uint4*>(address));
  } else {
    static_assert(bytes == 8);
    *reinterpret_cast<uint2*>(&pack) = __ldcg(reinterpret_cast<const uint2*>(address));
  }
  return pack;
#else
  return load<V>(address);
#endif
}

// Brings what lies there nearer. It reads no value: what is written there later will be seen.
__device__ inline void prefetch(const void* global) {
#if defined(__CUDACC__)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
#else
  emulation::touch(global, 1);
#endif
}

// Ends a group of the thread's own copies, which may be empty.
__device__ inline void commit_copies() {
#if defined(__CUDACC__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emulation::commit_copies();
#endif
}

// Until all of the thread's groups but the last N are there, for this thread.
template <int N>
__device__ inline void wait_for_copies() {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#else
  emulation::wait_for_copies(N);
#endif
}

// -- tensor cores ------------------------------------------------------------------------------------------------------------

// c (16, 8) += a (16, 16) b (16, 8) in bfloat16 with float32 sums, by a warp. With g = lane / 4 and t = lane % 4 a thread
// holds, two numbers a word: a[0] row g, columns 2 t and 2 t + 1; a[1] row g + 8; a[2], a[3] the same 8 columns further; b[0]
// column g, rows 2 t and 2 t + 1; b[1] 8 rows further; c[0], c[1] row g, columns 2 t and 2 t + 1; c[2], c[3] row g + 8.
__device__ inline void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], int of_b = 0) {
#if defined(__CUDACC__)
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[of_b]), "r"(b[of_b + 1]));
#else
  emulation::multiply(c, a, b + of_b);
#endif
}

// Four matrices of 8 rows of 16 bytes in shared memory, whose rows are where lanes 0 to 7, 8 to 15, ... say. Of each a thread
// gets word lane % 4 of row lane / 4.
__device__ inline void load_matrices(uint32_t (&words)[4], const void* row) {
#if defined(__CUDACC__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
#else
  emulation::load_matrices(words, row);
#endif
}

// -- warpgroups --------------------------------------------------------------------------------------------------------------

// Products by four warps at once, of factors that lie in shared memory: Hopper only, and only in code for sm_90a.

// A factor of rows of 64 bytes, of which 8 are 512 bytes and aligned so, in the order of a 64-byte swizzle: chunk i of 16 bytes
// of row r lies where chunk i ^ (r / 2 % 4) would. PTX ISA, "Matrix Descriptor Format": address, stride from 8 rows to the
// next, layout. The 16 numbers further on in the same rows are 32 bytes further.
__device__ inline uint64_t describe_factor(const char* rows) {
#if defined(__CUDACC__)
  const uint64_t address = static_cast<uint32_t>(__cvta_generic_to_shared(rows));
  return (address & 0x3ffff) >> 4 | uint64_t{1} << 16 | uint64_t{512 >> 4} << 32 | uint64_t{2} << 62;
#else
  return reinterpret_cast<uint64_t>(rows);
#endif
}

// What was copied to shared memory by this thread is there for the products of any warpgroup, after a barrier.
__device__ inline void show_copies_to_warpgroups() {
#if defined(__CUDACC__) && __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Before products whose sums a thread has written.
__device__ inline void begin_group_products() {
#if defined(__CUDACC__) && defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

__device__ inline void commit_group_products() {
#if defined(__CUDACC__) && defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#elif !defined(__CUDACC__)
  emulation::commit_group_products();
#endif
}

// Until all that are committed but the last N groups have read their factors and, with N = 0, the sums may be read.
template <int N, int NT>
__device__ inline void wait_for_group_products(float (&c)[NT][4]) {
#if defined(__CUDACC__) && defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
#pragma unroll
  for (int n = 0; N == 0 && n < NT; ++n) {
#pragma unroll
    for (int j = 0; j < 4; ++j) asm volatile("" : "+f"(c[n][j])::"memory");  // not read any earlier
  }
#elif !defined(__CUDACC__)
  emulation::wait_for_group_products(N);
#endif
}

// c (64, 8 NT) += a (64, 16) b (8 NT, 16)^T; warp i of the four has rows 16 i and on, as multiply() has them.
template <int NT>
__device__ inline void multiply_by_group(float (&c)[NT][4], uint64_t a, uint64_t b) {
#if defined(__CUDACC__)
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  if constexpr (NT == 4) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
        "}, %16, %17, 1, 1, 1, 0, 0;"
        : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]),
          "+f"(c[1][2]), "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]),
          "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]), "+f"(c[3][3])
        : "l"(a), "l"(b));
  } else if constexpr (NT == 7) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n56k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "
        "%23, %24, %25, %26, %27"
        "}, %28, %29, 1, 1, 1, 0, 0;"
        : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]),
          "+f"(c[1][2]), "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]),
          "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]), "+f"(c[3][3]), "+f"(c[4][0]), "+f"(c[4][1]),
          "+f"(c[4][2]), "+f"(c[4][3]), "+f"(c[5][0]), "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]),
          "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3])
        : "l"(a), "l"(b));
  } else if constexpr (NT == 8) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "
        "%23, %24, %25, %26, %27, %28, %29, %30, %31"
        "}, %32, %33, 1, 1, 1, 0, 0;"
        : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]),
          "+f"(c[1][2]), "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]),
          "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]), "+f"(c[3][3]), "+f"(c[4][0]), "+f"(c[4][1]),
          "+f"(c[4][2]), "+f"(c[4][3]), "+f"(c[5][0]), "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]),
          "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]), "+f"(c[7][0]), "+f"(c[7][1]),
          "+f"(c[7][2]), "+f"(c[7][3])
        : "l"(a), "l"(b));
  } else if constexpr (NT == 9) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n72k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "
        "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35"
        "}, %36, %37, 1, 1, 1, 0, 0;"
        : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]),
          "+f"(c[1][2]), "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]),
          "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]), "+f"(c[3][3]), "+f"(c[4][0]), "+f"(c[4][1]),
          "+f"(c[4][2]), "+f"(c[4][3]), "+f"(c[5][0]), "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]),
          "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]), "+f"(c[7][0]), "+f"(c[7][1]),
          "+f"(c[7][2]), "+f"(c[7][3]), "+f"(c[8][0]), "+f"(c[8][1]), "+f"(c[8][2]), "+f"(c[8][3])
        : "l"(a), "l"(b));
  } else {
    static_assert(NT == 4, "a warpgroup's products are written out for 32, 56, 64 and 72 columns");
  }
#else
  __trap();  // the host launches no such kernel there
#endif
#else
  emulation::multiply_by_group(c, a, b);
#endif
}

// Two numbers as a word, the first in its lower half.
__device__ inline uint32_t pack_bf16(float first, float second) {
  const Pack<__nv_bfloat16, 2> pair{{from_float<__nv_bfloat16>(first), from_float<__nv_bfloat16>(second)}};
  uint32_t word;
  memcpy(&word, &pair, sizeof word);
  return word;
}

// -- clusters ----------------------------------------------------------------------------------------------------------------

// A barrier for all threads of the cluster, in two halves: what was written to shared memory before the first is there for all
// after the second, if `release`: that waits for the thread's writes to global memory too.
template <bool release>
__device__ inline void cluster_arrive() {
#if defined(__CUDACC__)
#if __CUDA_ARCH__ >= 900
  if constexpr (release) {
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
  } else {
    asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
  }
#else
  __trap();  // the host launches no such kernel there
#endif
#else
  emulation::cluster_arrive<release>();
#endif
}

__device__ inline void cluster_wait() {
#if defined(__CUDACC__)
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
#else
  emulation::cluster_wait();
#endif
}

// What stands at this address of its own shared memory in block `rank` of the cluster.
__device__ inline Pack<float, 4> load_from_rank(const Pack<float, 4>* shared, uint32_t rank) {
#if defined(__CUDACC__)
  Pack<float, 4> pack{};
#if __CUDA_ARCH__ >= 900
  const uint32_t own = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(own), "r"(rank));
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(pack.v[0]), "=f"(pack.v[1]), "=f"(pack.v[2]), "=f"(pack.v[3])
               : "r"(address)
               : "memory");
#endif
  return pack;
#else
  return emulation::load_from_rank(shared, rank);
#endif
}

// -- overlapping launches ----------------------------------------------------------------------------------------------------

// A kernel that is launched to overlap may start once every block of the one before has called allow_next_kernel(), and must
// then read nothing that this one writes, and write nothing at all, before await_previous_kernel(): that returns when the
// kernel before has ended and what it wrote can be seen. As every block of these kernels waits, all the earlier ones have ended
// too.
__device__ inline void allow_next_kernel() {
#if defined(__CUDACC__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ inline void await_previous_kernel() {
#if defined(__CUDACC__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace textok_fast::cuda
