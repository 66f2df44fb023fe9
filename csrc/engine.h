// ZeRO's engine: buckets, their order, and the hooks that fill them while backward goes on. The same
// interface, order of collectives and sums as fastllm/dist/python_engine.py.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/autograd/variable.h>

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bucket.h"
#include "collective.h"

namespace fastllm {

// Hears what is about to be launched or waited for; empty: a wait is over.
using Listener = std::function<void(const std::string&)>;

class Engine {
 public:
  Engine(Group gather, Group reduce, int64_t rank, int64_t world, EngineOptions options);
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  int64_t add(const std::string& name, std::vector<at::Tensor> params, bool trainable);
  Bucket& bucket(int64_t number) { return *buckets_.at(number); }
  int64_t sent_bytes() const { return collective_.sent_bytes(); }

  void complete(int64_t number);
  void close_round();
  std::pair<double, std::vector<std::pair<int64_t, int64_t>>> finish();
  void zero();

  void gather_start(int64_t number);
  void gather_wait(int64_t number);
  void release(int64_t number);
  void publish();
  void close();

  bool local = false;
  bool exact = false;
  Listener check;
  Listener watch;

 private:
  void arrived(int64_t number, int64_t i);
  void launch_ready();
  void launch(int64_t number);
  void land();
  void wait_params(Bucket& bucket);
  void wait_grad(Bucket& bucket);
  void say(const Listener& listener, const std::string& what) const;

  using NodePointer = decltype(torch::autograd::impl::grad_accumulator(at::Tensor()));
  struct Hook {
    NodePointer node;
    uintptr_t key;
  };

  EngineOptions options_;
  Collective collective_;
  MemoryPool memory_;
  BufferPool buffers_;
  std::vector<std::unique_ptr<Bucket>> buckets_;
  std::vector<int64_t> order_;  // trainable buckets, as gradients come
  size_t next_ = 0;
  bool open_ = false;
  int64_t rounds_ = 0;
  std::deque<std::pair<int64_t, Flight>> flying_;
  std::vector<Hook> hooks_;
};

}  // namespace fastllm
