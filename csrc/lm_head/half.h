// float32 to bfloat16 and float16, rounded to nearest even: the GPU's instructions, or the same in integers on a host.
#pragma once

#include <cstdint>
#include <cstring>

#include "lm_head/row_math.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace mmrpt {

struct Bfloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

namespace host {

inline std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline std::uint16_t bfloat16_bits(float x) {
  const std::uint32_t bits = bits_of(x);
  if (x != x) return static_cast<std::uint16_t>((bits >> 16) | 0x40u);  // a NaN stays one
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline std::uint16_t float16_bits(float x) {
  const std::uint32_t bits = bits_of(x), sign = (bits >> 16) & 0x8000u, size = bits & 0x7fffffffu;
  if (x != x) return static_cast<std::uint16_t>(sign | 0x7e00u);
  if (size >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);  // 65520 and above: infinity
  if (size < 0x38800000u) {  // below 2^-14: a multiple of 2^-24, which the nearest even integer counts
    const float steps = std::nearbyintf(std::fabs(x) * 16777216.0f);
    return static_cast<std::uint16_t>(sign | static_cast<std::uint32_t>(steps));
  }
  const std::uint32_t rounded = size + 0xfffu + ((size >> 13) & 1u);
  return static_cast<std::uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

}  // namespace host

MMRPT_DEVICE void narrow(float x, float& to) { to = x; }

MMRPT_DEVICE void narrow(float x, Bfloat16& to) {
#if defined(__CUDA_ARCH__)
  to.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
  to.bits = host::bfloat16_bits(x);
#endif
}

MMRPT_DEVICE void narrow(float x, Float16& to) {
#if defined(__CUDA_ARCH__)
  to.bits = __half_as_ushort(__float2half_rn(x));
#else
  to.bits = host::float16_bits(x);
#endif
}

}  // namespace mmrpt
