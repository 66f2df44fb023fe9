// Attention within documents, with grouped queries: out = softmax(scores) v, where
// score = scale q.k, or c tanh(scale q.k / c) with a softcap c, and the softmax of a head may have
// a sink: one more key of a given score and without a value.
//
// q (B, Sq, Hq, D), k and v (B, Sk, Hkv, D), any strides over B, S and heads; or packed, q (Tq, Hq,
// D), k and v (Tk, Hkv, D), with the boundaries of the documents. Of m queries and n keys, query i
// sees the keys from i + n - m - left to i + n - m + right. The forward keeps the output and the
// log-sum-exp of every query, the backward (attention_backward.cpp) computes the probabilities
// again from them. Blocks of 64 queries by 64 keys stay in the cache; blocks that the window or
// the documents leave empty are never visited, and K and V are never expanded to the query heads.
// Every block is computed by one thread in a fixed order, so the bits do not depend on their
// number.
#include <torch/library.h>

#include <optional>
#include <vector>

#include "attention_shape.h"

namespace fastllm {
namespace {

constexpr float kNothing = -std::numeric_limits<float>::infinity();

template <typename T, Unit unit>
struct Forward {
  const Shape& shape;
  Heads<const T> q, k, v;
  const float* sinks;  // (Hq,) or null
  Heads<T> out;
  float* lse;  // (B, Hq, Sq)

  struct Scratch {
    std::vector<uint32_t> queries, probabilities;
    std::vector<float> scores, sums;
  };

  int64_t depth() const { return units<unit>(shape.width); }
  int64_t key_block() const { return kBlock * depth(); }                      // packed K, units
  int64_t value_block() const { return units<unit>(kBlock) * shape.padded; }  // packed V, units

  void run() const {
    const std::vector<Document>& documents = shape.documents;
    const std::vector<Span> key_blocks = blocks_of(documents, true);
    const std::vector<Span> query_blocks = blocks_of(documents, false);
    std::vector<int64_t> first(documents.size() + 1, 0);  // first key block of a document
    for (const Span& span : key_blocks) ++first[span.document + 1];
    for (size_t d = 0; d < documents.size(); ++d) first[d + 1] += first[d];
    const int64_t blocks = static_cast<int64_t>(key_blocks.size());
    const auto words = at::TensorOptions().dtype(at::kInt);
    const at::Tensor packed_k = at::empty({shape.kv_heads * blocks * key_block()}, words);
    const at::Tensor packed_v = at::empty({shape.kv_heads * blocks * value_block()}, words);
    uint32_t* keys = mutable_data<uint32_t>(packed_k);
    uint32_t* values = mutable_data<uint32_t>(packed_v);
    at::parallel_for(0, blocks * shape.kv_heads, 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Span& span = key_blocks[i / shape.kv_heads];
        const Document& doc = documents[span.document];
        const int64_t token = doc.key_begin + span.begin, head = i % shape.kv_heads;
        dispatch<PackRows<unit>>(k.at(doc.batch, token, head), k.token, span.size, shape.width,
                                 keys + i * key_block());
        dispatch<PackPairs<unit>>(v.at(doc.batch, token, head), v.token, span.size, shape.width,
                                  shape.padded, values + i * value_block());
      }
    });
    const int64_t items = static_cast<int64_t>(query_blocks.size()) * shape.heads;
    const auto scratch = [&] {
      return Scratch{std::vector<uint32_t>(key_block()), std::vector<uint32_t>(kBlock * kBlock),
                     std::vector<float>(kBlock * kBlock),
                     std::vector<float>(kBlock * shape.padded)};
    };
    parallel_items(items, scratch, [&](Scratch& s, int64_t i) {
      // The last blocks see the most keys: they go first, so that the threads end together.
      const Span& span = query_blocks[query_blocks.size() - 1 - i / shape.heads];
      const int64_t head = i % shape.heads;
      const int64_t block = first[span.document] * shape.kv_heads + head / shape.group();
      query_block(s, span, head, keys + block * key_block(), values + block * value_block());
    });
  }

