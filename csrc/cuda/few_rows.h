// A DiT block over few rows (64, say: a guidance pair of 32 tokens) in bfloat16: products that are bound by reading their
// weights, attention of at most 64 tokens, and gated residual with LayerNorm. What the block computes:
// textok_fast/ops/block.py.
//
// With so few rows it is latency that costs. Each kernel lets the next one start at once, and that reads its weights into
// shared memory while this one computes; a product's sum is split over the blocks of a cluster, so that each reads only a part
// of x, and is put together through their shared memory.

#pragma once

#include <cmath>

#include "tile.h"

namespace textok_fast::cuda {

constexpr uint32_t kTileRows = 64;      // rows of x that a block multiplies
constexpr uint32_t kSlice = 32;         // numbers of a sum that are loaded and multiplied together: 64 bytes of each row
constexpr uint32_t kSliceBytes = 64;
constexpr uint32_t kRowsThreads = 256;
constexpr uint32_t kMaxCluster = 8;     // what every GPU with clusters can launch
constexpr uint32_t kMaxTokens = 64;     // of a sample, in the attention
constexpr uint32_t kMaxHead = 96;
constexpr uint32_t kMaxNormWidth = 2048;
constexpr uint32_t kMostShared = 113 << 10;  // of a block: two of them, or one and the next kernel's, fit a multiprocessor

// Slices of R rows lie one after the other, each row's 64 bytes side by side as four chunks, in an order that differs from row
// to row: so 8 rows of the same chunk lie in different banks. It is also an order that warpgroups read.
__host__ __device__ constexpr uint32_t slice_pitch(uint32_t rows) { return rows * kSliceBytes; }

__device__ inline uint32_t place_in_slice(uint32_t row, uint32_t chunk) {
  return row * kSliceBytes + (chunk ^ row / 2 % 4) * 16;
}

// The first factor of multiply(), from 16 rows of a slice and half of its numbers.
__device__ inline void load_rows(uint32_t (&a)[4], const char* slice, uint32_t row, uint32_t half) {
  const uint32_t lane = threadIdx.x % kWarp;
  load_matrices(a, slice + row * kSliceBytes + place_in_slice(lane % 16, 2 * half + lane / 16));
}

// Its second one, from 8 rows: b[0] and b[1] of the first half, b[2] and b[3] of the second.
__device__ inline void load_columns(uint32_t (&b)[4], const char* slice, uint32_t row) {
  const uint32_t lane = threadIdx.x % kWarp;
  load_matrices(b, slice + row * kSliceBytes + place_in_slice(lane % 8, lane / 8));
}

// -- product -----------------------------------------------------------------------------------------------------------------

enum class Activation : uint32_t { kNone, kGelu, kGeluTanh };

__device__ inline float activate(float x, Activation activation) {
  if (activation == Activation::kGelu) return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
  if (activation == Activation::kGeluTanh) {
    // 0.5 x (1 + tanh(z)) = x / (1 + exp(-2 z)), with z = sqrt(2 / pi) (x + 0.044715 x^3); exp in base 2
    const float z = x * (1.0f + 0.044715f * x * x);
    return x / (1.0f + exp2f(-2.0f * 0.79788456080286536f * 1.4426950408889634f * z));
  }
  return x;
}

// activation(x weight^T + bias), or the sum's `splits` parts without either.
struct RowsProduct {
  const __nv_bfloat16 *x, *weight, *bias;  // (M, K), (N, K), (N) or null
  __nv_bfloat16* out;                      // (M, N), or null
  float* partial;                          // (splits, M, N), or null
  uint32_t rows, inputs, outputs;          // M, K, N: K a multiple of 32, N of 8
  uint32_t cluster, splits;                // K is shared by cluster * splits blocks; cluster is a power of two
  uint32_t slices;                         // at most, of a block
  Activation activation;
};

// 8 warps: some along the rows, 32 each or with GROUPS, where four of them multiply together, 16; WN along the columns with NT
// * 8 each; WK along the sum. STAGES times some slices of x are in shared memory at a time.
template <bool GROUPS, int NT, int WN, int WK, int STAGES>
struct RowsTile {
  static constexpr int MT = GROUPS ? 1 : 2, WM = GROUPS ? 4 : 2;  // 16 rows of a warp, warps
  static_assert(WM * WN * WK * kWarp == kRowsThreads);
  static constexpr uint32_t columns = NT * WN * 8;
  static constexpr uint32_t weight_pitch = slice_pitch(columns), x_pitch = slice_pitch(kTileRows);
  static constexpr uint32_t sums = kTileRows * columns / 4;  // fours

