// fp16 numbers as fp32 vectors, beside vec.h.

#pragma once

#include "vec.h"

namespace textok_fast {
namespace {

struct fp16 {
  uint16_t bits;
};

#if defined(TEXTOK_ISA_AVX512)

inline Vec load(const fp16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
inline Vec load(const fp16* p, int count) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(count), p))}; }

#else

typedef float WideFloats __attribute__((vector_size(4 * kLanes)));
typedef uint32_t WideBits __attribute__((vector_size(4 * kLanes)));
typedef uint16_t NarrowBits __attribute__((vector_size(2 * kLanes)));

// The processor's own conversion is one more extension to ask for, so the bits are moved instead: the exponent's bias is
// corrected by a product, which also normalizes subnormal numbers.
inline Vec load(const fp16* p) {
  NarrowBits half;
  __builtin_memcpy(&half, p, sizeof half);
  const WideBits bits = __builtin_convertvector(half, WideBits);
  const WideBits magnitude = (bits & 0x7fff) << 13;
  const WideBits special = (WideBits)(magnitude >= (0x7c00u << 13));  // infinity or NaN
  const WideBits scaled = (WideBits)((WideFloats)magnitude * 0x1p112f);
  Vec result;
  const WideBits joined = scaled | (special & 0x7f800000u) | ((bits & 0x8000) << 16);
  __builtin_memcpy(&result.r, &joined, sizeof joined);
  return result;
}

inline Vec load(const fp16* p, int count) {
  fp16 lanes[kLanes] = {};
  for (int i = 0; i < count; ++i) lanes[i] = p[i];
  return load(lanes);
}

#endif

}  // namespace
}  // namespace textok_fast
