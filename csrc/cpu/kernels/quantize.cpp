// Nearest codes. The lanes of a vector are rows of x, so that a code's numbers are broadcast straight from the codebook, which
// needs no transposing, and each lane keeps its own minimum. A block of codes times two vectors of rows stays in registers.
//
// Only the block that holds the minimum is recorded, one comparison a block instead of one a code; `finish` computes the
// distances of that one block again to find the code. Distances do not depend on how work is divided, nor do the results.

#include "quantize.h"

#include "vec.h"

namespace textok_fast {
namespace {

typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

#if defined(TEXTOK_ISA_AVX512)
constexpr int kCodes = 8;  // accumulators: kCodes * kVectors of 32 registers

typedef __mmask16 Mask;
inline Mask less(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.r, b.r, _CMP_LT_OQ); }
// Smaller, or the first NaN.
inline Mask precedes(Vec a, Vec b) {
  return _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(b.r, b.r, _CMP_ORD_Q), a.r, b.r, _CMP_NGE_UQ);
}
inline Vec minimum(Vec a, Vec b) { return {_mm512_min_ps(a.r, b.r)}; }
inline Vec select(Mask m, Vec a, Vec b) { return {_mm512_mask_blend_ps(m, b.r, a.r)}; }
inline Ints select(Mask m, Ints a, Ints b) { return (Ints)_mm512_mask_blend_epi32(m, (__m512i)b, (__m512i)a); }
#elif defined(TEXTOK_ISA_AVX2)
constexpr int kCodes = 4;  // of 16 registers

typedef __m256 Mask;
inline Mask less(Vec a, Vec b) { return _mm256_cmp_ps(a.r, b.r, _CMP_LT_OQ); }
inline Mask precedes(Vec a, Vec b) {
  return _mm256_and_ps(_mm256_cmp_ps(b.r, b.r, _CMP_ORD_Q), _mm256_cmp_ps(a.r, b.r, _CMP_NGE_UQ));
}
inline Vec minimum(Vec a, Vec b) { return {_mm256_min_ps(a.r, b.r)}; }
inline Vec select(Mask m, Vec a, Vec b) { return {_mm256_blendv_ps(b.r, a.r, m)}; }
inline Ints select(Mask m, Ints a, Ints b) { return (Ints)_mm256_blendv_ps((__m256)b, (__m256)a, m); }
#else
constexpr int kCodes = 4;

typedef Ints Mask;
inline Mask less(Vec a, Vec b) { return a.r < b.r; }
inline Mask precedes(Vec a, Vec b) { return (b.r == b.r) & ~(a.r >= b.r); }
inline Ints select(Mask m, Ints a, Ints b) { return (m & a) | (~m & b); }
inline Vec select(Mask m, Vec a, Vec b) { return {(Lanes)select(m, (Ints)a.r, (Ints)b.r)}; }
#if defined(__SSE2__)
inline Vec minimum(Vec a, Vec b) { return {(Lanes)_mm_min_ps((__m128)a.r, (__m128)b.r)}; }
#else
inline Vec minimum(Vec a, Vec b) { return select(less(a, b), a, b); }
#endif
#endif

constexpr int kVectors = 2;
constexpr int kRows = kVectors * kLanes;
constexpr int64_t kTileFloats = 4096;    // codes that stay in the first-level cache while groups of rows pass
constexpr int64_t kChunkFloats = 32768;  // rows that stay in the second-level cache while codes pass

// No sum of a distance overflows when neither |2x|^2 nor |c|^2 is larger.
constexpr float kSafeSquare = 1e37f;

inline bool precedes(float a, float b) { return a < b || (a != a && b == b); }

