// The row kernels on a GPU: a block a row. Deterministic: every sum has one order.
#include <cuda_runtime.h>

#include "logprobs/rows.h"

namespace mmrpt {

namespace {

constexpr int kWarp = 32;
constexpr unsigned kAll = 0xffffffffu;

// Every lane of a group of 2 * step neighbours gets the group's sums.
__device__ RowSums merge_warp(RowSums sums, int step) {
  for (; step > 0; step /= 2) {
    const RowSums other{__shfl_xor_sync(kAll, sums.top, step), __shfl_xor_sync(kAll, sums.total, step),
                        __shfl_xor_sync(kAll, sums.dots, step)};
    sums = merge(sums, other);
  }
  return sums;
}

// The block's sums, in its first warp.
__device__ RowSums merge_block(RowSums sums) {
  __shared__ RowSums warps[kLanes / kWarp];
  sums = merge_warp(sums, kWarp / 2);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = sums;
  __syncthreads();
  if (threadIdx.x >= kWarp) return sums;
  return merge_warp(warps[threadIdx.x % (kLanes / kWarp)], kLanes / kWarp / 2);
}

template <bool kDots, bool kCapped>
__global__ void __launch_bounds__(kLanes) partials_kernel(const PartialsCall call) {
  const std::int64_t i = blockIdx.x;
  const float* row = call.logits + i * call.stride;
  const RowSums sums = merge_block(lane_sums<kDots, kCapped>(row, call.vocab, call.head, threadIdx.x));
  if (threadIdx.x == 0) store(call, i, sums);
}

template <typename T, bool kEntropy, bool kCapped>
__global__ void __launch_bounds__(kLanes) gradient_kernel(const GradientCall call) {
  const std::int64_t i = blockIdx.x;
  T* out = static_cast<T*>(call.out) + i * call.out_stride;
  lane_gradient<T, kEntropy, kCapped>(call.logits + i * call.stride, out, call, row_gradient(call, i), call.targets[i],
                                      threadIdx.x);
}

// The runtime's current device is a matter of each thread and of each copy of the runtime: this module links its own.
template <typename Launch>
const char* launched(int device, Launch launch) {
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    launch();
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* partials_on_device(const PartialsCall& call, int device, void* stream) {
  return launched(device, [&] {
    with_switches(call.want_dots, call.head.capped, [&](auto dots, auto capped) {
      partials_kernel<dots.value, capped.value>
          <<<static_cast<unsigned>(call.rows), kLanes, 0, static_cast<cudaStream_t>(stream)>>>(call);
    });
  });
}

const char* gradient_on_device(const GradientCall& call, int device, void* stream) {
  return launched(device, [&] {
    with_element(call.element, [&](auto* element) {
      using T = std::remove_pointer_t<decltype(element)>;
      with_switches(call.d_entropy != nullptr, call.head.capped, [&](auto entropy, auto capped) {
        gradient_kernel<T, entropy.value, capped.value>
            <<<static_cast<unsigned>(call.rows), kLanes, 0, static_cast<cudaStream_t>(stream)>>>(call);
      });
    });
  });
}

}  // namespace mmrpt
