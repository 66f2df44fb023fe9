// Which rank owns which elements; the same as fastllm/dist/partition.py, which says it in words.
#pragma once

#include <cstdint>
#include <vector>

namespace fastllm {

constexpr int64_t kAlign = 256;  // elements

struct Layout {
  std::vector<int64_t> sizes;   // of the parameters
  std::vector<int64_t> begins;  // of each in the flat tensor
  int64_t shard = 0;            // elements a rank owns
  int64_t world = 1;

  int64_t padded() const { return shard * world; }
};

// Elements that are consecutive in a parameter and in a buffer.
struct Run {
  int64_t parameter;
  int64_t offset;  // in the parameter
  int64_t begin;   // in the buffer
  int64_t size;
};

Layout make_layout(std::vector<int64_t> sizes, int64_t world);

// Every element of a buffer that holds the shards `order` one after another, in the buffer's order.
std::vector<Run> make_runs(const Layout& layout, const std::vector<int64_t>& order);

// What lies between the runs: the paddings, as (begin, size) in the buffer.
std::vector<Run> make_gaps(const std::vector<Run>& runs, int64_t total);

// Shards in the order in which a rank sends them: its own, which stays, comes last.
std::vector<int64_t> sent_order(int64_t world, int64_t rank);

}  // namespace fastllm
