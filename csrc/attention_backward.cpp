// The gradient of attention (attention.cpp says what it computes). A task takes up to 1024 keys of
// one document and key head: it computes the probabilities again, block by block, adds up dk and
// dv of its keys, and writes dq. Where a document has several tasks, each writes its part of dq,
// and the parts are added in the order of the keys.
#include <torch/library.h>

#include <optional>
#include <vector>

#include "attention_shape.h"

namespace fastllm {
namespace {

// Keys that one task takes; a document has at most kParts tasks.
constexpr int64_t kTaskKeys = 1024, kParts = 8;

int64_t task_keys(const Document& doc) {
  return std::max(kTaskKeys, round_up((doc.keys + kParts - 1) / kParts, kBlock));
}

// The parts of dq that are kept at a time: as many as the keys of one block of queries reach over.
int64_t slots_of(const Shape& shape) {
  int64_t slots = 0;
  for (const Document& doc : shape.documents) {
    const int64_t step = task_keys(doc);
    if (step >= doc.keys) continue;
    for (int64_t begin = 0; begin < doc.queries; begin += kBlock) {
      const Range seen = shape.keys_of(doc, begin, std::min(begin + kBlock, doc.queries));
      if (seen.begin < seen.end)
        slots = std::max(slots, (seen.end - 1) / step - seen.begin / step + 1);
    }
  }
  return slots;
}

template <typename T, Unit unit>
struct Backward {
  const Shape& shape;
  Heads<const T> q, k, v, out, grad;
  const float *lse, *grad_lse;  // (B, Hq, Sq); grad_lse may be null
  Heads<T> dq, dk, dv;
  int64_t slots;
  float* parts;  // (slot, B, Sq, Hq, D): part i of a document is in slot i % slots

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

  void run() const {
    std::vector<Span> spans;
    int64_t longest = 0;
    for (int64_t d = 0; d < static_cast<int64_t>(shape.documents.size()); ++d) {
      const Document& doc = shape.documents[d];
      const int64_t step = task_keys(doc);
      for (int64_t begin = 0; begin < doc.keys; begin += step)
        spans.push_back({d, begin, std::min(step, doc.keys - begin)});
      longest = std::max(longest, std::min(step, doc.keys));
    }
    parallel_items(
        static_cast<int64_t>(spans.size()) * shape.kv_heads, [&] { return make_scratch(longest); },
        [&](Scratch& s, int64_t i) { task(s, spans[i / shape.kv_heads], i % shape.kv_heads); });
  }

