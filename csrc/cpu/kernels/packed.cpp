// Products with packed weights. A group of rows times a panel stays in registers: each step loads the panel's vectors once and
// broadcasts a word of each row. The weights are read once, from memory when rows are few: while one block of steps is
// multiplied with all groups of rows, the next one is fetched.
//
// Each sum is taken in the order of the steps whatever the number of rows or threads, so neither changes a result.

#include "packed.h"

#include "functions.h"
#include "transpose.h"
#include "vec.h"

namespace textok_fast {
namespace {

#define TEXTOK_INLINE inline __attribute__((always_inline))

constexpr int kVectors = 3;
constexpr int kColumns = kVectors * kLanes;
#if defined(TEXTOK_ISA_AVX512)
constexpr int kRows = 8;  // sums: kRows * kVectors of 32 registers
#else
constexpr int kRows = 4;  // of 16
#endif
constexpr int64_t kBlockSteps = 1200;  // of a panel: with AVX-512 225 KiB, in the second-level cache

typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef int16_t Shorts __attribute__((vector_size(4 * kLanes)));

template <typename V>
inline V load_bits(const uint32_t* p) {
  V value;
  __builtin_memcpy(&value, p, sizeof value);
  return value;
}

inline float as_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t as_word(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Number i and those after it that belong to the same four bytes, 0 behind the last of `count`. Bytes keep their order in memory, in
// weights as in x, so that it does not matter which it is.
template <typename T>
inline uint32_t word_of(const T* p, int64_t i, int64_t count) {
  uint32_t word = 0;
  if (i + static_cast<int64_t>(4 / sizeof(T)) <= count) {
    __builtin_memcpy(&word, p + i, 4);
  } else {
    __builtin_memcpy(&word, p + i, (count - i) * sizeof(T));
  }
  return word;
}

// What differs between kinds:
//   Number: of the weights; kNumbers of them are a step
//   kWords: words of x in a step as the products take it; split(p, w): word w of kLanes steps
//   kFlip: what packed words differ in from the numbers' own bits
//   Weight weight(p, w): kLanes outputs' part for word w; Sum dot(sum, weight, word of x)

struct Fp32 {
  typedef float Number;
  typedef Vec Sum, Weight;
  static constexpr int kNumbers = 1, kWords = 1;
  static constexpr uint32_t kFlip = 0;
  static TEXTOK_INLINE Words split(const uint32_t* p, int) { return load_bits<Words>(p); }
  static TEXTOK_INLINE Weight weight(const uint32_t* p, int) { return load_bits<Vec>(p); }
  static TEXTOK_INLINE Sum dot(Sum sum, Weight weight, uint32_t word) { return fma(weight, set(as_float(word)), sum); }
};

struct Bf16 {
  typedef bf16 Number;
  typedef Vec Sum;
  static constexpr int kNumbers = 2;
  static constexpr uint32_t kFlip = 0;
#if defined(__AVX512BF16__)
  typedef __m512i Weight;
  static constexpr int kWords = 1;
  static TEXTOK_INLINE Words split(const uint32_t* p, int) { return load_bits<Words>(p); }
  static TEXTOK_INLINE Weight weight(const uint32_t* p, int) { return _mm512_loadu_si512(p); }
  static TEXTOK_INLINE Sum dot(Sum sum, Weight weight, uint32_t word) {
    return {_mm512_dpbf16_ps(sum.r, (__m512bh)weight, (__m512bh)_mm512_set1_epi32(static_cast<int>(word)))};
  }
#else  // as fp32: first one half of every four bytes, then the other
  typedef Vec Weight;
  static constexpr int kWords = 2;
  static TEXTOK_INLINE Words split(const uint32_t* p, int w) {
    const Words bits = load_bits<Words>(p);
    return w == 0 ? bits << 16 : bits & 0xffff0000;
  }
  static TEXTOK_INLINE Weight weight(const uint32_t* p, int w) { return {(decltype(Vec::r))split(p, w)}; }
  static TEXTOK_INLINE Sum dot(Sum sum, Weight weight, uint32_t word) { return fma(weight, set(as_float(word)), sum); }
#endif
};

struct Int8 {
  typedef int8_t Number;
  typedef Ints Sum;
  static constexpr int kNumbers = 4;
#if defined(__AVX512VNNI__)
  // The instruction multiplies bytes without sign by bytes with one: weights are stored plus 128, and sums start at -128 times the
  // sum of x.
  typedef __m512i Weight;
  static constexpr int kWords = 1;
  static constexpr uint32_t kFlip = 0x80808080;
  static TEXTOK_INLINE Words split(const uint32_t* p, int) { return load_bits<Words>(p); }
  static TEXTOK_INLINE Weight weight(const uint32_t* p, int) { return _mm512_loadu_si512(p); }
  static TEXTOK_INLINE Sum dot(Sum sum, Weight weight, uint32_t word) {
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, weight, _mm512_set1_epi32(static_cast<int>(word)));
  }
#else  // as 16-bit numbers, whose products are added in pairs: of every four bytes the lower of each half, then the upper
  static constexpr int kWords = 2;
  static constexpr uint32_t kFlip = 0;
  static TEXTOK_INLINE Words split(const uint32_t* p, int w) {
    const Shorts halves = load_bits<Shorts>(p);
    return (Words)((w == 0 ? halves << 8 : halves) >> 8);
  }
#if defined(TEXTOK_ISA_AVX512) || defined(TEXTOK_ISA_AVX2) || defined(__SSE2__)
  typedef Words Weight;
  static TEXTOK_INLINE Weight weight(const uint32_t* p, int w) { return split(p, w); }
  static TEXTOK_INLINE Sum dot(Sum sum, Weight weight, uint32_t word) {
    const Words words = Words{} + word;
#if defined(TEXTOK_ISA_AVX512)
    return sum + (Ints)_mm512_madd_epi16((__m512i)weight, (__m512i)words);
#elif defined(TEXTOK_ISA_AVX2)
    return sum + (Ints)_mm256_madd_epi16((__m256i)weight, (__m256i)words);
#else
    return sum + (Ints)_mm_madd_epi16((__m128i)weight, (__m128i)words);
#endif
  }
#else
  struct Weight {
    Ints low, high;
  };
  static TEXTOK_INLINE Weight weight(const uint32_t* p, int w) {
    const Words pair = split(p, w);
    return {(Ints)(pair << 16) >> 16, (Ints)pair >> 16};
  }
  static TEXTOK_INLINE Sum dot(Sum sum, Weight weight, uint32_t word) {
    return sum + weight.low * static_cast<int16_t>(word) + weight.high * static_cast<int16_t>(word >> 16);
  }
#endif
#endif
};

template <class Kind>
void pack(const PackWeight& s, int64_t first_panel, int64_t last_panel) {
  typedef typename Kind::Number Number;
  const int64_t steps = divide_up(s.in, Kind::kNumbers);
  for (int64_t panel = first_panel; panel < last_panel; ++panel) {
    uint32_t* packed = s.packed + panel * steps * kColumns;
    for (int64_t first = 0; first < steps; first += 64) {  // a few lines of every row, which stay in the cache
      const int64_t last = smaller(first + 64, steps);
      for (int64_t j = 0; j < kColumns; ++j) {
        const int64_t column = panel * kColumns + j;
        const Number* row = static_cast<const Number*>(s.weight) + column * s.in;
        for (int64_t k = first; k < last; ++k) {
          packed[k * kColumns + j] = (column < s.out ? word_of(row, k * Kind::kNumbers, s.in) : 0) ^ Kind::kFlip;
        }
      }
    }
  }
}

template <typename T>
inline Vec load_part(const T* p, int64_t count) {
  return count >= kLanes ? load(p) : load(p, count > 0 ? static_cast<int>(count) : 0);
}

// Row i of x to `words`, a step each, with room for kLanes more.
template <typename T>
inline void copy_row(const PackedProduct& s, const T* x, uint32_t* words) {
  if (s.steps > 0) words[s.steps - 1] = 0;  // a step may be more than what is left
  __builtin_memcpy(words, x, s.in * sizeof(T));
}

// Symmetric, by the largest magnitude of the row; one with a number that is not finite gets the scale NaN.
template <typename T>
void quantize_row(const PackedProduct& s, const T* x, int64_t i, uint32_t* words) {
  typedef int8_t Bytes __attribute__((vector_size(kLanes)));
  int8_t* bytes = reinterpret_cast<int8_t*>(words);
  Ints largest = {}, total = {};
  for (int64_t k = 0; k < s.in; k += kLanes) {
    const Ints bits = (Ints)magnitude(load_part(x + k, s.in - k)).r;
    largest = bits > largest ? bits : largest;
  }
  int32_t most = 0;
  for (int lane = 0; lane < kLanes; ++lane) most = largest[lane] > most ? largest[lane] : most;
  if (most >= 0x7f800000) {
    s.row_scales[i] = __builtin_nanf("");
    __builtin_memset(bytes, 0, 4 * s.steps);
    return;
  }
  float scale = as_float(static_cast<uint32_t>(most)) / 127;
  if (scale == 0) scale = 1;
  s.row_scales[i] = scale;

  const Vec divisor = set(scale), high = set(127), low = set(-127), shift = set(12582912);  // 1.5 * 2^23 rounds to whole numbers
  for (int64_t k = 0; k < 4 * s.steps; k += kLanes) {
    const Vec value = clamp(load_part(x + k, s.in - k) / divisor, low, high);  // more than 127 where the scale is subnormal
    const Ints whole = (Ints)(value + shift).r - (Ints)shift.r;
    total += whole;
    const Bytes narrow = __builtin_convertvector(whole, Bytes);
    __builtin_memcpy(bytes + k, &narrow, sizeof narrow);
  }
  uint32_t sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += static_cast<uint32_t>(total[lane]);
  if constexpr (Int8::kFlip != 0) s.starts[i] = 0u - 128u * sum;
}

template <class Kind>
inline void take_row(const PackedProduct& s, const void* x, int64_t i, uint32_t* words) {
  s.starts[i] = 0;
  if constexpr (Kind::kNumbers < 4) {
    copy_row(s, static_cast<const typename Kind::Number*>(x), words);
  } else if (s.x_is_bf16) {
    quantize_row(s, static_cast<const bf16*>(x), i, words);
  } else {
    quantize_row(s, static_cast<const float*>(x), i, words);
  }
}

template <class Kind>
void take_rows(const PackedProduct& s, int64_t first_group, int64_t last_group, uint32_t* scratch) {
  const int64_t rows = s.last_row - s.first_row, bytes = s.x_is_bf16 ? 2 : 4, padded = s.steps + kLanes;
  constexpr int64_t kStride = Kind::kWords * kRows;
  for (int64_t group = first_group; group < last_group; ++group) {
    const int64_t first = group * kRows, count = smaller(kRows, rows - first);
    uint32_t* const out = s.words + group * s.steps * kStride;
    for (int64_t r = 0; r < count; ++r) {
      const int64_t row = s.first_row + first + r;
      const int64_t offset = row / s.inner * s.outer_stride + row % s.inner * s.inner_stride;
      take_row<Kind>(s, static_cast<const char*>(s.x) + bytes * offset, first + r, scratch + r * padded);
    }
    int64_t k = 0;
#if defined(TEXTOK_ISA_AVX512)
    if constexpr (Kind::kWords == 1) {
      if (count == kRows) {
        for (; k + 8 <= s.steps; k += 8) transpose(scratch + k, padded, out + k * kRows, kRows);
      }
    }
#endif
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t j = k; j < s.steps; j += kLanes) {
        for (int w = 0; w < Kind::kWords; ++w) {
          const Words words = Kind::split(scratch + r * padded + j, w);
          for (int lane = 0; lane < smaller(kLanes, s.steps - j); ++lane) out[(j + lane) * kStride + w * kRows + r] = words[lane];
        }
      }
    }
  }
}

