#include "collective.h"

#include <utility>
#include <vector>

#include "quantize.h"
#include "reduce.h"

// torch 2.13 renamed alltoall_base and its sisters; the old names are there in every version.
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"

namespace fastllm {
namespace {

constexpr int kGatherTag = 7771;  // a tag that programs of their own are unlikely to use

// The sum on a GPU, in the same order as csrc/reduce.cpp. Returns nothing there that would make the
// host wait: the sum of squares is made where the norm is.
double sum_on_device(const at::Tensor& grad, const std::vector<at::Tensor>& chunks, double scale,
                     bool accumulate) {
  at::Tensor total = chunks[0].to(grad.scalar_type(), /*non_blocking=*/false, /*copy=*/true);
  for (size_t i = 1; i < chunks.size(); ++i) total.add_(chunks[i]);
  if (scale != 1.0) total.mul_(scale);
  if (accumulate) {
    grad.add_(total);
  } else {
    grad.copy_(total);
  }
  return 0.0;
}

}  // namespace

Flight Collective::start_reduce(const at::Tensor& buffer, const at::Tensor& received, bool native) {
  const int64_t own = buffer.numel() / world_;
  sent_bytes_ += own * (world_ - 1) * buffer.element_size();
  if (world_ == 1) {
    if (native) received.copy_(buffer);
    return {Work(), buffer, received};
  }
  at::Tensor output = received;
  at::Tensor input = buffer;
  if (native) {
    return {reduce_->_reduce_scatter_base(output, input), buffer, received};
  }
  // The own shard stays where it is: sending it to oneself would be a copy.
  input = buffer.narrow(0, 0, own * (world_ - 1));
  std::vector<int64_t> splits(world_, own);
  splits[rank_] = 0;
  return {reduce_->alltoall_base(output, input, splits, splits), buffer, received};
}

double Collective::land(const Flight& flight, const at::Tensor& grad, bool native, double scale,
                        bool accumulate) {
  if (flight.work) flight.work->wait();
  const int64_t own_size = flight.buffer.numel() / world_;
  const at::Tensor own =
      native ? flight.received : flight.buffer.narrow(0, own_size * (world_ - 1), own_size);
  const at::Tensor others = native ? flight.received.narrow(0, 0, 0) : flight.received;
  const int64_t place = native ? 0 : rank_;
  if (grad.is_cpu()) {
    return own.scalar_type() == at::kByte
               ? reduce_int8(grad, own, others, place, scale, accumulate)
               : reduce_chunks(grad, own, others, place, scale, accumulate);
  }
  std::vector<at::Tensor> chunks =
      others.numel() ? others.split(own_size) : std::vector<at::Tensor>();
  chunks.insert(chunks.begin() + place, own);
  return sum_on_device(grad, chunks, scale, accumulate);
}

Gather Collective::all_gather(at::Tensor full, at::Tensor shard) {
  Gather gather;
  if (shard.numel() == 0) return gather;
  sent_bytes_ += static_cast<int64_t>(shard.nbytes()) * (world_ - 1);
  if (native_ && world_ > 1) {
    gather.works_.push_back(gather_->_allgather_base(full, shard));
    gather.sent_ = std::move(shard);
    return gather;
  }
  // Gloo's own gathers into a buffer of its own and copies that, which takes longer. Messages
  // between two ranks arrive in the order they are sent in, so that one tag does for all.
  const int64_t size = shard.numel();
  for (int64_t rank = 0; rank < world_; ++rank) {
    std::vector<at::Tensor> part = {full.narrow(0, rank * size, size)};
    if (rank != rank_) {
      gather.works_.push_back(gather_->recv(part, static_cast<int>(rank), kGatherTag));
    } else if (part[0].data_ptr() != shard.data_ptr()) {
      part[0].copy_(shard);
    }
  }
  for (int64_t rank = 0; rank < world_; ++rank) {
    std::vector<at::Tensor> part = {shard};
    if (rank != rank_) {
      gather.works_.push_back(gather_->send(part, static_cast<int>(rank), kGatherTag));
    }
  }
  gather.sent_ = std::move(shard);
  return gather;
}

void Gather::wait() {
  for (const Work& work : works_) work->wait();
  works_.clear();
  sent_.reset();
}

}  // namespace fastllm
