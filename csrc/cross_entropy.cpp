// Cross-entropy of rows of logits, with label smoothing, z-loss and soft-capping. For one row
// x (V), its label y and, where a softcap c is set, x replaced by c tanh(x / c) first:
//   lse  = log(sum_i e^x_i)
//   loss = (1 - s) (lse - x_y) + s (lse - mean_i x_i) + z lse^2
//   dx_i = p_i (1 + 2 z lse) - (1 - s) [i = y] - s / V,   p_i = e^(x_i - lse)
// A row whose label is ignore_index has loss 0 and gradient 0. All sums are in fp32.
#include <torch/library.h>

#include <vector>

#include "common.h"

namespace fastllm {
namespace {

struct Options {
  int64_t vocab;
  float smoothing, z_loss, softcap;  // softcap 0: none
};

FASTLLM_INLINE float capped(float x, float softcap) { return softcap * fast_tanh(x / softcap); }

// Loss of one row. Leaves e^(x - max) in `exponentials` where that is not null.
struct RowLoss {
  template <typename T>
  static FASTLLM_INLINE void run(const T* x, int64_t label, Options o, float* exponentials,
                                 float* loss, float* lse, float* max_out) {
    float top[kLanes], sums[kLanes] = {}, totals[kLanes] = {};
    for (int64_t l = 0; l < kLanes; ++l) top[l] = -INFINITY;
    if (o.softcap > 0.0f) {
      // tanh is dear: keep the capped values, and read them below.
      for (int64_t i = 0; i < o.vocab; ++i) exponentials[i] = capped(to_float(x[i]), o.softcap);
      sum_row(exponentials, exponentials, o, top, sums, totals);
    } else {
      sum_row(x, exponentials, o, top, sums, totals);
    }
    const float max = fold_max(top);
    const float log_sum = max + std::log(fold_sum(sums));
    const float target =
        o.softcap > 0.0f ? capped(to_float(x[label]), o.softcap) : to_float(x[label]);
    const float uniform =
        o.smoothing > 0.0f ? fold_sum(totals) / static_cast<float>(o.vocab) : 0.0f;
    *lse = log_sum;
    *max_out = max;
    *loss = (1.0f - o.smoothing) * (log_sum - target) + o.smoothing * (log_sum - uniform) +
            o.z_loss * log_sum * log_sum;
  }

  template <typename S>
  static FASTLLM_INLINE void sum_row(const S* x, float* exponentials, Options o, float* top,
                                     float* sums, float* totals) {
    int64_t i = 0;
    for (; i + kLanes <= o.vocab; i += kLanes)
      for (int64_t l = 0; l < kLanes; ++l) top[l] = larger(to_float(x[i + l]), top[l]);
    for (int64_t l = 0; i + l < o.vocab; ++l) top[l] = larger(to_float(x[i + l]), top[l]);
    const float max = fold_max(top);
    if (o.smoothing > 0.0f) {
      for (i = 0; i + kLanes <= o.vocab; i += kLanes)
        for (int64_t l = 0; l < kLanes; ++l) totals[l] += to_float(x[i + l]);
      for (int64_t l = 0; i + l < o.vocab; ++l) totals[l] += to_float(x[i + l]);
    }
    for (i = 0; i + kLanes <= o.vocab; i += kLanes) {
      for (int64_t l = 0; l < kLanes; ++l) {
        const float e = fast_exp(to_float(x[i + l]) - max);
        exponentials[i + l] = e;
        sums[l] += e;
      }
    }
    for (int64_t l = 0; i + l < o.vocab; ++l) {
      const float e = fast_exp(to_float(x[i + l]) - max);
      exponentials[i + l] = e;
      sums[l] += e;
    }
  }
};

// Gradient of one row from e^(x - shift): p_i = exponentials[i] * inverse.
struct RowGradient {
  template <typename T>
  static FASTLLM_INLINE void run(const T* x, T* dx, const float* exponentials, float inverse,
                                 int64_t label, float lse, float scale, Options o) {
    const float factor = scale * inverse * (1.0f + 2.0f * o.z_loss * lse);
    const float uniform = scale * o.smoothing / static_cast<float>(o.vocab);
    const float at_label = exponentials[label] * factor - uniform - scale * (1.0f - o.smoothing);
    const float label_logit = to_float(x[label]);
    if (o.softcap > 0.0f) {
      for (int64_t i = 0; i < o.vocab; ++i)
        dx[i] =
            from_float<T>((exponentials[i] * factor - uniform) * slope(to_float(x[i]), o.softcap));
      dx[label] = from_float<T>(at_label * slope(label_logit, o.softcap));
    } else {
      for (int64_t i = 0; i < o.vocab; ++i)
        dx[i] = from_float<T>(exponentials[i] * factor - uniform);
      dx[label] = from_float<T>(at_label);
    }
  }

