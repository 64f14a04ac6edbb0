// Vec: fp32 vectors of the instruction set being compiled: AVX-512 (16 lanes), AVX2 with FMA (8), or whatever the baseline of the
// target has, through the compiler's own vectors (4 lanes).
//
// Only for csrc/cpu/kernels/*.cpp. Everything is in an anonymous namespace, and nothing of the C++ library is used: an inline
// function with external linkage could be merged by the linker with the copy compiled for a larger instruction set, and then
// fail on a smaller machine.

#pragma once

#include <stdint.h>

#if defined(TEXTOK_ISA_AVX512) || defined(TEXTOK_ISA_AVX2)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

// What every instruction set gives, T being float or bf16 (widened when loaded, rounded when stored):
//   set(x)  a + b  a - b  a * b  a / b  fma(a, b, c) = a * b + c  sum(a): of the lanes, as a float
//   load(T*)  store(T*, a)  stream(T*, a): past the cache; the address is a multiple of kLanes * sizeof(T)
//   (store and stream return the numbers as they were stored)
//   load(T*, count)  store(T*, a, count)  keep(a, count): the first 0 <= count < kLanes lanes; the others are 0, or not written

#define TEXTOK_CONCAT_(a, b) a##_##b
#define TEXTOK_CONCAT(a, b) TEXTOK_CONCAT_(a, b)
#define TEXTOK_TABLE(family) TEXTOK_CONCAT(family, TEXTOK_ISA)  // norm_avx2, ...

namespace textok_fast {
namespace {

struct bf16 {
  uint16_t bits;
};

inline float to_float(float value) { return value; }

inline float to_float(bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  __builtin_memcpy(&result, &bits, sizeof result);
  return result;
}

inline void from_float(float value, float* out) { *out = value; }

// Rounds to nearest, ties to even; NaN stays NaN.
inline void from_float(float value, bf16* out) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  out->bits = value != value ? static_cast<uint16_t>(bits >> 16 | 0x40) : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#if defined(TEXTOK_ISA_AVX512)

constexpr int kLanes = 16;

struct Vec {
  __m512 r;
};

inline Vec set(float value) { return {_mm512_set1_ps(value)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.r, b.r)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.r, b.r)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.r, b.r)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.r, b.r)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.r, b.r, c.r)}; }
inline float sum(Vec a) { return _mm512_reduce_add_ps(a.r); }

inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec store(float* p, Vec a) {
  _mm512_storeu_ps(p, a.r);
  return a;
}
inline Vec stream(float* p, Vec a) {
  _mm512_stream_ps(p, a.r);
  return a;
}

inline __mmask16 first(int count) { return static_cast<__mmask16>((1u << count) - 1); }
inline Vec load(const float* p, int count) { return {_mm512_maskz_loadu_ps(first(count), p)}; }
inline Vec store(float* p, Vec a, int count) {
  _mm512_mask_storeu_ps(p, first(count), a.r);
  return a;
}
inline Vec keep(Vec a, int count) { return {_mm512_maskz_mov_ps(first(count), a.r)}; }

inline Vec widen(__m256i bits) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))}; }

// bf16's numbers, in the upper halves; the lower halves hold what was cut off.
inline __m512i rounded_bits(Vec a) {
  const __m512i bits = _mm512_castps_si512(a.r);
  const __m512i up = _mm512_add_epi32(bits, _mm512_mask_mov_epi32(
      _mm512_set1_epi32(0x7fff), _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000)), _mm512_set1_epi32(0x8000)));
  return _mm512_mask_or_epi32(up, _mm512_cmp_ps_mask(a.r, a.r, _CMP_UNORD_Q), bits, _mm512_set1_epi32(0x400000));
}
inline __m256i upper_halves(__m512i bits) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)); }
inline Vec as_numbers(__m512i bits) {
  return {_mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000))))};
}

inline Vec load(const bf16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline Vec store(bf16* p, Vec a) {
  const __m512i bits = rounded_bits(a);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), upper_halves(bits));
  return as_numbers(bits);
}
inline Vec stream(bf16* p, Vec a) {
  const __m512i bits = rounded_bits(a);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), upper_halves(bits));
  return as_numbers(bits);
}
inline Vec load(const bf16* p, int count) { return widen(_mm256_maskz_loadu_epi16(first(count), p)); }
inline Vec store(bf16* p, Vec a, int count) {
  const __m512i bits = rounded_bits(a);
  _mm256_mask_storeu_epi16(p, first(count), upper_halves(bits));
  return as_numbers(bits);
}

