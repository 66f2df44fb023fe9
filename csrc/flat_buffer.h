// The parameters of a bucket as views of one flat tensor, which may be without memory for a time.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <vector>

#include "partition.h"
#include "pool.h"

namespace fastllm {

using MemoryPool = Pool<c10::DataPtr>;

class FlatBuffer {
 public:
  // Moves the data of `params` into flat storage. `apart`: this rank's shard is memory of its own,
  // so that the whole can be released; its memory comes from the pool then, and goes there.
  // `on_host`: it is on the CPU.
  FlatBuffer(std::vector<at::Tensor> params, int64_t world, int64_t rank, bool apart, bool on_host,
             MemoryPool& pool);

  const std::vector<at::Tensor>& params() const { return params_; }
  const Layout& layout() const { return layout_; }
  const at::Tensor& full() const { return full_; }    // (padded,)
  const at::Tensor& shard() const { return shard_; }  // (shard,)
  bool whole() const { return whole_; }

  void allocate();  // gives the whole memory again, of undefined contents
  void show();      // the parameters are views of the whole
  void release();   // takes the memory back; the parameters read as NaN
  void bump();      // tells autograd that the parameters changed

 private:
  MemoryPool& pool_;
  int64_t bytes_;
  std::vector<at::Tensor> params_;
  Layout layout_;
  at::Tensor full_;
  at::Tensor shard_;
  at::Tensor nothing_;  // one NaN
  bool whole_ = true;
};

}  // namespace fastllm
