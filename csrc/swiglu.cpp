// SwiGLU: silu(gate) * up, silu(x) = x * sigmoid(x). The backward computes the sigmoid again
// instead of saving it. gate and up may be the two halves of one projection (strided rows).
#include <torch/library.h>

#include "common.h"

namespace fastllm {
namespace {

struct SwigluForward {
  template <typename T>
  static FASTLLM_INLINE void run(const T* __restrict gate, const T* __restrict up,
                                 T* __restrict out, int64_t width) {
    for (int64_t i = 0; i < width; ++i) {
      const float g = to_float(gate[i]);
      const float sigmoid = 1.0f / (1.0f + fast_exp(-g));
      out[i] = from_float<T>(g * sigmoid * to_float(up[i]));
    }
  }
};

struct SwigluBackward {
  template <typename T>
  static FASTLLM_INLINE void run(const T* __restrict grad, const T* __restrict gate,
                                 const T* __restrict up, T* __restrict dgate, T* __restrict dup,
                                 int64_t width) {
    for (int64_t i = 0; i < width; ++i) {
      const float d = to_float(grad[i]), g = to_float(gate[i]), u = to_float(up[i]);
      const float sigmoid = 1.0f / (1.0f + fast_exp(-g));
      const float silu = g * sigmoid;
      dup[i] = from_float<T>(d * silu);
      dgate[i] = from_float<T>(d * u * (sigmoid + silu * (1.0f - sigmoid)));
    }
  }
};

void check(const at::Tensor& a, const at::Tensor& b) {
  TORCH_CHECK_VALUE(a.sizes() == b.sizes() && a.scalar_type() == b.scalar_type(),
                    "fastllm swiglu: gate and up must have one shape and dtype, got ", a.sizes(),
                    " ", a.scalar_type(), " and ", b.sizes(), " ", b.scalar_type());
}

at::Tensor swiglu_forward(const at::Tensor& gate, const at::Tensor& up) {
  check(gate, up);
  const at::Tensor g = as_rows(gate), u = as_rows(up);
  const int64_t rows = g.size(0), width = g.size(1);
  at::Tensor out =
      at::empty(gate.sizes(), gate.options().memory_format(at::MemoryFormat::Contiguous));
  with_dtype(gate, "swiglu", [&]<typename T>(T) {
    at::parallel_for(0, rows, rows_per_task(width), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        dispatch<SwigluForward>(data<T>(g) + row * g.stride(0), data<T>(u) + row * u.stride(0),
                                mutable_data<T>(out) + row * width, width);
    });
  });
  return out;
}

// The gradient of gate and up side by side: (..., 2 * width), gate first.
at::Tensor swiglu_backward(const at::Tensor& grad, const at::Tensor& gate, const at::Tensor& up) {
  check(gate, up);
  check(grad, gate);
  const at::Tensor d = as_rows(grad), g = as_rows(gate), u = as_rows(up);
  const int64_t rows = g.size(0), width = g.size(1);
  std::vector<int64_t> sizes = gate.sizes().vec();
  sizes.back() *= 2;
  at::Tensor out = at::empty(sizes, gate.options().memory_format(at::MemoryFormat::Contiguous));
  with_dtype(gate, "swiglu", [&]<typename T>(T) {
    at::parallel_for(0, rows, rows_per_task(2 * width), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        T* to = mutable_data<T>(out) + row * 2 * width;
        dispatch<SwigluBackward>(data<T>(d) + row * d.stride(0), data<T>(g) + row * g.stride(0),
                                 data<T>(u) + row * u.stride(0), to, to + width, width);
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace fastllm

TORCH_LIBRARY_FRAGMENT(fastllm_cpu, m) {
  m.def("swiglu(Tensor gate, Tensor up) -> Tensor");
  m.def("swiglu_backward(Tensor grad, Tensor gate, Tensor up) -> Tensor");
}

TORCH_LIBRARY_IMPL(fastllm_cpu, CPU, m) {
  m.impl("swiglu", &fastllm::swiglu_forward);
  m.impl("swiglu_backward", &fastllm::swiglu_backward);
}