#elif defined(TEXTOK_ISA_AVX2)

constexpr int kLanes = 8;

struct Vec {
  __m256 r;
};

inline Vec set(float value) { return {_mm256_set1_ps(value)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.r, b.r)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.r, b.r)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.r, b.r)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.r, b.r)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.r, b.r, c.r)}; }

inline float sum(Vec a) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(a.r), _mm256_extractf128_ps(a.r, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec store(float* p, Vec a) {
  _mm256_storeu_ps(p, a.r);
  return a;
}
inline Vec stream(float* p, Vec a) {
  _mm256_stream_ps(p, a.r);
  return a;
}

inline __m256i first(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Vec load(const float* p, int count) { return {_mm256_maskload_ps(p, first(count))}; }
inline Vec store(float* p, Vec a, int count) {
  _mm256_maskstore_ps(p, first(count), a.r);
  return a;
}
inline Vec keep(Vec a, int count) { return {_mm256_and_ps(a.r, _mm256_castsi256_ps(first(count)))}; }

inline Vec widen(__m128i bits) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))}; }

// bf16's numbers, in the upper halves; the lower halves hold what was cut off.
inline __m256i rounded_bits(Vec a) {
  const __m256i bits = _mm256_castps_si256(a.r);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  return _mm256_blendv_epi8(up, quiet, _mm256_castps_si256(_mm256_cmp_ps(a.r, a.r, _CMP_UNORD_Q)));
}
inline __m128i upper_halves(__m256i bits) {
  const __m256i low = _mm256_srli_epi32(bits, 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
}
inline Vec as_numbers(__m256i bits) {
  return {_mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(static_cast<int>(0xffff0000))))};
}

inline Vec load(const bf16* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline Vec store(bf16* p, Vec a) {
  const __m256i bits = rounded_bits(a);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), upper_halves(bits));
  return as_numbers(bits);
}
inline Vec stream(bf16* p, Vec a) {
  const __m256i bits = rounded_bits(a);
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), upper_halves(bits));
  return as_numbers(bits);
}

#else  // baseline

constexpr int kLanes = 4;
typedef float Lanes __attribute__((vector_size(16)));
typedef uint32_t Bits __attribute__((vector_size(16)));
typedef uint16_t HalfBits __attribute__((vector_size(8)));
constexpr bool kEvenIsLow = __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__;

struct Vec {
  Lanes r;
};

inline Vec set(float value) { return {Lanes{value, value, value, value}}; }
inline Vec operator+(Vec a, Vec b) { return {a.r + b.r}; }
inline Vec operator-(Vec a, Vec b) { return {a.r - b.r}; }
inline Vec operator*(Vec a, Vec b) { return {a.r * b.r}; }
inline Vec operator/(Vec a, Vec b) { return {a.r / b.r}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {a.r * b.r + c.r}; }  // fused where the target can
inline float sum(Vec a) { return (a.r[0] + a.r[2]) + (a.r[1] + a.r[3]); }

inline Vec load(const float* p) {
  Vec a;
  __builtin_memcpy(&a.r, p, sizeof a.r);
  return a;
}
inline Vec store(float* p, Vec a) {
  __builtin_memcpy(p, &a.r, sizeof a.r);
  return a;
}

inline Vec load(const bf16* p) {
  HalfBits half;
  __builtin_memcpy(&half, p, sizeof half);
  const Bits bits = __builtin_convertvector(half, Bits) << 16;
  return {reinterpret_cast<Lanes>(bits)};
}
// bf16's numbers, in the upper halves; the lower halves hold what was cut off.
inline Bits rounded_bits(Vec a) {
  const Bits bits = reinterpret_cast<Bits>(a.r);
  const Bits nan = reinterpret_cast<Bits>(a.r != a.r);
  return (nan & (bits | 0x400000)) | (~nan & (bits + 0x7fff + ((bits >> 16) & 1)));
}
inline Vec as_numbers(Bits bits) { return {reinterpret_cast<Lanes>(bits & 0xffff0000)}; }
inline Vec store(bf16* p, Vec a) {
  const Bits rounded = rounded_bits(a);
  const HalfBits half = __builtin_convertvector(rounded >> 16, HalfBits);
  __builtin_memcpy(p, &half, sizeof half);
  return as_numbers(rounded);
}