  // `keys` and `values` are the document's first blocks of this head.
  void query_block(Scratch& s, const Span& span, int64_t head, const uint32_t* keys,
                   const uint32_t* values) const {
    const Document& doc = shape.documents[span.document];
    const int64_t token = doc.query_begin + span.begin;
    const Range seen = shape.keys_of(doc, span.begin, span.begin + span.size);
    const float sink = sinks == nullptr ? kNothing : sinks[head];
    alignas(64) float max[kBlock], sum[kBlock], decay[kBlock];
    std::fill_n(max, kBlock, sink);
    std::fill_n(sum, kBlock, sink == kNothing ? 0.0f : 1.0f);
    dispatch<PackColumns<unit>>(q.at(doc.batch, token, head), q.token, span.size, shape.width,
                                s.queries.data());
    const int64_t start = seen.begin / kBlock;
    for (int64_t b = start; b * kBlock < seen.end; ++b) {
      const Block block = shape.block(doc, span.begin, span.size, b * kBlock,
                                      std::min(kBlock, seen.end - b * kBlock));
      score_product<unit>(block, depth(), keys + b * shape.kv_heads * key_block(), s.queries.data(),
                          s.scores.data());
      const bool changed = with_options(block, [&](auto masked, auto capped) {
        return dispatch<SoftmaxBlock<unit, masked, capped>>(s.scores.data(), block, max, sum, decay,
                                                            s.probabilities.data());
      });
      if (changed && b > start) dispatch<ScaleRows>(s.sums.data(), decay, span.size, shape.padded);
      sum_over_keys<unit>(block, shape.padded, s.probabilities.data(),
                          values + b * shape.kv_heads * value_block(), s.sums.data(), b > start);
    }
    for (int64_t i = 0; i < span.size; ++i) {
      const Range own = shape.keys_of(doc, span.begin + i, span.begin + i + 1);
      float* sums = s.sums.data() + i * shape.padded;
      if (own.begin == own.end) std::fill_n(sums, shape.padded, 0.0f);
      const float inverse = own.begin == own.end ? 0.0f : 1.0f / sum[i];
      dispatch<StoreRows>(sums, shape.padded, inverse, out.at(doc.batch, token + i, head),
                          out.token, int64_t{1}, shape.width);
      lse[shape.row(doc.batch, token + i, head)] = max[i] + std::log(sum[i]);
    }
  }
};

std::tuple<at::Tensor, at::Tensor> attention_forward(const at::Tensor& q_in, const at::Tensor& k_in,
                                                     const at::Tensor& v_in,
                                                     const std::optional<at::Tensor>& cu_seqlens_q,
                                                     const std::optional<at::Tensor>& cu_seqlens_k,
                                                     const std::optional<at::Tensor>& sinks_in,
                                                     int64_t left, int64_t right, double scale,
                                                     double softcap) {
  const Shape shape = shape_of(q_in, k_in, v_in,
                               {cu_seqlens_q, cu_seqlens_k, sinks_in, left, right, scale, softcap});
  const at::Tensor q = unit_stride(with_batch(q_in)), k = unit_stride(with_batch(k_in));
  const at::Tensor v = unit_stride(with_batch(v_in));
  const at::Tensor sinks =
      sinks_in.has_value() ? sinks_in->to(at::kFloat).contiguous() : at::Tensor();
  at::Tensor out = at::empty(q.sizes(), q.options().memory_format(at::MemoryFormat::Contiguous));
  at::Tensor lse =
      at::empty({shape.batch, shape.heads, shape.length}, q.options().dtype(at::kFloat));
  with_format(q, [&]<typename T, Unit unit>(T, std::integral_constant<Unit, unit>) {
    Forward<T, unit>{shape,
                     reader<T>(q),
                     reader<T>(k),
                     reader<T>(v),
                     sinks.defined() ? data<float>(sinks) : nullptr,
                     writer<T>(out),
                     mutable_data<float>(lse)}
        .run();
  });
  beyond(shape, out, false).zero_();
  // They see no key, and so have the sink's share alone, as such a query of a document has.
  const at::Tensor rest = beyond(shape, lse.transpose(1, 2), false);
  if (sinks.defined()) {
    rest.copy_(sinks);
  } else {
    rest.fill_(kNothing);
  }
  return cu_seqlens_q.has_value() ? std::tuple(out.squeeze(0), lse.squeeze(0))
                                  : std::tuple(out, lse);
}

}  // namespace
}  // namespace fastllm

TORCH_LIBRARY_FRAGMENT(fastllm_cpu, m) {
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
      "Tensor? sinks, int left, int right, float scale, float softcap) -> (Tensor out, Tensor "
      "lse)");
}

TORCH_LIBRARY_IMPL(fastllm_cpu, CPU, m) { m.impl("attention", &fastllm::attention_forward); }