  static FASTLLM_INLINE float slope(float x, float softcap) {
    const float t = fast_tanh(x / softcap);
    return 1.0f - t * t;
  }
};

// e^(x - lse) of one row: the probabilities.
struct RowProbability {
  template <typename T>
  static FASTLLM_INLINE void run(const T* x, float* out, float lse, Options o) {
    if (o.softcap > 0.0f) {
      for (int64_t i = 0; i < o.vocab; ++i)
        out[i] = fast_exp(capped(to_float(x[i]), o.softcap) - lse);
    } else {
      for (int64_t i = 0; i < o.vocab; ++i) out[i] = fast_exp(to_float(x[i]) - lse);
    }
  }
};

void check(const at::Tensor& logits, const at::Tensor& labels, int64_t ignore_index,
           double softcap) {
  TORCH_CHECK_VALUE(logits.dim() == 2 && labels.dim() == 1 && labels.size(0) == logits.size(0),
                    "fastllm cross_entropy: expected logits (T, V) and labels (T,), got ",
                    logits.sizes(), " and ", labels.sizes());
  TORCH_CHECK_TYPE(labels.scalar_type() == at::kLong,
                   "fastllm cross_entropy: labels must be int64");
  TORCH_CHECK_VALUE(softcap >= 0.0, "fastllm cross_entropy: softcap must be positive, got ",
                    softcap);
  const int64_t* values = data<int64_t>(labels);
  for (int64_t row = 0; row < labels.size(0); ++row)
    TORCH_CHECK_INDEX(
        values[row] == ignore_index || (values[row] >= 0 && values[row] < logits.size(1)),
        "fastllm cross_entropy: label ", values[row], " at row ", row,
        " is outside the vocabulary of ", logits.size(1), " and is not ignore_index (",
        ignore_index, ")");
}

Options options(const at::Tensor& logits, double smoothing, double z_loss, double softcap) {
  return {logits.size(1), static_cast<float>(smoothing), static_cast<float>(z_loss),
          static_cast<float>(softcap)};
}

std::tuple<at::Tensor, at::Tensor> cross_entropy_forward(const at::Tensor& logits,
                                                         const at::Tensor& labels_in,
                                                         int64_t ignore_index, double smoothing,
                                                         double z_loss, double softcap) {
  const at::Tensor labels = labels_in.contiguous();
  check(logits, labels, ignore_index, softcap);
  const at::Tensor x = as_rows(logits);
  const Options o = options(logits, smoothing, z_loss, softcap);
  const int64_t rows = logits.size(0);
  at::Tensor loss = at::zeros({rows}, logits.options().dtype(at::kFloat));
  at::Tensor lse = at::zeros({rows}, loss.options());
  with_dtype(logits, "cross_entropy", [&]<typename T>(T) {
    at::parallel_for(0, rows, rows_per_task(o.vocab), [&](int64_t begin, int64_t end) {
      std::vector<float> exponentials(o.vocab);
      for (int64_t row = begin; row < end; ++row) {
        const int64_t label = data<int64_t>(labels)[row];
        float max = 0.0f;
        if (label != ignore_index)
          dispatch<RowLoss>(data<T>(x) + row * x.stride(0), label, o, exponentials.data(),
                            mutable_data<float>(loss) + row, mutable_data<float>(lse) + row, &max);
      }
    });
  });
  return {loss, lse};
}

// Writes d(loss) / d(logits) * grad[row] into `out`, which may be `logits` itself.
void write_gradient(const at::Tensor& grad_in, const at::Tensor& logits,
                    const at::Tensor& labels_in, const at::Tensor& lse, int64_t ignore_index,
                    double smoothing, double z_loss, double softcap, at::Tensor& out) {
  const at::Tensor labels = labels_in.contiguous(), grad = grad_in.contiguous();
  check(logits, labels, ignore_index, softcap);
  TORCH_CHECK_VALUE(grad.scalar_type() == at::kFloat && grad.sizes() == labels.sizes(),
                    "fastllm cross_entropy: the gradient of the losses must be float32 (T,)");
  const at::Tensor x = as_rows(logits);
  const Options o = options(logits, smoothing, z_loss, softcap);
  with_dtype(logits, "cross_entropy", [&]<typename T>(T) {
    at::parallel_for(0, logits.size(0), rows_per_task(o.vocab), [&](int64_t begin, int64_t end) {
      std::vector<float> probabilities(o.vocab);
      for (int64_t row = begin; row < end; ++row) {
        const int64_t label = data<int64_t>(labels)[row];
        const T* from = data<T>(x) + row * x.stride(0);
        T* to = mutable_data<T>(out) + row * out.stride(0);
        if (label == ignore_index) {
          std::fill(to, to + o.vocab, T{});
          continue;
        }
        const float log_sum = data<float>(lse)[row];
        dispatch<RowProbability>(from, probabilities.data(), log_sum, o);
        dispatch<RowGradient>(from, to, const_cast<const float*>(probabilities.data()), 1.0f, label,
                              log_sum, data<float>(grad)[row], o);
      }
    });
  });
}

at::Tensor cross_entropy_backward(const at::Tensor& grad, const at::Tensor& logits,
                                  const at::Tensor& labels, const at::Tensor& lse,
                                  int64_t ignore_index, double smoothing, double z_loss,
                                  double softcap) {
  at::Tensor out =
      at::empty(logits.sizes(), logits.options().memory_format(at::MemoryFormat::Contiguous));
  write_gradient(grad, logits, labels, lse, ignore_index, smoothing, z_loss, softcap, out);
  return out;
}

void check_rows_in_place(const at::Tensor& logits) {
  TORCH_CHECK_VALUE(logits.dim() == 2 && (logits.size(1) <= 1 || logits.stride(1) == 1),
                    "fastllm cross_entropy: logits that are overwritten need a last stride of 1");
}

void cross_entropy_backward_(const at::Tensor& grad, at::Tensor& logits, const at::Tensor& labels,
                             const at::Tensor& lse, int64_t ignore_index, double smoothing,
                             double z_loss, double softcap) {
  check_rows_in_place(logits);
  write_gradient(grad, logits, labels, lse, ignore_index, smoothing, z_loss, softcap, logits);
}

// Losses, and the logits overwritten by the gradient of their sum, in one pass over memory.
at::Tensor cross_entropy_with_gradient_(at::Tensor& logits, const at::Tensor& labels_in,
                                        int64_t ignore_index, double smoothing, double z_loss,
                                        double softcap) {
  const at::Tensor labels = labels_in.contiguous();
  check_rows_in_place(logits);
  check(logits, labels, ignore_index, softcap);
  const Options o = options(logits, smoothing, z_loss, softcap);
  const int64_t rows = logits.size(0), stride = logits.stride(0);
  at::Tensor loss = at::zeros({rows}, logits.options().dtype(at::kFloat));
  with_dtype(logits, "cross_entropy", [&]<typename T>(T) {
    at::parallel_for(0, rows, rows_per_task(o.vocab), [&](int64_t begin, int64_t end) {
      std::vector<float> exponentials(o.vocab);
      for (int64_t row = begin; row < end; ++row) {
        const int64_t label = data<int64_t>(labels)[row];
        T* x = mutable_data<T>(logits) + row * stride;
        if (label == ignore_index) {
          std::fill(x, x + o.vocab, T{});
          continue;
        }
        float lse = 0.0f, max = 0.0f;
        dispatch<RowLoss>(const_cast<const T*>(x), label, o, exponentials.data(),
                          mutable_data<float>(loss) + row, &lse, &max);
        dispatch<RowGradient>(const_cast<const T*>(x), x,
                              const_cast<const float*>(exponentials.data()), std::exp(max - lse),
                              label, lse, 1.0f, o);
      }
    });
  });
  return loss;
}

}  // namespace
}  // namespace fastllm

