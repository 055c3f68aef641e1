// The three row kernels of the lm head's loss: what a call is, and what a block of lanes (threads) does for its row. The
// host build runs the same lanes one after another, index arithmetic and order of sums included.
#pragma once

#include <cstdint>

#include "lm_head/half.h"
#include "lm_head/row_math.h"

namespace mmrpt {

enum class Kernel { kExponentials, kStatistics, kGradient };
enum class Element { kFloat32, kBfloat16, kFloat16 };

// One call of a kernel, on all rows.
struct Call {
  Kernel kernel;
  Element element;              // of out; exponentials have no float16
  const float* logits;          // (rows, vocab), `stride` floats from row to row, at any alignment of a float
  const float* bias;            // (vocab,), or null
  const std::int64_t* targets;  // (rows,); outside [0, vocab): another part of the vocabulary holds the target
  // exponentials write (3, rows): shift, rest, dots; statistics (4, rows): top, total, dots, chosen; the gradient reads
  // (3, rows): top, total, d_logps, and with an entropy (5, rows): entropy, d_entropy.
  float* numbers;
  void* out;  // (rows, vocab), `out_stride` elements from row to row; may be the logits themselves
  std::int64_t rows, stride, out_stride;
  int vocab;
  bool entropy;            // wanted, or with a gradient
  float max_above_target;  // how far a word may be above the target's z if that is to be the base
  Head head;
};

void run_on_host(const Call& call);
// On `stream` of `device`; gives the runtime's error, or null. Only in a build with CUDA sources.
const char* run_on_device(const Call& call, int device, void* stream);

// A block has a row: 512 threads with four 16-byte loads in flight each cover the memory's latency. A cluster per row
// would help calls of a few rows only, and those wait for the matrix product's read of the whole weight anyway.
constexpr int kLanes = 512;
constexpr int kVector = 4;  // neighbouring words of a lane: a 16-byte load of floats
constexpr int kFlight = 4;  // vectors in flight
constexpr int kJump = kLanes * kVector;  // from one vector of a lane to its next

template <typename T>
struct alignas(sizeof(T) * kVector) Vector {
  T x[kVector];
};

template <typename T>
MMRPT_DEVICE bool aligned(const T* row) {
  return reinterpret_cast<std::uintptr_t>(row) % sizeof(Vector<T>) == 0;
}

// Which lane has a word depends on its column alone, so that a row's sums are the same at every address: rows that do
// not begin at a 16-byte boundary (where the vocabulary is no multiple of 4) are read word by word.
MMRPT_DEVICE Vector<float> load(const float* row, int column, int vocab, bool is_aligned) {
  if (is_aligned && column + kVector <= vocab) return *reinterpret_cast<const Vector<float>*>(row + column);
  Vector<float> words{};
MMRPT_UNROLL
  for (int i = 0; i < kVector; ++i)
    if (column + i < vocab) words.x[i] = row[column + i];
  return words;
}

template <typename T>
MMRPT_DEVICE void store(const float (&words)[kVector], T* row, int column, int vocab, bool is_aligned) {
  Vector<T> rounded;
MMRPT_UNROLL
  for (int i = 0; i < kVector; ++i) narrow(words[i], rounded.x[i]);
  if (is_aligned && column + kVector <= vocab) {
    *reinterpret_cast<Vector<T>*>(row + column) = rounded;
    return;
  }
MMRPT_UNROLL
  for (int i = 0; i < kVector; ++i)
    if (column + i < vocab) row[column + i] = rounded.x[i];
}

// A lane's share of row i, kFlight vectors a step, all of them loaded before the first is used: use(column of the first,
// raw logits with their bias; 0 beyond the vocabulary). A lane writes its own words alone, so out may be the logits.
template <typename Use>
MMRPT_DEVICE void for_each_step(const Call& call, std::int64_t i, int lane, Use use) {
  const float* row = call.logits + i * call.stride;
  const bool row_aligned = aligned(row), bias_aligned = aligned(call.bias);
  for (int first = lane * kVector; first < call.vocab; first += kFlight * kJump) {
    Vector<float> raw[kFlight];
MMRPT_UNROLL
    for (int k = 0; k < kFlight; ++k) raw[k] = load(row, first + k * kJump, call.vocab, row_aligned);
    if (call.bias != nullptr) {
MMRPT_UNROLL
      for (int k = 0; k < kFlight; ++k) {
        const Vector<float> bias = load(call.bias, first + k * kJump, call.vocab, bias_aligned);
MMRPT_UNROLL
        for (int j = 0; j < kVector; ++j) raw[k].x[j] += bias.x[j];
      }
    }
    use(first, raw);
  }
}

// The target's column, or -1 where it is no word of this vocabulary.
MMRPT_DEVICE int target_of(const Call& call, std::int64_t i) {
  const std::int64_t target = call.targets[i];
  return target >= 0 && target < call.vocab ? static_cast<int>(target) : -1;
}

MMRPT_DEVICE float raw_at(const Call& call, std::int64_t i, int column) {
  const float raw = call.logits[i * call.stride + column];
  return call.bias == nullptr ? raw : raw + call.bias[column];
}

template <typename T>
MMRPT_DEVICE void write_zeros(T* row, int vocab, int lane) {
  const float zeros[kVector] = {};
  for (int column = lane * kVector; column < vocab; column += kJump) store(zeros, row, column, vocab, aligned(row));
}

// `Block` is a block of threads, or the host in their place:
//   block.merged(of_lane)    what of_lane(lane) gives, merged over all lanes in one fixed order, and known to all
//   block.for_each_lane(run)  run(lane), after all that lanes wrote in `merged`

template <bool kDots, bool kCapped, typename Block>
MMRPT_DEVICE void statistics_of_row(const Call& call, std::int64_t i, const Block& block) {
  const RunningSums sums = block.merged([&](int lane) {
    RunningSums sums;
    for_each_step(call, i, lane, [&](int first, const Vector<float>(&raw)[kFlight]) {
      float z[kFlight * kVector];
MMRPT_UNROLL
      for (int k = 0; k < kFlight * kVector; ++k) {
        const bool is_word = first + k / kVector * kJump + k % kVector < call.vocab;
        z[k] = is_word ? call.head.outer * softcap<kCapped>(raw[k / kVector].x[k % kVector], call.head) : -INFINITY;
      }
      sums = push<kDots>(sums, z);
    });
    return sums;
  });
  block.for_each_lane([&](int lane) {
    if (lane != 0) return;
    const int target = target_of(call, i);
    call.numbers[i] = sums.top;
    call.numbers[call.rows + i] = sums.total;
    call.numbers[2 * call.rows + i] = kDots ? sums.dots : 0.0f;  // merging makes dots of nothing but shifts
    call.numbers[3 * call.rows + i] =
        target < 0 ? -INFINITY : call.head.outer * softcap<kCapped>(raw_at(call, i, target), call.head);
  });
}

// max z over a lane's share of a row.
template <bool kCapped>
MMRPT_DEVICE BasedSums lane_max(const Call& call, std::int64_t i, int lane) {
  BasedSums sums;
  for_each_step(call, i, lane, [&](int first, const Vector<float>(&raw)[kFlight]) {
MMRPT_UNROLL
    for (int k = 0; k < kFlight * kVector; ++k)
      if (first + k / kVector * kJump + k % kVector < call.vocab)
        sums.top = fmaxf(sums.top, call.head.outer * softcap<kCapped>(raw[k / kVector].x[k % kVector], call.head));
  });
  return sums;
}

// A lane's share of a row's exponentials, written to `out`, with 0 for the target.
template <typename T, bool kDots, bool kCapped>
MMRPT_DEVICE BasedSums lane_exponentials(const Call& call, std::int64_t i, T* out, int target, float base, int lane) {
  BasedSums sums;
  const bool out_aligned = aligned(out);
  for_each_step(call, i, lane, [&](int first, const Vector<float>(&raw)[kFlight]) {
    BasedSums parts[kFlight];
MMRPT_UNROLL
    for (int k = 0; k < kFlight; ++k) {
      const int column = first + k * kJump;
      float capped[kVector], z[kVector], exps[kVector];
MMRPT_UNROLL
      for (int j = 0; j < kVector; ++j) {
        capped[j] = softcap<kCapped>(raw[k].x[j], call.head);
        z[j] = column + j < call.vocab && column + j != target ? call.head.outer * capped[j] : -INFINITY;
      }
      parts[k] = sum_exponentials<kDots>(z, base, exps);
      parts[k].top = max_of(-INFINITY, z);
      if (kCapped) {
MMRPT_UNROLL
        for (int j = 0; j < kVector; ++j) exps[j] *= 1.0f - capped[j] * capped[j];
      }
      store(exps, out, column, call.vocab, out_aligned);
    }
    static_assert(kFlight == 4, "a tree of four");
    sums = merge(sums, merge(merge(parts[0], parts[1]), merge(parts[2], parts[3])));
  });
  return sums;
}

template <typename T, bool kDots, bool kCapped, typename Block>
MMRPT_DEVICE void exponentials_of_row(const Call& call, std::int64_t i, const Block& block) {
  T* out = static_cast<T*>(call.out) + i * call.out_stride;
  const int target = target_of(call, i);  // an id that is no word makes a broken row
  const float target_capped = target < 0 ? NAN : softcap<kCapped>(raw_at(call, i, target), call.head);
  const float target_z = call.head.outer * target_capped;
  float base = target_z;
  if (call.out == call.logits) {  // nothing could be read again: look first. All lanes have read the target by then
    const float top = block.merged([&](int lane) { return lane_max<kCapped>(call, i, lane); }).top;
    if (top - base > call.max_above_target) base = top;
  }
  BasedSums sums;
  while (true) {  // twice at most: then base is top
    sums = block.merged([&](int lane) {
      return lane_exponentials<T, kDots, kCapped>(call, i, out, target, base, lane);
    });
    if (!(sums.top - base > call.max_above_target)) break;
    base = sums.top;
  }
  block.for_each_lane([&](int lane) {
    const bool broken = !(sums.total < INFINITY);
    if (broken) write_zeros(out, call.vocab, lane);
    if (lane != 0) return;
    call.numbers[i] = target_z - base;
    call.numbers[call.rows + i] = sums.total;
    call.numbers[2 * call.rows + i] = sums.dots;
    if (!broken) narrow(-sums.total * (kCapped ? 1.0f - target_capped * target_capped : 1.0f), out[target]);
  });
}

template <typename T, bool kEntropy, bool kCapped, typename Block>
MMRPT_DEVICE void gradient_of_row(const Call& call, std::int64_t i, const Block& block) {
  T* out = static_cast<T*>(call.out) + i * call.out_stride;
  const auto number = [&](int k) { return call.numbers[k * call.rows + i]; };
  const float d_logp = number(2), entropy = kEntropy ? number(3) : 0.0f, d_entropy = kEntropy ? number(4) : 0.0f;
  const RowGradient row = row_gradient(number(0), number(1), entropy, d_logp, d_entropy, call.head);
  const int target = target_of(call, i);
  const bool out_aligned = aligned(out);
  block.for_each_lane([&](int lane) {
    // Exactly zero, whatever the logits are; they are not even read.
    if (d_logp == 0.0f && d_entropy == 0.0f) return write_zeros(out, call.vocab, lane);
    for_each_step(call, i, lane, [&](int first, const Vector<float>(&raw)[kFlight]) {
MMRPT_UNROLL
      for (int k = 0; k < kFlight; ++k) {
        const int column = first + k * kJump;
        float words[kVector];
MMRPT_UNROLL
        for (int j = 0; j < kVector; ++j)
          words[j] = word_gradient<kEntropy, kCapped>(row, raw[k].x[j], column + j == target, call.head);
        store(words, out, column, call.vocab, out_aligned);
      }
    });
  });
}

// A kernel for what is known when it is compiled.
template <Kernel kKernel, typename T, bool kEntropy, bool kCapped>
struct Variant {
  template <typename Block>
  static MMRPT_DEVICE void row(const Call& call, std::int64_t i, const Block& block) {
    if constexpr (kKernel == Kernel::kExponentials) exponentials_of_row<T, kEntropy, kCapped>(call, i, block);
    if constexpr (kKernel == Kernel::kStatistics) statistics_of_row<kEntropy, kCapped>(call, i, block);
    if constexpr (kKernel == Kernel::kGradient) gradient_of_row<T, kEntropy, kCapped>(call, i, block);
  }
};

template <Kernel kKernel, typename T, typename Run>
void with_switches(const Call& call, Run run) {
  if (call.entropy && call.head.capped) run(Variant<kKernel, T, true, true>{});
  if (call.entropy && !call.head.capped) run(Variant<kKernel, T, true, false>{});
  if (!call.entropy && call.head.capped) run(Variant<kKernel, T, false, true>{});
  if (!call.entropy && !call.head.capped) run(Variant<kKernel, T, false, false>{});
}

// run(the call's variant).
template <typename Run>
void with_variant(const Call& call, Run run) {
  const auto is = [&](Kernel kernel, Element element) { return call.kernel == kernel && call.element == element; };
  if (call.kernel == Kernel::kStatistics) with_switches<Kernel::kStatistics, float>(call, run);
  if (is(Kernel::kExponentials, Element::kFloat32)) with_switches<Kernel::kExponentials, float>(call, run);
  if (is(Kernel::kExponentials, Element::kBfloat16)) with_switches<Kernel::kExponentials, Bfloat16>(call, run);
  if (is(Kernel::kGradient, Element::kFloat32)) with_switches<Kernel::kGradient, float>(call, run);
  if (is(Kernel::kGradient, Element::kBfloat16)) with_switches<Kernel::kGradient, Bfloat16>(call, run);
  if (is(Kernel::kGradient, Element::kFloat16)) with_switches<Kernel::kGradient, Float16>(call, run);
}

}  // namespace mmrpt