inline float fma(float a, float b, float c) {
#if defined(__FMA__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

float square_sum(const float* p, int64_t width) {
  Vec total = set(0);
  int64_t t = 0;
  for (; t + kLanes <= width; t += kLanes) total = fma(load(p + t), load(p + t), total);
  float result = t > 0 ? sum(total) : 0.0f;
  for (; t < width; ++t) result = fma(p[t], p[t], result);
  return result;
}

// To fp32; with `normalize`, divided by the norm or 1e-12, as torch.nn.functional.normalize has it.
template <typename T>
void convert(const T* row, float* out, int64_t width, bool normalize) {
  for (int64_t t = 0; t < width; ++t) out[t] = to_float(row[t]);
  if (!normalize) return;
  const float norm = square_root(square_sum(out, width));
  const float divisor = norm < 1e-12f ? 1e-12f : norm;
  for (int64_t t = 0; t < width; ++t) out[t] /= divisor;
}

// What a row is multiplied by: -2x, or -2x/|x|.
template <typename T>
void fetch(const CodeSearch& s, int64_t row, float* out) {
  convert(static_cast<const T*>(s.x) + row * s.width, out, s.width, s.normalize);
  for (int64_t t = 0; t < s.width; ++t) out[t] *= -2;
}

template <typename T>
void prepare(const CodeSearch& s, int64_t first_code, int64_t last_code) {
  const T* codebook = static_cast<const T*>(s.codebook);
  if (static_cast<const void*>(s.codes) != s.codebook) {
    if (s.normalize) {
      for (int64_t k = first_code; k < last_code; ++k) convert(codebook + k * s.width, s.codes + k * s.width, s.width, true);
    } else {  // as one row
      convert(codebook + first_code * s.width, s.codes + first_code * s.width, (last_code - first_code) * s.width, false);
    }
  }
  for (int64_t k = first_code; k < last_code; ++k) s.squares[k] = square_sum(s.codes + k * s.width, s.width);
}

// The distances of COUNT codes to VECTORS * kLanes rows, and what they change. `x` is (width, VECTORS * kLanes).
template <int VECTORS, int COUNT, bool CAREFUL>
inline __attribute__((always_inline)) void take(
    const float* x, const float* codes, const float* squares, int64_t width, int32_t id, Vec* best, Ints* block) {
  Vec sums[COUNT][VECTORS];
#pragma GCC unroll 8
  for (int j = 0; j < COUNT; ++j) {
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) sums[j][v] = set(squares[j]);
  }
  for (int64_t t = 0; t < width; ++t) {
    Vec rows[VECTORS];
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) rows[v] = load(x + (t * VECTORS + v) * kLanes);
#pragma GCC unroll 8
    for (int j = 0; j < COUNT; ++j) {
      const Vec code = set(codes[j * width + t]);
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) sums[j][v] = fma(rows[v], code, sums[j][v]);
    }
  }
  const Ints ids = Ints{} + id;
#pragma GCC unroll 2
  for (int v = 0; v < VECTORS; ++v) {
    if constexpr (CAREFUL) {
      for (int j = 0; j < COUNT; ++j) {
        const Mask m = precedes(sums[j][v], best[v]);
        best[v] = select(m, sums[j][v], best[v]);
        block[v] = select(m, ids, block[v]);
      }
    } else {
#pragma GCC unroll 4
      for (int stride = COUNT / 2; stride > 0; stride /= 2) {
#pragma GCC unroll 4
        for (int j = 0; j < stride; ++j) sums[j][v] = minimum(sums[j][v], sums[j + stride][v]);
      }
      const Mask m = less(sums[0][v], best[v]);
      best[v] = minimum(sums[0][v], best[v]);
      block[v] = select(m, ids, block[v]);
    }
  }
}

template <int VECTORS, bool CAREFUL>
void take_tile(const CodeSearch& s, const float* x, int64_t first_code, int64_t last_code, float* best_at, int32_t* block_at) {
  Vec best[VECTORS];
  Ints block[VECTORS];
  for (int v = 0; v < VECTORS; ++v) {
    best[v] = load(best_at + v * kLanes);
    __builtin_memcpy(&block[v], block_at + v * kLanes, sizeof block[v]);
  }
  int64_t k = first_code;
  for (; k + kCodes <= last_code; k += kCodes) {
    const int32_t id = static_cast<int32_t>(k / kCodes);
    take<VECTORS, kCodes, CAREFUL>(x, s.codes + k * s.width, s.squares + k, s.width, id, best, block);
  }
  for (; k < last_code; ++k) {
    const int32_t id = static_cast<int32_t>(k / kCodes);
    take<VECTORS, 1, CAREFUL>(x, s.codes + k * s.width, s.squares + k, s.width, id, best, block);
  }
  for (int v = 0; v < VECTORS; ++v) {
    store(best_at + v * kLanes, best[v]);
    __builtin_memcpy(block_at + v * kLanes, &block[v], sizeof block[v]);
  }
}

int64_t groups_per_chunk(int64_t width) {
  const int64_t groups = kChunkFloats / (kRows * (width > 0 ? width : 1));
  return groups > 0 ? groups : 1;
}

// A row, packed rows and a flag for each group.
int64_t scratch_floats(int64_t width) { return width + groups_per_chunk(width) * (kRows * width + 1); }

