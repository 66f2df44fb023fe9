// Attention within documents, with grouped queries: out = softmax(q k^T scale + mask) v.
//
// q (B, S, Hq, D), k and v (B, Skv, Hkv, D), any strides over B, S and heads. The forward keeps the
// output and the log-sum-exp of every query, the backward computes the probabilities again from
// them. Blocks of 64 queries by 64 keys stay in the cache; blocks that causality or the document
// boundaries leave empty are never visited, and K and V are never expanded to the query heads.
// Every block is computed by one thread in a fixed order, so the bits do not depend on their
// number.
#include <torch/library.h>

#include <optional>
#include <vector>

#include "attention_shape.h"

namespace fastllm {
namespace {

// ------------------------------------------------------------------------------------- forward

template <typename T, Unit unit>
struct Forward {
  Shape shape;
  std::vector<Document> documents;
  Heads<const T> q, k, v;
  Heads<T> out;
  float* lse;  // (B, S, Hq)

  struct Scratch {
    std::vector<uint32_t> queries, probabilities;
    std::vector<float> scores, sums;
  };

  int64_t depth() const { return units<unit>(shape.width); }
  int64_t key_block() const { return kBlock * depth(); }                      // packed K, units
  int64_t value_block() const { return units<unit>(kBlock) * shape.padded; }  // packed V, units

  void run() const {
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

  void query_block(Scratch& s, const Span& span, int64_t head, const uint32_t* keys,
                   const uint32_t* values) const {
    const Document& doc = documents[span.document];
    const int64_t token = doc.query_begin + span.begin;
    const int64_t ahead = span.begin + doc.keys - doc.queries;  // keys before the first query's own
    const int64_t end = shape.causal ? ahead + span.size : doc.keys;
    alignas(64) float max[kBlock], sum[kBlock], decay[kBlock];
    std::fill_n(max, kBlock, -std::numeric_limits<float>::infinity());
    std::fill_n(sum, kBlock, 0.0f);
    dispatch<PackColumns<unit>>(q.at(doc.batch, token, head), q.token, span.size, shape.width,
                                s.queries.data());
    Block block{0, round_up(span.size, 16), 0, shape.scale};
    for (int64_t begin = 0; begin < end; begin += kBlock) {
      block.keys = std::min(kBlock, end - begin);
      block.limit = shape.causal ? ahead - begin : kBlock;
      tile_product(unit, block.keys, block.queries, depth(), keys, depth(), 1, s.queries.data(),
                   kBlock, s.scores.data(), kBlock, false);
      const bool changed = dispatch<SoftmaxBlock<unit>>(s.scores.data(), block, max, sum, decay,
                                                        s.probabilities.data());
      if (changed && begin > 0) dispatch<ScaleRows>(s.sums.data(), decay, span.size, shape.padded);
      tile_product(unit, span.size, shape.padded, units<unit>(block.keys), s.probabilities.data(),
                   1, kBlock, values, shape.padded, s.sums.data(), shape.padded, begin > 0);
      keys += shape.kv_heads * key_block();
      values += shape.kv_heads * value_block();
    }
    if (end <= 0) std::fill(s.sums.begin(), s.sums.end(), 0.0f);
    for (int64_t i = 0; i < span.size; ++i) {
      const float inverse = end > 0 ? 1.0f / sum[i] : 0.0f;
      dispatch<StoreRows>(s.sums.data() + i * shape.padded, shape.padded, inverse,
                          out.at(doc.batch, token + i, head), out.token, int64_t{1}, shape.width);
      lse[(doc.batch * shape.length + token + i) * shape.heads + head] = max[i] + std::log(sum[i]);
    }
  }
};

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

std::tuple<at::Tensor, at::Tensor> attention_forward(const at::Tensor& q_in, const at::Tensor& k_in,
                                                     const at::Tensor& v_in,
                                                     const std::optional<at::Tensor>& cu_seqlens,
                                                     bool causal, std::optional<double> scale) {
  const Shape shape = shape_of(q_in, k_in, v_in, causal, scale);
  const at::Tensor q = unit_stride(q_in), k = unit_stride(k_in), v = unit_stride(v_in);
  at::Tensor out = at::empty(q.sizes(), q.options().memory_format(at::MemoryFormat::Contiguous));
  at::Tensor lse =
      at::empty({shape.batch, shape.length, shape.heads}, q.options().dtype(at::kFloat));
  if (out.numel() == 0) return {out, lse};
  with_format(q, [&]<typename T, Unit unit>(T, std::integral_constant<Unit, unit>) {
    Forward<T, unit>{
        shape,          documents_of(shape, cu_seqlens), reader<T>(q), reader<T>(k), reader<T>(v),
        writer<T>(out), mutable_data<float>(lse)}
        .run();
  });
  return {out, lse};
}

// ------------------------------------------------------------------------------------ backward

// Keys that one task takes. Where a document is longer, dq is the sum of the tasks' parts, which
// are added in order; there are at most kParts of them, so that they do not fill the memory.
constexpr int64_t kTaskKeys = 1024, kParts = 8;

int64_t task_keys(int64_t keys) {
  return std::max(kTaskKeys, round_up((keys + kParts - 1) / kParts, kBlock));
}

template <typename T, Unit unit>
struct Backward {
  Shape shape;
  std::vector<Document> documents;
  Heads<const T> q, k, v, out, grad;
  const float* lse;
  Heads<T> dq, dk, dv;
  float* parts;  // (part, B, S, Hq, D) where some document has more than one task

