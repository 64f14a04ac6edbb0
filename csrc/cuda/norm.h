// Kernels of layer_norm_modulate and gated_residual_layer_norm_modulate, forward and backward, and the choice among them.
//
//   r = x + gate * branch (or x alone, or x + branch), rounded to its dtype;  h = (r - mean) * rstd * (offset + scale) + shift
//
// Statistics and arithmetic are float32, the variance is taken in a second pass over the numbers. A warp holds its row in
// registers, each number in its own dtype; wider rows are a block's, which reads them again from the caches. A lane holds the
// columns warp_column(k, lane): vectors of 16 bytes where addresses, strides and D allow, else single numbers, and then a warp
// takes rows of up to 256.
//
// Backward, with g the gradient of h and G that of r:  w = g (offset + scale),
//   dr = rstd (w - mean(w) - xhat mean(w xhat)) + G,  dx = dr,  dbranch = gate dr,
//   dshift = sum g,  dscale = sum g xhat,  dgate = sum dr branch,  each over the rows of a sample.
// Blocks own chunks of a sample's rows and leave float32 partial sums; a second kernel adds them in a fixed order. No atomics:
// results repeat bit for bit.

#pragma once

#include "device.h"

namespace textok_fast::cuda {

constexpr uint32_t kForwardColumns = 2048;   // widest row of one warp, in vectors
constexpr uint32_t kBackwardColumns = 1280;  // less, because a gradient is held as well: no register may spill
constexpr int kBlockThreads = 256;        // threads of the block that has a wider one
constexpr int kMaxWarps = 4;              // rows a block of the warp kernels works on at a time
constexpr size_t kSharedBytes = 48 << 10;  // what every device grants without being asked
constexpr uint32_t kFewRows = 512;        // up to here one warp a block, so that they spread over the multiprocessors
constexpr uint32_t kBackwardBlocks = 512;  // about what one device runs at a time

// Strides count numbers; a row's numbers lie next to each other.
template <typename T>
struct Rows {
  const T* data;
  int64_t batch, row;
  __host__ __device__ const T* at(uint32_t sample, uint32_t n) const { return data + sample * batch + n * row; }
};

// One row a sample; the stride may be 0.
template <typename T>
struct Samples {
  const T* data;
  int64_t batch;
  __host__ __device__ const T* at(uint32_t sample) const { return data + sample * batch; }
};

template <typename T>
struct NormForward {
  Rows<T> x, branch;              // branch.data is null without a residual
  Samples<T> gate, shift, scale;  // gate.data may be null
  T *residual, *out;              // contiguous
  uint32_t batch, rows, width;    // B, N, D; B * N < 2^31
  float offset, eps;
};

template <typename T>
struct NormBackward {
  Rows<T> grad, x, grad_residual, branch;  // grad_residual.data is null without a residual, branch.data without a gate
  Samples<T> gate, scale;
  T *dx, *dbranch;                            // contiguous
  float* partial;                             // (B, chunks, kinds, D): dshift, dscale and, with a gate, dgate
  T* sums[3];                                 // the same, each (B, D) contiguous
  uint32_t batch, rows, width, chunks, chunk_rows;
  float offset, eps;
  __host__ __device__ uint32_t kinds() const { return gate.data == nullptr ? 2 : 3; }
};

// -- where things are --------------------------------------------------------------------------------------------------------

// First column of a lane's k-th vector.
template <int V>
__host__ __device__ constexpr uint32_t warp_column(uint32_t k, uint32_t lane) {
  return (k * kWarp + lane) * V;
}

// Number of floats that a warp's lanes keep for one row of CHUNKS * V numbers each.
template <int V, int CHUNKS>
__host__ __device__ constexpr uint32_t warp_slots() {
  return CHUNKS * V * kWarp;
}

// Where in those floats number j of a lane's k-th vector is: in units of W = 4 where V allows, neighbouring lanes next to each
// other, so that shared memory is read without bank conflicts.
template <int V>
constexpr int kSlotWidth = V % 4 == 0 ? 4 : 1;

template <int V>
__host__ __device__ constexpr uint32_t slot_of(uint32_t k, uint32_t j, uint32_t lane) {
  constexpr uint32_t W = kSlotWidth<V>;
  return ((k * V + j) / W * kWarp + lane) * W + j % W;
}

template <int V>
__host__ __device__ constexpr uint32_t column_of_slot(uint32_t slot) {
  constexpr uint32_t W = kSlotWidth<V>;
  const uint32_t number = slot / (kWarp * W) * W + slot % W;  // k * V + j
  return warp_column<V>(number / V, slot / W % kWarp) + number % V;
}

// -- forward -----------------------------------------------------------------------------------------------------------------

// Whether modulation is fetched together with the row, before the sums that it does not depend on: while registers last.
template <typename T, int V, int CHUNKS>
constexpr bool kPrefetch = CHUNKS * ((V * sizeof(T) + 3) / 4) <= 24;  // registers of one such array

template <typename T, int V, int CHUNKS, bool RESIDUAL>
__global__ void __launch_bounds__(kMaxWarps * kWarp, 1) norm_forward_warp(const NormForward<T> p) {
  const uint32_t lane = threadIdx.x % kWarp;
  const uint32_t row = blockIdx.x * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (row >= p.batch * p.rows) return;
  const uint32_t sample = row / p.rows, n = row % p.rows;
  const T* const shift = p.shift.at(sample);
  const T* const scale = p.scale.at(sample);

  Pack<T, V> value[CHUNKS], shifts[CHUNKS], scales[CHUNKS];
  const T* const x = p.x.at(sample, n);
#pragma unroll
  for (int k = 0; k < CHUNKS; ++k) {
    const uint32_t column = warp_column<V>(k, lane);
    value[k] = column < p.width ? load_input<V>(x + column) : zeros<V, T>();
  }
  if constexpr (kPrefetch<T, V, CHUNKS>) {
#pragma unroll
    for (int k = 0; k < CHUNKS; ++k) {
      const uint32_t column = warp_column<V>(k, lane);
      if (column < p.width) {
        scales[k] = load_input<V>(scale + column);
        shifts[k] = load_input<V>(shift + column);
      }
    }
  }
  if constexpr (RESIDUAL) {
    const T* const branch = p.branch.at(sample, n);
    const T* const gate = p.gate.data == nullptr ? nullptr : p.gate.at(sample);
    T* const residual = p.residual + static_cast<int64_t>(row) * p.width;
#pragma unroll
    for (int k = 0; k < CHUNKS; ++k) {
      const uint32_t column = warp_column<V>(k, lane);
      if (column >= p.width) continue;
      const Pack<T, V> added = load_input<V>(branch + column);
      if (gate != nullptr) {
        const Pack<T, V> gates = load_input<V>(gate + column);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          value[k].v[j] = from_float<T>(to_float(value[k].v[j]) + to_float(gates.v[j]) * to_float(added.v[j]));
        }
      } else {
#pragma unroll
        for (int j = 0; j < V; ++j) value[k].v[j] = from_float<T>(to_float(value[k].v[j]) + to_float(added.v[j]));
      }
      store<V>(residual + column, value[k]);
    }
  }

  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < CHUNKS; ++k) {
#pragma unroll
    for (int j = 0; j < V; ++j) sum += to_float(value[k].v[j]);  // zeros past the end
  }
  const float mean = warp_sum(sum) / static_cast<float>(p.width);
  float squares = 0.0f;
