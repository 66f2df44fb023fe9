#include "bucket.h"

#include <utility>

#include "quantize.h"

namespace fastllm {
namespace {

at::ScalarType wire_type(const std::string& wire, at::ScalarType param) {
  if (param == at::kDouble || wire == "same") return param;
  if (wire == "fp32") return at::kFloat;
  if (wire == "bf16") return at::kBFloat16;
  TORCH_CHECK_VALUE(wire == "int8", "wire must be same, fp32, bf16 or int8, found ", wire);
  return at::kByte;
}

std::vector<int64_t> natural_order(int64_t world) {
  std::vector<int64_t> order;
  for (int64_t rank = 0; rank < world; ++rank) order.push_back(rank);
  return order;
}

}  // namespace

Bucket::Bucket(std::string name, std::vector<at::Tensor> params, bool trainable,
               const EngineOptions& options, const Collective& collective, MemoryPool& memory,
               BufferPool& buffers)
    : name_(std::move(name)),
      trainable_(trainable),
      flat_(std::move(params), collective.world(), collective.rank(), options.release,
            options.host_shards, memory),
      buffers_(buffers),
      narrow_params_(options.param_wire == "int8") {
  const at::Tensor& first = flat_.params()[0];
  wire_ = wire_type(options.wire, first.scalar_type());
  native_ = options.native && (wire_ == at::kFloat || wire_ == at::kDouble);
  packed_.resize(flat_.params().size());
  reached_.resize(flat_.params().size());
  if (!trainable) return;
  const Layout& layout = flat_.layout();
  const std::vector<Run> all =
      make_runs(layout, native_ ? natural_order(collective.world())
                                : sent_order(collective.world(), collective.rank()));
  runs_.resize(flat_.params().size());
  for (const Run& run : all) runs_[run.parameter].push_back(run);
  gaps_ = make_gaps(all, layout.padded());
  const auto like = first.options().requires_grad(false);
  const int64_t kept = options.gather_grads ? layout.padded() : layout.shard;
  grad_ = at::zeros({kept}, like.dtype(wide(first.scalar_type())));
  if (options.gather_grads) {
    whole_grad_ = grad_;
    grad_ = whole_grad_.narrow(0, collective.rank() * layout.shard, layout.shard);
  }
  if (wire_ == at::kByte) error_ = at::zeros({layout.padded()}, like.dtype(at::kFloat));
}

at::Tensor Bucket::take_buffer(int64_t numel, at::ScalarType type) {
  const at::TensorOptions options = flat_.full().options().dtype(type);
  const int64_t bytes = numel * static_cast<int64_t>(c10::elementSize(type));
  if (flat_.full().is_cpu()) {
    if (std::optional<at::Tensor> memory = buffers_.take(bytes)) return memory->view(type);
  }
  return at::empty({numel}, options);
}

void Bucket::give_buffer(const at::Tensor& buffer) {
  if (buffer.defined() && buffer.is_cpu() && buffer.numel() > 0) {
    buffers_.give(static_cast<int64_t>(buffer.nbytes()), buffer.view(at::kByte));
  }
}

void Bucket::keep(int64_t i) {
  at::Tensor& grad = flat_.params()[i].mutable_grad();
  const at::ScalarType type = wide(grad.scalar_type());
  if (grad.scalar_type() == type) return;  // autograd itself adds to it
  const auto kept = kept_.find(i);
  if (kept == kept_.end()) {
    kept_[i] = grad.to(type);
  } else {
    kept->second.add_(grad);
  }
  grad.reset();
}

void Bucket::pack(int64_t i) {
  if (!buffer_.defined()) {
    // int8 is made of the whole buffer at once: it is packed in the wide type before.
    buffer_ = take_buffer(flat_.layout().padded(),
                          wire_ == at::kByte ? wide(flat_.params()[0].scalar_type()) : wire_);
    for (const Run& gap : gaps_) buffer_.narrow(0, gap.begin, gap.size).zero_();
  }
  at::Tensor& slot = flat_.params()[i].mutable_grad();
  at::Tensor grad = slot;
  slot.reset();
  const auto kept = kept_.find(i);
  if (kept != kept_.end()) {
    grad = grad.defined() ? kept->second.add_(grad) : kept->second;
    kept_.erase(kept);
  }
  if (grad.defined()) grad = grad.reshape({-1});
  for (const Run& run : runs_[i]) {
    const at::Tensor target = buffer_.narrow(0, run.begin, run.size);
    if (grad.defined()) {
      target.copy_(grad.narrow(0, run.offset, run.size));
    } else {
      target.zero_();
    }
  }
  packed_count_ += !packed_[i];
  packed_[i] = true;
}

void Bucket::clear_packed() {
  packed_.assign(packed_.size(), false);
  packed_count_ = 0;
}

Flight Bucket::start(Collective& collective) {
  at::Tensor buffer = std::exchange(buffer_, at::Tensor());
  if (wire_ == at::kByte) {
    const at::Tensor wide_buffer = buffer;
    buffer = take_buffer(wide_buffer.numel() / kTile * kInt8Bytes, at::kByte);
    quantize_int8(buffer, wide_buffer, error_, 1.0);
    give_buffer(wide_buffer);
  }
  const int64_t own = buffer.numel() / collective.world();
  const int64_t room = native_ ? own : own * (collective.world() - 1);
  return collective.start_reduce(buffer, take_buffer(room, buffer.scalar_type()), native_);
}

void Bucket::land(Collective& collective, const Flight& flight, double scale) {
  square_ = collective.land(flight, grad_, native_, scale, summed_);
  summed_ = true;
  give_buffer(flight.buffer);
  give_buffer(flight.received);
}

void Bucket::gather_grad(Collective& collective) {
  grad_gather_ = collective.all_gather(whole_grad_, grad_);
}

// What is sent in int8 is what every rank computes with, this one too.
void Bucket::gather_params(Collective& collective, bool exact) {
  params_begun_ = true;
  at::Tensor shard = flat_.shard().to(flat_.full().device(), /*non_blocking=*/true);
  if (!narrow_params_ || exact) {
    params_gather_ = collective.all_gather(flat_.full(), shard);
    return;
  }
  at::Tensor narrow = at::empty({shard.numel() / kTile * kInt8Bytes},
                                shard.options().dtype(at::kByte));
  quantize_int8(narrow, shard, std::nullopt, 1.0);
  params_wire_ = take_buffer(narrow.numel() * collective.world(), at::kByte);
  params_gather_ = collective.all_gather(params_wire_, narrow);
}

void Bucket::wait_params() {
  params_gather_.wait();
  params_begun_ = false;
  if (!params_wire_.defined()) return;
  dequantize_int8(flat_.full(), params_wire_);
  give_buffer(params_wire_);
  params_wire_.reset();
}

bool Bucket::has_kept() const {
  if (!kept_.empty()) return true;
  for (const at::Tensor& param : flat_.params()) {
    if (param.grad().defined()) return true;
  }
  return false;
}

std::vector<int64_t> Bucket::unreached() const {
  std::vector<int64_t> found;
  for (size_t i = 0; i < reached_.size(); ++i) {
    if (!reached_[i] && flat_.params()[i].numel() > 0) found.push_back(static_cast<int64_t>(i));
  }
  return found;
}

void Bucket::forget() {
  summed_ = false;
  square_ = 0.0;
  kept_.clear();
  reached_.assign(reached_.size(), false);
  for (const at::Tensor& param : flat_.params()) param.mutable_grad().reset();
}

}  // namespace fastllm
