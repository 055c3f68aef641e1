// The mathematics of one softmax row, written once for host and device: what the CPU tests check against float64 is what
// a CUDA kernel runs. No torch, no headers beyond <cmath>.
//
//   z_j = softcap(logit_scale * raw_j) / temperature,  p_j = exp(z_j - lse),  lse = log sum_j exp(z_j)
//   log p_t = (z_t - top) - log total,   entropy = log total - dots / total      (top, total, dots: RowSums)
// The two divisions and logarithms at the end of a row are the caller's: sums of several parts of a vocabulary merge first.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define MMRPT_HOST_DEVICE __host__ __device__ __forceinline__
#define MMRPT_UNROLL _Pragma("unroll")
#else
#define MMRPT_HOST_DEVICE inline
#define MMRPT_UNROLL
#endif

namespace mmrpt {

// A word this far below its row's maximum has probability exactly 0; clamping there keeps 0 * -inf out.
constexpr float kFarBelow = -1e4f;

// What happens between raw logits and softmax, in the order of mmrpt_kernels/common/head.py.
struct Head {
  float inner, outer;  // z = outer * tanh(inner * raw) with a soft cap, else outer * raw
  float slope;         // d z / d raw, at tanh = 0 with a soft cap
  bool capped;
};

inline Head make_head(double temperature, double softcap, double logit_scale) {
  const float slope = static_cast<float>(logit_scale / temperature);
  if (!(softcap > 0.0)) return Head{1.0f, slope, slope, false};
  return Head{static_cast<float>(logit_scale / softcap), static_cast<float>(softcap / temperature), slope, true};
}

// What one pass over (part of) a row leaves behind. Parts merge in any grouping, so threads, warps, chunks of the
// vocabulary and ranks combine with the same function.
struct RowSums {
  float top;    // max_j z_j; -inf for a part without a word above -inf
  float total;  // sum_j exp(z_j - top)
  float dots;   // sum_j (z_j - top) exp(z_j - top)  <= 0; 0 where the entropy is not wanted
};

MMRPT_HOST_DEVICE RowSums empty_sums() { return RowSums{-INFINITY, 0.0f, 0.0f}; }

// Moves the sums from their own maximum to a larger one: with d = top_old - top_new <= 0,
//   total' = e^d total,   dots' = e^d (dots + d total).
MMRPT_HOST_DEVICE RowSums rescale(RowSums part, float top) {
  if (part.total == 0.0f) return RowSums{top, 0.0f, 0.0f};  // -inf - -inf would be NaN
  const float shift = part.top - top;
  const float scale = expf(shift);
  return RowSums{top, scale * part.total, scale * (part.dots + shift * part.total)};
}

MMRPT_HOST_DEVICE RowSums merge(RowSums a, RowSums b) {
  const float top = fmaxf(a.top, b.top);
  const RowSums left = rescale(a, top), right = rescale(b, top);
  return RowSums{top, left.total + right.total, left.dots + right.dots};
}

// Sum as a tree, so that rounding grows with log N.
template <int N>
MMRPT_HOST_DEVICE float tree_sum(const float* x) {
  if constexpr (N == 1) {
    return x[0];
  } else {
    return tree_sum<N / 2>(x) + tree_sum<N - N / 2>(x + N / 2);
  }
}

// N more logits: one exponential each, and one for the sums so far where the maximum moves. A logit of
// -inf (a word that is ruled out, or filling) has probability 0 and counts nothing. NaN makes total NaN, whatever top is.
template <bool kDots, int N>
MMRPT_HOST_DEVICE RowSums push(RowSums sums, const float (&z)[N]) {
  float top = sums.top;
MMRPT_UNROLL
  for (int k = 0; k < N; ++k) top = fmaxf(top, z[k]);
  if (top > sums.top) sums = rescale(sums, top);
  const float base = top == -INFINITY ? 0.0f : top;
  float exps[N], dots[N];
MMRPT_UNROLL
  for (int k = 0; k < N; ++k) {
    const float shift = z[k] - base;
    exps[k] = expf(shift);
    dots[k] = kDots ? exps[k] * fmaxf(shift, kFarBelow) : 0.0f;
  }
  if (kDots) sums.dots += tree_sum<N>(dots);
  sums.total += tree_sum<N>(exps);
  return sums;
}

// z, or tanh(inner * raw), of which z is `outer` times: the gradient needs the latter.
template <bool kCapped>
MMRPT_HOST_DEVICE float bend(float raw, const Head& head) {
  return kCapped ? tanhf(head.inner * raw) : raw;
}

// d loss / d raw_j from two coefficients a row: g = d loss / d log p_t and e = d loss / d entropy,
//   d log p_t / d z_j = [j = t] - p_j,   d entropy / d z_j = -p_j (log p_j + entropy).
// Kernels need to know nothing else of any loss. What a row's words share, with d z / d raw multiplied in:
//   d raw_j = exp(z_j - top) (slope * (z_j - top) + offset) + [j = t] chosen,  times 1 - tanh^2 under a soft cap.
struct RowGradient {
  float top, slope, offset, chosen;
  bool idle;  // both coefficients are 0: exact zeros, whatever the logits are
};

MMRPT_HOST_DEVICE RowGradient row_gradient(float top, float total, float entropy, float g, float e, const Head& head) {
  const float scale = head.slope / total;
  const float through_entropy = e == 0.0f ? 0.0f : e * (logf(total) - entropy);
  return RowGradient{top, -e * scale, (through_entropy - g) * scale, g * head.slope, g == 0.0f && e == 0.0f};
}

template <bool kEntropy, bool kCapped>
MMRPT_HOST_DEVICE float word_gradient(const RowGradient& row, float raw, bool is_target, const Head& head) {
  const float bent = bend<kCapped>(raw, head);
  const float shift = head.outer * bent - row.top;
  const float weight = kEntropy ? row.slope * fmaxf(shift, kFarBelow) + row.offset : row.offset;
  const float gradient = expf(shift) * weight + (is_target ? row.chosen : 0.0f);
  return kCapped ? gradient * (1.0f - bent * bent) : gradient;
}

// The other way to the same gradient, for losses of log-probabilities alone: relative to a base that is known before the
// sweep, a word's exponential is its gradient already, up to one factor a row that the loss decides later.
//   d log p_t / d raw_j = -slope / whole * matrix_j,   whole = exp(z_t - base) + total,
//   matrix_j = exp(z_j - base) (1 - tanh^2) for j != t,   matrix_t = -total (1 - tanh^2)
// Sums over (part of) a row's words but its target.
struct BasedSums {
  float top;    // max_j z_j
  float total;  // sum_j exp(z_j - base)
  float dots;   // sum_j (z_j - base) exp(z_j - base); 0 where the entropy is not wanted
};

MMRPT_HOST_DEVICE BasedSums empty_based_sums() { return BasedSums{-INFINITY, 0.0f, 0.0f}; }

MMRPT_HOST_DEVICE BasedSums merge(BasedSums a, BasedSums b) {
  return BasedSums{fmaxf(a.top, b.top), a.total + b.total, a.dots + b.dots};
}

// The target of a row: its z is the base as long as no word lies more than `most` above it.
struct Target {
  int column;   // -1 where it is no word: z is NaN then, and so is the row
  float z;
  float slope;  // 1 - tanh^2
};

template <bool kCapped>
MMRPT_HOST_DEVICE Target target_of(const float* row, int vocab, long long column, const Head& head) {
  if (column < 0 || column >= vocab) return Target{-1, NAN, 0.0f};
  const float bent = bend<kCapped>(row[column], head);
  return Target{static_cast<int>(column), head.outer * bent, kCapped ? 1.0f - bent * bent : 1.0f};
}

MMRPT_HOST_DEVICE bool too_far_above(float top, float base, float most) { return top - base > most; }

// N neighbours of a row become their words of the matrix, `chosen` (if among them) 0. `counts`: whether they are there.
template <bool kDots, bool kCapped, int N>
MMRPT_HOST_DEVICE BasedSums exponentials(const float (&raw)[N], float base, int chosen, bool counts, const Head& head,
                                         float (&matrix)[N]) {
  float exps[N], dots[N], top = -INFINITY;
MMRPT_UNROLL
  for (int i = 0; i < N; ++i) {
    const float bent = bend<kCapped>(raw[i], head);
    const float z = counts && i != chosen ? head.outer * bent : -INFINITY;
    const float shift = z - base;
    top = fmaxf(top, z);
    exps[i] = expf(shift);
    dots[i] = kDots ? exps[i] * fmaxf(shift, kFarBelow) : 0.0f;
    matrix[i] = kCapped ? exps[i] * (1.0f - bent * bent) : exps[i];
  }
  return BasedSums{top, tree_sum<N>(exps), kDots ? tree_sum<N>(dots) : 0.0f};
}

}  // namespace mmrpt