  // Of this, a multiple of WK for GROUPS, whose warps all have as many.
  __host__ __device__ static constexpr uint32_t whole(uint32_t slices) { return GROUPS ? (slices + WK - 1) / WK * WK : slices; }

  // Up to the biases.
  __host__ __device__ static constexpr uint32_t body(uint32_t slices) {
    const uint32_t tiles = whole(slices) * weight_pitch + STAGES * WK * x_pitch;
    const uint32_t staging = (WK > 2 ? WK / 2 : 1) * sums * 16;
    return tiles > staging ? tiles : staging;
  }

  static constexpr uint32_t bytes(uint32_t slices) { return body(slices) + columns * sizeof(__nv_bfloat16); }
};

// Columns `first` and on of the `slices` slices from `begin` on; columns after the last one, and slices up to `whole`, as
// zeros.
template <uint32_t COLUMNS>
__device__ inline void copy_weights(
    char* to, const RowsProduct& p, uint32_t first, uint32_t begin, uint32_t slices, uint32_t whole) {
  const uint32_t chunks = whole * 4, count = COLUMNS * chunks;
  if (count == 0) return;
  const uint32_t row_step = kRowsThreads / chunks, chunk_step = kRowsThreads % chunks;
  uint32_t row = threadIdx.x / chunks, chunk = threadIdx.x % chunks;
  const __nv_bfloat16* const from = p.weight + static_cast<int64_t>(first) * p.inputs + begin * kSlice;
  for (uint32_t i = threadIdx.x; i < count; i += kRowsThreads) {
    const bool valid = first + row < p.outputs && chunk < slices * 4;
    const __nv_bfloat16* const address = valid ? from + static_cast<int64_t>(row) * p.inputs + chunk * 8 : p.weight;
    copy_async(to + chunk / 4 * slice_pitch(COLUMNS) + place_in_slice(row, chunk % 4), address, valid);
    row += row_step;
    chunk += chunk_step;
    if (chunk >= chunks) {
      chunk -= chunks;
      ++row;
    }
  }
}

// Sums the same place over the cluster, in the order of the blocks.
template <int CLUSTER>
__device__ inline Pack<float, 4> sum_over_cluster(const Pack<float, 4>* place) {
  Pack<float, 4> parts[CLUSTER];
#pragma unroll
  for (int rank = 0; rank < CLUSTER; ++rank) parts[rank] = load_from_rank(place, rank);
#pragma unroll
  for (int rank = 1; rank < CLUSTER; ++rank) {
#pragma unroll
    for (int j = 0; j < 4; ++j) parts[0].v[j] += parts[rank].v[j];
  }
  return parts[0];
}

template <bool GROUPS, int NT, int WN, int WK, int STAGES>
__global__ void __launch_bounds__(kRowsThreads, 2) rows_product(const RowsProduct p) {
  using Tile = RowsTile<GROUPS, NT, WN, WK, STAGES>;
  constexpr int MT = Tile::MT, WM = Tile::WM;
  TEXTOK_DYNAMIC_SHARED(shared);
  char* const weights = reinterpret_cast<char*>(shared);
  char* const stages = weights + Tile::whole(p.slices) * Tile::weight_pitch;
  __nv_bfloat16* const biases = reinterpret_cast<__nv_bfloat16*>(weights + Tile::body(p.slices));

  const uint32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const uint32_t wm = warp % WM, wn = warp / WM % WN, wk = warp / (WM * WN);
  const uint32_t share = blockIdx.x, shares = p.cluster * p.splits;  // of the sum
  const uint32_t rank = share & (p.cluster - 1), split = share / p.cluster;
  const uint32_t column = blockIdx.y * Tile::columns, row = blockIdx.z * kTileRows;
  const uint32_t all = p.inputs / kSlice, begin = all * share / shares, slices = all * (share + 1) / shares - begin;

  allow_next_kernel();
  copy_weights<Tile::columns>(weights, p, column, begin, slices, Tile::whole(slices));
  if (p.bias != nullptr && threadIdx.x < Tile::columns / 8) {
    const bool valid = column + threadIdx.x * 8 < p.outputs;
    copy_async(biases + threadIdx.x * 8, valid ? p.bias + column + threadIdx.x * 8 : p.bias, valid);
  }
  commit_copies();
  await_previous_kernel();

  // A stage has WK slices, one for each part of the warps. Counted down, as a register is dear here: `left` are not multiplied
  // yet by the warps of part 0, `coming` not copied.
  int left = static_cast<int>(slices), coming = static_cast<int>(Tile::whole(slices));
  const uint32_t mine = row + threadIdx.x / 4;
  const bool valid = mine < p.rows;
  const __nv_bfloat16* from = p.x + static_cast<int64_t>(valid ? mine : 0) * p.inputs + begin * kSlice + threadIdx.x % 4 * 8;
  const __nv_bfloat16* const end = from + slices * kSlice;
  const uint32_t own = place_in_slice(threadIdx.x / 4, threadIdx.x % 4);
  const auto copy_x = [&](uint32_t stage) {  // bytes from the first one
#pragma unroll
    for (int k = 0; k < WK; ++k) {
      if (k >= coming) continue;
      const bool there = valid && (Tile::whole(1) == 1 || from + k * kSlice < end);
      copy_async(stages + own + stage + k * Tile::x_pitch, there ? from + k * kSlice : p.x, there);
    }
    from += WK * kSlice;
    coming -= WK;
  };
#pragma unroll
  for (uint32_t i = 0; i < STAGES; ++i) {
    copy_x(i * WK * Tile::x_pitch);
    commit_copies();
  }

  float sums[MT][NT][4] = {};
  uint32_t stage = 0, w = wn * NT * 8 * kSliceBytes + wk * Tile::weight_pitch;  // bytes
  const auto advance = [](uint32_t& stage) {
    constexpr uint32_t step = WK * Tile::x_pitch;
    stage = stage == (STAGES - 1) * step ? 0 : stage + step;
  };
  if constexpr (GROUPS) {
    // A stage's products run while those of the next are issued, and it is filled again when all warps have seen them end. So
    // two stages are not on their way, which waits for two more than it must at first.
    uint32_t free = 0;
#pragma unroll 1
    for (uint32_t i = 0; left > 0; ++i, left -= WK) {
      wait_for_copies<STAGES - 3>();
      show_copies_to_warpgroups();
      __syncthreads();
      if (i >= 2) {
        if (coming > 0) copy_x(free);
        commit_copies();
        advance(free);
      }
      begin_group_products();
      const char* const x = stages + stage + wk * Tile::x_pitch;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        multiply_by_group(sums[0], describe_factor(x + half * 32), describe_factor(weights + w + half * 32));
      }
      commit_group_products();
      wait_for_group_products<1>(sums[0]);
      w += WK * Tile::weight_pitch;
      advance(stage);
    }
    wait_for_group_products<0>(sums[0]);
  } else {
#pragma unroll 1
    for (; left > 0; left -= WK) {
      wait_for_copies<STAGES - 1>();
      __syncthreads();
      if (static_cast<int>(wk) < left) {
        uint32_t a[MT][2][4];  // of 16 rows and half a slice
#pragma unroll
        for (int m = 0; m < MT; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            load_rows(a[m][half], stages + stage + wk * Tile::x_pitch, (wm * MT + m) * 16, half);
          }
        }
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          uint32_t b[4];
          load_columns(b, weights + w, n * 8);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int m = 0; m < MT; ++m) multiply(sums[m][n], a[m][half], b, 2 * half);
          }
        }
      }
      w += WK * Tile::weight_pitch;
      if (coming > 0) {
        __syncthreads();
        copy_x(stage);
      }
      commit_copies();
      advance(stage);
    }
  }

  // The parts of the warps along the sum meet in shared memory, in the order in which the threads hold them, then the
  // cluster's.
  wait_for_copies<0>();  // of a block without a slice
  __syncthreads();
  Pack<float, 4>* const staging = reinterpret_cast<Pack<float, 4>*>(weights);
  const uint32_t slot = (wm * WN + wn) * MT * NT * kWarp + lane;  // of this thread's first four sums
  const auto each = [&](auto&& run) {
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int n = 0; n < NT; ++n) run(sums[m][n], slot + (m * NT + n) * kWarp);
    }
  };
  const auto put = [&](uint32_t area) {
    each([&](float(&four)[4], uint32_t place) {
      store<4>(&staging[area * Tile::sums + place].v[0], {{four[0], four[1], four[2], four[3]}});
    });
  };
