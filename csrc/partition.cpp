#include "partition.h"

#include <torch/library.h>

#include <algorithm>
#include <utility>

namespace fastllm {

Layout make_layout(std::vector<int64_t> sizes, int64_t world) {
  Layout layout;
  int64_t at = 0;
  for (const int64_t size : sizes) {
    layout.begins.push_back(at);
    at += (size + kAlign - 1) / kAlign * kAlign;
  }
  const int64_t unit = world * kAlign;
  layout.shard = (at + unit - 1) / unit * kAlign;
  layout.sizes = std::move(sizes);
  layout.world = world;
  return layout;
}

std::vector<Run> make_runs(const Layout& layout, const std::vector<int64_t>& order) {
  std::vector<Run> found;
  for (size_t place = 0; place < order.size(); ++place) {
    const int64_t low = order[place] * layout.shard;
    const int64_t high = low + layout.shard;
    for (size_t i = 0; i < layout.sizes.size(); ++i) {
      const int64_t begin = layout.begins[i];
      const int64_t first = std::max(begin, low);
      const int64_t last = std::min(begin + layout.sizes[i], high);
      if (first < last) {
        found.push_back({static_cast<int64_t>(i), first - begin,
                         static_cast<int64_t>(place) * layout.shard + first - low, last - first});
      }
    }
  }
  return found;
}

std::vector<Run> make_gaps(const std::vector<Run>& runs, int64_t total) {
  std::vector<Run> gaps;
  int64_t at = 0;
  for (const Run& run : runs) {
    if (run.begin > at) gaps.push_back({-1, 0, at, run.begin - at});
    at = run.begin + run.size;
  }
  if (total > at) gaps.push_back({-1, 0, at, total - at});
  return gaps;
}

std::vector<int64_t> sent_order(int64_t world, int64_t rank) {
  std::vector<int64_t> order;
  for (int64_t other = 0; other < world; ++other) {
    if (other != rank) order.push_back(other);
  }
  order.push_back(rank);
  return order;
}

namespace {

// For the tests: the runs as a flat list of (parameter, offset, begin, size).
std::vector<int64_t> partition_runs(std::vector<int64_t> sizes, int64_t world,
                                    std::vector<int64_t> order) {
  std::vector<int64_t> flat;
  for (const Run& run : make_runs(make_layout(std::move(sizes), world), order)) {
    flat.insert(flat.end(), {run.parameter, run.offset, run.begin, run.size});
  }
  return flat;
}

std::vector<int64_t> partition_layout(std::vector<int64_t> sizes, int64_t world) {
  const Layout layout = make_layout(std::move(sizes), world);
  std::vector<int64_t> flat = layout.begins;
  flat.push_back(layout.shard);
  return flat;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastllm_cpu, m) {
  m.def("partition_layout(int[] sizes, int world) -> int[]", partition_layout);
  m.def("partition_runs(int[] sizes, int world, int[] order) -> int[]", partition_runs);
}

}  // namespace fastllm
