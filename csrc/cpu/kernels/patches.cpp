// A strip passes through the first-level cache in bytes: lines of pixels <-> one line a channel <-> the order of patches. Only
// the step from or to floats touches much memory, and it goes straight through it.

#include "patches.h"

#include <stddef.h>

#include "half.h"
#include "vec.h"

namespace textok_fast {
namespace {

#if defined(TEXTOK_ISA_AVX512) || defined(TEXTOK_ISA_AVX2)
// Where each byte of 48 goes when 16 pixels are taken apart, or put together; 0x80 makes a zero.
struct Shuffles {
  alignas(16) uint8_t apart[3][3][16];     // [channel][source vector]
  alignas(16) uint8_t together[3][3][16];  // [target vector][channel]
};

constexpr Shuffles make_shuffles() {
  Shuffles s = {};
  for (int channel = 0; channel < 3; ++channel) {
    for (int vector = 0; vector < 3; ++vector) {
      for (int i = 0; i < 16; ++i) {
        const int from = 3 * i + channel, to = 16 * vector + i;
        s.apart[channel][vector][i] = static_cast<uint8_t>(from / 16 == vector ? from % 16 : 0x80);
        s.together[vector][channel][i] = static_cast<uint8_t>(to % 3 == channel ? to / 3 : 0x80);
      }
    }
  }
  return s;
}

constexpr Shuffles kShuffles = make_shuffles();

inline __m128i load16(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
inline void store16(uint8_t* p, __m128i a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), a); }

inline __m128i pick(const __m128i (&from)[3], const uint8_t (&masks)[3][16]) {
  const __m128i a = _mm_shuffle_epi8(from[0], load16(masks[0])), b = _mm_shuffle_epi8(from[1], load16(masks[1]));
  return _mm_or_si128(_mm_or_si128(a, b), _mm_shuffle_epi8(from[2], load16(masks[2])));
}
#endif

// (width, 3) to three lines `plane` bytes apart.
void take_apart(const uint8_t* pixels, uint8_t* lines, int64_t plane, int64_t width) {
  int64_t i = 0;
#if defined(TEXTOK_ISA_AVX512) || defined(TEXTOK_ISA_AVX2)
  for (; i + 16 <= width; i += 16) {
    const __m128i from[3] = {load16(pixels + 3 * i), load16(pixels + 3 * i + 16), load16(pixels + 3 * i + 32)};
#pragma GCC unroll 3
    for (int channel = 0; channel < 3; ++channel) store16(lines + channel * plane + i, pick(from, kShuffles.apart[channel]));
  }
#endif
  for (; i < width; ++i) {
    for (int channel = 0; channel < 3; ++channel) lines[channel * plane + i] = pixels[3 * i + channel];
  }
}

// The inverse.
void put_together(const uint8_t* lines, int64_t plane, uint8_t* pixels, int64_t width) {
  int64_t i = 0;
#if defined(TEXTOK_ISA_AVX512) || defined(TEXTOK_ISA_AVX2)
  for (; i + 16 <= width; i += 16) {
    const __m128i from[3] = {load16(lines + i), load16(lines + plane + i), load16(lines + 2 * plane + i)};
#pragma GCC unroll 3
    for (int part = 0; part < 3; ++part) store16(pixels + 3 * i + 16 * part, pick(from, kShuffles.together[part]));
  }
#endif
  for (; i < width; ++i) {
    for (int channel = 0; channel < 3; ++channel) pixels[3 * i + channel] = lines[channel * plane + i];
  }
}

// Copies `count` bytes in steps of 16, up to kOvershoot more than meant.
inline void copy_over(uint8_t* to, const uint8_t* from, int64_t count) {
  for (int64_t i = 0; i < count; i += kOvershoot) __builtin_memcpy(to + i, from + i, kOvershoot);
}

inline float level(uint8_t byte) { return byte / 127.5f - 1; }

inline Vec levels(const uint8_t* bytes) {
#if defined(TEXTOK_ISA_AVX512)
  const Vec a = {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(load16(bytes)))};
#elif defined(TEXTOK_ISA_AVX2)
  const Vec a = {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes))))};
#else
  typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
  Bytes narrow_bytes;
  __builtin_memcpy(&narrow_bytes, bytes, sizeof narrow_bytes);
  const Vec a = {__builtin_convertvector(narrow_bytes, Lanes)};
  return a / set(127.5f) - set(1);
#endif
#if defined(TEXTOK_ISA_AVX512) || defined(TEXTOK_ISA_AVX2)
  // The quotient by a product and its remainder: exactly that of a division for each of the 256 bytes, several times faster.
  const Vec inverse = set(1 / 127.5f), quotient = a * inverse;
  const Vec remainder = fma(quotient, set(-127.5f), a);
  return fma(remainder, inverse, quotient) - set(1);
#endif
}

