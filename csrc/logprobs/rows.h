// The three row kernels of the lm head's loss: what a call is, and what one lane (a thread of a block) does for its row.
// The host build runs the same lanes one after another, index arithmetic included.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/half.h"
#include "common/row_math.h"

namespace mmrpt {

// Statistics of rows of logits.
struct PartialsCall {
  const float* logits;          // (rows, vocab), `stride` floats from row to row, at any alignment of a float
  const std::int64_t* targets;  // (rows,); outside [0, vocab): another part of the vocabulary holds the target
  float* out;                   // (4, rows): top, total, dots (0 unless want_dots), chosen (-inf where not held)
  std::int64_t rows, stride;
  int vocab;
  bool want_dots;
  Head head;
};

enum class Element { kFloat32, kBfloat16, kFloat16 };

// d loss / d raw logits. The first columns may be those of a part of the vocabulary, top and total those of all of it.
struct GradientCall {
  const float* logits;          // as above
  const std::int64_t* targets;  // as above: a target that is not held adds nothing
  const float *top, *total, *entropy, *d_logps, *d_entropy;  // (rows,); entropy and d_entropy null: none has a gradient
  void* out;                                                 // (rows, vocab) of `element`; may be the logits themselves
  Element element;
  std::int64_t rows, stride, out_stride;  // strides in elements
  int vocab;
  Head head;
};

// Exponentials relative to the target, of rows over a whole vocabulary.
struct ExponentialsCall {
  const float* logits;          // as above
  const std::int64_t* targets;  // (rows,) in [0, vocab)
  float* sums;                  // (3, rows): z of the target - base, and total and dots (0 unless want_dots) of the others
  void* out;                    // (rows, vocab) of `element`, not float16; may be the logits themselves
  Element element;
  std::int64_t rows, stride, out_stride;
  int vocab;
  bool want_dots;
  float most_above;  // that a word may be above the target's z, and still have this for its base
  Head head;
};

void partials_on_host(const PartialsCall& call);
void gradient_on_host(const GradientCall& call);
void exponentials_on_host(const ExponentialsCall& call);
// On `stream` of `device`; give the runtime's error, or null. Only in a build with CUDA sources.
const char* partials_on_device(const PartialsCall& call, int device, void* stream);
const char* gradient_on_device(const GradientCall& call, int device, void* stream);
const char* exponentials_on_device(const ExponentialsCall& call, int device, void* stream);

// A block has a row: 512 threads with four 16-byte loads in flight each cover the memory's latency. A cluster per row
// would help calls of a few rows only, and those wait for the matrix product's read of the whole weight anyway.
constexpr int kLanes = 512;
constexpr int kVector = 4;   // floats of a 16-byte load
constexpr int kFlight = 4;   // loads in flight
constexpr int kUnit = kVector * kFlight;

struct alignas(16) Vector {
  float x[kVector];
};

// A row as floats before the first 16-byte boundary, vectors, and the floats after the last: at most 3 at each end.
struct Layout {
  int head, vectors, edges;  // edges: both ends together
};

MMRPT_HOST_DEVICE Layout layout_of(const float* row, int vocab) {
  const int past = static_cast<int>((reinterpret_cast<std::uintptr_t>(row) / sizeof(float)) % kVector);
  const int wanted = (kVector - past) % kVector;
  const int head = wanted < vocab ? wanted : vocab;
  const int vectors = (vocab - head) / kVector;
  return Layout{head, vectors, vocab - vectors * kVector};
}

// Column of the k-th float outside the vectors.
MMRPT_HOST_DEVICE int edge_column(const Layout& layout, int k) {
  return k < layout.head ? k : k + layout.vectors * kVector;
}

// The sums over a lane's share of a row.
template <bool kDots, bool kCapped>
MMRPT_HOST_DEVICE RowSums lane_sums(const float* row, int vocab, const Head& head, int lane) {
  const Layout layout = layout_of(row, vocab);
  const Vector* vectors = reinterpret_cast<const Vector*>(row + layout.head);
  RowSums sums = empty_sums();
  for (int first = lane; first < layout.vectors; first += kLanes * kFlight) {
    float z[kUnit];
MMRPT_UNROLL
    for (int k = 0; k < kFlight; ++k) {
      const int at = first + k * kLanes;
      Vector raw{};
      if (at < layout.vectors) raw = vectors[at];
MMRPT_UNROLL
      for (int i = 0; i < kVector; ++i)
        z[k * kVector + i] = at < layout.vectors ? head.outer * bend<kCapped>(raw.x[i], head) : -INFINITY;
    }
    sums = push<kDots>(sums, z);
  }
  if (lane < layout.edges) {
    const float z[1] = {head.outer * bend<kCapped>(row[edge_column(layout, lane)], head)};
    sums = push<kDots>(sums, z);
  }
  return sums;
}

// What row i leaves behind. The target's z is -inf where this part of the vocabulary does not hold it.
MMRPT_HOST_DEVICE void store(const PartialsCall& call, std::int64_t i, const RowSums& sums) {
  const float* row = call.logits + i * call.stride;
  const std::int64_t target = call.targets[i];
  float chosen = -INFINITY;
  if (target >= 0 && target < call.vocab)
    chosen = call.head.outer * (call.head.capped ? bend<true>(row[target], call.head) : row[target]);
  call.out[i] = sums.top;
  call.out[call.rows + i] = sums.total;
  call.out[2 * call.rows + i] = call.want_dots ? sums.dots : 0.0f;  // merging makes dots of nothing but shifts
  call.out[3 * call.rows + i] = chosen;
}

MMRPT_HOST_DEVICE RowGradient row_gradient(const GradientCall& call, std::int64_t row) {
  const bool entropy = call.d_entropy != nullptr;
  return row_gradient(call.top[row], call.total[row], entropy ? call.entropy[row] : 0.0f, call.d_logps[row],
                      entropy ? call.d_entropy[row] : 0.0f, call.head);
}

// kVector neighbours of an output row.
template <typename T>
struct alignas(sizeof(T) * kVector) Packed {
  T x[kVector];
};

template <typename T>
MMRPT_HOST_DEVICE bool aligned_for_packed(const T* out) {
  return reinterpret_cast<std::uintptr_t>(out) % sizeof(Packed<T>) == 0;
}

template <typename T>
MMRPT_HOST_DEVICE void put(const Packed<T>& packed, T* out, bool aligned) {
  if (aligned) {
    *reinterpret_cast<Packed<T>*>(out) = packed;
    return;
  }
MMRPT_UNROLL
  for (int i = 0; i < kVector; ++i) out[i] = packed.x[i];
}

// A lane's share of a row's gradient. Reads all of a step before it writes, so `out` may be `row`.
template <typename T, bool kEntropy, bool kCapped>
MMRPT_HOST_DEVICE void lane_gradient(const float* row, T* out, const GradientCall& call, const RowGradient& g,
                                     std::int64_t target, int lane) {
  const Layout layout = layout_of(row, call.vocab);
  const Vector* vectors = reinterpret_cast<const Vector*>(row + layout.head);
  const bool aligned = aligned_for_packed(out + layout.head);
  for (int first = lane; first < layout.vectors; first += kLanes * kFlight) {
    Vector raw[kFlight];
MMRPT_UNROLL
    for (int k = 0; k < kFlight; ++k) {
      const int at = first + k * kLanes;
      if (!g.idle && at < layout.vectors) raw[k] = vectors[at];  // a row without gradient is not even read
    }
MMRPT_UNROLL
    for (int k = 0; k < kFlight; ++k) {
      const int at = first + k * kLanes, column = layout.head + at * kVector;
      if (at >= layout.vectors) break;
      Packed<T> packed;
MMRPT_UNROLL
      for (int i = 0; i < kVector; ++i)
        narrow(g.idle ? 0.0f : word_gradient<kEntropy, kCapped>(g, raw[k].x[i], column + i == target, call.head),
               packed.x[i]);
      put(packed, out + column, aligned);
    }
  }
  if (lane < layout.edges) {
    const int column = edge_column(layout, lane);
    narrow(g.idle ? 0.0f : word_gradient<kEntropy, kCapped>(g, row[column], column == target, call.head), out[column]);
  }
}

// max z over a lane's share of a row.
template <bool kCapped>
MMRPT_HOST_DEVICE BasedSums lane_top(const float* row, int vocab, const Head& head, int lane) {
  const Layout layout = layout_of(row, vocab);
  const Vector* vectors = reinterpret_cast<const Vector*>(row + layout.head);
  BasedSums sums = empty_based_sums();
  for (int first = lane; first < layout.vectors; first += kLanes * kFlight) {
MMRPT_UNROLL
    for (int k = 0; k < kFlight; ++k) {
      const int at = first + k * kLanes;
      Vector raw{};
      if (at < layout.vectors) raw = vectors[at];
MMRPT_UNROLL
      for (int i = 0; i < kVector; ++i)
        sums.top = fmaxf(sums.top, at < layout.vectors ? head.outer * bend<kCapped>(raw.x[i], head) : -INFINITY);
    }
  }
  if (lane < layout.edges)
    sums.top = fmaxf(sums.top, head.outer * bend<kCapped>(row[edge_column(layout, lane)], head));
  return sums;
}

// A lane's share of a row's exponentials. Reads all of a step before it writes, so `out` may be `row`. The target's word
// is written as 0, for `finish_exponentials` to write again when all lanes are done.
template <typename T, bool kDots, bool kCapped>
MMRPT_HOST_DEVICE BasedSums lane_exponentials(const float* row, T* out, const ExponentialsCall& call, int target,
                                              float base, int lane) {
  const Layout layout = layout_of(row, call.vocab);
  const Vector* vectors = reinterpret_cast<const Vector*>(row + layout.head);
  const bool aligned = aligned_for_packed(out + layout.head);
  BasedSums sums = empty_based_sums();
  for (int first = lane; first < layout.vectors; first += kLanes * kFlight) {
    Vector raw[kFlight];
MMRPT_UNROLL
    for (int k = 0; k < kFlight; ++k) {
      const int at = first + k * kLanes;
      raw[k] = Vector{};
      if (at < layout.vectors) raw[k] = vectors[at];
    }
    BasedSums some[kFlight];
MMRPT_UNROLL
    for (int k = 0; k < kFlight; ++k) {
      const int at = first + k * kLanes, column = layout.head + at * kVector;
      float words[kVector];
      some[k] = exponentials<kDots, kCapped>(raw[k].x, base, target - column, at < layout.vectors, call.head, words);
      if (at >= layout.vectors) continue;
      Packed<T> packed;
MMRPT_UNROLL
      for (int i = 0; i < kVector; ++i) narrow(words[i], packed.x[i]);
      put(packed, out + column, aligned);
    }
    static_assert(kFlight == 4, "a tree of four");
    sums = merge(sums, merge(merge(some[0], some[1]), merge(some[2], some[3])));
  }
  if (lane < layout.edges) {
    const int column = edge_column(layout, lane);
    const float raw_word[1] = {row[column]};
    float word[1];
    sums = merge(sums, exponentials<kDots, kCapped>(raw_word, base, target - column, true, call.head, word));
    narrow(word[0], out[column]);
  }
  return sums;
}

// What row i leaves behind, lane by lane, when all lanes have written their exponentials: three sums and the target's
// word; nothing but zeros where the sum is broken.
template <typename T>
MMRPT_HOST_DEVICE void finish_exponentials(T* out, const ExponentialsCall& call, std::int64_t i, const Target& target,
                                           float base, const BasedSums& sums, int lane) {
  const bool broken = !(sums.total < INFINITY);
  if (broken)
    for (int column = lane; column < call.vocab; column += kLanes) narrow(0.0f, out[column]);
  if (lane != 0) return;
  call.sums[i] = target.z - base;
  call.sums[call.rows + i] = sums.total;
  call.sums[2 * call.rows + i] = sums.dots;
  if (!broken) narrow(-sums.total * target.slope, out[target.column]);
}

// Runs `run` with the call's switches as compile-time constants: run(std::bool_constant, std::bool_constant).
template <typename Run>
void with_switches(bool first, bool second, Run run) {
  if (first && second) run(std::true_type{}, std::true_type{});
  if (first && !second) run(std::true_type{}, std::false_type{});
  if (!first && second) run(std::false_type{}, std::true_type{});
  if (!first && !second) run(std::false_type{}, std::false_type{});
}

// Runs `run` with an (empty) pointer of the element's type; the wide ones have float32's range.
template <typename Run>
void with_wide_element(Element element, Run run) {
  if (element == Element::kFloat32) run(static_cast<float*>(nullptr));
  if (element == Element::kBfloat16) run(static_cast<Bfloat16*>(nullptr));
}

template <typename Run>
void with_element(Element element, Run run) {
  with_wide_element(element, run);
  if (element == Element::kFloat16) run(static_cast<Float16*>(nullptr));
}

}  // namespace mmrpt
