#include "adamw.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

namespace fastllm {
namespace {

using OptionalTensors = c10::List<std::optional<at::Tensor>>;

// Elements of one task: 28 bytes each move for bf16 weights, so a task is some 450 KB, large
// enough to hide its start and small enough to share out evenly.
constexpr int64_t kChunk = 1 << 14;

// ---------------------------------------------------------------- the update of a run of elements

// One run of consecutive elements of one tensor. `master` is the fp32 weight that is updated (the
// parameter itself where it is fp32; null where a bf16 parameter has none).
struct Run {
  void* param;
  const void* grad;
  float* exp_avg;
  float* exp_avg_sq;
  float* master;
  int64_t size;
  int64_t offset;  // global index of the first element
};

// Weights in fp32: `master` is the parameter.
template <typename Grad>
struct StepFloat {
  static FASTLLM_INLINE void run(const Run& r, const AdamWScalars& scalars) {
    const Grad* __restrict grad = static_cast<const Grad*>(r.grad);
    float* __restrict m = r.exp_avg;
    float* __restrict v = r.exp_avg_sq;
    float* __restrict p = r.master;
    const AdamWScalars s = scalars;
    for (int64_t i = 0; i < r.size; ++i) {
      p[i] = adamw_update(s, p[i], to_float(grad[i]), m[i], v[i]);
    }
  }
};

// Weights in bf16 or fp16 beside an fp32 master, rounded to nearest.
template <typename Param, typename Grad>
struct StepMaster {
  static FASTLLM_INLINE void run(const Run& r, const AdamWScalars& scalars) {
    Param* __restrict param = static_cast<Param*>(r.param);
    const Grad* __restrict grad = static_cast<const Grad*>(r.grad);
    float* __restrict m = r.exp_avg;
    float* __restrict v = r.exp_avg_sq;
    float* __restrict p = r.master;
    const AdamWScalars s = scalars;
    for (int64_t i = 0; i < r.size; ++i) {
      p[i] = adamw_update(s, p[i], to_float(grad[i]), m[i], v[i]);
      param[i] = from_float<Param>(p[i]);
    }
  }
};

// Weights in bf16, rounded stochastically, with or without a master.
template <bool has_master, typename Grad>
struct StepStochastic {
  static FASTLLM_INLINE void run(const Run& r, const AdamWScalars& scalars,
                                 const StochasticRounding& generator) {
    // The upper half of the index is constant between multiples of 2^32: at most two pieces.
    int64_t done = 0;
    while (done < r.size) {
      const uint64_t index = static_cast<uint64_t>(r.offset + done);
      const int64_t room = (int64_t{1} << 32) - static_cast<int64_t>(index & 0xffffffffu);
      const int64_t count = std::min(room, r.size - done);
      piece(r, done, count, index, scalars, generator);
      done += count;
    }
  }