// What is fetched meanwhile: LINES cache lines at each step, `ahead_step` bytes further each time.
template <class Kind, int ROWS, int LINES>
void run_block(const uint32_t* x, const uint32_t* panel, int64_t steps, uint32_t* sums, const char* ahead, int64_t ahead_step) {
  typename Kind::Sum sum[ROWS][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) sum[r][v] = load_bits<typename Kind::Sum>(sums + r * kColumns + v * kLanes);
  }
  for (int64_t k = 0; k < steps; ++k) {
#pragma GCC unroll 3
    for (int line = 0; line < LINES; ++line) __builtin_prefetch(ahead + 64 * line, 0, 2);
    ahead += ahead_step;
#pragma GCC unroll 2
    for (int w = 0; w < Kind::kWords; ++w) {
      typename Kind::Weight weight[kVectors];
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) weight[v] = Kind::weight(panel + v * kLanes, w);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v) sum[r][v] = Kind::dot(sum[r][v], weight[v], x[w * kRows + r]);
      }
    }
    x += Kind::kWords * kRows;
    panel += kColumns;
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) __builtin_memcpy(sums + r * kColumns + v * kLanes, &sum[r][v], sizeof sum[r][v]);
  }
}

typedef void (*RunBlock)(const uint32_t*, const uint32_t*, int64_t, uint32_t*, const char*, int64_t);