#pragma unroll
  for (int k = 0; k < CHUNKS; ++k) {
    if (warp_column<V>(k, lane) >= p.width) continue;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float centered = to_float(value[k].v[j]) - mean;
      squares += centered * centered;
    }
  }
  const float rstd = rsqrtf(warp_sum(squares) / static_cast<float>(p.width) + p.eps);

  T* const out = p.out + static_cast<int64_t>(row) * p.width;
#pragma unroll
  for (int k = 0; k < CHUNKS; ++k) {
    const uint32_t column = warp_column<V>(k, lane);
    if (column >= p.width) continue;
    if constexpr (!kPrefetch<T, V, CHUNKS>) {
      scales[k] = load_input<V>(scale + column);
      shifts[k] = load_input<V>(shift + column);
    }
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float normalized = (to_float(value[k].v[j]) - mean) * rstd;
      value[k].v[j] = from_float<T>(normalized * (p.offset + to_float(scales[k].v[j])) + to_float(shifts[k].v[j]));
    }
    store<V>(out + column, value[k]);
  }
}

template <typename T, int V, bool RESIDUAL>
__global__ void __launch_bounds__(kBlockThreads, 1) norm_forward_block(const NormForward<T> p) {
  __shared__ float shared[kBlockThreads / kWarp];
  const uint32_t row = blockIdx.x, sample = row / p.rows, n = row % p.rows;
  const uint32_t first = threadIdx.x * V, step = kBlockThreads * V;
  const T* const shift = p.shift.at(sample);
  const T* const scale = p.scale.at(sample);
  const T* value = p.x.at(sample, n);
  float sum = 0.0f;
  if constexpr (RESIDUAL) {
    const T* const branch = p.branch.at(sample, n);
    const T* const gate = p.gate.data == nullptr ? nullptr : p.gate.at(sample);
    T* const residual = p.residual + static_cast<int64_t>(row) * p.width;
    for (uint32_t column = first; column < p.width; column += step) {
      Pack<T, V> pack = load_input<V>(value + column);
      const Pack<T, V> added = load_input<V>(branch + column);
      const Pack<T, V> gates = gate == nullptr ? zeros<V, T>() : load_input<V>(gate + column);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const float factor = gate == nullptr ? 1.0f : to_float(gates.v[j]);
        pack.v[j] = from_float<T>(to_float(pack.v[j]) + factor * to_float(added.v[j]));
        sum += to_float(pack.v[j]);
      }
      store<V>(residual + column, pack);
    }
    value = residual;  // read again below, each number by the thread that wrote it
  } else {
    for (uint32_t column = first; column < p.width; column += step) {
      const Pack<T, V> pack = load<V>(value + column);
#pragma unroll
      for (int j = 0; j < V; ++j) sum += to_float(pack.v[j]);
    }
  }
  const float mean = block_sum(sum, shared) / static_cast<float>(p.width);
  float squares = 0.0f;
  for (uint32_t column = first; column < p.width; column += step) {
    const Pack<T, V> pack = load<V>(value + column);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float centered = to_float(pack.v[j]) - mean;
      squares += centered * centered;
    }
  }
  const float rstd = rsqrtf(block_sum(squares, shared) / static_cast<float>(p.width) + p.eps);
  T* const out = p.out + static_cast<int64_t>(row) * p.width;
  for (uint32_t column = first; column < p.width; column += step) {
    Pack<T, V> pack = load<V>(value + column);
    const Pack<T, V> scales = load_input<V>(scale + column), shifts = load_input<V>(shift + column);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float normalized = (to_float(pack.v[j]) - mean) * rstd;
      pack.v[j] = from_float<T>(normalized * (p.offset + to_float(scales.v[j])) + to_float(shifts.v[j]));
    }
    store<V>(out + column, pack);
  }
}

