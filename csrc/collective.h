// Sums over ranks through a c10d process group: natively where the backend is good at it, else an
// all-to-all of shards and a sum in fp32 here.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include <cstdint>
#include <vector>

namespace fastllm {

using Group = c10::intrusive_ptr<c10d::ProcessGroup>;
using Work = c10::intrusive_ptr<c10d::Work>;

// A reduce-scatter under way. It keeps its tensors alive until it is landed.
struct Flight {
  Work work;  // null: nothing was sent
  at::Tensor buffer;
  at::Tensor received;
};

// An all-gather under way; it keeps what is sent alive until it is waited for.
class Gather {
 public:
  bool under_way() const { return !works_.empty(); }
  void wait();

 private:
  friend class Collective;
  std::vector<Work> works_;
  at::Tensor sent_;
};

class Collective {
 public:
  // Groups are null in a world of one. native: they have collectives on tensors as they lie (NCCL).
  Collective(Group gather, Group reduce, int64_t rank, int64_t world, bool native)
      : gather_(std::move(gather)),
        reduce_(std::move(reduce)),
        rank_(rank),
        world_(world),
        native_(native) {}

  int64_t rank() const { return rank_; }
  int64_t world() const { return world_; }
  int64_t sent_bytes() const { return sent_bytes_; }

  // buffer: the shards of all ranks, in order of rank (native) or of sent_order. received: room for
  // one shard (native), or for those of the other ranks.
  Flight start_reduce(const at::Tensor& buffer, const at::Tensor& received, bool native);

  // Waits, and puts the sum times scale into grad, or adds it; returns grad's sum of squares.
  double land(const Flight& flight, const at::Tensor& grad, bool native, double scale,
              bool accumulate);

  // full <- the shards of all ranks. shard may be this rank's part of it.
  Gather all_gather(at::Tensor full, at::Tensor shard);

 private:
  Group gather_;
  Group reduce_;
  int64_t rank_;
  int64_t world_;
  bool native_;
  int64_t sent_bytes_ = 0;
};

}  // namespace fastllm