#if defined(__SSE2__)
inline Vec stream(float* p, Vec a) {
  _mm_stream_ps(p, (__m128)a.r);
  return a;
}
#else
inline Vec stream(float* p, Vec a) { return store(p, a); }
#endif
inline Vec stream(bf16* p, Vec a) { return store(p, a); }

inline Vec load(const float* p, int count) {
  Vec a = set(0);
  for (int i = 0; i < count; ++i) a.r[i] = p[i];
  return a;
}
inline Vec store(float* p, Vec a, int count) {
  for (int i = 0; i < count; ++i) p[i] = a.r[i];
  return a;
}
inline Vec keep(Vec a, int count) {
  for (int i = count; i < kLanes; ++i) a.r[i] = 0;
  return a;
}

#endif

#if !defined(TEXTOK_ISA_AVX512)
// The first `count` lanes, 0 <= count < kLanes; nothing else is touched in memory, and the other lanes are 0.
inline Vec load(const bf16* p, int count) {
  bf16 lanes[kLanes] = {};
  for (int i = 0; i < count; ++i) lanes[i] = p[i];
  return load(lanes);
}
inline Vec store(bf16* p, Vec a, int count) {
  bf16 lanes[kLanes];
  const Vec stored = store(lanes, a);
  for (int i = 0; i < count; ++i) p[i] = lanes[i];
  return stored;
}
#endif

// Pair: 2 * kLanes numbers of a row. Of bf16 the first vector has the numbers at even places and the second those at odd places:
// a shift and a mask take them apart and together, where putting them in order takes shuffles, which are scarcer than arithmetic.
// Whoever keeps fp32 copies of bf16 rows keeps them in that order; sums do not mind it.
//   load_pair(T*)  store_pair(T*, a)  stream_pair(T*, a)  and, with a count below 2 * kLanes, the first numbers of the row,
//   keep(a, count, T{}): others 0. store and stream return the numbers as they were stored.

struct Pair {
  Vec a, b;
};

inline Pair operator+(Pair x, Pair y) { return {x.a + y.a, x.b + y.b}; }
inline Pair operator-(Pair x, Pair y) { return {x.a - y.a, x.b - y.b}; }
inline Pair operator*(Pair x, Pair y) { return {x.a * y.a, x.b * y.b}; }
inline Pair fma(Pair x, Pair y, Pair z) { return {fma(x.a, y.a, z.a), fma(x.b, y.b, z.b)}; }
inline Pair set_pair(float value) { return {set(value), set(value)}; }
inline float sum(Pair x) { return sum(x.a + x.b); }

inline Pair load_pair(const float* p) { return {load(p), load(p + kLanes)}; }
inline Pair store_pair(float* p, Pair x) { return {store(p, x.a), store(p + kLanes, x.b)}; }
inline Pair stream_pair(float* p, Pair x) { return {stream(p, x.a), stream(p + kLanes, x.b)}; }

#if defined(TEXTOK_ISA_AVX512)

inline __mmask32 first_of_pair(int count) { return static_cast<__mmask32>((1ull << count) - 1); }

inline Pair apart(__m512i bits) {
  return {{_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16))}, as_numbers(bits)};
}
inline __m512i together(__m512i even, __m512i odd) {
  return _mm512_mask_mov_epi16(_mm512_srli_epi32(even, 16), 0xaaaaaaaa, odd);
}

