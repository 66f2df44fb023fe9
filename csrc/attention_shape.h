// What the forward and the backward of attention share: the shapes, the documents, their blocks,
// and the sharing out of work.
#pragma once

#include <algorithm>
#include <atomic>
#include <optional>
#include <vector>

#include "attention_block.h"

namespace fastllm {

// A run of tokens of one row of the batch that attend to each other.
struct Document {
  int64_t batch, query_begin, queries, key_begin, keys;
};

// A tensor (B, S, heads, D) whose last stride is 1.
template <typename T>
struct Heads {
  T* base;
  int64_t batch, token, head;

  Heads(const at::Tensor& x, T* base)
      : base(base), batch(x.stride(0)), token(x.stride(1)), head(x.stride(2)) {}
  T* at(int64_t b, int64_t s, int64_t h) const { return base + b * batch + s * token + h * head; }
};

template <typename T>
Heads<const T> reader(const at::Tensor& x) {
  return {x, data<T>(x)};
}

template <typename T>
Heads<T> writer(const at::Tensor& x) {
  return {x, mutable_data<T>(x)};
}

inline at::Tensor unit_stride(const at::Tensor& x) {
  return x.size(3) <= 1 || x.stride(3) == 1 ? x : x.contiguous();
}

struct Shape {
  int64_t batch, length, kv_length, heads, kv_heads, width, padded;  // padded: width to 16
  bool causal;
  float scale;
  int64_t group() const { return heads / kv_heads; }
};

inline Shape shape_of(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, bool causal,
                      std::optional<double> scale) {
  TORCH_CHECK_VALUE(
      q.dim() == 4 && k.dim() == 4 && k.sizes() == v.sizes() && q.size(0) == k.size(0) &&
          q.size(3) == k.size(3) && k.size(2) > 0 && q.size(2) % k.size(2) == 0,
      "fastllm attention: expected q (B, S, Hq, D) and k, v (B, Skv, Hkv, D) with Hq a "
      "multiple of Hkv, got ",
      q.sizes(), ", ", k.sizes(), ", ", v.sizes());
  TORCH_CHECK_TYPE(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(),
                   "fastllm attention: q, k and v differ in dtype");
  TORCH_CHECK_VALUE(!causal || k.size(1) >= q.size(1),
                    "fastllm attention: causal needs at least as many keys as queries, got ",
                    k.size(1), " and ", q.size(1));
  const double by = scale.value_or(1.0 / std::sqrt(std::max<double>(1.0, q.size(3))));
  return {q.size(0),
          q.size(1),
          k.size(1),
          q.size(2),
          k.size(2),
          q.size(3),
          round_up(q.size(3), 16),
          causal,
          static_cast<float>(by)};
}

inline std::vector<Document> documents_of(const Shape& shape,
                                          const std::optional<at::Tensor>& cu_seqlens) {
  std::vector<Document> documents;
  if (!cu_seqlens.has_value()) {
    for (int64_t b = 0; b < shape.batch; ++b)
      documents.push_back({b, 0, shape.length, 0, shape.kv_length});
    return documents;
  }
  TORCH_CHECK_VALUE(shape.length == shape.kv_length,
                    "fastllm attention: cu_seqlens needs as many keys as queries, got ",
                    shape.kv_length, " and ", shape.length);
  const at::Tensor bounds = cu_seqlens->to(at::kLong).contiguous();
  TORCH_CHECK_VALUE(bounds.dim() == 1 && bounds.size(0) >= 1,
                    "fastllm attention: cu_seqlens must be (N + 1,), got ", bounds.sizes());
  const int64_t* at = data<int64_t>(bounds);
  const int64_t count = bounds.size(0) - 1, total = shape.batch * shape.length;
  TORCH_CHECK_VALUE(at[0] == 0 && at[count] == total,
                    "fastllm attention: cu_seqlens must run from 0 to B * S = ", total, ", got ",
                    at[0], " to ", at[count]);
  for (int64_t i = 0; i < count; ++i) {
    TORCH_CHECK_VALUE(at[i] <= at[i + 1], "fastllm attention: cu_seqlens decreases at ", i);
    if (at[i] == at[i + 1]) continue;
    const int64_t row = at[i] / shape.length, begin = at[i] % shape.length;
    const int64_t size = at[i + 1] - at[i];
    TORCH_CHECK_VALUE(begin + size <= shape.length, "fastllm attention: the document from ", at[i],
                      " to ", at[i + 1], " crosses the end of a row of ", shape.length);
    documents.push_back({row, begin, size, begin, size});
  }
  return documents;
}

// Runs item(scratch, i) for every i, in no particular order; each thread takes the next one.
template <typename MakeScratch, typename Item>
void parallel_items(int64_t count, const MakeScratch& make_scratch, const Item& item) {
  std::atomic<int64_t> next{0};
  const int64_t workers = std::min<int64_t>(count, at::get_num_threads());
  at::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    auto scratch = make_scratch();
    for (int64_t i = next++; i < count; i = next++) item(scratch, i);
  });
}

// A block of queries of one document, or of keys.
struct Span {
  int64_t document, begin, size;
};

inline std::vector<Span> blocks_of(const std::vector<Document>& documents, bool of_keys) {
  std::vector<Span> spans;
  for (int64_t d = 0; d < static_cast<int64_t>(documents.size()); ++d) {
    const int64_t size = of_keys ? documents[d].keys : documents[d].queries;
    for (int64_t begin = 0; begin < size; begin += kBlock)
      spans.push_back({d, begin, std::min(kBlock, size - begin)});
  }
  return spans;
}

}  // namespace fastllm
