// The row kernels on a host, lane by lane: what CPU tests run in the place of a GPU.
#include "lm_head/row_softmax.h"

namespace mmrpt {

namespace {

constexpr int kWarp = 32;

struct Threads {
  // As a block merges: within each warp, then over the warps, in the same order.
  template <typename OfLane>
  auto merged(OfLane of_lane) const {
    decltype(of_lane(0)) parts[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) parts[lane] = of_lane(lane);
    for (int step = kWarp / 2; step > 0; step /= 2)
      for (int lane = 0; lane < kLanes; ++lane)
        if (lane % kWarp < step) parts[lane] = merge(parts[lane], parts[lane + step]);
    for (int step = kLanes / 2; step >= kWarp; step /= 2)
      for (int lane = 0; lane < step; lane += kWarp) parts[lane] = merge(parts[lane], parts[lane + step]);
    return parts[0];
  }

  template <typename Run>
  void for_each_lane(Run run) const {
    for (int lane = 0; lane < kLanes; ++lane) run(lane);
  }
};

}  // namespace

void run_on_host(const Call& call) {
  with_variant(call, [&](auto variant) {
    for (std::int64_t i = 0; i < call.rows; ++i) variant.row(call, i, Threads{});
  });
}

}  // namespace mmrpt
