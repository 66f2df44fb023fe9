// The gradients of a bucket: packed into one buffer as backward makes them, cast to the wire's
// dtype, and summed over micro-batches in this rank's shard.
#pragma once

#include <ATen/ATen.h>

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "collective.h"
#include "flat_buffer.h"

namespace fastllm {

using BufferPool = Pool<at::Tensor>;

struct EngineOptions {
  std::string wire = "same";        // of gradients: "same", "fp32", "bf16" or "int8"
  std::string param_wire = "same";  // of parameters: "same" or, with release, "int8"
  double scale = 1.0;
  bool native = false;
  bool gather_grads = false;
  bool release = false;
  bool host_shards = false;
  int64_t in_flight = 2;
};

// What gradients are summed in.
inline at::ScalarType wide(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

class Bucket {
 public:
  Bucket(std::string name, std::vector<at::Tensor> params, bool trainable,
         const EngineOptions& options, const Collective& collective, MemoryPool& memory,
         BufferPool& buffers);

  const std::string& name() const { return name_; }
  bool trainable() const { return trainable_; }
  FlatBuffer& flat() { return flat_; }
  const at::Tensor& grad() const { return grad_; }
  const at::Tensor& whole_grad() const { return whole_grad_; }
  double square() const { return square_; }

  // A gradient that stays here for now (`keep`), or joins the buffer (`pack`; undefined: none).
  void keep(int64_t i);
  void pack(int64_t i);
  bool packed(int64_t i) const { return packed_[i]; }
  bool full() const { return packed_count_ == static_cast<int64_t>(packed_.size()); }
  void clear_packed();

  // The buffer goes off; another micro-batch may fill and send the next one before it is landed.
  Flight start(Collective& collective);
  void land(Collective& collective, const Flight& flight, double scale);

  bool has_kept() const;
  std::vector<int64_t> unreached() const;
  void reach(int64_t i) { reached_[i] = true; }
  void forget();  // the step's gradients

  // Where gradients are gathered: from when they are landed until `wait_grad`.
  void gather_grad(Collective& collective);
  bool gathers_grad() const { return grad_gather_.under_way(); }
  void wait_grad() { grad_gather_.wait(); }

  // The parameters: `wait_params` makes what `gather_params` began whole. exact: not in int8.
  void gather_params(Collective& collective, bool exact);
  bool gathers_params() const { return params_begun_; }
  void wait_params();

 private:
  at::Tensor take_buffer(int64_t numel, at::ScalarType type);
  void give_buffer(const at::Tensor& buffer);

  std::string name_;
  bool trainable_;
  FlatBuffer flat_;
  BufferPool& buffers_;
  at::ScalarType wire_;
  bool native_;
  std::vector<std::vector<Run>> runs_;  // of each parameter in the buffer
  std::vector<Run> gaps_;
  at::Tensor grad_;        // (shard,)
  at::Tensor whole_grad_;  // (padded,) the sums of all ranks, where they are gathered
  Gather grad_gather_;
  bool narrow_params_;
  at::Tensor params_wire_;  // the int8 form of the parameters while they come
  Gather params_gather_;
  bool params_begun_ = false;
  at::Tensor error_;  // (padded,) what int8 left unsent
  at::Tensor buffer_;
  std::map<int64_t, at::Tensor> kept_;
  std::vector<bool> packed_;
  int64_t packed_count_ = 0;
  std::vector<bool> reached_;
  bool summed_ = false;
  double square_ = 0.0;
};

}  // namespace fastllm
