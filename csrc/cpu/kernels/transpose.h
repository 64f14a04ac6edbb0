// A small matrix of 4-byte words turned about, beside vec.h.

#pragma once

#include "vec.h"

namespace textok_fast {
namespace {

#if defined(TEXTOK_ISA_AVX512) || defined(TEXTOK_ISA_AVX2)
// 8 rows of 8 words, `from` apart, to 8 words' rows, `to` apart.
inline void transpose(const uint32_t* in, int64_t from, uint32_t* out, int64_t to) {
  __m256i a[8], b[8];
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r) a[r] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + r * from));
#pragma GCC unroll 4
  for (int r = 0; r < 8; r += 2) {
    b[r] = _mm256_unpacklo_epi32(a[r], a[r + 1]);
    b[r + 1] = _mm256_unpackhi_epi32(a[r], a[r + 1]);
  }
#pragma GCC unroll 2
  for (int r = 0; r < 8; r += 4) {  // a[r + j]: rows r to r + 3 of words j and j + 4
    a[r] = _mm256_unpacklo_epi64(b[r], b[r + 2]);
    a[r + 1] = _mm256_unpackhi_epi64(b[r], b[r + 2]);
    a[r + 2] = _mm256_unpacklo_epi64(b[r + 1], b[r + 3]);
    a[r + 3] = _mm256_unpackhi_epi64(b[r + 1], b[r + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + j * to), _mm256_permute2x128_si256(a[j], a[j + 4], 0x20));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + (j + 4) * to), _mm256_permute2x128_si256(a[j], a[j + 4], 0x31));
  }
}
#else
inline void transpose(const uint32_t* in, int64_t from, uint32_t* out, int64_t to) {
  for (int j = 0; j < 8; ++j) {
    for (int r = 0; r < 8; ++r) out[j * to + r] = in[r * from + j];
  }
}
#endif

}  // namespace
}  // namespace textok_fast
