// The row kernels on a host, lane by lane: what CPU tests run in the place of a GPU.
#include "logprobs/rows.h"

namespace mmrpt {

namespace {

constexpr int kWarp = 32;

// As a block merges: within each warp, then over the warps, in the same order.
RowSums merge_lanes(RowSums (&parts)[kLanes]) {
  for (int warp = 0; warp < kLanes; warp += kWarp)
    for (int step = kWarp / 2; step > 0; step /= 2)
      for (int k = 0; k < step; ++k) parts[warp + k] = merge(parts[warp + k], parts[warp + k + step]);
  for (int step = kLanes / kWarp / 2; step > 0; step /= 2)
    for (int k = 0; k < step; ++k) parts[k * kWarp] = merge(parts[k * kWarp], parts[(k + step) * kWarp]);
  return parts[0];
}

}  // namespace

void partials_on_host(const PartialsCall& call) {
  with_switches(call.want_dots, call.head.capped, [&](auto dots, auto capped) {
    for (std::int64_t i = 0; i < call.rows; ++i) {
      const float* row = call.logits + i * call.stride;
      RowSums parts[kLanes];
      for (int lane = 0; lane < kLanes; ++lane)
        parts[lane] = lane_sums<dots.value, capped.value>(row, call.vocab, call.head, lane);
      store(call, i, merge_lanes(parts));
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

}  // namespace mmrpt
