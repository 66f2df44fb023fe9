// AdamW over many CPU tensors in one pass over memory: unscale and clip (both in grad_scale), the
// moments, decoupled weight decay, and the write-back to 16-bit weights.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "vector.h"

namespace fastllm {

// The step's scalars, as the update uses them: worked out in double, then rounded once to fp32.
struct AdamWScalars {
  float one_minus_beta1;
  float beta2;
  float one_minus_beta2;
  float eps;
  float decay;              // 1 - lr * weight_decay
  float step_size;          // lr / (1 - beta1^step)
  float second_correction;  // sqrt(1 - beta2^step)
  float grad_scale;

  AdamWScalars(double lr, double beta1, double beta2, double eps, double weight_decay,
               int64_t step, float grad_scale);
};

// One element. m and v are updated in place; the new weight is returned.
FASTLLM_INLINE float adamw_update(const AdamWScalars& s, float p, float grad, float& m, float& v) {
  const float g = grad * s.grad_scale;
  m = m + (g - m) * s.one_minus_beta1;
  v = v * s.beta2 + g * g * s.one_minus_beta2;
  const float denom = __builtin_sqrtf(v) / s.second_correction + s.eps;
  return p * s.decay - s.step_size * m / denom;
}

// Stochastic rounding to bf16: the low 16 bits of the fp32 number decide the chance of rounding
// away from zero. The random bits are a hash of (seed, step, global element index), so neither
// the split into tensors nor the number of threads or ranks changes the result.
struct StochasticRounding {
  uint32_t key;  // of seed and step

  StochasticRounding(int64_t seed, int64_t step)
      : key(static_cast<uint32_t>(seed) ^ (static_cast<uint32_t>(step) * 0x9E3779B9u)) {}

  // The key of the indices whose upper 32 bits are `high`.
  FASTLLM_INLINE uint32_t block_key(uint32_t high) const { return key ^ (high * 0x85EBCA6Bu); }

  // Two rounds of the lowbias32 mixer, of which the upper 16 bits are used.
  FASTLLM_INLINE uint32_t noise(uint32_t index_low, uint32_t block_key) const {
    return mix(mix(index_low ^ block_key) + key + 0x632BE5ABu) >> 16;
  }

  FASTLLM_INLINE static uint32_t mix(uint32_t x) {
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    return x ^ (x >> 16);
  }

  FASTLLM_INLINE static bf16 round(float x, uint32_t noise) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
    const bf16 nearest = from_float<bf16>(x);
    return {finite ? static_cast<uint16_t>((bits + noise) >> 16) : nearest.bits};
  }
};

// The registered ops, for callers in C++ (csrc/ files that own flat buffers).
void adamw_step(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
                at::TensorList exp_avg_sqs, const c10::List<std::optional<at::Tensor>>& masters,
                double lr, double beta1, double beta2, double eps, double weight_decay,
                const at::Tensor& grad_scale, bool stochastic_rounding, int64_t seed,
                int64_t step, at::IntArrayRef offsets);

at::Tensor grad_norm(at::TensorList grads);

}  // namespace fastllm
