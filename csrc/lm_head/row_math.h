// The mathematics of one softmax row, once for host and device: what the CPU tests check against float64 is what a CUDA
// kernel runs. The protocol, with its equations, is mmrpt_kernels/lm_head/row_softmax.py.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define MMRPT_DEVICE __device__ __forceinline__
#define MMRPT_UNROLL _Pragma("unroll")
#else  // the host build
#define MMRPT_DEVICE inline
#define MMRPT_UNROLL
#endif

namespace mmrpt {

// A word this far below its row's maximum has probability exactly 0; clamping there avoids 0 * -inf.
constexpr float kFarBelow = -1e4f;

// Between raw logits (bias included) and softmax: z = outer * softcap(raw), softcap(raw) = tanh(inner * raw) or raw.
struct Head {
  float inner, outer;
  float slope;  // d z / d raw where tanh is flat
  bool capped;
};

template <bool kCapped>
MMRPT_DEVICE float softcap(float raw, const Head& head) {
  return kCapped ? tanhf(head.inner * raw) : raw;
}

// Sums over (part of) a row relative to its own maximum. Parts merge in any grouping.
struct RunningSums {
  float top = -INFINITY;  // max_j z_j; -inf for a part without a word above -inf
  float total = 0.0f;     // sum_j exp(z_j - top)
  float dots = 0.0f;      // sum_j (z_j - top) exp(z_j - top)  <= 0; 0 where the entropy is not wanted
};

// The same sums relative to a larger maximum: with d = old top - new top <= 0,
//   total' = e^d total,   dots' = e^d (dots + d total).
MMRPT_DEVICE RunningSums rescale(RunningSums part, float top) {
  if (part.total == 0.0f) return RunningSums{top, 0.0f, 0.0f};  // -inf - -inf would be NaN
  const float shift = part.top - top;
  const float scale = expf(shift);
  return RunningSums{top, scale * part.total, scale * (part.dots + shift * part.total)};
}

MMRPT_DEVICE RunningSums merge(RunningSums a, RunningSums b) {
  const float top = fmaxf(a.top, b.top);
  const RunningSums left = rescale(a, top), right = rescale(b, top);
  return RunningSums{top, left.total + right.total, left.dots + right.dots};
}

// Sums over (part of) a row's words but its target, relative to a base that is known before.
struct BasedSums {
  float top = -INFINITY;  // max_j z_j
  float total = 0.0f;     // sum_j exp(z_j - base)
  float dots = 0.0f;      // sum_j (z_j - base) exp(z_j - base); 0 where the entropy is not wanted
};

MMRPT_DEVICE BasedSums merge(BasedSums a, BasedSums b) {
  return BasedSums{fmaxf(a.top, b.top), a.total + b.total, a.dots + b.dots};
}

// Sum as a tree, so that rounding grows with log N.
template <int N>
MMRPT_DEVICE float tree_sum(const float* x) {
  if constexpr (N == 1) {
    return x[0];
  } else {
    return tree_sum<N / 2>(x) + tree_sum<N - N / 2>(x + N / 2);
  }
}

// Exponentials of N words relative to `base`; a word of -inf (ruled out, or filling) adds nothing. max_j z_j is no part.
template <bool kDots, int N>
MMRPT_DEVICE BasedSums sum_exponentials(const float (&z)[N], float base, float (&exps)[N]) {
  float dots[N];
MMRPT_UNROLL
  for (int k = 0; k < N; ++k) {
    const float shift = z[k] - base;
    exps[k] = expf(shift);
    dots[k] = kDots ? exps[k] * fmaxf(shift, kFarBelow) : 0.0f;
  }
  return BasedSums{-INFINITY, tree_sum<N>(exps), kDots ? tree_sum<N>(dots) : 0.0f};
}

template <int N>
MMRPT_DEVICE float max_of(float top, const float (&z)[N]) {
MMRPT_UNROLL
  for (int k = 0; k < N; ++k) top = fmaxf(top, z[k]);
  return top;
}

// N more words: one exponential each, and one for the sums so far where the maximum moves. NaN makes total NaN.
template <bool kDots, int N>
MMRPT_DEVICE RunningSums push(RunningSums sums, const float (&z)[N]) {
  const float top = max_of(sums.top, z);
  if (top > sums.top) sums = rescale(sums, top);
  float exps[N];
  const BasedSums more = sum_exponentials<kDots>(z, top == -INFINITY ? 0.0f : top, exps);
  return RunningSums{top, sums.total + more.total, sums.dots + more.dots};
}

// What the words of a row share in its gradient, from g = d loss / d log p_t and e = d loss / d entropy:
//   d raw_j = exp(z_j - top) (factor * (z_j - top) + offset) + [j = t] at_target,  times 1 - tanh^2 under a soft cap.
struct RowGradient {
  float top, factor, offset, at_target;
};

MMRPT_DEVICE RowGradient row_gradient(float top, float total, float entropy, float g, float e, const Head& head) {
  const float scale = head.slope / total;
  const float through_entropy = e == 0.0f ? 0.0f : e * (logf(total) - entropy);
  return RowGradient{top, -e * scale, (through_entropy - g) * scale, g * head.slope};
}

template <bool kEntropy, bool kCapped>
MMRPT_DEVICE float word_gradient(const RowGradient& row, float raw, bool is_target, const Head& head) {
  const float capped = softcap<kCapped>(raw, head);
  const float shift = head.outer * capped - row.top;
  const float weight = kEntropy ? row.factor * fmaxf(shift, kFarBelow) + row.offset : row.offset;
  const float gradient = expf(shift) * weight + (is_target ? row.at_target : 0.0f);
  return kCapped ? gradient * (1.0f - capped * capped) : gradient;
}

}  // namespace mmrpt
