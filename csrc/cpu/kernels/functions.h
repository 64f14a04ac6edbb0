// Elementary functions of fp32 vectors, beside vec.h.

#pragma once

#include "vec.h"

namespace textok_fast {
namespace {

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

inline Vec select(Ints mask, Vec a, Vec b) { return {(decltype(a.r))(mask ? (Ints)a.r : (Ints)b.r)}; }
inline Ints less(Vec a, Vec b) { return (Floats)a.r < (Floats)b.r; }
inline Vec magnitude(Vec a) { return {(decltype(a.r))((Ints)a.r & 0x7fffffff)}; }

// NaN stays NaN, as in torch.clamp.
inline Vec clamp(Vec a, Vec low, Vec high) {
  const Vec raised = select(less(a, low), low, a);
  return select(less(high, raised), high, raised);
}

inline Vec power_of_two(Ints n) { return {(decltype(Vec::r))((n + 127) << 23)}; }

// e^x within 2 ulp: x = n ln 2 + f with |f| <= ln 2 / 2, a polynomial for e^f (coefficients of Cephes' expf), then times 2^n: in
// two factors where no instruction does it, so that the result becomes subnormal, 0 or infinite where it should.
inline Vec exponential(Vec value) {
#if defined(TEXTOK_ISA_AVX512)  // of a NaN, the smaller and the larger is the second argument
  const Vec x = {_mm512_min_ps(set(89).r, _mm512_max_ps(set(-104).r, value.r))};
  const Vec n = {_mm512_roundscale_ps((x * set(1.44269504f)).r, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
#else
  const Vec x = clamp(value, set(-104), set(89)), shift = set(12582912);  // 1.5 * 2^23, where the spacing of floats is 1
  const Vec shifted = fma(x, set(1.44269504f), shift), n = shifted - shift;
#endif
  const Vec f = fma(n, set(2.12194440e-4f), fma(n, set(-0.693359375f), x));
  Vec y = fma(set(1.9875691500e-4f), f, set(1.3981999507e-3f));
  y = fma(y, f, set(8.3334519073e-3f));
  y = fma(y, f, set(4.1665795894e-2f));
  y = fma(y, f, set(1.6666665459e-1f));
  y = fma(y, f, set(5.0000001201e-1f));
  y = fma(y, f * f, f + set(1));
#if defined(TEXTOK_ISA_AVX512)
  return {_mm512_scalef_ps(y.r, n.r)};
#else
  const Ints exponent = (Ints)shifted.r - (Ints)shift.r, half = exponent >> 1;
  return y * power_of_two(half) * power_of_two(exponent - half);
#endif
}

// x Phi(x) = max(x, 0) - t (1 - Phi(t)) with t = |x|, so that nothing cancels on either side. With s = 1 / (1 + 0.35 t),
// (1 - Phi(t)) e^(t^2/2) is s times a polynomial in s (fitted here to 4e-8 relative for t up to 14.5, beyond which it is 0).
inline Vec gelu(Vec x) {
  const Vec zero = set(0), one = set(1), t = clamp(magnitude(x), zero, set(16)), s = one / fma(t, set(0.35f), one);
  Vec p = fma(set(-0.029158201f), s, set(0.14403242f));
  p = fma(p, s, set(-0.25584203f));
  p = fma(p, s, set(0.15932305f));
  p = fma(p, s, set(-0.023214573f));
  p = fma(p, s, set(0.1055534f));
  p = fma(p, s, set(0.11982107f));
  p = fma(p, s, set(0.13986355f));
  p = fma(p, s, set(0.1396213f));
  return select(less(x, zero), zero, x) - t * s * p * exponential(t * t * set(-0.5f));
}

// 0.5 x (1 + tanh u) = x / (1 + e^(-2u)) with u = sqrt(2 / pi) (x + 0.044715 x^3).
inline Vec gelu_tanh(Vec x) {
  const Vec one = set(1), u = x * fma(x * x, set(0.044715f), one);
  return x / (one + exponential(u * set(-1.5957691216057308f)));
}

}  // namespace
}  // namespace textok_fast