// -- backward ----------------------------------------------------------------------------------------------------------------

// What one number of a row adds to the sums over rows.
struct Terms {
  float shift, scale, gate;
};

// The statistics of a row that its backward pass needs.
struct RowStatistics {
  float mean, rstd, mean_w, mean_wx;  // mean(w) and mean(w xhat)
};

// Writes dx and dbranch for V columns and gives each number's terms to add(j, terms).
template <int V, typename T, typename Add>
__device__ inline void backward_vector(
    const NormBackward<T>& p, const RowStatistics& s, uint32_t sample, uint32_t n, uint32_t column, const Pack<T, V>& x,
    const Pack<T, V>& grad, Add&& add) {
  const int64_t place = (static_cast<int64_t>(sample) * p.rows + n) * p.width + column;
  const Pack<T, V> scale = load_input<V>(p.scale.at(sample) + column);
  Pack<T, V> dx, dbranch, above, gate, branch;
  const bool gated = p.gate.data != nullptr;
  above = p.grad_residual.data != nullptr ? load_input<V>(p.grad_residual.at(sample, n) + column) : zeros<V, T>();
  if (gated) {
    gate = load_input<V>(p.gate.at(sample) + column);
    branch = load_input<V>(p.branch.at(sample, n) + column);
  }
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const float g = to_float(grad.v[j]), xhat = (to_float(x.v[j]) - s.mean) * s.rstd;
    const float dr =
        s.rstd * (g * (p.offset + to_float(scale.v[j])) - s.mean_w - xhat * s.mean_wx) + to_float(above.v[j]);
    dx.v[j] = from_float<T>(dr);
    float gate_term = 0.0f;
    if (gated) {
      dbranch.v[j] = from_float<T>(dr * to_float(gate.v[j]));
      gate_term = dr * to_float(branch.v[j]);
    }
    add(j, Terms{g, g * xhat, gate_term});
  }
  store<V>(p.dx + place, dx);
  if (gated) store<V>(p.dbranch + place, dbranch);
}

