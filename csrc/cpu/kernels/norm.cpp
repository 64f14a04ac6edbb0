// LayerNorm with modulation, after a gated residual or alone, forward and backward.
//
// A row is read from memory once and then lies in the first-level cache, as fp32 (`scratch`, or where it is). Its variance is
// taken about its mean in a pass of its own, which costs little there and, unlike a sum of squares, loses no digits.

#include "norm.h"

#include "vec.h"

namespace textok_fast {
namespace {

#define TEXTOK_INLINE __attribute__((always_inline))

constexpr int64_t kStep = 2 * kLanes;

struct All {};  // in place of a count: all numbers of the pair

template <class T>
inline Pair load_pair(const T* p, All) {
  return load_pair(p);
}
template <class T>
inline Pair store_pair(T* p, Pair x, All) {
  return store_pair(p, x);
}
template <class T>
inline Pair keep(Pair x, All, T) {
  return x;
}

// To a result; fp32 copies, which have room for whole pairs, are written by store_pair.
template <bool kStreaming, class T>
inline Pair write(T* p, Pair x, All) {
  return kStreaming ? stream_pair(p, x) : store_pair(p, x);
}
template <bool kStreaming, class T>
inline Pair write(T* p, Pair x, int count) {
  return store_pair(p, x, count);
}

// f(i, count) for every pair of a row.
template <class F>
inline void each(int64_t width, const F& f) {
  int64_t i = 0;
  for (; i + kStep <= width; i += kStep) f(i, All{});
  if (i < width) f(i, static_cast<int>(width - i));
}

// The sum of f(i, count) over a row; in four parts, so that additions need not wait for one another.
template <class F>
inline float total(int64_t width, const F& f) {
  Pair first = set_pair(0), second = set_pair(0);
  int64_t i = 0;
  for (; i + 2 * kStep <= width; i += 2 * kStep) {
    first = first + f(i, All{});
    second = second + f(i + kStep, All{});
  }
  for (; i + kStep <= width; i += kStep) first = first + f(i, All{});
  if (i < width) second = second + f(i, static_cast<int>(width - i));
  return sum(first + second);
}

template <class T>
inline const T* row_of(const Rows& rows, int64_t sample, int64_t row) {
  return static_cast<const T*>(rows.data) + sample * rows.batch_stride + row * rows.row_stride;
}
template <class T>
inline const T* row_of(const Samples& samples, int64_t sample) {
  return static_cast<const T*>(samples.data) + sample * samples.batch_stride;
}

// A copy of a row in fp32, in the order and with the padding of pairs, plus a number.
template <class T>
inline const float* copied(const T* row, float plus, float* copy, int64_t width) {
  const Pair added = set_pair(plus);
  each(width, [&](int64_t i, auto n) TEXTOK_INLINE { store_pair(copy + i, load_pair(row + i, n) + added); });
  return copy;
}

struct Statistics {
  float mean, inverse;  // of the standard deviation
};

// Of a row that was added up; `copy` has whole pairs.
template <class T>
inline Statistics statistics(float total_of_row, const float* copy, int64_t width, float eps) {
  const float mean = total_of_row / static_cast<float>(width);
  const Pair center = set_pair(mean);
  const float squares = total(width, [&](int64_t i, auto n) TEXTOK_INLINE {
    const Pair difference = keep(load_pair(copy + i) - center, n, T{});
    return difference * difference;
  });
  return {mean, 1.0f / square_root(squares / static_cast<float>(width) + eps)};
}

// X is the type of the residual stream, T that of everything else: the same, or float and OrderedBf16.
template <class X, class T, bool kResidual, bool kGate, bool kStreaming>
void forward_rows(const NormForward& a, int64_t begin, int64_t end, float* scratch) {
  const int64_t width = a.width;
  const int64_t stride = scratch_stride(width);
  float* const copy = scratch;             // the row
  float* const factor = scratch + stride;  // offset + scale, of the sample
  float* const shift = scratch + 2 * stride;
  float* const gate = scratch + 3 * stride;
  // In fp32 the row is read again from where it lies already, unless that is past the cache or ends within a pair.
  const bool copies = sizeof(X) < sizeof(float) || (kResidual && kStreaming) || width % kStep != 0;
  int64_t last_sample = -1;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t sample = index / a.rows, row = index - sample * a.rows;
    if (sample != last_sample) {
      copied(row_of<T>(a.scale, sample), a.offset, factor, width);
      copied(row_of<T>(a.shift, sample), 0, shift, width);
      if constexpr (kGate) copied(row_of<T>(a.gate, sample), 0, gate, width);
      last_sample = sample;
    }
    const X* const x = row_of<X>(a.x, sample, row);
    const T* const branch = kResidual ? row_of<T>(a.branch, sample, row) : nullptr;
    X* const residual = kResidual ? static_cast<X*>(a.residual) + index * width : nullptr;
    const float sum_of_row = total(width, [&](int64_t i, auto n) TEXTOK_INLINE {
      Pair r = load_pair(x + i, n);
      if constexpr (kResidual) {
        r = kGate ? fma(load_pair(gate + i), load_pair(branch + i, n), r) : r + load_pair(branch + i, n);
        r = write<kStreaming>(residual + i, r, n);  // rounded, as the backward pass will read it
      }
      if (copies) store_pair(copy + i, r);
      return r;
    });
    const float* values = copy;
    if constexpr (sizeof(X) == sizeof(float)) {
      if (!copies) values = kResidual ? residual : x;
    }
    const Statistics s = statistics<X>(sum_of_row, values, width, a.eps);
    const Pair mean = set_pair(s.mean), inverse = set_pair(s.inverse);
    T* const out = static_cast<T*>(a.out) + index * width;
    each(width, [&](int64_t i, auto n) TEXTOK_INLINE {
      const Pair normalized = (load_pair(values + i) - mean) * inverse;
      write<kStreaming>(out + i, fma(normalized, load_pair(factor + i), load_pair(shift + i)), n);
    });
  }
  if constexpr (kStreaming) stream_done();
}

template <class X, class T>
void forward(const NormForward& a, int64_t begin, int64_t end, float* scratch) {
  const bool residual = a.branch.data != nullptr, gate = a.gate.data != nullptr;
  if (a.streaming) {
    (!residual ? forward_rows<X, T, false, false, true>
     : gate    ? forward_rows<X, T, true, true, true>
               : forward_rows<X, T, true, false, true>)(a, begin, end, scratch);
  } else {
    (!residual ? forward_rows<X, T, false, false, false>
     : gate    ? forward_rows<X, T, true, true, false>
               : forward_rows<X, T, true, false, false>)(a, begin, end, scratch);
  }
}

// With y the normalized row, g = grad * (offset + scale) and means over the row:
//   d/dr = (g - mean(g) - y mean(g y)) / std + grad_residual;  dx = d/dr, dbranch = gate d/dr
template <class X, class T, bool kResidual, bool kGate, bool kStreaming>
void backward_chunks(const NormBackward& a, int64_t begin, int64_t end, float* scratch) {
  const int64_t width = a.width;
  const int64_t stride = scratch_stride(width);
  float* const normalized = scratch;
  float* const scaled = scratch + stride;  // grad * (offset + scale)
  float* const factor = scratch + 2 * stride;
  float* const gate = scratch + 3 * stride;
  int64_t last_sample = -1;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t sample = index / a.chunks;
    if (sample != last_sample) {
      copied(row_of<T>(a.scale, sample), a.offset, factor, width);
      if constexpr (kGate) copied(row_of<T>(a.gate, sample), 0, gate, width);
      last_sample = sample;
    }
    float* const dshift = a.dshift + index * stride;
    float* const dscale = a.dscale + index * stride;
    float* const dgate = kGate ? a.dgate + index * stride : nullptr;
    for (int64_t i = 0; i < stride; ++i) {
      dshift[i] = dscale[i] = 0;
      if constexpr (kGate) dgate[i] = 0;
    }
    const int64_t first_row = (index - sample * a.chunks) * a.chunk_rows;
    const int64_t last_row = first_row + a.chunk_rows < a.rows ? first_row + a.chunk_rows : a.rows;
    for (int64_t row = first_row; row < last_row; ++row) {
      const X* const r = row_of<X>(a.residual, sample, row);
      const float sum_of_row =
          total(width, [&](int64_t i, auto n) TEXTOK_INLINE { return store_pair(normalized + i, load_pair(r + i, n)); });
      const Statistics s = statistics<X>(sum_of_row, normalized, width, a.eps);
      const Pair mean = set_pair(s.mean), inverse = set_pair(s.inverse);
      const T* const grad = row_of<T>(a.grad, sample, row);
      Pair products = set_pair(0);
      const float sum_of_scaled = total(width, [&](int64_t i, auto n) TEXTOK_INLINE {
        const Pair y = store_pair(normalized + i, keep((load_pair(normalized + i) - mean) * inverse, n, X{}));
        const Pair g = load_pair(grad + i, n);
        const Pair gs = store_pair(scaled + i, g * load_pair(factor + i));
        store_pair(dshift + i, load_pair(dshift + i) + g);
        store_pair(dscale + i, fma(g, y, load_pair(dscale + i)));
        products = fma(gs, y, products);
        return gs;
      });
      const float numbers = static_cast<float>(width);
      const Pair mean_scaled = set_pair(sum_of_scaled / numbers), mean_product = set_pair(sum(products) / numbers);
      const int64_t at = (sample * a.rows + row) * width;
      X* const dx = static_cast<X*>(a.dx) + at;
      T* const dbranch = kGate ? static_cast<T*>(a.dbranch) + at : nullptr;
      const X* const grad_residual = kResidual ? row_of<X>(a.grad_residual, sample, row) : nullptr;
      const T* const branch = kGate ? row_of<T>(a.branch, sample, row) : nullptr;
      each(width, [&](int64_t i, auto n) TEXTOK_INLINE {
        Pair d = (load_pair(scaled + i) - mean_scaled - load_pair(normalized + i) * mean_product) * inverse;
        if constexpr (kResidual) d = d + load_pair(grad_residual + i, n);
        write<kStreaming>(dx + i, d, n);
        if constexpr (kGate) {
          write<kStreaming>(dbranch + i, load_pair(gate + i) * d, n);
          store_pair(dgate + i, fma(d, load_pair(branch + i, n), load_pair(dgate + i)));
        }
      });
    }
  }
  if constexpr (kStreaming) stream_done();
}

