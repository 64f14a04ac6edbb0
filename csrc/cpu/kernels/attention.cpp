// Attention of one head of one sample at a time. Keys are transposed, so that the lanes of a vector are keys for the scores and
// channels for the result; a group of queries stays in registers. What is multiplied are words of four bytes, one float32 or, where
// the processor has products of bf16, two numbers of it: then probabilities are rounded to bf16, and so is their sum's every term.
//
// Sums are taken in the same order whatever the number of samples or threads, so neither changes a result.

#include "attention.h"

#include "functions.h"
#include "transpose.h"
#include "vec.h"

namespace textok_fast {
namespace {

#define TEXTOK_INLINE inline __attribute__((always_inline))

constexpr int kQueries = 4;
#if defined(TEXTOK_ISA_AVX512)
constexpr int kVectors = 4;  // sums: kQueries * kVectors of 32 registers
#else
constexpr int kVectors = 2;  // of 16
#endif

constexpr int64_t kPadding = kLanes < 8 ? 8 : kLanes;  // whole vectors, and whole blocks of what is transposed

inline int64_t padded(int64_t count) { return (count + kPadding - 1) / kPadding * kPadding; }
inline float as_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// What differs between kinds:
//   kNumbers: in a word;  dot(sum, p, word): sum plus the products of kLanes words at p with one word
//   take_row(row, dim, words): a row of q or k;  take_pair(row, next, dim, words): kNumbers rows of v, the others null
//   round(e, p, n): probabilities n to n + kLanes of a row as they are multiplied, written at the row's p; returns them
template <typename T>
struct Plain {
  static constexpr int kNumbers = 1;
  static TEXTOK_INLINE Vec dot(Vec sum, const uint32_t* p, uint32_t word) {
    return fma(set(as_float(word)), load(reinterpret_cast<const float*>(p)), sum);
  }
  static TEXTOK_INLINE void take_row(const T* row, int64_t dim, uint32_t* words) {
    for (int64_t d = 0; d < dim; d += kLanes) {
      const int64_t left = dim - d;
      store(reinterpret_cast<float*>(words) + d, left >= kLanes ? load(row + d) : load(row + d, static_cast<int>(left)));
    }
  }
  static TEXTOK_INLINE void take_pair(const T* row, const T*, int64_t dim, uint32_t* words) { take_row(row, dim, words); }
  static TEXTOK_INLINE Vec round(Vec e, float* row, int64_t n) {
    store(row + n, e);
    return e;
  }
};

#if defined(__AVX512BF16__)
struct Halves {
  static constexpr int kNumbers = 2;
  static TEXTOK_INLINE Vec dot(Vec sum, const uint32_t* p, uint32_t word) {
    return {_mm512_dpbf16_ps(
        sum.r, (__m512bh)_mm512_loadu_si512(p), (__m512bh)_mm512_set1_epi32(static_cast<int>(word)))};
  }
  static TEXTOK_INLINE void take_row(const bf16* row, int64_t dim, uint32_t* words) {
    words[(dim - 1) / 2] = 0;
    __builtin_memcpy(words, row, dim * sizeof(bf16));
  }
  static TEXTOK_INLINE __m512i words_of(const bf16* p, int64_t left) {
    const __m256i bits = left >= kLanes ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))
                                        : _mm256_maskz_loadu_epi16(first(static_cast<int>(left)), p);
    return _mm512_cvtepu16_epi32(bits);
  }
  static TEXTOK_INLINE void take_pair(const bf16* row, const bf16* next, int64_t dim, uint32_t* words) {
    for (int64_t d = 0; d < dim; d += kLanes) {
      __m512i both = words_of(row + d, dim - d);
      if (next != nullptr) both = _mm512_or_si512(both, _mm512_slli_epi32(words_of(next + d, dim - d), 16));
      _mm512_storeu_si512(words + d, both);
    }
  }
  // In place: no number is written where one is still to be read.
  static TEXTOK_INLINE Vec round(Vec e, float* row, int64_t n) {
    const __m256i bits = (__m256i)_mm512_cvtneps_pbh(e.r);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(reinterpret_cast<uint16_t*>(row) + n), bits);
    return widen(bits);
  }
};
#endif

struct Scratch {
  uint32_t *keys, *values;  // (steps of D, padded N_k) and (steps of N_k, padded D)
  uint32_t* rows;           // (8, padded D): keys before they are transposed, then a group of queries
  float* scores;            // (kQueries, padded N_k)
};