// A block has a chunk of a sample's rows; its warps take them in turns and add up in shared memory of their own.
template <typename T, int V, int CHUNKS>
__global__ void __launch_bounds__(kMaxWarps * kWarp, 1) norm_backward_warp(const NormBackward<T> p) {
  TEXTOK_DYNAMIC_SHARED(shared);  // (warps, kinds, slots)
  constexpr uint32_t slots = warp_slots<V, CHUNKS>();
  constexpr int W = kSlotWidth<V>;
  const uint32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const uint32_t sample = blockIdx.x / p.chunks, chunk = blockIdx.x % p.chunks;
  const uint32_t kinds = p.kinds();
  const uint32_t begin = chunk * p.chunk_rows;
  const uint32_t end = p.rows - begin < p.chunk_rows ? p.rows : begin + p.chunk_rows;
  float* const mine = shared + warp * kinds * slots;
  // A lane reads and writes only the slots (k, j, lane), so there is nothing to wait for until the end.
  for (uint32_t kind = 0; kind < kinds; ++kind) {
#pragma unroll
    for (uint32_t i = 0; i < CHUNKS * V / W; ++i) store<W>(mine + kind * slots + (i * kWarp + lane) * W, zeros<W, float>());
  }

  for (uint32_t n = begin + warp; n < end; n += warps) {
    Pack<T, V> value[CHUNKS], grad[CHUNKS];
    const T* const x = p.x.at(sample, n);
    const T* const g = p.grad.at(sample, n);
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < CHUNKS; ++k) {
      const uint32_t column = warp_column<V>(k, lane);
      value[k] = column < p.width ? load_input<V>(x + column) : zeros<V, T>();
      grad[k] = column < p.width ? load_input<V>(g + column) : zeros<V, T>();
    }
#pragma unroll
    for (int k = 0; k < CHUNKS; ++k) {
#pragma unroll
      for (int j = 0; j < V; ++j) sum += to_float(value[k].v[j]);
    }
    RowStatistics s;
    s.mean = warp_sum(sum) / static_cast<float>(p.width);
    const T* const scale = p.scale.at(sample);
    float squares = 0.0f, sum_w = 0.0f, sum_wx = 0.0f;  // sum_wx without the factor rstd
#pragma unroll
    for (int k = 0; k < CHUNKS; ++k) {
      const uint32_t column = warp_column<V>(k, lane);
      if (column >= p.width) continue;
      const Pack<T, V> scales = load_input<V>(scale + column);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const float centered = to_float(value[k].v[j]) - s.mean;
        const float w = to_float(grad[k].v[j]) * (p.offset + to_float(scales.v[j]));
        squares += centered * centered;
        sum_w += w;
        sum_wx += w * centered;
      }
    }
    s.rstd = rsqrtf(warp_sum(squares) / static_cast<float>(p.width) + p.eps);
    s.mean_w = warp_sum(sum_w) / static_cast<float>(p.width);
    s.mean_wx = warp_sum(sum_wx) * s.rstd / static_cast<float>(p.width);
