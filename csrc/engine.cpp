#include "engine.h"

#include <torch/csrc/autograd/utils/lambda_post_hook.h>

namespace fastllm {

Engine::Engine(Group gather, Group reduce, int64_t rank, int64_t world, EngineOptions options)
    : options_(std::move(options)),
      collective_(std::move(gather), std::move(reduce), rank, world, options_.native),
      memory_(4),
      buffers_(2 * options_.in_flight + 2) {}

Engine::~Engine() { close(); }

int64_t Engine::add(const std::string& name, std::vector<at::Tensor> params, bool trainable) {
  const int64_t number = static_cast<int64_t>(buckets_.size());
  buckets_.push_back(std::make_unique<Bucket>(
      name, std::move(params), trainable, options_, collective_, memory_, buffers_));
  Bucket& bucket = *buckets_.back();
  if (options_.release) bucket.flat().release();
  if (!trainable) return number;
  order_.push_back(number);
  for (size_t i = 0; i < bucket.flat().params().size(); ++i) {
    NodePointer node = torch::autograd::impl::grad_accumulator(bucket.flat().params()[i]);
    const int64_t place = static_cast<int64_t>(i);
    const uintptr_t key = node->add_post_hook(
        std::make_unique<torch::autograd::utils::LambdaPostHook>(
            [this, number, place](const torch::autograd::variable_list& outputs,
                                  const torch::autograd::variable_list&) {
              arrived(number, place);
              return outputs;
            }));
    hooks_.push_back({node, key});
  }
  return number;
}

// A parameter's gradient is whole for this micro-batch.
void Engine::arrived(int64_t number, int64_t i) {
  const at::NoGradGuard no_grad;
  Bucket& bucket = *buckets_[number];
  if (!bucket.flat().params()[i].grad().defined()) return;
  bucket.reach(i);
  if (local) return bucket.keep(i);
  if (bucket.packed(i)) close_round();
  bucket.pack(i);
  open_ = true;
  if (bucket.full()) {
    if (options_.release) release(number);
    launch_ready();
  }
}

void Engine::launch_ready() {
  for (; next_ < order_.size() && buckets_[order_[next_]]->full(); ++next_) launch(order_[next_]);
}

void Engine::launch(int64_t number) {
  Bucket& bucket = *buckets_[number];
  if (bucket.flat().layout().shard == 0) return;
  say(check, "reduce-scatter of " + bucket.name());
  flying_.emplace_back(number, bucket.start(collective_));
  while (static_cast<int64_t>(flying_.size()) > options_.in_flight) land();
}

void Engine::land() {
  const auto [number, flight] = std::move(flying_.front());
  flying_.pop_front();
  Bucket& bucket = *buckets_[number];
  wait_grad(bucket);  // of an earlier micro-batch
  say(watch, "reduce-scatter of " + bucket.name());
  bucket.land(collective_, flight, options_.scale);
  say(watch, "");
  if (!options_.gather_grads) return;
  say(check, "all-gather of the gradients of " + bucket.name());
  bucket.gather_grad(collective_);
  if (options_.in_flight == 0) wait_grad(bucket);
}

void Engine::wait_grad(Bucket& bucket) {
  if (!bucket.gathers_grad()) return;
  say(watch, "all-gather of the gradients of " + bucket.name());
  bucket.wait_grad();
  say(watch, "");
}

// No more gradients of a bucket will come in this micro-batch: those that are lacking are zero.
void Engine::complete(int64_t number) {
  const at::NoGradGuard no_grad;
  Bucket& bucket = *buckets_.at(number);
  if (!local) {
    for (size_t i = 0; i < bucket.flat().params().size(); ++i) {
      if (!bucket.packed(i)) bucket.pack(i);
    }
    open_ = true;
  }
  if (options_.release) release(number);
  if (!local) launch_ready();
}

void Engine::close_round() {
  const bool before = std::exchange(local, false);
  for (size_t at = next_; at < order_.size(); ++at) complete(order_[at]);
  local = before;
  for (const int64_t number : order_) buckets_[number]->clear_packed();
  next_ = 0;
  open_ = false;
  ++rounds_;
}

std::pair<double, std::vector<std::pair<int64_t, int64_t>>> Engine::finish() {
  const at::NoGradGuard no_grad;
  if (open_) close_round();
  bool again = rounds_ == 0;
  for (const int64_t number : order_) again = again || buckets_[number]->has_kept();
  if (again) close_round();
  while (!flying_.empty()) land();
  for (const int64_t number : order_) wait_grad(*buckets_[number]);
  double square = 0.0;
  std::vector<std::pair<int64_t, int64_t>> unused;
  for (const int64_t number : order_) {
    square += buckets_[number]->square();
    for (const int64_t i : buckets_[number]->unreached()) unused.emplace_back(number, i);
  }
  return {square, unused};
}

void Engine::zero() {
  for (const int64_t number : order_) buckets_[number]->forget();
  rounds_ = 0;
}

void Engine::gather_start(int64_t number) {
  const at::NoGradGuard no_grad;
  Bucket& bucket = *buckets_.at(number);
  if (bucket.flat().whole() || bucket.gathers_params()) return;
  say(check, "all-gather of " + bucket.name());
  bucket.flat().allocate();
  bucket.gather_params(collective_, exact);
}

void Engine::gather_wait(int64_t number) {
  const at::NoGradGuard no_grad;
  Bucket& bucket = *buckets_.at(number);
  if (bucket.flat().whole()) return;
  gather_start(number);
  wait_params(bucket);
  bucket.flat().show();
}

void Engine::release(int64_t number) {
  const at::NoGradGuard no_grad;
  Bucket& bucket = *buckets_.at(number);
  if (!bucket.flat().whole() && !bucket.gathers_params()) return;
  if (bucket.gathers_params()) wait_params(bucket);
  bucket.flat().release();
}

void Engine::wait_params(Bucket& bucket) {
  say(watch, "all-gather of " + bucket.name());
  bucket.wait_params();
  say(watch, "");
}

void Engine::publish() {
  const at::NoGradGuard no_grad;
  if (options_.release) {
    for (const int64_t number : order_) release(number);
    return;
  }
  for (const int64_t number : order_) {
    Bucket& bucket = *buckets_[number];
    say(check, "all-gather of " + bucket.name());
    bucket.gather_params(collective_, exact);
  }
  for (const int64_t number : order_) {
    wait_params(*buckets_[number]);
    buckets_[number]->flat().bump();
  }
}

void Engine::close() {
  for (Hook& hook : hooks_) hook.node->del_post_hook(hook.key);
  hooks_.clear();
}

void Engine::say(const Listener& listener, const std::string& what) const {
  if (listener) listener(what);
}

}  // namespace fastllm