  // Operands of one task, each in the layout that its product reads.
  struct Scratch {
    std::vector<uint32_t> key_rows, key_pairs, value_rows;  // the task's keys
    std::vector<uint32_t> query_columns, query_pairs;       // one block of queries
    std::vector<uint32_t> grad_columns, grad_pairs;
    std::vector<uint32_t> p_by_key, ds_by_key, ds_by_query;
    std::vector<float> scores, dp, dq, dk, dv;
    float lse[kBlock], delta[kBlock];
  };

  int64_t depth() const { return units<unit>(shape.width); }
  int64_t rows_block() const { return kBlock * depth(); }
  int64_t pairs_block() const { return units<unit>(kBlock) * shape.padded; }
  int64_t sums_block() const { return kBlock * shape.padded; }

  Scratch make_scratch(int64_t keys) const {
    const int64_t blocks = (keys + kBlock - 1) / kBlock, square = kBlock * kBlock;
    const auto words = [](int64_t n) { return std::vector<uint32_t>(n); };
    const auto floats = [](int64_t n) { return std::vector<float>(n); };
    return {words(blocks * rows_block()),
            words(blocks * pairs_block()),
            words(blocks * rows_block()),
            words(rows_block()),
            words(pairs_block()),
            words(rows_block()),
            words(pairs_block()),
            words(square),
            words(square),
            words(square),
            floats(square),
            floats(square),
            floats(sums_block()),
            floats(blocks * sums_block()),
            floats(blocks * sums_block()),
            {},
            {}};
  }

  static std::vector<Span> tasks(const std::vector<Document>& documents) {
    std::vector<Span> spans;
    for (int64_t d = 0; d < static_cast<int64_t>(documents.size()); ++d) {
      const int64_t step = task_keys(documents[d].keys);
      for (int64_t begin = 0; begin < documents[d].keys; begin += step)
        spans.push_back({d, begin, std::min(step, documents[d].keys - begin)});
    }
    return spans;
  }

  void run() const {
    const std::vector<Span> spans = tasks(documents);
    int64_t longest = 0;
    for (const Span& span : spans) longest = std::max(longest, span.size);
    parallel_items(
        static_cast<int64_t>(spans.size()) * shape.kv_heads, [&] { return make_scratch(longest); },
        [&](Scratch& s, int64_t i) { task(s, spans[i / shape.kv_heads], i % shape.kv_heads); });
  }

  void task(Scratch& s, const Span& span, int64_t kv_head) const {
    const Document& doc = documents[span.document];
    pack_keys(s, doc, span, kv_head);
    const int64_t behind = doc.keys - doc.queries;
    const int64_t first = shape.causal ? std::max<int64_t>(0, span.begin - behind) : 0;
    for (int64_t g = 0; g < shape.group(); ++g) {
      const int64_t head = kv_head * shape.group() + g;
      for (int64_t begin = first / kBlock * kBlock; begin < doc.queries; begin += kBlock)
        query_block(s, doc, span, head, begin, std::min(kBlock, doc.queries - begin));
    }
    const int64_t token = doc.key_begin + span.begin;
    dispatch<StoreRows>(s.dk.data(), shape.padded, shape.scale, dk.at(doc.batch, token, kv_head),
                        dk.token, span.size, shape.width);
    dispatch<StoreRows>(s.dv.data(), shape.padded, 1.0f, dv.at(doc.batch, token, kv_head), dv.token,
                        span.size, shape.width);
  }