#pragma unroll
    for (int k = 0; k < CHUNKS; ++k) {
      const uint32_t column = warp_column<V>(k, lane);
      if (column >= p.width) continue;
      Terms terms[V];
      backward_vector<V>(p, s, sample, n, column, value[k], grad[k], [&](int j, Terms t) { terms[j] = t; });
#pragma unroll
      for (int j = 0; j < V; j += W) {
        float* const slot = mine + slot_of<V>(k, j, lane);
        Pack<float, W> shifts = load<W>(slot), scales = load<W>(slot + slots);
#pragma unroll
        for (int i = 0; i < W; ++i) {
          shifts.v[i] += terms[j + i].shift;
          scales.v[i] += terms[j + i].scale;
        }
        store<W>(slot, shifts);
        store<W>(slot + slots, scales);
        if (kinds == 3) {
          Pack<float, W> gates = load<W>(slot + 2 * slots);
#pragma unroll
          for (int i = 0; i < W; ++i) gates.v[i] += terms[j + i].gate;
          store<W>(slot + 2 * slots, gates);
        }
      }
    }
  }

  __syncthreads();
  float* const partial = p.partial + static_cast<int64_t>(blockIdx.x) * kinds * p.width;
  for (uint32_t i = threadIdx.x; i < kinds * slots; i += blockDim.x) {
    const uint32_t kind = i / slots, column = column_of_slot<V>(i % slots);
    if (column >= p.width) continue;
    float sum = 0.0f;
    for (uint32_t w = 0; w < warps; ++w) sum += shared[w * kinds * slots + i];
    partial[static_cast<int64_t>(kind) * p.width + column] = sum;
  }
}

// A block takes the rows of its chunk one after the other and adds up in global memory, where each thread has its own columns.
template <typename T, int V>
__global__ void __launch_bounds__(kBlockThreads, 1) norm_backward_block(const NormBackward<T> p) {
  __shared__ float shared[kBlockThreads / kWarp];
  const uint32_t sample = blockIdx.x / p.chunks, chunk = blockIdx.x % p.chunks;
  const uint32_t kinds = p.kinds();
  const uint32_t begin = chunk * p.chunk_rows;
  const uint32_t end = p.rows - begin < p.chunk_rows ? p.rows : begin + p.chunk_rows;
  const uint32_t first = threadIdx.x * V, step = kBlockThreads * V;
  const T* const scale = p.scale.at(sample);
  float* const partial = p.partial + static_cast<int64_t>(blockIdx.x) * kinds * p.width;
  for (uint32_t n = begin; n < end; ++n) {
    const T* const x = p.x.at(sample, n);
    const T* const g = p.grad.at(sample, n);
    float sum = 0.0f;
    for (uint32_t column = first; column < p.width; column += step) {
      const Pack<T, V> value = load_input<V>(x + column);
#pragma unroll
      for (int j = 0; j < V; ++j) sum += to_float(value.v[j]);
    }
    RowStatistics s;
    s.mean = block_sum(sum, shared) / static_cast<float>(p.width);
    float squares = 0.0f, sum_w = 0.0f, sum_wx = 0.0f;
    for (uint32_t column = first; column < p.width; column += step) {
      const Pack<T, V> value = load_input<V>(x + column), grad = load_input<V>(g + column);
      const Pack<T, V> scales = load_input<V>(scale + column);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const float centered = to_float(value.v[j]) - s.mean;
        const float w = to_float(grad.v[j]) * (p.offset + to_float(scales.v[j]));
        squares += centered * centered;
        sum_w += w;
        sum_wx += w * centered;
      }
    }
    s.rstd = rsqrtf(block_sum(squares, shared) / static_cast<float>(p.width) + p.eps);
    s.mean_w = block_sum(sum_w, shared) / static_cast<float>(p.width);
    s.mean_wx = block_sum(sum_wx, shared) * s.rstd / static_cast<float>(p.width);
    for (uint32_t column = first; column < p.width; column += step) {
      const Pack<T, V> value = load_input<V>(x + column), grad = load_input<V>(g + column);
      float* const to = partial + column;
      const auto add = [&](float* sum, float term) { *sum = n == begin ? term : *sum + term; };
      backward_vector<V>(p, s, sample, n, column, value, grad, [&](int j, Terms t) {
        add(to + j, t.shift);
        add(to + static_cast<int64_t>(p.width) + j, t.scale);
        if (kinds == 3) add(to + 2 * static_cast<int64_t>(p.width) + j, t.gate);
      });
    }
  }
}

