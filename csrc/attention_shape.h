// What the forward and the backward of attention share: the shapes, the documents, their blocks,
// what sees what, and the sharing out of work.
#pragma once

#include <algorithm>
#include <atomic>
#include <optional>
#include <vector>

#include "attention_block.h"

namespace fastllm {

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

// The options as the ops get them.
struct Options {
  const std::optional<at::Tensor>&cu_seqlens_q, &cu_seqlens_k, &sinks;
  int64_t left, right;
  double scale, softcap;
};

// Tokens of one row of the batch whose queries see its keys only.
struct Document {
  int64_t batch, query_begin, queries, key_begin, keys;
  int64_t ahead() const { return keys - queries; }  // keys before the first query's own
};

struct Shape {
  int64_t batch, length, kv_length, heads, kv_heads, width, padded;  // padded: width to 16
  int64_t left, right;
  float scale, softcap;
  std::vector<Document> documents;

  int64_t group() const { return heads / kv_heads; }

  // Where (b, token, head) is in lse (B, Hq, Sq).
  int64_t row(int64_t b, int64_t token, int64_t head) const {
    return (b * heads + head) * length + token;
  }

  // The keys that any of a range of queries sees; the queries that see any of a range of keys.
  Range keys_of(const Document& doc, int64_t begin, int64_t end) const {
    return within(begin + doc.ahead() - left, end + doc.ahead() + right, doc.keys);
  }
  Range queries_of(const Document& doc, int64_t begin, int64_t end) const {
    return within(begin - doc.ahead() - right, end - doc.ahead() + left, doc.queries);
  }

  Block block(const Document& doc, int64_t query, int64_t queries, int64_t key,
              int64_t keys) const {
    const int64_t own = query + doc.ahead() - key;
    const auto bound = [](int64_t x) {
      return static_cast<int32_t>(std::clamp<int64_t>(x, -kBlock, kBlock));
    };
    return {keys,
            queries,
            bound(own - left),
            bound(own + right),
            softcap > 0.0f ? scale / softcap : scale,
            softcap};
  }

