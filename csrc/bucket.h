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

// What gradients are summed in.
inline at::ScalarType wide(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

class Bucket {
 public:
  // wire: "same", "fp32", "bf16" or "int8".
  Bucket(std::string name, std::vector<at::Tensor> params, bool trainable, bool release,
         bool host_shards, const Collective& collective, const std::string& wire, bool native_group,
         MemoryPool& memory, BufferPool& buffers);

  const std::string& name() const { return name_; }
  bool trainable() const { return trainable_; }
  FlatBuffer& flat() { return flat_; }
  const at::Tensor& grad() const { return grad_; }
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

  at::Tensor grad_full;  // (padded,) the sums of all ranks, where they are gathered (stage 0)
  Work gathering;
  at::Tensor gather_source;  // must live until then
  bool gather_started = false;

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
  at::Tensor grad_;   // (shard,)
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
