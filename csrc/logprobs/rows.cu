// The row kernels on a GPU: a block a row. Deterministic: every sum has one order.
#include <cuda_runtime.h>

#include "logprobs/rows.h"

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

// Every lane gets the block's sums. What any lane wrote before, to global memory too, all have written when it returns.
template <typename Sums>
__device__ Sums merge_block(Sums sums) {
  __shared__ Sums warps[kLanes / kWarp];
  sums = merge_warp(sums, kWarp / 2);
  __syncthreads();  // an earlier merge may still be read
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = sums;
  __syncthreads();
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

template <typename T, bool kDots, bool kCapped>
__global__ void __launch_bounds__(kLanes) exponentials_kernel(const ExponentialsCall call) {
  const std::int64_t i = blockIdx.x;
  const float* row = call.logits + i * call.stride;
  T* out = static_cast<T*>(call.out) + i * call.out_stride;
  const Target target = target_of<kCapped>(row, call.vocab, call.targets[i], call.head);
  float base = target.z;
  if (call.out == call.logits) {  // nothing could be read again: look first. All lanes have read the target by then
    const float top = merge_block(lane_top<kCapped>(row, call.vocab, call.head, threadIdx.x)).top;
    if (too_far_above(top, base, call.most_above)) base = top;
  }
  BasedSums sums;
  while (true) {  // twice at most: then base is top
    sums = merge_block(lane_exponentials<T, kDots, kCapped>(row, out, call, target.column, base, threadIdx.x));
    if (!too_far_above(sums.top, base, call.most_above)) break;
    base = sums.top;
  }
  finish_exponentials(out, call, i, target, base, sums, threadIdx.x);
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

const char* exponentials_on_device(const ExponentialsCall& call, int device, void* stream) {
  return launched(device, [&] {
    with_wide_element(call.element, [&](auto* element) {
      using T = std::remove_pointer_t<decltype(element)>;
      with_switches(call.want_dots, call.head.capped, [&](auto dots, auto capped) {
        exponentials_kernel<T, dots.value, capped.value>
            <<<static_cast<unsigned>(call.rows), kLanes, 0, static_cast<cudaStream_t>(stream)>>>(call);
      });
    });
  });
}

}  // namespace mmrpt