// Adds the chunks of each sample in a fixed order: 32 columns and 8 shares of the chunks a block.
template <typename T>
__global__ void __launch_bounds__(256) norm_reduce(const NormBackward<T> p) {
  __shared__ float shared[256];
  const uint32_t tiles = (p.width + 31) / 32, kinds = p.kinds();
  const uint32_t tile = blockIdx.x % tiles, kind = blockIdx.x / tiles % kinds, sample = blockIdx.x / tiles / kinds;
  const uint32_t column = tile * 32 + threadIdx.x % 32, share = threadIdx.x / 32;
  const int64_t stride = static_cast<int64_t>(kinds) * p.width;
  const float* const from = p.partial + static_cast<int64_t>(sample) * p.chunks * stride + static_cast<int64_t>(kind) * p.width;
  float sum = 0.0f;
  if (column < p.width) {
#pragma unroll 4
    for (uint32_t chunk = share; chunk < p.chunks; chunk += 8) sum += from[chunk * stride + column];
  }
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (share > 0 || column >= p.width) return;
#pragma unroll
  for (int other = 1; other < 8; ++other) sum += shared[other * 32 + threadIdx.x];
  p.sums[kind][static_cast<int64_t>(sample) * p.width + column] = from_float<T>(sum);
}

// -- which kernel, and how many blocks ---------------------------------------------------------------------------------------

template <typename T>
bool fits(const Rows<T>& rows, int64_t vector) {
  return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.batch % vector == 0 && rows.row % vector == 0;
}

template <typename T>
bool fits(const Samples<T>& samples, int64_t vector) {
  return reinterpret_cast<uintptr_t>(samples.data) % 16 == 0 && samples.batch % vector == 0;
}

template <typename T>
bool fits(const NormForward<T>& p) {
  constexpr int64_t v = 16 / sizeof(T);
  return p.width % v == 0 && fits(p.x, v) && fits(p.branch, v) && fits(p.gate, v) && fits(p.shift, v) && fits(p.scale, v);
}

template <typename T>
bool fits(const NormBackward<T>& p) {
  constexpr int64_t v = 16 / sizeof(T);
  return p.width % v == 0 && fits(p.grad, v) && fits(p.x, v) && fits(p.grad_residual, v) && fits(p.branch, v) &&
         fits(p.gate, v) && fits(p.scale, v);
}