  void task(Scratch& s, const Span& span, int64_t kv_head) const {
    const Document& doc = shape.documents[span.document];
    pack_keys(s, doc, span, kv_head);
    const Range seeing = shape.queries_of(doc, span.begin, span.begin + span.size);
    for (int64_t g = 0; g < shape.group(); ++g) {
      const int64_t head = kv_head * shape.group() + g;
      for (int64_t begin = seeing.begin / kBlock * kBlock; begin < seeing.end; begin += kBlock)
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
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    const int64_t token = doc.query_begin + begin, row = shape.row(doc.batch, token, head);
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
    for (int64_t i = 0; i < queries; ++i) {
      // A query that sees nothing: every e^(score - lse) is to be 0, and nothing flows through lse.
      const bool blind = lse[row + i] == -kInfinity;
      s.lse[i] = blind ? kInfinity : lse[row + i];
      if (grad_lse != nullptr && !blind) s.delta[i] -= grad_lse[row + i];
    }
  }

  void query_block(Scratch& s, const Document& doc, const Span& span, int64_t head, int64_t begin,
                   int64_t queries) const {
    pack_queries(s, doc, head, begin, queries);
    const Range seen = shape.keys_of(doc, begin, begin + queries);
    const int64_t end = std::min(seen.end - span.begin, span.size);
    const int64_t start = std::max<int64_t>(seen.begin - span.begin, 0) / kBlock;
    for (int64_t b = start; b * kBlock < end; ++b) {
      const int64_t key = b * kBlock;
      const Block block =
          shape.block(doc, begin, queries, span.begin + key, std::min(kBlock, end - key));
      score_product<unit>(block, depth(), s.key_rows.data() + b * rows_block(),
                          s.query_columns.data(), s.scores.data());
      score_product<unit>(block, depth(), s.value_rows.data() + b * rows_block(),
                          s.grad_columns.data(), s.dp.data());
      with_options(block, [&](auto masked, auto capped) {
        dispatch<GradientBlock<unit, masked, capped>>(
            s.scores.data(), s.dp.data(), block, static_cast<const float*>(s.lse),
            static_cast<const float*>(s.delta), s.p_by_key.data(), s.ds_by_key.data(),
            s.ds_by_query.data());
      });
      const std::vector<uint32_t>& ds_by_query = unit == Unit::fp32 ? s.ds_by_key : s.ds_by_query;
      sum_over_queries<unit>(block, shape.padded, s.p_by_key.data(), s.grad_pairs.data(),
                             s.dv.data() + b * sums_block());
      sum_over_queries<unit>(block, shape.padded, s.ds_by_key.data(), s.query_pairs.data(),
                             s.dk.data() + b * sums_block());
      sum_over_keys<unit>(block, shape.padded, ds_by_query.data(),
                          s.key_pairs.data() + b * pairs_block(), s.dq.data(), b > start);
    }
    const int64_t token = doc.query_begin + begin, step = task_keys(doc);
    if (step >= doc.keys) {
      dispatch<StoreRows>(s.dq.data(), shape.padded, shape.scale, dq.at(doc.batch, token, head),
                          dq.token, queries, shape.width);
    } else {
      dispatch<StoreRows>(s.dq.data(), shape.padded, shape.scale,
                          part(doc, span.begin / step, token) + head * shape.width,
                          shape.heads * shape.width, queries, shape.width);
    }
  }

  // Part i of the gradient of a document's query at `token`, (Hq, D).
  float* part(const Document& doc, int64_t i, int64_t token) const {
    const int64_t slot = i % slots * shape.batch + doc.batch;
    return parts + (slot * shape.length + token) * shape.heads * shape.width;
  }

  // dq of the queries that no task visits, and of the documents that took several tasks.
  void finish() const {
    const std::vector<Span> blocks = blocks_of(shape.documents, false);
    const int64_t width = shape.heads * shape.width;
    at::parallel_for(
        0, std::ssize(blocks), rows_per_task(width * kBlock), [&](int64_t b, int64_t end) {
          std::vector<float> sum(width);
          for (; b < end; ++b) {
            const Span& span = blocks[b];
            const Document& doc = shape.documents[span.document];
            const Range seen = shape.keys_of(doc, span.begin, span.begin + span.size);
            const bool nothing = seen.begin == seen.end;
            const int64_t step = task_keys(doc);
            if (step >= doc.keys && !nothing) continue;
            for (int64_t i = 0; i < span.size; ++i) {
              const int64_t token = doc.query_begin + span.begin + i;
              std::fill(sum.begin(), sum.end(), 0.0f);
              for (int64_t p = seen.begin / step; !nothing && p <= (seen.end - 1) / step; ++p) {
                const float* from = part(doc, p, token);
                for (int64_t j = 0; j < width; ++j) sum[j] += from[j];
              }
              dispatch<StoreRows>(static_cast<const float*>(sum.data()), shape.width, 1.0f,
                                  dq.at(doc.batch, token, 0), dq.head, shape.heads, shape.width);
            }
          }
        });
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_backward(
    const at::Tensor& grad_in, const std::optional<at::Tensor>& grad_lse_in, const at::Tensor& q_in,
    const at::Tensor& k_in, const at::Tensor& v_in, const at::Tensor& out_in,
    const at::Tensor& lse_in, const std::optional<at::Tensor>& cu_seqlens_q,
    const std::optional<at::Tensor>& cu_seqlens_k, const std::optional<at::Tensor>& sinks,
    int64_t left, int64_t right, double scale, double softcap) {
  const Shape shape =
      shape_of(q_in, k_in, v_in, {cu_seqlens_q, cu_seqlens_k, sinks, left, right, scale, softcap});
  TORCH_CHECK_VALUE(grad_in.sizes() == q_in.sizes() && out_in.sizes() == q_in.sizes() &&
                        grad_in.scalar_type() == q_in.scalar_type() &&
                        out_in.scalar_type() == q_in.scalar_type(),
                    "fastllm attention: out and its gradient must have the shape and dtype of q");
  TORCH_CHECK_VALUE(
      lse_in.numel() == shape.batch * shape.heads * shape.length &&
          lse_in.scalar_type() == at::kFloat &&
          (!grad_lse_in.has_value() || grad_lse_in->sizes() == lse_in.sizes()),
      "fastllm attention: lse and its gradient must be (B, Hq, Sq) or (Hq, Tq), lse float32");
  const at::Tensor q = unit_stride(with_batch(q_in)), k = unit_stride(with_batch(k_in));
  const at::Tensor v = unit_stride(with_batch(v_in)), out = unit_stride(with_batch(out_in));
  const at::Tensor grad = unit_stride(with_batch(grad_in)), lse = lse_in.contiguous();
  const at::Tensor grad_lse =
      grad_lse_in.has_value() ? grad_lse_in->to(at::kFloat).contiguous() : at::Tensor();
  const auto contiguous = at::MemoryFormat::Contiguous;
  at::Tensor dq = at::empty(q.sizes(), q.options().memory_format(contiguous));
  at::Tensor dk = at::empty(k.sizes(), k.options().memory_format(contiguous));
  at::Tensor dv = at::empty(v.sizes(), v.options().memory_format(contiguous));
  const int64_t slots = slots_of(shape);
  const at::Tensor parts = at::empty({slots * q.numel()}, q.options().dtype(at::kFloat));
  with_format(q, [&]<typename T, Unit unit>(T, std::integral_constant<Unit, unit>) {
    const Backward<T, unit> backward{shape,
                                     reader<T>(q),
                                     reader<T>(k),
                                     reader<T>(v),
                                     reader<T>(out),
                                     reader<T>(grad),
                                     data<float>(lse),
                                     grad_lse.defined() ? data<float>(grad_lse) : nullptr,
                                     writer<T>(dq),
                                     writer<T>(dk),
                                     writer<T>(dv),
                                     slots,
                                     mutable_data<float>(parts)};
    backward.run();
    backward.finish();
  });
  beyond(shape, dq, false).zero_();
  beyond(shape, dk, true).zero_();
  beyond(shape, dv, true).zero_();
  if (!cu_seqlens_q.has_value()) return {dq, dk, dv};
  return {dq.squeeze(0), dk.squeeze(0), dv.squeeze(0)};
}

}  // namespace
}  // namespace fastllm

TORCH_LIBRARY_FRAGMENT(fastllm_cpu, m) {
  m.def(
      "attention_backward(Tensor grad, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, "
      "Tensor lse, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? sinks, int left, int right, "
      "float scale, float softcap) -> (Tensor dq, Tensor dk, Tensor dv)");
}

TORCH_LIBRARY_IMPL(fastllm_cpu, CPU, m) {
  m.impl("attention_backward", &fastllm::attention_backward);
}