int64_t scratch_floats(int64_t keys, int64_t dim) {  // as many as words of one number take
  return padded(dim) * padded(keys) + keys * padded(dim) + 8 * padded(dim) + kQueries * padded(keys);
}

template <typename T>
inline const T* row_of(const AttentionPart& part, int64_t sample, int64_t head, int64_t row) {
  return static_cast<const T*>(part.numbers) + sample * part.sample + head * part.head + row * part.row;
}

// VECTORS vectors of the products of QUERIES rows of `a` with the matrix b, whose rows are `a_row` and `b_row` words apart.
template <class Kind, int QUERIES, int VECTORS>
TEXTOK_INLINE void product(
    const uint32_t* a, int64_t a_row, const uint32_t* b, int64_t b_row, int64_t steps, Vec (*sums)[kVectors]) {
  Vec sum[QUERIES][VECTORS];
#pragma GCC unroll 4
  for (int r = 0; r < QUERIES; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) sum[r][v] = set(0);
  }
  for (int64_t i = 0; i < steps; ++i, b += b_row) {
#pragma GCC unroll 4
    for (int r = 0; r < QUERIES; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sum[r][v] = Kind::dot(sum[r][v], b + v * kLanes, a[r * a_row + i]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < QUERIES; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) sums[r][v] = sum[r][v];
  }
}

template <class Kind, int QUERIES>
TEXTOK_INLINE void product_of(
    int vectors, const uint32_t* a, int64_t a_row, const uint32_t* b, int64_t b_row, int64_t steps, Vec (*sums)[kVectors]) {
  if (vectors == 1) return product<Kind, QUERIES, 1>(a, a_row, b, b_row, steps, sums);
  if constexpr (kVectors > 2) {
    if (vectors == 3) return product<Kind, QUERIES, 3>(a, a_row, b, b_row, steps, sums);
    if (vectors == 4) return product<Kind, QUERIES, 4>(a, a_row, b, b_row, steps, sums);
  }
  return product<Kind, QUERIES, 2>(a, a_row, b, b_row, steps, sums);
}

// How many of `left` vectors come next: as many passes as must be, of like size.
inline int vectors_next(int64_t left) {
  const int64_t passes = (left + kVectors - 1) / kVectors;
  return static_cast<int>((left + passes - 1) / passes);
}

// A row of scores to e^(scale (score - largest)) as they are multiplied, 0 where masked and behind the last; returns 1 / their sum,
// 0 where no key is left.
template <class Kind>
TEXTOK_INLINE float softmax(float* scores, int64_t keys, const bool* mask, float scale) {
  const int64_t width = padded(keys);
  const float nothing = -__builtin_inff();
  for (int64_t n = keys; n < width; ++n) scores[n] = nothing;
  bool any = mask == nullptr;
  for (int64_t n = 0; mask != nullptr && n < keys; ++n) {
    any = any || mask[n];
    scores[n] = mask[n] ? scores[n] : nothing;
  }
  Vec highest = load(scores);
  for (int64_t n = kLanes; n < width; n += kLanes) {
    const Vec next = load(scores + n);
    highest = select(less(highest, next), next, highest);
  }
  float lanes[kLanes], most = nothing;
  store(lanes, highest);
  for (int lane = 0; lane < kLanes; ++lane) most = most < lanes[lane] ? lanes[lane] : most;
  if (!any) most = 0;  // the row is 0; without a finite score in the others it is NaN
  Vec total = set(0);
  const Vec shift = set(most), factor = set(scale), low = set(-104), zero = set(0);
  for (int64_t n = 0; n < width; n += kLanes) {
    const Vec exponent = (load(scores + n) - shift) * factor;
    total = total + Kind::round(select(less(exponent, low), zero, exponential(exponent)), scores, n);
  }
  const float all = sum(total);
  return all == 0 ? 0 : 1 / all;
}