// Numbers in [-1, 1], none of them 0 or subnormal in fp16.
inline void from_float(float value, fp16* out) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  const uint32_t magnitude = bits & 0x7fffffff, rounded = (magnitude + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  out->bits = static_cast<uint16_t>((rounded - (112 << 10)) | ((bits >> 16) & 0x8000));
}
#if defined(TEXTOK_ISA_AVX512)
inline __m256i to_half(Vec a) { return _mm512_cvtps_ph(a.r, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline void store(fp16* p, Vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_half(a)); }
inline void stream(fp16* p, Vec a) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), to_half(a)); }
#else
inline void store(fp16* p, Vec a) {
  WideBits bits;
  __builtin_memcpy(&bits, &a, sizeof bits);
  const WideBits magnitude = bits & 0x7fffffff, rounded = (magnitude + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const NarrowBits half = __builtin_convertvector((rounded - (112 << 10)) | ((bits >> 16) & 0x8000), NarrowBits);
  __builtin_memcpy(p, &half, sizeof half);
}
inline void stream(fp16* p, Vec a) { store(p, a); }
#endif

template <typename T>
void write_levels(const uint8_t* bytes, T* out, int64_t count, bool streaming) {
  int64_t i = 0;
  if (streaming) {
    for (; i + kLanes <= count; i += kLanes) stream(out + i, levels(bytes + i));
  } else {
    for (; i + kLanes <= count; i += kLanes) store(out + i, levels(bytes + i));
  }
  for (; i < count; ++i) from_float(level(bytes[i]), out + i);
}

template <typename T>
void patchify(const Patchify& a, int64_t first_strip, int64_t last_strip, uint8_t* scratch) {
  const int64_t p = a.patch_size, width = a.columns * p, line = width + kOvershoot, plane = p * line;
  uint8_t *lines = scratch, *strip = scratch + 3 * plane;
  for (int64_t s = first_strip; s < last_strip; ++s) {
    const uint8_t* pixels = a.images + s / a.strips * a.batch_stride + s % a.strips * p * a.row_stride;
    for (int64_t row = 0; row < p; ++row) {
      const uint8_t* from = pixels + row * a.row_stride;
      uint8_t* to = lines + row * line;
      if (a.column_stride == 3 && a.channel_stride == 1) {
        take_apart(from, to, plane, width);
      } else {
        for (int channel = 0; channel < 3; ++channel) {
          const uint8_t* source = from + channel * a.channel_stride;
          uint8_t* target = to + channel * plane;
          if (a.column_stride == 1) {
            __builtin_memcpy(target, source, static_cast<size_t>(width));
          } else {
            for (int64_t i = 0; i < width; ++i) target[i] = source[i * a.column_stride];
          }
        }
      }
    }
    uint8_t* to = strip;
    for (int64_t column = 0; column < a.columns; ++column) {
      for (int64_t row = 0; row < 3 * p; ++row, to += p) copy_over(to, lines + row * line + column * p, p);
    }
    const int64_t count = 3 * p * width;
    write_levels(strip, static_cast<T*>(a.patches) + s * count, count, a.streaming);
  }
  if (a.streaming) stream_done();
}

#if defined(TEXTOK_ISA_AVX512)
inline void store_bytes(uint8_t* p, Vec a) {  // 0 <= a <= 255 or NaN, which the maximum makes its second operand
  const __m512 clamped = _mm512_min_ps(_mm512_max_ps(a.r, _mm512_setzero_ps()), _mm512_set1_ps(255));
  store16(p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(clamped)));
}
#elif defined(TEXTOK_ISA_AVX2)
inline void store_bytes(uint8_t* p, Vec a) {
  const __m256 clamped = _mm256_min_ps(_mm256_max_ps(a.r, _mm256_setzero_ps()), _mm256_set1_ps(255));
  const __m256i ints = _mm256_cvtps_epi32(clamped);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(ints), _mm256_extracti128_si256(ints, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
}
#else
inline void store_bytes(uint8_t* p, Vec a) {
  typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
  const Bits positive = (Bits)(a.r > 0.0f);  // not NaN
  Lanes clamped = (Lanes)((Bits)a.r & positive);
  const Bits above = (Bits)(clamped > 255.0f);
  clamped = (Lanes)(((Bits)(Lanes{} + 255.0f) & above) | ((Bits)clamped & ~above));
  // At 1.5 * 2^23 the spacing of floats is 1: the sum is rounded half to even, its low bits are the integer.
  const Bytes bytes = __builtin_convertvector((Bits)(clamped + 12582912.0f) & 0xff, Bytes);
  __builtin_memcpy(p, &bytes, sizeof bytes);
}
#endif

template <typename T>
void read_levels(const T* from, uint8_t* bytes, int64_t count) {
  const auto scaled = [](Vec a) { return (a + set(1)) * set(127.5f); };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store_bytes(bytes + i, scaled(load(from + i)));
  if (i < count) store_bytes(bytes + i, scaled(load(from + i, static_cast<int>(count - i))));  // at most kOvershoot too many
}

template <typename T>
void unpatchify(const Unpatchify& a, int64_t first_strip, int64_t last_strip, uint8_t* scratch) {
  const int64_t p = a.patch_size, width = a.columns * p, line = width + kOvershoot, plane = p * line, count = 3 * p * width;
  uint8_t *lines = scratch, *strip = scratch + 3 * plane;
  for (int64_t s = first_strip; s < last_strip; ++s) {
    read_levels(static_cast<const T*>(a.patches) + s * count, strip, count);
    const uint8_t* from = strip;
    for (int64_t column = 0; column < a.columns; ++column) {
      for (int64_t row = 0; row < 3 * p; ++row, from += p) copy_over(lines + row * line + column * p, from, p);
    }
    for (int64_t row = 0; row < p; ++row) put_together(lines + row * line, plane, a.images + s * count + row * 3 * width, width);
  }
}

}  // namespace

const PatchesKernels TEXTOK_TABLE(patches) = {
    {&patchify<float>, &unpatchify<float>}, {&patchify<bf16>, &unpatchify<bf16>}, {&patchify<fp16>, &unpatchify<fp16>}};

}  // namespace textok_fast