  static Range within(int64_t begin, int64_t end, int64_t size) {
    const Range range{std::max<int64_t>(begin, 0), std::min(end, size)};
    return range.begin < range.end ? range : Range{0, 0};
  }
};

// The tensor as (B, S, heads, D): packed tokens are one row.
inline at::Tensor with_batch(const at::Tensor& x) { return x.dim() == 3 ? x.unsqueeze(0) : x; }

inline at::Tensor boundaries(const at::Tensor& cu_seqlens, const char* name, int64_t tokens) {
  TORCH_CHECK_VALUE(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1 &&
                        at::isIntegralType(cu_seqlens.scalar_type(), false),
                    "fastllm attention: ", name, " must be (N + 1,) integers, got ",
                    cu_seqlens.sizes(), " of ", cu_seqlens.scalar_type());
  const at::Tensor bounds = cu_seqlens.to(at::kLong).contiguous();
  const int64_t* at = data<int64_t>(bounds);
  const int64_t last = bounds.size(0) - 1;
  TORCH_CHECK_VALUE(at[0] == 0, "fastllm attention: ", name, " must begin at 0, got ", at[0]);
  for (int64_t i = 0; i < last; ++i)
    TORCH_CHECK_VALUE(at[i] <= at[i + 1], "fastllm attention: ", name, " decreases from ", at[i],
                      " to ", at[i + 1], " at ", i + 1);
  TORCH_CHECK_VALUE(at[last] <= tokens, "fastllm attention: ", name, " ends at ", at[last],
                    ", after the last of ", tokens, " tokens");
  return bounds;
}

inline std::vector<Document> documents_of(const Shape& shape, const Options& options) {
  std::vector<Document> documents;
  if (!options.cu_seqlens_q.has_value()) {
    for (int64_t b = 0; b < shape.batch; ++b)
      documents.push_back({b, 0, shape.length, 0, shape.kv_length});
    return documents;
  }
  const at::Tensor queries = boundaries(*options.cu_seqlens_q, "cu_seqlens_q", shape.length);
  const at::Tensor keys = boundaries(*options.cu_seqlens_k, "cu_seqlens_k", shape.kv_length);
  TORCH_CHECK_VALUE(queries.sizes() == keys.sizes(), "fastllm attention: cu_seqlens_q has ",
                    queries.size(0) - 1, " documents, cu_seqlens_k ", keys.size(0) - 1);
  const int64_t *q = data<int64_t>(queries), *k = data<int64_t>(keys);
  for (int64_t i = 0; i + 1 < queries.size(0); ++i)
    documents.push_back({0, q[i], q[i + 1] - q[i], k[i], k[i + 1] - k[i]});
  return documents;
}

inline Shape shape_of(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                      const Options& options) {
  const bool packed = options.cu_seqlens_q.has_value();
  TORCH_CHECK_VALUE(packed == options.cu_seqlens_k.has_value(),
                    "fastllm attention: cu_seqlens_q and cu_seqlens_k go together");
  const int64_t dims = packed ? 3 : 4;
  TORCH_CHECK_VALUE(q.dim() == dims && k.dim() == dims && k.sizes() == v.sizes() &&
                        (packed || q.size(0) == k.size(0)) && q.size(-1) == k.size(-1) &&
                        q.size(-1) > 0 && k.size(-2) > 0 && q.size(-2) % k.size(-2) == 0,
                    "fastllm attention: expected ",
                    packed ? "q (Tq, Hq, D) and k, v (Tk, Hkv, D) beside cu_seqlens"
                           : "q (B, Sq, Hq, D) and k, v (B, Sk, Hkv, D) without cu_seqlens",
                    ", Hq a multiple of Hkv, got ", q.sizes(), ", ", k.sizes(), ", ", v.sizes());
  TORCH_CHECK_TYPE(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(),
                   "fastllm attention: q, k and v differ in dtype: ", q.scalar_type(), ", ",
                   k.scalar_type(), ", ", v.scalar_type());
  TORCH_CHECK_VALUE(options.left >= -1 && options.right >= -1,
                    "fastllm attention: a window is at least 0, or -1 for no limit, got ",
                    options.left, ", ", options.right);
  TORCH_CHECK_VALUE(options.softcap >= 0, "fastllm attention: softcap must be at least 0, got ",
                    options.softcap);
  TORCH_CHECK_VALUE(!options.sinks.has_value() ||
                        (options.sinks->dim() == 1 && options.sinks->size(0) == q.size(-2) &&
                         options.sinks->is_floating_point()),
                    "fastllm attention: sinks must be (Hq,) = (", q.size(-2), ",), floating");
  // Far enough for any tensor, and far from an overflow.
  constexpr int64_t kFar = int64_t{1} << 48;
  const auto reach = [&](int64_t x) { return x < 0 ? kFar : std::min(x, kFar); };
  Shape shape{packed ? 1 : q.size(0),
              q.size(-3),
              k.size(-3),
              q.size(-2),
              k.size(-2),
              q.size(-1),
              round_up(q.size(-1), 16),
              reach(options.left),
              reach(options.right),
              static_cast<float>(options.scale),
              static_cast<float>(options.softcap),
              {}};
  shape.documents = documents_of(shape, options);
  return shape;
}

// The tokens of x (B, S, heads, D) that belong to no document.
inline at::Tensor beyond(const Shape& shape, const at::Tensor& x, bool of_keys) {
  const bool any = !shape.documents.empty();
  const Document last = any ? shape.documents.back() : Document{};
  const int64_t begin = of_keys ? last.key_begin + last.keys : last.query_begin + last.queries;
  return x.slice(1, begin);
}

// Calls f(T{}, constant<unit>) for the dtype of q.
template <typename F>
void with_format(const at::Tensor& q, const F& f) {
  with_dtype(q, "attention", [&]<typename T>(T value) {
    if constexpr (std::is_same_v<T, bf16>) {
      if (has_bf16_pairs()) return f(value, std::integral_constant<Unit, Unit::bf16_pair>{});
    }
    f(value, std::integral_constant<Unit, Unit::fp32>{});
  });
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