#pragma unroll
  for (uint32_t half = WK / 2; half > 0; half /= 2) {
    if (wk >= half && wk < 2 * half) put(wk - half);
    __syncthreads();
    if (wk < half) {
      each([&](float(&four)[4], uint32_t place) {
        const Pack<float, 4> other = load<4>(&staging[wk * Tile::sums + place].v[0]);
#pragma unroll
        for (int j = 0; j < 4; ++j) four[j] += other.v[j];
      });
    }
    __syncthreads();
  }
  if (wk == 0) put(0);
  cluster_arrive<true>();
  cluster_wait();

  const auto finish = [&](auto cluster) {
    const uint32_t last = Tile::sums * (rank + 1) / p.cluster;
    for (uint32_t i = Tile::sums * rank / p.cluster + threadIdx.x; i < last; i += kRowsThreads) {
      const Pack<float, 4> sum = sum_over_cluster<decltype(cluster)::value>(staging + i);
      const uint32_t piece = i / kWarp, n = piece % NT, m = piece / NT % MT, of = piece / (MT * NT);
      const uint32_t to = column + (of % WN * NT + n) * 8 + i % 4 * 2;
      const uint32_t from = row + (of / WN * MT + m) * 16 + i % kWarp / 4;
      if (to >= p.outputs) continue;
      float bias[2] = {};
      if (p.bias != nullptr) {
        const Pack<__nv_bfloat16, 2> pair = load<2>(biases + to - column);
        for (int j = 0; j < 2; ++j) bias[j] = to_float(pair.v[j]);
      }
#pragma unroll
      for (uint32_t half = 0; half < 2; ++half) {
        const uint32_t at = from + half * 8;
        if (at >= p.rows) continue;
        const float first = sum.v[2 * half], second = sum.v[2 * half + 1];
        if (p.partial != nullptr) {
          store<2>(p.partial + (static_cast<int64_t>(split) * p.rows + at) * p.outputs + to, {{first, second}});
        } else {
          const Pack<__nv_bfloat16, 2> pair{
              {from_float<__nv_bfloat16>(activate(first + bias[0], p.activation)),
               from_float<__nv_bfloat16>(activate(second + bias[1], p.activation))}};
          store<2>(p.out + static_cast<int64_t>(at) * p.outputs + to, pair);
        }
      }
    }
  };
  if (p.cluster == 8) finish(Constant<8>{});
  if (p.cluster == 4) finish(Constant<4>{});
  if (p.cluster == 2) finish(Constant<2>{});
  if (p.cluster == 1) finish(Constant<1>{});
  // Nobody leaves while another one may read its shared memory; what was read has been used.
  cluster_arrive<false>();
  cluster_wait();
}

