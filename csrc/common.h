// What the ops of this folder share: dtype dispatch, tensors as rows, sums in a fixed order, exp.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "vector.h"

namespace fastllm {

// Calls f(T{}) with the storage type of a floating tensor: float, bf16 or fp16.
template <typename F>
void with_dtype(const at::Tensor& tensor, const char* op, F&& f) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return f(float{});
    case at::kBFloat16:
      return f(bf16{});
    case at::kHalf:
      return f(fp16{});
    default:
      TORCH_CHECK_TYPE(false, "fastllm ", op, ": expected float32, bfloat16 or float16, got ",
                       tensor.scalar_type());
  }
}

template <typename T>
const T* data(const at::Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* mutable_data(const at::Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// The tensor as (rows, last dimension) with the last stride 1: a view where its strides allow.
inline at::Tensor as_rows(const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() >= 1, "fastllm: expected a tensor of at least one dimension");
  const int64_t width = x.size(-1);
  const int64_t rows = width == 0 ? 0 : x.numel() / width;
  at::Tensor flat = x.reshape({rows, width});
  return rows == 0 || width == 1 || flat.stride(1) == 1 ? flat : flat.contiguous();
}

// Rows that one task takes, so that a task is about 32 thousand elements.
inline int64_t rows_per_task(int64_t width) {
  return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, width));
}

// A sum over an array is kept in this many lanes, whatever the vector width: element i goes to
// lane i % kLanes, and the lanes are folded in halves. So every CPU gets the same bits.
constexpr int64_t kLanes = 32;

FASTLLM_INLINE float fold_sum(float* lanes) {
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

FASTLLM_INLINE float larger(float a, float b) { return a > b ? a : b; }

FASTLLM_INLINE float fold_max(const float* lanes) {
  float result = lanes[0];
  for (int64_t i = 1; i < kLanes; ++i) result = larger(lanes[i], result);
  return result;
}

// e^r - 1 for x = n ln(2) + r with |r| <= ln(2)/2 and a whole n: the Taylor-like polynomial of
// Cephes' expf. n is in the low bits of *shifted.
FASTLLM_INLINE float reduced_expm1(float x, uint32_t* shifted) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float rounded = x * 1.44269504088896341f + kRound;
  const float n = rounded - kRound;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  *shifted = std::bit_cast<uint32_t>(rounded);
  return p * (r * r) + r;
}

// x where `take`, else y. Not `?:`: the compiler would compute each side in a branch of its own,
// and not vectorise the loop.
FASTLLM_INLINE float choose(bool take, float x, float y) {
  const uint32_t mask = 0u - static_cast<uint32_t>(take);
  return std::bit_cast<float>((std::bit_cast<uint32_t>(x) & mask) |
                              (std::bit_cast<uint32_t>(y) & ~mask));
}

// e^x within 2 ulp: 2^n e^r. Results below the smallest normal number are 0, arguments above 88
// count as 88 (so the result is finite), a NaN stays a NaN.
FASTLLM_INLINE float fast_exp(float x) {
  uint32_t shifted;
  const float p = reduced_expm1(x, &shifted) + 1.0f;
  const float scaled = p * std::bit_cast<float>((shifted << 23) + 0x3f800000u);
  const float below = choose(x > 88.0f, 1.6516363e38f, scaled);  // where n does not fit
  return choose(x < -87.3f, 0.0f, below);
}

// tanh(x) within 3 ulp, everywhere: e / (e + 2) with e = e^2|x| - 1 = 2^n (e^r - 1) + (2^n - 1),
// which does not cancel near 0. A NaN stays a NaN.
FASTLLM_INLINE float fast_tanh(float x) {
  const uint32_t sign = std::bit_cast<uint32_t>(x) & 0x80000000u;
  const float size = std::bit_cast<float>(std::bit_cast<uint32_t>(x) ^ sign);
  uint32_t shifted;
  const float p = reduced_expm1(2.0f * size, &shifted);
  const float power = std::bit_cast<float>((shifted << 23) + 0x3f800000u);
  const float e = p * power + (power - 1.0f);
  const float result = choose(size > 10.0f, 1.0f, e / (e + 2.0f));  // from 9.1 on it rounds to 1
  return std::bit_cast<float>(std::bit_cast<uint32_t>(result) | sign);
}

}  // namespace fastllm