template <class Kind, int ROWS>
RunBlock run_block_of(int64_t rows, bool few_groups) {
  if (rows == ROWS) return few_groups ? &run_block<Kind, ROWS, 3> : &run_block<Kind, ROWS, 1>;
  if constexpr (ROWS > 1) return run_block_of<Kind, ROWS - 1>(rows, few_groups);
  return nullptr;
}

inline Vec number_of(Vec sum, float, Vec, Vec bias) { return sum + bias; }
inline Vec number_of(Ints sum, float row_scale, Vec scale, Vec bias) {
  return fma(Vec{(decltype(Vec::r))__builtin_convertvector(sum, Floats)} * set(row_scale), scale, bias);
}

template <typename T>
inline void store_part(T* p, Vec a, int64_t count) {
  if (count >= kLanes) {
    store(p, a);
  } else {
    store(p, a, static_cast<int>(count));
  }
}

template <class Kind>
void finish_rows(const PackedProduct& s, int64_t first, int64_t count, int64_t column, const Vec* bias, const uint32_t* sums) {
  for (int64_t i = first; i < first + count; ++i, sums += kColumns) {
    const float row_scale = Kind::kNumbers == 4 ? s.row_scales[i] : 1;
    for (int v = 0; v < kVectors; ++v) {
      const int64_t n = column + v * kLanes, left = s.out - n;
      if (left <= 0) break;
      const Vec scale = Kind::kNumbers == 4 ? load_part(s.scales + n, left) : set(1);
      Vec value = number_of(load_bits<typename Kind::Sum>(sums + v * kLanes), row_scale, scale, bias[v]);
      if (s.activation == Activation::gelu) value = gelu(value);
      if (s.activation == Activation::gelu_tanh) value = gelu_tanh(value);
      const int64_t at = (s.first_row + i) * s.out + n;
      if (s.x_is_bf16) {
        store_part(static_cast<bf16*>(s.result) + at, value, left);
      } else {
        store_part(static_cast<float*>(s.result) + at, value, left);
      }
    }
  }
}