// -- attention ---------------------------------------------------------------------------------------------------------------

// softmax(q k^T / sqrt(d)) v for each sample and head; a block has one of each.
struct RowsAttention {
  const __nv_bfloat16* qkv;               // (B, N, 3, H, d)
  __nv_bfloat16* out;                     // (B, N, H, d)
  uint32_t batch, tokens, heads, width;   // B, N, H, d: N up to 64; d a multiple of 8, up to 96
  float scale;                            // log2(e) / sqrt(d)
};

inline float attention_scale(uint32_t width) {
  return 1.4426950408889634f / std::sqrt(static_cast<float>(width));
}

// Bytes of a row of v, an odd number of 16, so that rows lie in different banks.
__host__ __device__ constexpr uint32_t value_pitch(uint32_t width) { return (width / 8 | 1) * 16; }

__host__ __device__ constexpr uint32_t attention_bytes(uint32_t width) {
  return 2 * ((width + kSlice - 1) / kSlice) * slice_pitch(kMaxTokens) + kMaxTokens * value_pitch(width);
}

// SLICES hold a row of a head.
template <uint32_t SLICES>
__global__ void __launch_bounds__(kRowsThreads) rows_attention(const RowsAttention p) {
  TEXTOK_DYNAMIC_SHARED(shared);
  constexpr uint32_t pitch = slice_pitch(kMaxTokens);
  const uint32_t chunks = p.width / 8;
  char* const queries = reinterpret_cast<char*>(shared);
  char* const keys = queries + SLICES * pitch;
  char* const values = keys + SLICES * pitch;
  const uint32_t sample = blockIdx.y, head = blockIdx.x;
  const uint32_t groups = (p.tokens + 15) / 16;  // of 16 rows, queries or keys

  allow_next_kernel();
  await_previous_kernel();
  const int64_t part = static_cast<int64_t>(p.heads) * p.width;  // from q to k
  const __nv_bfloat16* const from = p.qkv + static_cast<int64_t>(sample) * p.tokens * 3 * part + head * p.width;
  for (uint32_t i = threadIdx.x; i < groups * 16 * SLICES * 4; i += kRowsThreads) {
    const uint32_t row = i / (SLICES * 4), chunk = i % (SLICES * 4);
    const bool valid = row < p.tokens && chunk < chunks;
    const __nv_bfloat16* const address = valid ? from + static_cast<int64_t>(row) * 3 * part + chunk * 8 : p.qkv;
    const uint32_t to = chunk / 4 * pitch + place_in_slice(row, chunk % 4);
    copy_async(queries + to, address, valid);
    copy_async(keys + to, valid ? address + part : p.qkv, valid);
    if (chunk < chunks) {
      copy_async(values + row * value_pitch(p.width) + chunk * 16, valid ? address + 2 * part : p.qkv, valid);
    }
  }
  commit_copies();
  wait_for_copies<0>();
  __syncthreads();

  // A warp has 16 queries and some of the columns; what several have of the same queries each computes anew.
  const uint32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, t = lane % 4;
  const uint32_t others = kRowsThreads / kWarp / groups, group = warp / others, other = warp % others;
  if (group >= groups) return;
  float scores[kMaxTokens / 8][4] = {};
#pragma unroll
  for (uint32_t s = 0; s < SLICES; ++s) {
    uint32_t a[2][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) load_rows(a[half], queries + s * pitch, group * 16, half);
#pragma unroll
    for (uint32_t n = 0; n < kMaxTokens / 8; ++n) {
      if (n >= groups * 2) continue;
      uint32_t b[4];
      load_columns(b, keys + s * pitch, n * 8);
#pragma unroll
      for (int half = 0; half < 2; ++half) multiply(scores[n], a[half], b, 2 * half);
    }
  }
  float most[2] = {-INFINITY, -INFINITY}, total[2] = {};
#pragma unroll
  for (uint32_t n = 0; n < kMaxTokens / 8; ++n) {
#pragma unroll
    for (uint32_t j = 0; j < 4; ++j) {
      if (n * 8 + 2 * t + j % 2 >= p.tokens) scores[n][j] = -INFINITY;
      most[j / 2] = fmaxf(most[j / 2], scores[n][j]);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    most[half] = fmaxf(most[half], __shfl_xor_sync(0xffffffffu, most[half], 1));
    most[half] = fmaxf(most[half], __shfl_xor_sync(0xffffffffu, most[half], 2));
  }
#pragma unroll
  for (uint32_t n = 0; n < kMaxTokens / 8; ++n) {
#pragma unroll
    for (uint32_t j = 0; j < 4; ++j) {
      scores[n][j] = exp2f((scores[n][j] - most[j / 2]) * p.scale);
      total[j / 2] += scores[n][j];
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    total[half] += __shfl_xor_sync(0xffffffffu, total[half], 1);
    total[half] += __shfl_xor_sync(0xffffffffu, total[half], 2);
  }

  // Sums of 8 columns as multiply() gives them are, in bfloat16, what it takes: 16 keys in two of them.
  for (uint32_t column = other; column < chunks; column += others) {
    float sums[4] = {};
#pragma unroll
    for (uint32_t k = 0; k < kMaxTokens / 16; ++k) {
      if (k >= groups) break;
      const float(&one)[4] = scores[2 * k];
      const float(&two)[4] = scores[2 * k + 1];
      const char* const place = values + (k * 16 + 2 * t) * value_pitch(p.width) + column * 16 + g * 2;
      uint32_t pair[4];
#pragma unroll
      for (uint32_t half = 0; half < 2; ++half) {
        const char* const at = place + half * 8 * value_pitch(p.width);
        const uint32_t lower = load<1>(reinterpret_cast<const uint16_t*>(at)).v[0];
        const uint32_t upper = load<1>(reinterpret_cast<const uint16_t*>(at + value_pitch(p.width))).v[0];
        pair[half] = lower | upper << 16;
      }
      multiply(
          sums,
          {pack_bf16(one[0], one[1]), pack_bf16(one[2], one[3]), pack_bf16(two[0], two[1]), pack_bf16(two[2], two[3])}, pair);
    }
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
      const uint32_t token = group * 16 + g + half * 8;
      if (token >= p.tokens) continue;
      const int64_t to = (static_cast<int64_t>(sample) * p.tokens + token) * part + head * p.width + column * 8 + 2 * t;
      const float inverse = 1.0f / total[half];
      store<2>(
          p.out + to, {{from_float<__nv_bfloat16>(sums[2 * half] * inverse),
                        from_float<__nv_bfloat16>(sums[2 * half + 1] * inverse)}});
    }
  }
}

// -- gated residual and LayerNorm --------------------------------------------------------------------------------------------

// r = x + gate (the parts' sum + bias), out = LayerNorm(r) (1 + scale) + shift, of r as it is stored. A block has a row, a
// thread four numbers of it.
template <typename T>
struct RowsNorm {
  const T* x;                                  // (M, D)
  const float* partial;                        // (splits, M, D)
  const __nv_bfloat16* bias;                   // (D)
  const __nv_bfloat16 *gate, *shift, *scale;   // (B, D), rows at these strides
  int64_t gate_stride, shift_stride, scale_stride;
  T* residual;                                 // (M, D)
  __nv_bfloat16* out;                          // (M, D)
  uint32_t rows, tokens, width, splits;        // M, N = M / B, D: a multiple of 4, up to 2,048
  float eps, share;                            // 1 / D, set at the launch
};

template <typename T>
__global__ void __launch_bounds__(kMaxNormWidth / 4) rows_norm(const RowsNorm<T> p) {
  __shared__ float shared[kMaxNormWidth / 4 / kWarp];
  const uint32_t sample = blockIdx.y, column = threadIdx.x * 4;
  const int64_t at = (static_cast<int64_t>(sample) * p.tokens + blockIdx.x) * p.width + column;
  const __nv_bfloat16* const gates = p.gate + sample * p.gate_stride + column;
  const __nv_bfloat16* const shifts = p.shift + sample * p.shift_stride + column;
  const __nv_bfloat16* const scales = p.scale + sample * p.scale_stride + column;
  const bool inside = column < p.width;

  allow_next_kernel();
  Pack<__nv_bfloat16, 4> bias{}, shift{}, scale{};
  if (inside) {
    bias = load<4>(p.bias + column);
    prefetch(gates);
    prefetch(shifts);
    prefetch(scales);
  }
  await_previous_kernel();
  float values[4] = {}, sum = 0.0f;
  if (inside) {
    const Pack<T, 4> x = load_fresh<4>(p.x + at);
    const Pack<__nv_bfloat16, 4> gate = load_fresh<4>(gates);
    shift = load_fresh<4>(shifts);
    scale = load_fresh<4>(scales);
    Pack<float, 4> branch = load_fresh<4>(p.partial + at);
#pragma unroll 1
    for (uint32_t split = 1; split < p.splits; ++split) {
      const Pack<float, 4> more = load_fresh<4>(p.partial + split * static_cast<int64_t>(p.rows) * p.width + at);
#pragma unroll
      for (int j = 0; j < 4; ++j) branch.v[j] += more.v[j];
    }
    Pack<T, 4> residual;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      residual.v[j] = from_float<T>(to_float(x.v[j]) + to_float(gate.v[j]) * (branch.v[j] + to_float(bias.v[j])));
      values[j] = to_float(residual.v[j]);
      sum += values[j];
    }
    store<4>(p.residual + at, residual);
  }
  const float mean = block_sum(sum, shared) * p.share;
  float squares = 0.0f;
  if (inside) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      values[j] -= mean;
      squares += values[j] * values[j];
    }
  }
  const float rstd = rsqrtf(block_sum(squares, shared) * p.share + p.eps);
  if (!inside) return;
  Pack<__nv_bfloat16, 4> out;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    out.v[j] = from_float<__nv_bfloat16>(values[j] * rstd * (1.0f + to_float(scale.v[j])) + to_float(shift.v[j]));
  }
  store<4>(p.out + at, out);
}