template <class Kind, typename T, int QUERIES>
TEXTOK_INLINE void answer(const ShortAttention& s, const Scratch& scratch, int64_t sample, int64_t head, int64_t first) {
  const int64_t keys = padded(s.keys), dim = padded(s.dim);
  const int64_t dim_steps = (s.dim + Kind::kNumbers - 1) / Kind::kNumbers, key_steps = (s.keys + Kind::kNumbers - 1) / Kind::kNumbers;
  for (int r = 0; r < QUERIES; ++r) Kind::take_row(row_of<T>(s.q, sample, head, first + r), s.dim, scratch.rows + r * dim);
  Vec sums[kQueries][kVectors];
  for (int64_t n = 0, left = keys / kLanes; left > 0;) {
    const int vectors = vectors_next(left);
    product_of<Kind, QUERIES>(vectors, scratch.rows, dim, scratch.keys + n, keys, dim_steps, sums);
    for (int r = 0; r < QUERIES; ++r) {
      for (int v = 0; v < vectors; ++v) store(scratch.scores + r * keys + n + v * kLanes, sums[r][v]);
    }
    n += vectors * kLanes;
    left -= vectors;
  }
  const bool* mask = s.mask == nullptr ? nullptr : s.mask + sample * s.keys;
  float shares[QUERIES];
  for (int r = 0; r < QUERIES; ++r) shares[r] = softmax<Kind>(scratch.scores + r * keys, s.keys, mask, s.scale);
  for (int64_t d = 0, left = dim / kLanes; left > 0;) {
    const int vectors = vectors_next(left);
    const uint32_t* probabilities = reinterpret_cast<const uint32_t*>(scratch.scores);
    product_of<Kind, QUERIES>(vectors, probabilities, keys, scratch.values + d, dim, key_steps, sums);
    for (int r = 0; r < QUERIES; ++r) {
      T* out = static_cast<T*>(s.result) + ((sample * s.queries + first + r) * s.heads + head) * s.dim;
      for (int v = 0; v < vectors; ++v) {
        const int64_t at = d + v * kLanes, count = s.dim - at;
        const Vec value = sums[r][v] * set(shares[r]);
        if (count >= kLanes) {
          store(out + at, value);
        } else {
          store(out + at, value, static_cast<int>(count));
        }
      }
    }
    d += vectors * kLanes;
    left -= vectors;
  }
}

template <class Kind, typename T>
void run_kind(const ShortAttention& s, int64_t begin, int64_t end, float* memory) {
  const int64_t keys = padded(s.keys), dim = padded(s.dim), steps = (s.dim + Kind::kNumbers - 1) / Kind::kNumbers;
  Scratch scratch;
  scratch.keys = reinterpret_cast<uint32_t*>(memory);
  scratch.values = scratch.keys + dim * keys;
  scratch.rows = scratch.values + s.keys * dim;
  scratch.scores = reinterpret_cast<float*>(scratch.rows + 8 * dim);
  for (int64_t i = 0; i < 8 * dim; ++i) scratch.rows[i] = 0;
  const int64_t rows = ((s.queries + s.parts - 1) / s.parts + kQueries - 1) / kQueries * kQueries;  // of a part
  for (int64_t index = begin; index < end; ++index) {
    const int64_t problem = index / s.parts, sample = problem / s.heads, head = problem % s.heads;
    int64_t first = index % s.parts * rows;
    const int64_t last = first + rows < s.queries ? first + rows : s.queries;
    const bool packed = index > begin && index % s.parts != 0;  // by the part before it
    for (int64_t n = 0; !packed && n < s.keys; n += Kind::kNumbers) {
      const T* next = n + 1 < s.keys ? row_of<T>(s.v, sample, head, n + 1) : nullptr;
      Kind::take_pair(row_of<T>(s.v, sample, head, n), next, s.dim, scratch.values + n / Kind::kNumbers * dim);
    }
    for (int64_t n = 0; !packed && n < keys; n += 8) {  // behind the last key other rows: softmax takes no account of them
      for (int64_t r = 0; r < 8 && n + r < s.keys; ++r) {
        Kind::take_row(row_of<T>(s.k, sample, head, n + r), s.dim, scratch.rows + r * dim);
      }
      for (int64_t d = 0; d < steps; d += 8) transpose(scratch.rows + d, dim, scratch.keys + d * keys + n, keys);
    }
    for (; first + kQueries <= last; first += kQueries) answer<Kind, T, kQueries>(s, scratch, sample, head, first);
    for (; first < last; ++first) answer<Kind, T, 1>(s, scratch, sample, head, first);
  }
}

#if defined(__AVX512BF16__)
typedef Halves OfBf16;
#else
typedef Plain<bf16> OfBf16;
#endif

void run(const ShortAttention& s, int64_t begin, int64_t end, float* scratch) {
  (s.is_bf16 ? run_kind<OfBf16, bf16> : run_kind<Plain<float>, float>)(s, begin, end, scratch);
}

}  // namespace

const AttentionKernels TEXTOK_TABLE(attention) = {&run, &scratch_floats};

}  // namespace textok_fast