inline Pair load_pair(const bf16* p) { return apart(_mm512_loadu_si512(p)); }
inline Pair load_pair(const bf16* p, int count) { return apart(_mm512_maskz_loadu_epi16(first_of_pair(count), p)); }
inline Pair store_pair(bf16* p, Pair x) {
  const __m512i even = rounded_bits(x.a), odd = rounded_bits(x.b);
  _mm512_storeu_si512(p, together(even, odd));
  return {as_numbers(even), as_numbers(odd)};
}
inline Pair stream_pair(bf16* p, Pair x) {
  const __m512i even = rounded_bits(x.a), odd = rounded_bits(x.b);
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), together(even, odd));
  return {as_numbers(even), as_numbers(odd)};
}
inline Pair store_pair(bf16* p, Pair x, int count) {
  const __m512i even = rounded_bits(x.a), odd = rounded_bits(x.b);
  _mm512_mask_storeu_epi16(p, first_of_pair(count), together(even, odd));
  return {as_numbers(even), as_numbers(odd)};
}

inline Pair load_pair(const float* p, int count) {
  const __mmask32 mask = first_of_pair(count);
  return {{_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p)},
          {_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), p + kLanes)}};
}
inline Pair store_pair(float* p, Pair x, int count) {
  const __mmask32 mask = first_of_pair(count);
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>(mask), x.a.r);
  _mm512_mask_storeu_ps(p + kLanes, static_cast<__mmask16>(mask >> 16), x.b.r);
  return x;
}

#else

#if defined(TEXTOK_ISA_AVX2)
inline Pair load_pair(const bf16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {{_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16))}, as_numbers(bits)};
}
inline __m256i together(__m256i even, __m256i odd) { return _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, 0xaa); }
inline Pair store_pair(bf16* p, Pair x) {
  const __m256i even = rounded_bits(x.a), odd = rounded_bits(x.b);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), together(even, odd));
  return {as_numbers(even), as_numbers(odd)};
}
inline Pair stream_pair(bf16* p, Pair x) {
  const __m256i even = rounded_bits(x.a), odd = rounded_bits(x.b);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), together(even, odd));
  return {as_numbers(even), as_numbers(odd)};
}
#else
inline Pair load_pair(const bf16* p) {
  Bits bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return {{reinterpret_cast<Lanes>(kEvenIsLow ? bits << 16 : bits & 0xffff0000)},
          {reinterpret_cast<Lanes>(kEvenIsLow ? bits & 0xffff0000 : bits << 16)}};
}
inline Pair store_pair(bf16* p, Pair x) {
  const Bits even = rounded_bits(x.a), odd = rounded_bits(x.b);
  const Bits bits = kEvenIsLow ? even >> 16 | (odd & 0xffff0000) : odd >> 16 | (even & 0xffff0000);
  __builtin_memcpy(p, &bits, sizeof bits);
  return {as_numbers(even), as_numbers(odd)};
}
inline Pair stream_pair(bf16* p, Pair x) { return store_pair(p, x); }
#endif

#endif

// bf16 beside fp32 rows: its pairs have their numbers in the order in which they lie, as those of fp32 have.
struct OrderedBf16 {
  bf16 number;
};

inline Pair load_pair(const OrderedBf16* p) { return {load(&p->number), load(&p[kLanes].number)}; }
inline Pair store_pair(OrderedBf16* p, Pair x) { return {store(&p->number, x.a), store(&p[kLanes].number, x.b)}; }
inline Pair stream_pair(OrderedBf16* p, Pair x) { return {stream(&p->number, x.a), stream(&p[kLanes].number, x.b)}; }

// Where nothing above has a mask for it.
template <class T>
inline Pair load_pair(const T* p, int count) {
  T numbers[2 * kLanes] = {};
  for (int i = 0; i < count; ++i) numbers[i] = p[i];
  return load_pair(numbers);
}
template <class T>
inline Pair store_pair(T* p, Pair x, int count) {
  T numbers[2 * kLanes];
  const Pair stored = store_pair(numbers, x);
  for (int i = 0; i < count; ++i) p[i] = numbers[i];
  return stored;
}

inline Vec keep_at_most(Vec a, int count) { return count >= kLanes ? a : keep(a, count); }
inline Pair keep(Pair x, int count, float) { return {keep_at_most(x.a, count), count > kLanes ? keep(x.b, count - kLanes) : set(0)}; }
inline Pair keep(Pair x, int count, bf16) { return {keep_at_most(x.a, (count + 1) / 2), keep(x.b, count / 2)}; }

// What was streamed becomes visible to other threads.
inline void stream_done() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

inline float square_root(float value) { return __builtin_sqrtf(value); }

}  // namespace
}  // namespace textok_fast