template <class X, class T>
void backward(const NormBackward& a, int64_t begin, int64_t end, float* scratch) {
  const bool residual = a.grad_residual.data != nullptr, gate = a.gate.data != nullptr;
  if (a.streaming) {
    (!residual ? backward_chunks<X, T, false, false, true>
     : gate    ? backward_chunks<X, T, true, true, true>
               : backward_chunks<X, T, true, false, true>)(a, begin, end, scratch);
  } else {
    (!residual ? backward_chunks<X, T, false, false, false>
     : gate    ? backward_chunks<X, T, true, true, false>
               : backward_chunks<X, T, true, false, false>)(a, begin, end, scratch);
  }
}

template <class T>
void reduce(const float* partial, void* out, int64_t chunks, int64_t width, int64_t begin, int64_t end) {
  const int64_t stride = scratch_stride(width);
  for (int64_t sample = begin; sample < end; ++sample) {
    const float* first = partial + sample * chunks * stride;
    T* const result = static_cast<T*>(out) + sample * width;
    each(width, [&](int64_t i, auto n) TEXTOK_INLINE {
      Pair sums = set_pair(0);
      for (int64_t chunk = 0; chunk < chunks; ++chunk) sums = sums + load_pair(first + chunk * stride + i);
      write<false>(result + i, sums, n);
    });
  }
}

}  // namespace

const NormKernels TEXTOK_TABLE(norm) = {
    {&forward<float, float>, &backward<float, float>, &reduce<float>},
    {&forward<bf16, bf16>, &backward<bf16, bf16>, &reduce<bf16>},
    {&forward<float, OrderedBf16>, &backward<float, OrderedBf16>, &reduce<OrderedBf16>},
};

}  // namespace textok_fast