  void pack_keys(Scratch& s, const Document& doc, const Span& span, int64_t kv_head) const {
    for (int64_t begin = 0, b = 0; begin < span.size; begin += kBlock, ++b) {
      const int64_t token = doc.key_begin + span.begin + begin;
      const int64_t keys = std::min(kBlock, span.size - begin);
      const T* key = k.at(doc.batch, token, kv_head);
      dispatch<PackRows<unit>>(key, k.token, keys, shape.width,
                               s.key_rows.data() + b * rows_block());
      dispatch<PackPairs<unit>>(key, k.token, keys, shape.width, shape.padded,
                                s.key_pairs.data() + b * pairs_block());
      dispatch<PackRows<unit>>(v.at(doc.batch, token, kv_head), v.token, keys, shape.width,
                               s.value_rows.data() + b * rows_block());
    }
    const int64_t sums = (span.size + kBlock - 1) / kBlock * sums_block();
    std::fill_n(s.dk.begin(), sums, 0.0f);
    std::fill_n(s.dv.begin(), sums, 0.0f);
  }

  void pack_queries(Scratch& s, const Document& doc, int64_t head, int64_t begin,
                    int64_t queries) const {
    const int64_t token = doc.query_begin + begin;
    const T* query = q.at(doc.batch, token, head);
    const T* gradient = grad.at(doc.batch, token, head);
    dispatch<PackColumns<unit>>(query, q.token, queries, shape.width, s.query_columns.data());
    dispatch<PackPairs<unit>>(query, q.token, queries, shape.width, shape.padded,
                              s.query_pairs.data());
    dispatch<PackColumns<unit>>(gradient, grad.token, queries, shape.width, s.grad_columns.data());
    dispatch<PackPairs<unit>>(gradient, grad.token, queries, shape.width, shape.padded,
                              s.grad_pairs.data());
    // Columns beyond the last query meet zeros in the products; they only have to stay finite.
    std::fill_n(s.lse, kBlock, 0.0f);
    std::fill_n(s.delta, kBlock, 0.0f);
    dispatch<DotRows>(gradient, grad.token, out.at(doc.batch, token, head), out.token, queries,
                      shape.width, static_cast<float*>(s.delta));
    for (int64_t i = 0; i < queries; ++i)
      s.lse[i] = lse[(doc.batch * shape.length + token + i) * shape.heads + head];
  }

  void query_block(Scratch& s, const Document& doc, const Span& span, int64_t head, int64_t begin,
                   int64_t queries) const {
    pack_queries(s, doc, head, begin, queries);
    const int64_t ahead = begin + doc.keys - doc.queries - span.begin;
    const int64_t end = shape.causal ? std::min(span.size, ahead + queries) : span.size;
    const int64_t across = units<unit>(queries), row = units<unit>(kBlock);
    Block block{0, round_up(queries, 16), 0, shape.scale};
    for (int64_t key = 0, b = 0; key < end; key += kBlock, ++b) {
      block.keys = std::min(kBlock, end - key);
      block.limit = shape.causal ? ahead - key : kBlock;
      tile_product(unit, block.keys, block.queries, depth(), s.key_rows.data() + b * rows_block(),
                   depth(), 1, s.query_columns.data(), kBlock, s.scores.data(), kBlock, false);
      tile_product(unit, block.keys, block.queries, depth(), s.value_rows.data() + b * rows_block(),
                   depth(), 1, s.grad_columns.data(), kBlock, s.dp.data(), kBlock, false);
      dispatch<GradientBlock<unit>>(s.scores.data(), s.dp.data(), block,
                                    static_cast<const float*>(s.lse),
                                    static_cast<const float*>(s.delta), s.p_by_key.data(),
                                    s.ds_by_key.data(), s.ds_by_query.data());
      const std::vector<uint32_t>& ds_by_query = unit == Unit::fp32 ? s.ds_by_key : s.ds_by_query;
      tile_product(unit, block.keys, shape.padded, across, s.p_by_key.data(), row, 1,
                   s.grad_pairs.data(), shape.padded, s.dv.data() + b * sums_block(), shape.padded,
                   true);
      tile_product(unit, block.keys, shape.padded, across, s.ds_by_key.data(), row, 1,
                   s.query_pairs.data(), shape.padded, s.dk.data() + b * sums_block(), shape.padded,
                   true);
      tile_product(unit, queries, shape.padded, units<unit>(block.keys), ds_by_query.data(), 1,
                   kBlock, s.key_pairs.data() + b * pairs_block(), shape.padded, s.dq.data(),
                   shape.padded, key > 0);
    }
    const int64_t token = doc.query_begin + begin;
    if (task_keys(doc.keys) >= doc.keys) {
      dispatch<StoreRows>(s.dq.data(), shape.padded, shape.scale, dq.at(doc.batch, token, head),
                          dq.token, queries, shape.width);
    } else {
      const int64_t part = span.begin / task_keys(doc.keys), stride = shape.heads * shape.width;
      const int64_t tokens = shape.batch * shape.length;
      float* to = parts + (part * tokens + doc.batch * shape.length + token) * stride;
      dispatch<StoreRows>(s.dq.data(), shape.padded, shape.scale, to + head * shape.width, stride,
                          queries, shape.width);
    }
  }

