// RMSNorm over the last dimension: y = x * rstd * weight, rstd = 1 / sqrt(mean(x^2) + eps).
//
// One row is read from memory once; its second pass finds it in the first-level cache. The sums
// are in fp32. dweight is summed over fixed blocks of rows and then over the blocks in order, so
// its bits do not depend on the number of threads.
#include <torch/library.h>

#include "common.h"

namespace fastllm {
namespace {

constexpr int64_t kBlockRows = 64;  // rows that share one partial sum of dweight

struct RmsForward {
  template <typename T>
  static FASTLLM_INLINE void run(const T* __restrict x, int64_t stride,
                                 const float* __restrict weight, T* __restrict y,
                                 float* __restrict rstd, int64_t rows, int64_t width, float eps) {
    for (int64_t row = 0; row < rows; ++row, x += stride, y += width) {
      float lanes[kLanes] = {};
      int64_t i = 0;
      for (; i + kLanes <= width; i += kLanes)
        for (int64_t l = 0; l < kLanes; ++l) lanes[l] += to_float(x[i + l]) * to_float(x[i + l]);
      for (int64_t l = 0; i + l < width; ++l) lanes[l] += to_float(x[i + l]) * to_float(x[i + l]);
      const float mean = fold_sum(lanes) / static_cast<float>(width);
      const float scale = 1.0f / std::sqrt(mean + eps);
      rstd[row] = scale;
      for (int64_t j = 0; j < width; ++j) y[j] = from_float<T>(to_float(x[j]) * scale * weight[j]);
    }
  }
};

struct RmsBackward {
  // dweight (width) of these rows is written, not added to.
  template <typename T>
  static FASTLLM_INLINE void run(const T* __restrict dy, int64_t dy_stride, const T* __restrict x,
                                 int64_t x_stride, const float* __restrict weight,
                                 const float* __restrict rstd, T* __restrict dx,
                                 float* __restrict dweight, int64_t rows, int64_t width) {
    for (int64_t j = 0; j < width; ++j) dweight[j] = 0.0f;
    for (int64_t row = 0; row < rows; ++row, x += x_stride, dy += dy_stride, dx += width) {
      const float scale = rstd[row];
      float lanes[kLanes] = {};
      int64_t i = 0;
      for (; i + kLanes <= width; i += kLanes)
        for (int64_t l = 0; l < kLanes; ++l)
          lanes[l] += to_float(dy[i + l]) * weight[i + l] * to_float(x[i + l]);
      for (int64_t l = 0; i + l < width; ++l)
        lanes[l] += to_float(dy[i + l]) * weight[i + l] * to_float(x[i + l]);
      const float mean = fold_sum(lanes) * scale * scale / static_cast<float>(width);
      for (int64_t j = 0; j < width; ++j) {
        const float gradient = to_float(dy[j]);
        const float value = to_float(x[j]);
        dweight[j] += gradient * (value * scale);
        dx[j] = from_float<T>((gradient * weight[j] - value * mean) * scale);
      }
    }
  }
};

struct SumRows {
  static FASTLLM_INLINE void run(const float* partial, float* out, int64_t rows, int64_t stride,
                                 int64_t width) {
    for (int64_t j = 0; j < width; ++j) out[j] = 0.0f;
    for (int64_t row = 0; row < rows; ++row, partial += stride)
      for (int64_t j = 0; j < width; ++j) out[j] += partial[j];
  }
};

void check(const at::Tensor& x, const at::Tensor& weight) {
  TORCH_CHECK_VALUE(x.dim() >= 1 && weight.dim() == 1 && weight.size(0) == x.size(-1),
                    "fastllm rms_norm: x ", x.sizes(),
                    " needs a weight of its last dimension, got ", weight.sizes());
}

std::tuple<at::Tensor, at::Tensor> rms_norm_forward(const at::Tensor& x, const at::Tensor& weight,
                                                    double eps) {
  check(x, weight);
  const at::Tensor rows = as_rows(x);
  const at::Tensor scale = weight.to(at::kFloat).contiguous();
  const int64_t count = rows.size(0), width = rows.size(1);
  at::Tensor y = at::empty(x.sizes(), x.options().memory_format(at::MemoryFormat::Contiguous));
  at::Tensor rstd = at::empty({count}, x.options().dtype(at::kFloat));
  with_dtype(x, "rms_norm", [&]<typename T>(T) {
    const T* in = data<T>(rows);
    T* out = mutable_data<T>(y);
    const int64_t stride = rows.stride(0);
    at::parallel_for(0, count, rows_per_task(width), [&](int64_t begin, int64_t end) {
      dispatch<RmsForward>(in + begin * stride, stride, data<float>(scale), out + begin * width,
                           mutable_data<float>(rstd) + begin, end - begin, width,
                           static_cast<float>(eps));
    });
  });
  return {y, rstd};
}

std::tuple<at::Tensor, at::Tensor> rms_norm_backward(const at::Tensor& dy, const at::Tensor& x,
                                                     const at::Tensor& weight,
                                                     const at::Tensor& rstd) {
  check(x, weight);
  TORCH_CHECK_VALUE(dy.sizes() == x.sizes() && dy.scalar_type() == x.scalar_type(),
                    "fastllm rms_norm: the gradient must have the shape and dtype of x");
  const at::Tensor in = as_rows(x), gradient = as_rows(dy);
  const at::Tensor scale = weight.to(at::kFloat).contiguous();
  const int64_t count = in.size(0), width = in.size(1);
  const int64_t blocks = (count + kBlockRows - 1) / kBlockRows;
  at::Tensor dx = at::empty(x.sizes(), x.options().memory_format(at::MemoryFormat::Contiguous));
  at::Tensor partial = at::empty({blocks, width}, scale.options());
  at::Tensor dweight = at::empty({width}, scale.options());
  with_dtype(x, "rms_norm", [&]<typename T>(T) {
    const int64_t dy_stride = gradient.stride(0), x_stride = in.stride(0);
    const T* dy_data = data<T>(gradient);
    const T* x_data = data<T>(in);
    T* dx_data = mutable_data<T>(dx);
    float* sums = mutable_data<float>(partial);
    at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block * kBlockRows;
        const int64_t rows = std::min(kBlockRows, count - first);
        dispatch<RmsBackward>(dy_data + first * dy_stride, dy_stride, x_data + first * x_stride,
                              x_stride, data<float>(scale), data<float>(rstd) + first,
                              dx_data + first * width, sums + block * width, rows, width);
      }
    });
  });
  dispatch<SumRows>(data<float>(partial), mutable_data<float>(dweight), blocks, width, width);
  return {dx, dweight.to(weight.scalar_type())};
}

}  // namespace
}  // namespace fastllm

TORCH_LIBRARY_FRAGMENT(fastllm_cpu, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor y, Tensor rstd)");
  m.def(
      "rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd) -> "
      "(Tensor dx, Tensor dweight)");
}

TORCH_LIBRARY_IMPL(fastllm_cpu, CPU, m) {
  m.impl("rms_norm", &fastllm::rms_norm_forward);
  m.impl("rms_norm_backward", &fastllm::rms_norm_backward);
}