// -- which tile, and how many blocks -----------------------------------------------------------------------------------------

struct RowsPlan {
  uint32_t columns, cluster, splits;  // no columns: none fits
  bool groups;                        // by warpgroups, which Hopper has
};

// Only where it is called is the kernel compiled.
template <bool GROUPS, int NT, int WN, int WK, int STAGES>
auto kernel_of(RowsTile<GROUPS, NT, WN, WK, STAGES>) {
  return rows_product<GROUPS, NT, WN, WK, STAGES>;
}

// Calls run(RowsTile<...>) for the tile of so many columns, if there is one.
template <typename Run>
void with_rows_tile(bool groups, uint32_t columns, Run&& run) {
  if (groups) {
    switch (columns) {
      case 144: return run(RowsTile<true, 9, 2, 1, 7>{});
      case 128: return run(RowsTile<true, 8, 2, 1, 9>{});
      case 112: return run(RowsTile<true, 7, 2, 1, 9>{});
      case 72: return run(RowsTile<true, 9, 1, 2, 3>{});
      case 64: return run(RowsTile<true, 4, 2, 1, 9>{});
      case 32: return run(RowsTile<true, 4, 1, 2, 4>{});
      default: return;
    }
  }
  switch (columns) {
    case 144: return run(RowsTile<false, 9, 2, 2, 3>{});
    case 128: return run(RowsTile<false, 8, 2, 2, 3>{});
    case 112: return run(RowsTile<false, 7, 2, 2, 4>{});
    case 72: return run(RowsTile<false, 9, 1, 4, 2>{});
    case 64: return run(RowsTile<false, 8, 1, 4, 2>{});
    case 32: return run(RowsTile<false, 4, 1, 4, 2>{});
    default: return;
  }
}