  // dq of the documents that took several tasks.
  void add_parts() const {
    const int64_t stride = shape.heads * shape.width, tokens = shape.batch * shape.length;
    for (const Document& doc : documents) {
      const int64_t step = task_keys(doc.keys);
      if (step >= doc.keys) continue;
      at::parallel_for(0, doc.queries, rows_per_task(stride), [&](int64_t begin, int64_t end) {
        std::vector<float> sum(stride);
        for (int64_t i = begin; i < end; ++i) {
          const int64_t token = doc.query_begin + i;
          // The blocks of queries that reach into a task's keys wrote its part.
          const int64_t last = i / kBlock * kBlock + kBlock - 1 + doc.keys - doc.queries;
          const int64_t reach = shape.causal ? std::min(last, doc.keys - 1) : doc.keys - 1;
          const float* from = parts + (doc.batch * shape.length + token) * stride;
          std::copy_n(from, stride, sum.data());
          for (int64_t part = 1; part <= reach / step; ++part)
            for (int64_t j = 0; j < stride; ++j) sum[j] += from[part * tokens * stride + j];
          dispatch<StoreRows>(static_cast<const float*>(sum.data()), shape.width, 1.0f,
                              dq.at(doc.batch, token, 0), dq.head, shape.heads, shape.width);
        }
      });
    }
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_backward(
    const at::Tensor& grad_in, const at::Tensor& q_in, const at::Tensor& k_in,
    const at::Tensor& v_in, const at::Tensor& out_in, const at::Tensor& lse_in,
    const std::optional<at::Tensor>& cu_seqlens, bool causal, std::optional<double> scale) {
  const Shape shape = shape_of(q_in, k_in, v_in, causal, scale);
  TORCH_CHECK_VALUE(grad_in.sizes() == q_in.sizes() && out_in.sizes() == q_in.sizes() &&
                        grad_in.scalar_type() == q_in.scalar_type(),
                    "fastllm attention: the gradient must have the shape and dtype of q");
  const at::Tensor q = unit_stride(q_in), k = unit_stride(k_in), v = unit_stride(v_in);
  const at::Tensor out = unit_stride(out_in), grad = unit_stride(grad_in);
  const at::Tensor lse = lse_in.contiguous();
  const auto contiguous = at::MemoryFormat::Contiguous;
  at::Tensor dq = at::empty(q.sizes(), q.options().memory_format(contiguous));
  at::Tensor dk = at::empty(k.sizes(), k.options().memory_format(contiguous));
  at::Tensor dv = at::empty(v.sizes(), v.options().memory_format(contiguous));
  if (q.numel() == 0 || k.numel() == 0) return {dq.zero_(), dk.zero_(), dv.zero_()};
  const std::vector<Document> documents = documents_of(shape, cu_seqlens);
  int64_t parts = 1;
  for (const Document& doc : documents)
    parts = std::max(parts, (doc.keys + task_keys(doc.keys) - 1) / task_keys(doc.keys));
  const at::Tensor partial =
      at::empty({parts > 1 ? parts * q.numel() : 0}, q.options().dtype(at::kFloat));
  with_format(q, [&]<typename T, Unit unit>(T, std::integral_constant<Unit, unit>) {
    const Backward<T, unit> backward{
        shape,         documents,      reader<T>(q),    reader<T>(k),
        reader<T>(v),  reader<T>(out), reader<T>(grad), data<float>(lse),
        writer<T>(dq), writer<T>(dk),  writer<T>(dv),   mutable_data<float>(partial)};
    backward.run();
    backward.add_parts();
  });
  return {dq, dk, dv};
}

}  // namespace
}  // namespace fastllm

TORCH_LIBRARY_FRAGMENT(fastllm_cpu, m) {
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, bool causal, float? scale) -> "
      "(Tensor out, Tensor lse)");
  m.def(
      "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "Tensor? cu_seqlens, bool causal, float? scale) -> (Tensor dq, Tensor dk, Tensor dv)");
}

TORCH_LIBRARY_IMPL(fastllm_cpu, CPU, m) {
  m.impl("attention", &fastllm::attention_forward);
  m.impl("attention_backward", &fastllm::attention_backward);
}
