// The row kernels on a host, lane by lane: what CPU tests run in the place of a GPU.
#include "logprobs/rows.h"

namespace mmrpt {

namespace {

constexpr int kWarp = 32;

// As a block merges: within each warp, then over the warps, in the same order.
template <typename Sums>
Sums merge_lanes(Sums (&parts)[kLanes]) {
  for (int warp = 0; warp < kLanes; warp += kWarp)
    for (int step = kWarp / 2; step > 0; step /= 2)
      for (int k = 0; k < step; ++k) parts[warp + k] = merge(parts[warp + k], parts[warp + k + step]);
  for (int step = kLanes / kWarp / 2; step > 0; step /= 2)
    for (int k = 0; k < step; ++k) parts[k * kWarp] = merge(parts[k * kWarp], parts[(k + step) * kWarp]);
  return parts[0];
}

template <typename OfLane>
auto merge_all(OfLane of_lane) {
  decltype(of_lane(0)) parts[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) parts[lane] = of_lane(lane);
  return merge_lanes(parts);
}

template <typename T, bool kDots, bool kCapped>
void exponentials_of_row(const ExponentialsCall& call, std::int64_t i) {
  const float* row = call.logits + i * call.stride;
  T* out = static_cast<T*>(call.out) + i * call.out_stride;
  const Target target = target_of<kCapped>(row, call.vocab, call.targets[i], call.head);
  float base = target.z;
  if (call.out == call.logits) {
    const float top = merge_all([&](int lane) { return lane_top<kCapped>(row, call.vocab, call.head, lane); }).top;
    if (too_far_above(top, base, call.most_above)) base = top;
  }
  const auto sweep = [&](int lane) {
    return lane_exponentials<T, kDots, kCapped>(row, out, call, target.column, base, lane);
  };
  BasedSums sums = merge_all(sweep);
  while (too_far_above(sums.top, base, call.most_above)) {
    base = sums.top;
    sums = merge_all(sweep);
  }
  for (int lane = 0; lane < kLanes; ++lane) finish_exponentials(out, call, i, target, base, sums, lane);
}

}  // namespace

void partials_on_host(const PartialsCall& call) {
  with_switches(call.want_dots, call.head.capped, [&](auto dots, auto capped) {
    for (std::int64_t i = 0; i < call.rows; ++i) {
      const float* row = call.logits + i * call.stride;
      store(call, i, merge_all([&](int lane) {
              return lane_sums<dots.value, capped.value>(row, call.vocab, call.head, lane);
            }));
    }
  });
}

void gradient_on_host(const GradientCall& call) {
  with_element(call.element, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    with_switches(call.d_entropy != nullptr, call.head.capped, [&](auto entropy, auto capped) {
      for (std::int64_t i = 0; i < call.rows; ++i) {
        const RowGradient g = row_gradient(call, i);
        T* out = static_cast<T*>(call.out) + i * call.out_stride;
        for (int lane = 0; lane < kLanes; ++lane)
          lane_gradient<T, entropy.value, capped.value>(call.logits + i * call.stride, out, call, g, call.targets[i],
                                                        lane);
      }
    });
  });
}

void exponentials_on_host(const ExponentialsCall& call) {
  with_wide_element(call.element, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    with_switches(call.want_dots, call.head.capped, [&](auto dots, auto capped) {
      for (std::int64_t i = 0; i < call.rows; ++i) exponentials_of_row<T, dots.value, capped.value>(call, i);
    });
  });
}

}  // namespace mmrpt