constexpr uint32_t kRowsColumns[] = {144, 128, 112, 72, 64, 32};

inline uint32_t most_slices(uint32_t inputs, uint32_t shares) { return (inputs / kSlice + shares - 1) / shares; }

// 0 where there is no such tile.
inline uint32_t rows_product_bytes(bool groups, uint32_t columns, uint32_t slices) {
  uint32_t bytes = 0;
  with_rows_tile(groups, columns, [&](auto tile) { bytes = decltype(tile)::bytes(slices); });
  return bytes;
}

// The tile with the fewest bytes through a multiprocessor, x, weights and sums; what is given and not 0 stays. Splits, for
// partial sums only, are one or two.
inline RowsPlan plan_rows_product(
    uint32_t rows, uint32_t inputs, uint32_t outputs, bool partial, uint32_t processors, const RowsPlan& given) {
  RowsPlan best{0, 0, 0, given.groups};
  uint64_t least = ~uint64_t{0};
  for (const uint32_t columns : kRowsColumns) {
    if (given.columns != 0 && columns != given.columns) continue;
    for (uint32_t cluster = 1; cluster <= kMaxCluster; cluster *= 2) {
      if (given.cluster != 0 && cluster != given.cluster) continue;
      for (uint32_t splits = 1; splits <= (partial ? 2u : 1u); ++splits) {
        if (given.splits != 0 && splits != given.splits) continue;
        const uint32_t slices = most_slices(inputs, cluster * splits);
        if (rows_product_bytes(given.groups, columns, slices) > kMostShared) continue;
        const uint64_t blocks = static_cast<uint64_t>((rows + kTileRows - 1) / kTileRows) *
                                ((outputs + columns - 1) / columns) * cluster * splits;
        const uint64_t each = slices * kSliceBytes * (columns + kTileRows) + kTileRows * columns * 4;
        const uint64_t cost = (blocks + processors - 1) / processors * each;
        if (cost < least) {
          least = cost;
          best = {columns, cluster, splits, given.groups};
        }
      }
    }
  }
  return best;
}