  static FASTLLM_INLINE void piece(const Run& r, int64_t begin, int64_t count, uint64_t index,
                                   const AdamWScalars& scalars,
                                   const StochasticRounding& generator) {
    bf16* __restrict param = static_cast<bf16*>(r.param) + begin;
    const Grad* __restrict grad = static_cast<const Grad*>(r.grad) + begin;
    float* __restrict m = r.exp_avg + begin;
    float* __restrict v = r.exp_avg_sq + begin;
    float* __restrict p = has_master ? r.master + begin : nullptr;
    const AdamWScalars s = scalars;
    const StochasticRounding sr = generator;
    const uint32_t low = static_cast<uint32_t>(index);
    const uint32_t block_key = sr.block_key(static_cast<uint32_t>(index >> 32));
    for (int64_t i = 0; i < count; ++i) {
      const float old = has_master ? p[i] : to_float(param[i]);
      const float updated = adamw_update(s, old, to_float(grad[i]), m[i], v[i]);
      if (has_master) p[i] = updated;
      param[i] = sr.round(updated, sr.noise(low + static_cast<uint32_t>(i), block_key));
    }
  }
};

template <typename Grad>
void step_run(const Run& r, at::ScalarType param, bool stochastic, const AdamWScalars& s,
              const StochasticRounding& sr) {
  if (param == at::kFloat) return dispatch<StepFloat<Grad>, const Run&, const AdamWScalars&>(r, s);
  if (param == at::kHalf) {
    return dispatch<StepMaster<fp16, Grad>, const Run&, const AdamWScalars&>(r, s);
  }
  if (!stochastic) {
    return dispatch<StepMaster<bf16, Grad>, const Run&, const AdamWScalars&>(r, s);
  }
  if (r.master != nullptr) {
    return dispatch<StepStochastic<true, Grad>, const Run&, const AdamWScalars&,
                    const StochasticRounding&>(r, s, sr);
  }
  dispatch<StepStochastic<false, Grad>, const Run&, const AdamWScalars&,
           const StochasticRounding&>(r, s, sr);
}

// ---------------------------------------------------------------------------------- what is asked

bool is_grad_dtype(at::ScalarType type) {
  return type == at::kFloat || type == at::kBFloat16 || type == at::kHalf;
}

void check_tensor(const at::Tensor& t, const char* list, size_t i, const at::Tensor& like,
                  at::ScalarType dtype) {
  TORCH_CHECK_VALUE(t.device().is_cpu() && t.layout() == at::kStrided, "adamw_step_: ", list, "[",
                    i, "] must be a dense CPU tensor, found ", t.layout(), " on ", t.device());
  TORCH_CHECK_VALUE(t.scalar_type() == dtype, "adamw_step_: ", list, "[", i, "] must be ", dtype,
                    ", found ", t.scalar_type());
  TORCH_CHECK_VALUE(t.sizes() == like.sizes(), "adamw_step_: ", list, "[", i,
                    "] must have the shape of params[", i, "], ", like.sizes(), ", found ",
                    t.sizes());
  TORCH_CHECK_VALUE(t.is_contiguous(), "adamw_step_: ", list, "[", i,
                    "] must be contiguous, found strides ", t.strides(), " for shape ",
                    t.sizes());
}

void check_length(size_t found, size_t expected, const char* list) {
  TORCH_CHECK_VALUE(found == expected, "adamw_step_: expected ", expected, " ", list,
                    ", one per parameter, found ", found);
}

void check_master(const at::Tensor& param, const std::optional<at::Tensor>& master,
                  bool stochastic, size_t i) {
  const at::ScalarType type = param.scalar_type();
  if (type == at::kFloat) {
    TORCH_CHECK_VALUE(!master.has_value(), "adamw_step_: params[", i,
                      "] is Float and so its own master; masters[", i, "] must be None");
    return;
  }
  TORCH_CHECK_VALUE(type == at::kBFloat16 || type == at::kHalf, "adamw_step_: params[", i,
                    "] must be Float, BFloat16 or Half, found ", type);
  TORCH_CHECK_VALUE(!stochastic || type == at::kBFloat16, "adamw_step_: params[", i,
                    "] must be BFloat16 for stochastic rounding, found ", type);
  TORCH_CHECK_VALUE(master.has_value() || stochastic, "adamw_step_: params[", i, "] is ", type,
                    " and needs an fp32 masters[", i,
                    "] or, for BFloat16, stochastic_rounding; found neither");
  if (master.has_value()) check_tensor(*master, "masters", i, param, at::kFloat);
}

void check_arguments(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
                     at::TensorList exp_avg_sqs, const OptionalTensors& masters,
                     const at::Tensor& grad_scale, bool stochastic, int64_t step,
                     at::IntArrayRef offsets) {
  check_length(grads.size(), params.size(), "grads");
  check_length(exp_avgs.size(), params.size(), "exp_avgs");
  check_length(exp_avg_sqs.size(), params.size(), "exp_avg_sqs");
  check_length(masters.size(), params.size(), "masters");
  if (!offsets.empty()) check_length(offsets.size(), params.size(), "offsets");
  TORCH_CHECK_VALUE(step >= 1, "adamw_step_: step counts from 1, found ", step);
  TORCH_CHECK_VALUE(grad_scale.numel() == 1 && grad_scale.scalar_type() == at::kFloat &&
                        grad_scale.device().is_cpu(),
                    "adamw_step_: grad_scale must be one Float on the CPU, found ",
                    grad_scale.scalar_type(), " of shape ", grad_scale.sizes(), " on ",
                    grad_scale.device());
  for (size_t i = 0; i < params.size(); ++i) {
    const at::Tensor& param = params[i];
    check_tensor(param, "params", i, param, param.scalar_type());
    check_master(param, masters.get(i), stochastic, i);
    TORCH_CHECK_VALUE(is_grad_dtype(grads[i].scalar_type()), "adamw_step_: grads[", i,
                      "] must be Float, BFloat16 or Half, found ", grads[i].scalar_type());
    check_tensor(grads[i], "grads", i, param, grads[i].scalar_type());
    check_tensor(exp_avgs[i], "exp_avgs", i, param, at::kFloat);
    check_tensor(exp_avg_sqs[i], "exp_avg_sqs", i, param, at::kFloat);
    TORCH_CHECK_VALUE(offsets.empty() || offsets[i] >= 0, "adamw_step_: offsets[", i,
                      "] must not be negative, found ", offsets[i]);
  }
}

// ------------------------------------------------------------------------------------- the chunks

// What a task needs to know of a tensor, and the number of its first chunk among all.
struct Job {
  Run whole;
  at::ScalarType param;
  at::ScalarType grad;
  int64_t first_chunk;
};

std::vector<Job> plan_jobs(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
                           at::TensorList exp_avg_sqs, const OptionalTensors& masters,
                           at::IntArrayRef offsets, int64_t& chunks) {
  std::vector<Job> jobs;
  jobs.reserve(params.size());
  int64_t offset = 0;
  chunks = 0;
  for (size_t i = 0; i < params.size(); ++i) {
    const int64_t size = params[i].numel();
    const std::optional<at::Tensor> master = masters.get(i);
    const bool own = params[i].scalar_type() == at::kFloat;
    float* weight = own ? params[i].mutable_data_ptr<float>()
                        : (master.has_value() ? master->mutable_data_ptr<float>() : nullptr);
    const Run whole{params[i].mutable_data_ptr(), grads[i].const_data_ptr(),
                    exp_avgs[i].mutable_data_ptr<float>(),
                    exp_avg_sqs[i].mutable_data_ptr<float>(), weight, size,
                    offsets.empty() ? offset : offsets[i]};
    if (size > 0) {
      jobs.push_back({whole, params[i].scalar_type(), grads[i].scalar_type(), chunks});
    }
    chunks += (size + kChunk - 1) / kChunk;
    offset += size;
  }
  return jobs;
}

Run chunk_of(const Job& job, int64_t chunk) {
  const int64_t begin = (chunk - job.first_chunk) * kChunk;
  const int64_t param_bytes = job.param == at::kFloat ? 4 : 2;
  const int64_t grad_bytes = job.grad == at::kFloat ? 4 : 2;
  Run r = job.whole;
  r.param = static_cast<char*>(r.param) + begin * param_bytes;
  r.grad = static_cast<const char*>(r.grad) + begin * grad_bytes;
  r.exp_avg += begin;
  r.exp_avg_sq += begin;
  if (r.master != nullptr) r.master += begin;
  r.offset += begin;
  r.size = std::min(kChunk, r.size - begin);
  return r;
}

// The last of `items` whose `first` is not beyond `number`.
template <typename Item>
size_t find_item(const std::vector<Item>& items, int64_t Item::*first, int64_t number) {
  const auto after = std::upper_bound(
      items.begin(), items.end(), number,
      [first](int64_t value, const Item& item) { return value < item.*first; });
  return static_cast<size_t>(after - items.begin()) - 1;
}

// Autograd must notice that a weight it saved has changed since.
void bump_versions(at::TensorList tensors) {
  for (const at::Tensor& t : tensors) {
    if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
  }
}

// --------------------------------------------------------------------------------------- the norm

constexpr int64_t kNormBlock = 4096;
constexpr int64_t kLanes = 64;

// Sum of squares of one block: fp32 in a fixed set of lanes (each adds at most 64 terms), then
// the lanes in order in double.
template <typename Grad>
struct SquareSum {
  static FASTLLM_INLINE double run(const Grad* grad, int64_t size) {
    float lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) {
      for (int64_t j = 0; j < kLanes; ++j) {
        const float g = to_float(grad[i + j]);
        lanes[j] += g * g;
      }
    }
    for (int64_t j = 0; i + j < size; ++j) {
      const float g = to_float(grad[i + j]);
      lanes[j] += g * g;
    }
    double sum = 0;
    for (const float lane : lanes) sum += lane;
    return sum;
  }
};

struct NormJob {
  const void* data;
  at::ScalarType type;
  int64_t size;
  int64_t first_block;
};

template <typename Grad>
double block_sum(const NormJob& job, int64_t begin, int64_t size) {
  return dispatch<SquareSum<Grad>>(static_cast<const Grad*>(job.data) + begin, size);
}

double block_sum(const NormJob& job, int64_t block) {
  const int64_t begin = (block - job.first_block) * kNormBlock;
  const int64_t size = std::min(kNormBlock, job.size - begin);
  if (job.type == at::kFloat) return block_sum<float>(job, begin, size);
  if (job.type == at::kHalf) return block_sum<fp16>(job, begin, size);
  return block_sum<bf16>(job, begin, size);
}

}  // namespace

