// Memory that is wanted again and again in the same sizes. The system's allocator gives large blocks
// back at once, and the page faults of the next ones cost more than filling them.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <utility>
#include <vector>

namespace fastllm {

template <typename Block>
class Pool {
 public:
  // most: blocks of one size that are kept.
  explicit Pool(size_t most) : most_(most) {}

  std::optional<Block> take(int64_t size) {
    std::vector<Block>& free = free_[size];
    if (free.empty()) return std::nullopt;
    Block block = std::move(free.back());
    free.pop_back();
    return block;
  }

  void give(int64_t size, Block block) {
    std::vector<Block>& free = free_[size];
    if (free.size() < most_) free.push_back(std::move(block));
  }

 private:
  size_t most_;
  std::map<int64_t, std::vector<Block>> free_;
};

}  // namespace fastllm