// Blocks in each direction, of which so many along x are a cluster.
struct Grid {
  uint32_t x, y, z, cluster;
};

// launch(kernel, grid, threads, bytes of dynamic shared memory, arguments)
template <typename Launch>
void launch_rows_product(RowsProduct p, const RowsPlan& plan, Launch&& launch) {
  if (p.rows == 0) return;
  p.cluster = plan.cluster;
  p.splits = plan.splits;
  p.slices = most_slices(p.inputs, p.cluster * p.splits);
  const Grid grid{
      p.cluster * p.splits, (p.outputs + plan.columns - 1) / plan.columns, (p.rows + kTileRows - 1) / kTileRows, p.cluster};
  with_rows_tile(plan.groups, plan.columns, [&](auto tile) {
    launch(kernel_of(tile), grid, kRowsThreads, decltype(tile)::bytes(p.slices), p);
  });
}

template <typename Launch>
void launch_rows_attention(const RowsAttention& p, Launch&& launch) {
  if (p.batch * p.tokens == 0) return;
  const Grid grid{p.heads, p.batch, 1, 1};
  const uint32_t bytes = attention_bytes(p.width);
  if (p.width <= kSlice) return launch(rows_attention<1>, grid, kRowsThreads, bytes, p);
  if (p.width <= 2 * kSlice) return launch(rows_attention<2>, grid, kRowsThreads, bytes, p);
  launch(rows_attention<3>, grid, kRowsThreads, bytes, p);
}

template <typename T, typename Launch>
void launch_rows_norm(RowsNorm<T> p, Launch&& launch) {
  if (p.rows == 0) return;
  p.share = 1.0f / static_cast<float>(p.width);
  launch(rows_norm<T>, Grid{p.tokens, p.rows / p.tokens, 1, 1}, (p.width / 4 + kWarp - 1) / kWarp * kWarp, 0, p);
}

}  // namespace textok_fast::cuda