AdamWScalars::AdamWScalars(double lr, double beta1, double beta2, double eps, double weight_decay,
                           int64_t step, float grad_scale)
    : one_minus_beta1(static_cast<float>(1 - beta1)),
      beta2(static_cast<float>(beta2)),
      one_minus_beta2(static_cast<float>(1 - beta2)),
      eps(static_cast<float>(eps)),
      decay(static_cast<float>(1 - lr * weight_decay)),
      step_size(static_cast<float>(lr / (1 - std::pow(beta1, static_cast<double>(step))))),
      second_correction(
          static_cast<float>(std::sqrt(1 - std::pow(beta2, static_cast<double>(step))))),
      grad_scale(grad_scale) {}

void adamw_step(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
                at::TensorList exp_avg_sqs, const OptionalTensors& masters, double lr,
                double beta1, double beta2, double eps, double weight_decay,
                const at::Tensor& grad_scale, bool stochastic_rounding, int64_t seed,
                int64_t step, at::IntArrayRef offsets) {
  check_arguments(params, grads, exp_avgs, exp_avg_sqs, masters, grad_scale, stochastic_rounding,
                  step, offsets);
  const float scale = *grad_scale.const_data_ptr<float>();
  if (!std::isfinite(scale)) return;
  const AdamWScalars scalars(lr, beta1, beta2, eps, weight_decay, step, scale);
  const StochasticRounding generator(seed, step);
  int64_t chunks = 0;
  const std::vector<Job> jobs =
      plan_jobs(params, grads, exp_avgs, exp_avg_sqs, masters, offsets, chunks);
  at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    size_t at = find_item(jobs, &Job::first_chunk, begin);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      if (at + 1 < jobs.size() && jobs[at + 1].first_chunk <= chunk) ++at;
      const Job& job = jobs[at];
      const Run run = chunk_of(job, chunk);
      if (job.grad == at::kFloat) {
        step_run<float>(run, job.param, stochastic_rounding, scalars, generator);
      } else if (job.grad == at::kHalf) {
        step_run<fp16>(run, job.param, stochastic_rounding, scalars, generator);
      } else {
        step_run<bf16>(run, job.param, stochastic_rounding, scalars, generator);
      }
    }
  });
  bump_versions(params);
  bump_versions(exp_avgs);
  bump_versions(exp_avg_sqs);
}