template <class Kind>
void multiply(const PackedProduct& s, int64_t first_task, int64_t last_task, uint32_t* sums) {
  const int64_t rows = s.last_row - s.first_row, groups = divide_up(rows, kRows);
  const int64_t blocks = divide_up(s.steps, kBlockSteps), block = divide_up(s.steps, blocks > 0 ? blocks : 1);
  const uint32_t* const end = s.packed + divide_up(last_task, s.segments) * s.steps * kColumns;
  for (int64_t task = first_task; task < last_task; ++task) {
    const int64_t column = task / s.segments * kColumns, segment = task % s.segments;
    const int64_t first_group = segment * groups / s.segments, last_group = (segment + 1) * groups / s.segments;
    const int64_t first = first_group * kRows, last = smaller(last_group * kRows, rows);
    Vec bias[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      const int64_t n = column + v * kLanes, left = s.out - n;
      bias[v] = s.bias == nullptr || left <= 0 ? set(0)
                : s.bias_is_bf16               ? load_part(static_cast<const bf16*>(s.bias) + n, left)
                                               : load_part(static_cast<const float*>(s.bias) + n, left);
    }
    for (int64_t i = first; i < last; ++i) {
      const Words start = Words{} + s.starts[i];
      for (int v = 0; v < kVectors; ++v) __builtin_memcpy(sums + (i - first) * kColumns + v * kLanes, &start, sizeof start);
    }
    const bool few = last_group - first_group < 3;
    const RunBlock run_full = run_block_of<Kind, kRows>(kRows, few);
    for (int64_t k = 0; k < s.steps; k += block) {
      const int64_t steps = smaller(block, s.steps - k);
      const uint32_t *panel = s.packed + (column / kColumns * s.steps + k) * kColumns, *next = panel + steps * kColumns;
      const int64_t share = next < end ? smaller(steps * kColumns, end - next) * 4 / (last_group - first_group) : 0;
      const char* ahead = reinterpret_cast<const char*>(next < end ? next : panel);
      for (int64_t g = first_group; g < last_group; ++g, ahead += share) {
        const int64_t count = smaller(kRows, rows - g * kRows);
        uint32_t* const group_sums = sums + (g * kRows - first) * kColumns;
        const RunBlock run = count == kRows ? run_full : run_block_of<Kind, kRows>(count, few);
        run(s.words + (g * s.steps + k) * Kind::kWords * kRows, panel, steps, group_sums, ahead, divide_up(share, steps));
      }
    }
    finish_rows<Kind>(s, first, last - first, column, bias, sums);
  }
}

template <class Kind>
constexpr PackedFunctions functions() {
  return {&pack<Kind>, &take_rows<Kind>, &multiply<Kind>, Kind::kWords};
}

}  // namespace

const PackedKernels TEXTOK_TABLE(packed) = {{functions<Fp32>(), functions<Bf16>(), functions<Int8>()}, kRows, kColumns, kLanes};

}  // namespace textok_fast
