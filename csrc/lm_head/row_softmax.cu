// The row kernels on a GPU: a block a row. Deterministic: every sum has one order.
#include <cuda_runtime.h>

#include "lm_head/row_softmax.h"

namespace mmrpt {

namespace {

constexpr int kWarp = 32;
constexpr unsigned kAll = 0xffffffffu;

// Every lane of a group of 2 * step neighbours gets the group's sums.
template <typename Sums>
__device__ Sums merge_warp(Sums sums, int step) {
  for (; step > 0; step /= 2) {
    const Sums other{__shfl_xor_sync(kAll, sums.top, step), __shfl_xor_sync(kAll, sums.total, step),
                     __shfl_xor_sync(kAll, sums.dots, step)};
    sums = merge(sums, other);
  }
  return sums;
}

struct Threads {
  template <typename OfLane>
  __device__ auto merged(OfLane of_lane) const {
    __shared__ decltype(of_lane(0)) warps[kLanes / kWarp];
    auto sums = merge_warp(of_lane(threadIdx.x), kWarp / 2);
    __syncthreads();  // an earlier merge may still be read
    if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = sums;
    __syncthreads();  // what lanes wrote to global memory is written too
    return merge_warp(warps[threadIdx.x % (kLanes / kWarp)], kLanes / kWarp / 2);
  }

  template <typename Run>
  __device__ void for_each_lane(Run run) const {
    run(threadIdx.x);
  }
};

template <typename Variant>
__global__ void __launch_bounds__(kLanes) row_kernel(const Call call) {
  Variant::row(call, blockIdx.x, Threads{});
}

}  // namespace

const char* run_on_device(const Call& call, int device, void* stream) {
  // The runtime's current device is a matter of each thread and of each copy of the runtime: this module links its own.
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    with_variant(call, [&](auto variant) {
      const auto rows = static_cast<unsigned>(call.rows);
      row_kernel<decltype(variant)><<<rows, kLanes, 0, static_cast<cudaStream_t>(stream)>>>(call);
    });
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace mmrpt
