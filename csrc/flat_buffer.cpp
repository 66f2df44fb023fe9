#include "flat_buffer.h"

#include <limits>
#include <utility>

namespace fastllm {
namespace {

std::vector<int64_t> sizes_of(const std::vector<at::Tensor>& params) {
  std::vector<int64_t> sizes;
  for (const at::Tensor& param : params) sizes.push_back(param.numel());
  return sizes;
}

}  // namespace

FlatBuffer::FlatBuffer(std::vector<at::Tensor> params, int64_t world, int64_t rank, bool apart,
                       bool on_host, MemoryPool& pool)
    : pool_(pool),
      params_(std::move(params)),
      layout_(make_layout(sizes_of(params_), world)) {
  const at::NoGradGuard no_grad;
  const auto options = params_.at(0).options().requires_grad(false);
  full_ = at::zeros({layout_.padded()}, options);
  nothing_ = at::full({}, std::numeric_limits<double>::quiet_NaN(), options);
  bytes_ = static_cast<int64_t>(full_.nbytes());
  for (size_t i = 0; i < params_.size(); ++i) {
    full_.narrow(0, layout_.begins[i], layout_.sizes[i])
        .view(params_[i].sizes())
        .copy_(params_[i].detach());
  }
  shard_ = full_.narrow(0, rank * layout_.shard, layout_.shard);
  if (apart) shard_ = on_host && !shard_.is_cpu() ? shard_.cpu().pin_memory() : shard_.clone();
  show();
}

// The storage keeps its identity: views of it that autograd saved for the backward see the new
// memory.
void FlatBuffer::allocate() {
  if (bytes_ == 0) return;
  c10::StorageImpl* storage = full_.storage().unsafeGetStorageImpl();
  std::optional<c10::DataPtr> memory = pool_.take(bytes_);
  storage->set_data_ptr_noswap(memory ? std::move(*memory)
                                      : storage->allocator()->allocate(bytes_));
  storage->set_nbytes(bytes_);
}

void FlatBuffer::show() {
  for (size_t i = 0; i < params_.size(); ++i) {
    params_[i].set_data(full_.narrow(0, layout_.begins[i], layout_.sizes[i])
                            .view(params_[i].sizes()));
  }
  whole_ = true;
}

void FlatBuffer::release() {
  for (const at::Tensor& param : params_) param.set_data(nothing_.expand(param.sizes()));
  whole_ = false;
  if (bytes_ == 0) return;
  c10::StorageImpl* storage = full_.storage().unsafeGetStorageImpl();
  c10::DataPtr memory = storage->set_data_ptr(c10::DataPtr(nullptr, full_.device()));
  storage->set_nbytes(0);
  // A GPU's allocator keeps blocks by itself, and knows which stream still uses them.
  if (full_.device().is_cpu()) pool_.give(bytes_, std::move(memory));
}

void FlatBuffer::bump() {
  for (const at::Tensor& param : params_) {
    if (!param.is_inference()) param.unsafeGetTensorImpl()->bump_version();
  }
}

}  // namespace fastllm