TORCH_LIBRARY_FRAGMENT(fastllm_cpu, m) {
  m.def(
      "cross_entropy(Tensor logits, Tensor labels, int ignore_index, float label_smoothing, "
      "float z_loss, float softcap) -> (Tensor loss, Tensor lse)");
  m.def(
      "cross_entropy_backward(Tensor grad, Tensor logits, Tensor labels, Tensor lse, "
      "int ignore_index, float label_smoothing, float z_loss, float softcap) -> Tensor");
  m.def(
      "cross_entropy_backward_(Tensor grad, Tensor(a!) logits, Tensor labels, Tensor lse, "
      "int ignore_index, float label_smoothing, float z_loss, float softcap) -> ()");
  m.def(
      "cross_entropy_with_gradient_(Tensor(a!) logits, Tensor labels, int ignore_index, "
      "float label_smoothing, float z_loss, float softcap) -> Tensor");
}

TORCH_LIBRARY_IMPL(fastllm_cpu, CPU, m) {
  m.impl("cross_entropy", &fastllm::cross_entropy_forward);
  m.impl("cross_entropy_backward", &fastllm::cross_entropy_backward);
  m.impl("cross_entropy_backward_", &fastllm::cross_entropy_backward_);
  m.impl("cross_entropy_with_gradient_", &fastllm::cross_entropy_with_gradient_);
}