// Calls run(Constant<V>, Constant<CHUNKS>) for a row of a warp, or run(Constant<V>, Constant<0>) for a row of a block.
template <typename T, uint32_t MOST, typename Run>
void with_layout(bool vectors, uint32_t width, Run&& run) {
  constexpr int V = 16 / sizeof(T);
  if (!vectors) return width <= 8 * kWarp ? run(Constant<1>{}, Constant<8>{}) : run(Constant<1>{}, Constant<0>{});
  if (width <= 8 * kWarp) return run(Constant<V>{}, Constant<8 / V>{});
  if (width <= 24 * kWarp) return run(Constant<V>{}, Constant<24 / V>{});
  if (width <= 40 * kWarp) return run(Constant<V>{}, Constant<40 / V>{});
  if constexpr (MOST > 40 * kWarp) {
    if (width <= MOST) return run(Constant<V>{}, Constant<MOST / kWarp / V>{});
  }
  return run(Constant<V>{}, Constant<0>{});
}

// launch(kernel, blocks, threads, bytes of dynamic shared memory, arguments)
template <typename T, bool RESIDUAL, typename Launch>
void launch_norm_forward(const NormForward<T>& p, Launch&& launch) {
  const uint32_t rows = p.batch * p.rows;
  if (rows == 0 || p.width == 0) return;
  with_layout<T, kForwardColumns>(fits(p), p.width, [&](auto vector, auto chunks) {
    constexpr int V = decltype(vector)::value, CHUNKS = decltype(chunks)::value;
    if constexpr (CHUNKS == 0) {
      launch(norm_forward_block<T, V, RESIDUAL>, rows, kBlockThreads, 0, p);
    } else {
      const uint32_t warps = rows <= kFewRows ? 1 : kMaxWarps;
      launch(norm_forward_warp<T, V, CHUNKS, RESIDUAL>, (rows + warps - 1) / warps, warps * kWarp, 0, p);
    }
  });
}

// Sets chunks and chunk_rows. The caller then makes room for partial.
template <typename T>
void norm_backward_chunks(NormBackward<T>& p) {
  if (p.rows == 0 || p.batch == 0) {
    p.chunks = p.chunk_rows = 0;
    return;
  }
  const uint32_t at_once = p.width > kBackwardColumns ? 1 : kMaxWarps;  // rows a block works on
  const uint32_t most = (p.rows + at_once - 1) / at_once;
  const uint32_t wanted = (kBackwardBlocks + p.batch - 1) / p.batch;
  p.chunk_rows = (p.rows + (wanted < most ? wanted : most) - 1) / (wanted < most ? wanted : most);
  p.chunks = (p.rows + p.chunk_rows - 1) / p.chunk_rows;
}

template <typename T, typename Launch>
void launch_norm_backward(const NormBackward<T>& p, Launch&& launch) {
  if (p.batch == 0 || p.width == 0) return;
  const uint32_t blocks = p.batch * p.chunks;
  if (blocks > 0) {
    with_layout<T, kBackwardColumns>(fits(p), p.width, [&](auto vector, auto chunks) {
      constexpr int V = decltype(vector)::value, CHUNKS = decltype(chunks)::value;
      if constexpr (CHUNKS == 0) {
        launch(norm_backward_block<T, V>, blocks, kBlockThreads, 0, p);
      } else {
        const size_t bytes = p.kinds() * warp_slots<V, CHUNKS>() * sizeof(float);  // of a warp
        const size_t room = kSharedBytes / bytes;
        const uint32_t limit = p.chunk_rows < kMaxWarps ? p.chunk_rows : kMaxWarps;
        const uint32_t warps = room < limit ? static_cast<uint32_t>(room) : limit;
        launch(norm_backward_warp<T, V, CHUNKS>, blocks, warps * kWarp, warps * bytes, p);
      }
    });
  }
  launch(norm_reduce<T>, (p.width + 31) / 32 * p.kinds() * p.batch, 256, 0, p);
}

}  // namespace textok_fast::cuda
