// Rotary position embedding of q and k together, in the rotate-half convention:
//   out[i] = x[i] cos[i] - x[i + D/2] sin[i],   out[i + D/2] = x[i + D/2] cos[i] + x[i] sin[i].
// The gradient is the rotation by the opposite angle. q and k are (B, S, heads, D) with any strides
// over B, S and heads; cos and sin are (B, S, D/2) or (S, D/2) in fp32.
#include <torch/library.h>

#include "common.h"

namespace fastllm {
namespace {

struct Rotate {
  // `heads` heads of one token.
  template <typename T>
  static FASTLLM_INLINE void run(const T* __restrict x, int64_t stride, const float* __restrict cos,
                                 const float* __restrict sin, float sign, T* __restrict out,
                                 int64_t heads, int64_t half) {
    for (int64_t head = 0; head < heads; ++head, x += stride, out += 2 * half) {
      const T* second = x + half;
      for (int64_t i = 0; i < half; ++i) {
        const float a = to_float(x[i]), b = to_float(second[i]);
        const float c = cos[i], s = sin[i] * sign;
        out[i] = from_float<T>(a * c - b * s);
        out[half + i] = from_float<T>(b * c + a * s);
      }
    }
  }
};

at::Tensor unit_stride(const at::Tensor& x) {
  return x.size(-1) <= 1 || x.stride(-1) == 1 ? x : x.contiguous();
}

at::Tensor angles(const at::Tensor& table, const at::Tensor& q, const char* name) {
  const int64_t batch = q.size(0), length = q.size(1), half = q.size(3) / 2;
  const bool shared = table.dim() == 2 && table.size(0) == length && table.size(1) == half;
  const bool own = table.dim() == 3 && (table.size(0) == batch || table.size(0) == 1) &&
                   table.size(1) == length && table.size(2) == half;
  TORCH_CHECK_VALUE(shared || own, "fastllm rope: ", name, " ", table.sizes(), " does not fit q ",
                    q.sizes(), ": expected (B, S, D/2) or (S, D/2)");
  TORCH_CHECK_TYPE(table.scalar_type() == at::kFloat, "fastllm rope: ", name, " must be float32");
  return unit_stride(shared ? table.unsqueeze(0).expand({batch, length, half})
                            : table.expand({batch, length, half}));
}

std::tuple<at::Tensor, at::Tensor> rope(const at::Tensor& q, const at::Tensor& k,
                                        const at::Tensor& cos, const at::Tensor& sin,
                                        bool inverse) {
  TORCH_CHECK_VALUE(
      q.dim() == 4 && k.dim() == 4 && q.size(0) == k.size(0) && q.size(1) == k.size(1) &&
          q.size(3) == k.size(3) && q.size(3) % 2 == 0,
      "fastllm rope: expected q (B, S, Hq, D) and k (B, S, Hkv, D) with an even D, got ", q.sizes(),
      " and ", k.sizes());
  TORCH_CHECK_TYPE(q.scalar_type() == k.scalar_type(), "fastllm rope: q and k differ in dtype");
  const at::Tensor c = angles(cos, q, "cos"), s = angles(sin, q, "sin");
  const at::Tensor qs = unit_stride(q), ks = unit_stride(k);
  at::Tensor q_out = at::empty(q.sizes(), q.options()), k_out = at::empty(k.sizes(), k.options());
  const int64_t length = q.size(1), tokens = q.size(0) * length, half = q.size(3) / 2;
  const int64_t q_heads = q.size(2), k_heads = k.size(2);
  const float sign = inverse ? -1.0f : 1.0f;
  with_dtype(q, "rope", [&]<typename T>(T) {
    at::parallel_for(
        0, tokens, rows_per_task((q_heads + k_heads) * 2 * half), [&](int64_t begin, int64_t end) {
          for (int64_t token = begin; token < end; ++token) {
            const int64_t b = token / length, p = token % length;
            const float* cos_row = data<float>(c) + b * c.stride(0) + p * c.stride(1);
            const float* sin_row = data<float>(s) + b * s.stride(0) + p * s.stride(1);
            dispatch<Rotate>(data<T>(qs) + b * qs.stride(0) + p * qs.stride(1), qs.stride(2),
                             cos_row, sin_row, sign,
                             mutable_data<T>(q_out) + token * q_heads * 2 * half, q_heads, half);
            dispatch<Rotate>(data<T>(ks) + b * ks.stride(0) + p * ks.stride(1), ks.stride(2),
                             cos_row, sin_row, sign,
                             mutable_data<T>(k_out) + token * k_heads * 2 * half, k_heads, half);
          }
        });
  });
  return {q_out, k_out};
}

}  // namespace
}  // namespace fastllm

TORCH_LIBRARY_FRAGMENT(fastllm_cpu, m) {
  m.def(
      "rope(Tensor q, Tensor k, Tensor cos, Tensor sin, bool inverse) -> "
      "(Tensor q_out, Tensor k_out)");
}

TORCH_LIBRARY_IMPL(fastllm_cpu, CPU, m) { m.impl("rope", &fastllm::rope); }