template <typename T>
void search_part(const CodeSearch& s, int64_t part, int64_t first_group, int64_t last_group, float* scratch) {
  const int64_t chunk = groups_per_chunk(s.width);
  const int64_t wanted = s.width > 0 ? kTileFloats / s.width / kCodes * kCodes : 1024;
  const int64_t tile = wanted > 0 ? wanted : kCodes;
  const int64_t first_code = part * s.codes_per_split;
  const int64_t last_code = first_code + s.codes_per_split < s.count ? first_code + s.codes_per_split : s.count;
  float *row = scratch, *largest = row + s.width, *packed = largest + chunk;

  for (int64_t start = first_group; start < last_group; start += chunk) {
    const int64_t groups = last_group - start < chunk ? last_group - start : chunk;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first_row = (start + g) * kRows;
      const int64_t left = s.rows - first_row;
      const int lanes = left > kLanes ? kRows : kLanes;  // the last group may be half a group
      float* x = packed + g * kRows * s.width;
      largest[g] = 0;
      for (int lane = 0; lane < lanes; ++lane) {
        if (lane < left) {
          fetch<T>(s, first_row + lane, row);
          const float square = square_sum(row, s.width);
          if (!(square <= largest[g])) largest[g] = square <= kSafeSquare ? square : __builtin_inff();
          for (int64_t t = 0; t < s.width; ++t) x[t * lanes + lane] = row[t];
        } else {
          for (int64_t t = 0; t < s.width; ++t) x[t * lanes + lane] = 0;
        }
      }
      float* best = s.best + part * s.padded + first_row;
      int32_t* block = s.block + part * s.padded + first_row;
      for (int lane = 0; lane < kRows; ++lane) {
        best[lane] = __builtin_inff();
        block[lane] = static_cast<int32_t>(first_code / kCodes);
      }
    }
    for (int64_t k = first_code; k < last_code; k += tile) {
      const int64_t end = k + tile < last_code ? k + tile : last_code;
      bool safe = true;
      for (int64_t j = k; j < end; ++j) safe &= s.squares[j] <= kSafeSquare;
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t first_row = (start + g) * kRows;
        const float* x = packed + g * kRows * s.width;
        float* best = s.best + part * s.padded + first_row;
        int32_t* block = s.block + part * s.padded + first_row;
        const bool careful = !safe || largest[g] > kSafeSquare;
        if (s.rows - first_row > kLanes) {
          (careful ? take_tile<kVectors, true> : take_tile<kVectors, false>)(s, x, k, end, best, block);
        } else {
          (careful ? take_tile<1, true> : take_tile<1, false>)(s, x, k, end, best, block);
        }
      }
    }
  }
}

template <typename T>
void search(const CodeSearch& s, int64_t first_task, int64_t last_task, float* scratch) {
  const int64_t groups = s.padded / kRows;
  for (int64_t task = first_task; task < last_task;) {
    const int64_t part = task / groups, group = task % groups;
    const int64_t end = group + (last_task - task) < groups ? group + (last_task - task) : groups;
    search_part<T>(s, part, group, end, scratch);
    task += end - group;
  }
}

template <typename T>
void finish(const CodeSearch& s, int64_t first_row, int64_t last_row, float* scratch) {
  for (int64_t row = first_row; row < last_row; ++row) {
    float best = s.best[row];
    int64_t first_code = s.block[row];
    for (int64_t part = 1; part < s.splits; ++part) {
      const float other = s.best[part * s.padded + row];
      if (!precedes(other, best)) continue;
      best = other;
      first_code = s.block[part * s.padded + row];
    }
    first_code *= kCodes;
    fetch<T>(s, row, scratch);

    const int count = s.count - first_code < kCodes ? static_cast<int>(s.count - first_code) : kCodes;
    float distances[kCodes];
    for (int j = 0; j < kCodes; ++j) distances[j] = s.squares[first_code + (j < count ? j : 0)];
    const float* codes[kCodes];
    for (int j = 0; j < kCodes; ++j) codes[j] = s.codes + (first_code + (j < count ? j : 0)) * s.width;
    for (int64_t t = 0; t < s.width; ++t) {
#pragma GCC unroll 8
      for (int j = 0; j < kCodes; ++j) distances[j] = fma(scratch[t], codes[j][t], distances[j]);
    }
    int nearest = 0;
    for (int j = 1; j < count; ++j) {
      if (precedes(distances[j], distances[nearest])) nearest = j;
    }
    s.index[row] = first_code + nearest;
  }
}

template <typename T>
constexpr CodeFunctions functions() {
  return {&prepare<T>, &search<T>, &finish<T>};
}

}  // namespace

const QuantizeKernels TEXTOK_TABLE(quantize) = {functions<float>(), functions<bf16>(), kRows, kCodes, &scratch_floats};

}  // namespace textok_fast