at::Tensor grad_norm(at::TensorList grads) {
  std::vector<NormJob> jobs;
  int64_t blocks = 0;
  for (size_t i = 0; i < grads.size(); ++i) {
    const at::Tensor& grad = grads[i];
    TORCH_CHECK_VALUE(grad.device().is_cpu() && grad.layout() == at::kStrided &&
                          is_grad_dtype(grad.scalar_type()) && grad.is_contiguous(),
                      "grad_norm: grads[", i,
                      "] must be a contiguous Float, BFloat16 or Half tensor on the CPU, found ",
                      grad.scalar_type(), " of shape ", grad.sizes(), " and layout ",
                      grad.layout(), " on ", grad.device());
    if (grad.numel() > 0) {
      jobs.push_back({grad.const_data_ptr(), grad.scalar_type(), grad.numel(), blocks});
      blocks += (grad.numel() + kNormBlock - 1) / kNormBlock;
    }
  }
  std::vector<double> sums(blocks);
  at::parallel_for(0, blocks, 8, [&](int64_t begin, int64_t end) {
    size_t at = find_item(jobs, &NormJob::first_block, begin);
    for (int64_t block = begin; block < end; ++block) {
      if (at + 1 < jobs.size() && jobs[at + 1].first_block <= block) ++at;
      sums[block] = block_sum(jobs[at], block);
    }
  });
  double total = 0;
  for (const double sum : sums) total += sum;
  at::Tensor norm = at::empty({}, at::TensorOptions().dtype(at::kFloat));
  *norm.mutable_data_ptr<float>() = static_cast<float>(std::sqrt(total));
  return norm;
}

TORCH_LIBRARY_FRAGMENT(fastllm_cpu, m) {
  m.def(
      "adamw_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor(d!)?[] masters, float lr, float beta1, float beta2, "
      "float eps, float weight_decay, Tensor grad_scale, bool stochastic_rounding, int seed, "
      "int step, int[] offsets) -> ()");
  m.def("grad_norm(Tensor[] grads) -> Tensor");
}

TORCH_LIBRARY_IMPL(fastllm_cpu, CPU, m) {
  m.impl("adamw_step_", adamw_step);
  m.impl("grad_norm", grad_norm);
}

}  // namespace fastllm
