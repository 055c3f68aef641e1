// The mathematics of one softmax row, written once for host and device: what the CPU tests check against float64 is what
// a CUDA kernel runs. No torch, no headers beyond <cmath>.
//
//   z_j logits, p_j = exp(z_j - lse), lse = log sum_j exp(z_j)
//   log-probability of word t:  z_t - lse                     <= 0
//   entropy:                    -sum_j p_j log p_j = lse - sum_j p_j z_j   >= 0
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define MMRPT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MMRPT_HOST_DEVICE inline
#endif

namespace mmrpt {

// What one pass over (part of) a row leaves behind. Parts merge in any grouping, so threads, warps and vocabulary chunks
// combine with the same function.
struct RowSums {
  float max;       // m = max_j z_j; -inf for a part without finite logits
  float sum;       // sum_j exp(z_j - m)
  float weighted;  // sum_j (z_j - m) exp(z_j - m)  <= 0
};

MMRPT_HOST_DEVICE RowSums empty_sums() { return RowSums{-INFINITY, 0.0f, 0.0f}; }

// Moves the sums from their own maximum to a larger one: with d = m_old - m_new <= 0,
//   sum' = e^d sum,   weighted' = e^d (weighted + d sum).
MMRPT_HOST_DEVICE RowSums rescale(RowSums part, float max) {
  if (part.sum == 0.0f) return RowSums{max, 0.0f, 0.0f};  // -inf - -inf would be NaN
  const float shift = part.max - max;
  const float scale = expf(shift);
  return RowSums{max, scale * part.sum, scale * (part.weighted + shift * part.sum)};
}

MMRPT_HOST_DEVICE RowSums merge(RowSums a, RowSums b) {
  const float max = fmaxf(a.max, b.max);
  const RowSums left = rescale(a, max), right = rescale(b, max);
  return RowSums{max, left.sum + right.sum, left.weighted + right.weighted};
}

// One more logit. A logit of -inf (a word that is ruled out) has probability 0 and adds nothing.
MMRPT_HOST_DEVICE RowSums push(RowSums sums, float logit) {
  return logit == -INFINITY ? sums : merge(sums, RowSums{logit, 1.0f, 0.0f});
}

MMRPT_HOST_DEVICE float log_sum_exp(RowSums sums) { return sums.max + logf(sums.sum); }

// Rounding must not make a log-probability positive or an entropy negative; NaN passes through.
MMRPT_HOST_DEVICE float at_most_zero(float x) { return x > 0.0f ? 0.0f : x; }
MMRPT_HOST_DEVICE float at_least_zero(float x) { return x < 0.0f ? 0.0f : x; }

// z_t - lse, taken from the maximum so that large logits do not cancel: (z_t - m) - log sum.
MMRPT_HOST_DEVICE float log_probability(RowSums sums, float target_logit) {
  return at_most_zero((target_logit - sums.max) - logf(sums.sum));
}

MMRPT_HOST_DEVICE float entropy(RowSums sums) { return at_least_zero(logf(sums.sum) - sums.weighted / sums.sum); }

// d loss / d z_j from two coefficients a row: g = d loss / d log p_t and e = d loss / d entropy,
//   d log p_t / d z_j = [j = t] - p_j,   d entropy / d z_j = -p_j (log p_j + entropy).
// Kernels need to know nothing else of any loss.
MMRPT_HOST_DEVICE float logit_gradient(RowSums sums, float row_entropy, float logit, bool is_target, float g, float e) {
  const float logp = (logit - sums.max) - logf(sums.sum);
  const float p = expf(logp);
  const float through_entropy = p > 0.0f ? e * p * (logp + row_entropy) : 0.0f;  // p log p -> 0
  return g * ((is_target ? 1.0f : 0.0f) - p) - through_entropy;
}

}  // namespace mmrpt
