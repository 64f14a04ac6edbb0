#include "guided.h"

#include "functions.h"
#include "half.h"
#include "vec.h"

namespace textok_fast {
namespace {

template <typename T>
inline Vec load_part(const T* p, int count) {
  return count == kLanes ? load(p) : load(p, count);
}

template <typename T>
inline void store_part(T* p, Vec a, int count) {
  if (count == kLanes) {
    store(p, a);
  } else {
    store(p, a, count);
  }
}

struct Coefficients {
  Vec s, kx, km, a, b, low, high, n, sigma;  // sigma = n e^(high/2)
};

// `count` numbers of x from `i` on, those of the output from `o` on.
template <typename O, typename X>
inline void run(const GuidedStep& step, const Coefficients& k, int64_t i, int64_t o, int64_t count, bool paired, bool noisy) {
  const O* output = static_cast<const O*>(step.output);
  const bool learned = step.output_width != step.width;
  const Vec one = set(1), minus_one = set(-1), half = set(0.5f);
  for (; count > 0; i += kLanes, o += kLanes, count -= kLanes) {
    const int lanes = count < kLanes ? static_cast<int>(count) : kLanes;
    Vec m = load_part(output + o, lanes);
    if (paired) {
      const Vec u = load_part(output + step.pair + o, lanes);
      m = fma(k.s, m - u, u);
    }
    const Vec x = load_part(static_cast<const X*>(step.x) + i, lanes);
    Vec x0 = fma(k.kx, x, k.km * m);
    if (step.clip) x0 = clamp(x0, minus_one, one);
    Vec result = fma(k.a, x0, k.b * x);
    if (noisy) {
      const Vec noise = step.noise_type == Float::fp32 ? load_part(static_cast<const float*>(step.noise) + i, lanes)
                                                       : load_part(static_cast<const bf16*>(step.noise) + i, lanes);
      Vec sigma = k.sigma;
      if (learned) {
        const Vec f = (load_part(output + o + step.width, lanes) + one) * half;
        sigma = k.n * exponential((f * k.high + (one - f) * k.low) * half);
      }
      result = fma(sigma, noise, result);
    }
    store_part(static_cast<X*>(step.result) + i, result, lanes);
  }
}

template <typename O, typename X>
void run_rows(const GuidedStep& step, int64_t begin, int64_t end) {
  const float* c = step.coefficients;
  const bool noisy = step.noise != nullptr && c[7] != 0;
  const Vec sigma = set(c[7]) * exponential(set(0.5f * c[6]));
  const Coefficients k = {set(c[0]), set(c[1]), set(c[2]), set(c[3]), set(c[4]), set(c[5]), set(c[6]), set(c[7]), sigma};
  const int64_t guided = step.pair != 0 ? step.guided : 0;
  int64_t row = begin / step.width, column = begin - row * step.width;
  for (int64_t i = begin; i < end; ++row, column = 0) {
    const int64_t left = step.width - column < end - i ? step.width - column : end - i, last = column + left;
    const int64_t o = row * step.output_width + column;
    const int64_t inside = column >= guided ? 0 : (last < guided ? last : guided) - column;
    run<O, X>(step, k, i, o, inside, true, noisy);
    run<O, X>(step, k, i + inside, o + inside, left - inside, false, noisy);
    i += left;
  }
}

template <typename O>
void run_typed(const GuidedStep& step, int64_t begin, int64_t end) {
  (step.x_type == Float::fp32 ? run_rows<O, float> : run_rows<O, bf16>)(step, begin, end);
}

void run_step(const GuidedStep& step, int64_t begin, int64_t end) {
  switch (step.output_type) {
    case Float::fp32: return run_typed<float>(step, begin, end);
    case Float::bf16: return run_typed<bf16>(step, begin, end);
    case Float::fp16: return run_typed<fp16>(step, begin, end);
  }
}

}  // namespace

const GuidedKernels TEXTOK_TABLE(guided) = {&run_step};

}  // namespace textok_fast
