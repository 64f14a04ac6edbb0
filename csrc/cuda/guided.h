// Kernel of guided_step: guidance, the step's linear combinations and its noise, with the coefficients read on the device.
//
// One thread has V neighbouring numbers of x. A group is what lies together in x and in the model's output alike: the C
// channels of a token (B, N, C), or all channels of a sample (B, C, H, W); in the output, a group of learned variances follows
// each. So the channel is below the guided ones where the place in the group is below guided_channels * (H * W).

#pragma once

#include "device.h"

namespace textok_fast::cuda {

constexpr int kGuidedThreads = 128;
constexpr int kTableColumns = 8;

enum class NumberType { kFloat, kBFloat16, kHalf };

template <typename TO, typename TX>
struct GuidedStep {
  const TO* output;  // all contiguous
  const TX* x;
  const void* noise;   // may be null
  const float* table;  // (steps, 8)
  const int64_t* index;
  TX* out;
  NumberType noise_type;
  int64_t count, group, guided, steps;  // numbers of x, of a group, guided ones of a group; rows of the table
  bool pair, learned, clip;             // two halves; variances in the output
};

// Where the number `i` of x has its prediction in the (conditional half of the) output, and its place in the group.
struct Place {
  int64_t output, within;
};

__host__ __device__ inline Place place_of(int64_t i, int64_t group, bool learned) {
  // Dividing 32-bit numbers is several times faster, and nearly always enough.
  const bool small = i <= INT32_MAX && group <= INT32_MAX;
  const int64_t which = small ? static_cast<int64_t>(static_cast<uint32_t>(i) / static_cast<uint32_t>(group)) : i / group;
  const int64_t within = i - which * group;
  return {learned ? i + which * group : i, within};
}

// V numbers of the noise, whose type is not worth a kernel of its own.
template <int V>
__device__ inline Pack<float, V> load_noise(const void* noise, NumberType type, int64_t i) {
  Pack<float, V> result;
  const auto widen = [&](const auto& pack) {
#pragma unroll
    for (int j = 0; j < V; ++j) result.v[j] = to_float(pack.v[j]);
  };
  if (type == NumberType::kFloat) {
    widen(load_input<V>(static_cast<const float*>(noise) + i));
  } else if (type == NumberType::kBFloat16) {
    widen(load_input<V>(static_cast<const __nv_bfloat16*>(noise) + i));
  } else {
    widen(load_input<V>(static_cast<const __half*>(noise) + i));
  }
  return result;
}

template <typename TO, typename TX, int V>
__global__ void __launch_bounds__(kGuidedThreads) guided_step_kernel(const GuidedStep<TO, TX> p) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kGuidedThreads + threadIdx.x) * V;
  if (i >= p.count) return;
  const Place place = place_of(i, p.group, p.learned);

  // Everything is asked for before the index has come back, except the row of the table.
  const int64_t index = *p.index;
  const Pack<TX, V> x = load_input<V>(p.x + i);
  const Pack<TO, V> conditional = load_input<V>(p.output + place.output);
  Pack<TO, V> unconditional, variance;
  Pack<float, V> noise;
  if (p.pair) unconditional = load_input<V>(p.output + p.count * (p.learned ? 2 : 1) + place.output);
  if (p.noise != nullptr) {
    noise = load_noise<V>(p.noise, p.noise_type, i);
    if (p.learned) variance = load_input<V>(p.output + place.output + p.group);
  }

  Pack<TX, V> result;
  if (index < 0 || index >= p.steps) {
#pragma unroll
    for (int j = 0; j < V; ++j) result.v[j] = from_float<TX>(NAN);
    store<V>(p.out + i, result);
    return;
  }
  const float* const row = p.table + index * kTableColumns;
  const float scale = row[0], kx = row[1], km = row[2], a = row[3], b = row[4], low = row[5], high = row[6], factor = row[7];
#pragma unroll
  for (int j = 0; j < V; ++j) {
    float model = to_float(conditional.v[j]);
    if (p.pair && place.within + j < p.guided) {
      const float without = to_float(unconditional.v[j]);
      model = without + scale * (model - without);
    }
    const float now = to_float(x.v[j]);
    float clean = kx * now + km * model;
    if (p.clip) clean = clean < -1.0f ? -1.0f : clean > 1.0f ? 1.0f : clean;  // NaN stays
    float next = a * clean + b * now;
    if (p.noise != nullptr && factor != 0.0f) {
      float log_variance = high;
      if (p.learned) {
        const float share = (to_float(variance.v[j]) + 1.0f) * 0.5f;
        log_variance = share * high + (1.0f - share) * low;
      }
      next += factor * expf(0.5f * log_variance) * noise.v[j];
    }
    result.v[j] = from_float<TX>(next);
  }
  store<V>(p.out + i, result);
}

// launch(kernel, blocks, threads, bytes of dynamic shared memory, arguments)
template <typename TO, typename TX, typename Launch>
void launch_guided_step(GuidedStep<TO, TX> p, Launch&& launch) {
  if (p.count == 0) return;
  if (!p.learned && (!p.pair || p.guided == p.group)) p.group = p.guided = p.count;  // nothing changes from channel to channel
  constexpr int V = 4;
  const auto aligned = [](const void* data, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(data) % (V * bytes) == 0; };
  const bool vectors = p.group % V == 0 && aligned(p.x, sizeof(TX)) && aligned(p.out, sizeof(TX)) &&
                       aligned(p.output, sizeof(TO)) && aligned(p.noise, p.noise_type == NumberType::kFloat ? 4 : 2);
  const auto blocks = [&](int64_t each) { return static_cast<uint32_t>((p.count + each - 1) / each); };
  if (vectors) {
    launch(guided_step_kernel<TO, TX, V>, blocks(V * kGuidedThreads), kGuidedThreads, 0, p);
  } else {
    launch(guided_step_kernel<TO, TX, 1>, blocks(kGuidedThreads), kGuidedThreads, 0, p);
  }
}

}  // namespace textok_fast::cuda
