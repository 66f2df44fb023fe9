// The elementwise work on one block of attention: bringing operands into the layouts that
// tile_product reads, and the softmax of a block of scores and its gradient.
//
// Scores are kept transposed, (keys, queries), so that the softmax runs along queries and needs no
// sum across the lanes of a vector. A block is at most kBlock queries by kBlock keys.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "common.h"
#include "tile.h"

namespace fastllm {

constexpr int64_t kBlock = 64;
constexpr int64_t kStrip = 16;  // masks are followed, and loops run, by so many queries or keys

FASTLLM_INLINE int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Units along a dimension of `size`.
template <Unit unit>
constexpr int64_t units(int64_t size) {
  return unit == Unit::fp32 ? size : (size + 1) / 2;
}

template <Unit unit, typename T>
FASTLLM_INLINE uint32_t join(T low, T high) {
  if constexpr (unit == Unit::fp32) {
    return std::bit_cast<uint32_t>(to_float(low));
  } else {
    return static_cast<uint32_t>(low.bits) | static_cast<uint32_t>(high.bits) << 16;
  }
}

// (rows, width) -> (rows, units of width).
template <Unit unit>
struct PackRows {
  template <typename T>
  static FASTLLM_INLINE void run(const T* x, int64_t stride, int64_t rows, int64_t width,
                                 uint32_t* __restrict out) {
    constexpr int64_t step = unit == Unit::fp32 ? 1 : 2;
    for (int64_t row = 0; row < rows; ++row, x += stride) {
      for (int64_t i = 0; i + step <= width; i += step) *out++ = join<unit>(x[i], x[i + step - 1]);
      if (width % step != 0) *out++ = join<unit>(x[width - 1], T{});
    }
  }
};

// (rows, width) -> (units of width, kBlock), with zeros from `rows` to the next multiple of kStrip.
template <Unit unit>
struct PackColumns {
  static constexpr int64_t kTile = kStrip * kStrip;

  template <typename T>
  static FASTLLM_INLINE void run(const T* __restrict x, int64_t stride, int64_t rows, int64_t width,
                                 uint32_t* __restrict out) {
    constexpr int64_t step = unit == Unit::fp32 ? 1 : 2;
    const int64_t depth = units<unit>(width);
    for (int64_t row = 0; row < rows; row += kStrip) {
      const int64_t count = rows - row < kStrip ? rows - row : kStrip;
      for (int64_t column = 0; column < depth; column += kStrip) {
        const int64_t whole = width / step - column < kStrip ? width / step - column : kStrip;
        uint32_t tile[kTile] = {}, other[kTile];
        for (int64_t i = 0; i < count; ++i) {
          const T* from = x + (row + i) * stride + column * step;
          uint32_t* to = tile + i * kStrip;
          if (whole == kStrip) {
            for (int64_t k = 0; k < kStrip; ++k)
              to[k] = join<unit>(from[k * step], from[k * step + step - 1]);
          } else {
            for (int64_t k = 0; k < whole; ++k)
              to[k] = join<unit>(from[k * step], from[k * step + step - 1]);
            if (column + whole < depth) to[whole] = join<unit>(from[whole * step], T{});
          }
        }
        interleave(tile, other);
        interleave(other, tile);
        interleave(tile, other);
        interleave(other, tile);
        const int64_t lines = depth - column < kStrip ? depth - column : kStrip;
        for (int64_t k = 0; k < lines; ++k)
          for (int64_t i = 0; i < kStrip; ++i)
            out[(column + k) * kBlock + row + i] = tile[k * kStrip + i];
      }
    }
  }

  // Moves the top bit of an index to its end: four times that swaps the row and the column.
  static FASTLLM_INLINE void interleave(const uint32_t* __restrict x, uint32_t* __restrict out) {
    for (int64_t i = 0; i < kTile / 2; ++i) {
      out[2 * i] = x[i];
      out[2 * i + 1] = x[i + kTile / 2];
    }
  }
};

// (rows, width) -> (units of rows, padded), zeros beyond width and beyond the last row.
template <Unit unit>
struct PackPairs {
  template <typename T>
  static FASTLLM_INLINE void run(const T* __restrict x, int64_t stride, int64_t rows, int64_t width,
                                 int64_t padded, uint32_t* __restrict out) {
    constexpr int64_t step = unit == Unit::fp32 ? 1 : 2;
    for (int64_t row = 0; row < rows; row += step, out += padded) {
      const T* first = x + row * stride;
      if (row + step <= rows) {
        const T* second = first + (step - 1) * stride;
        for (int64_t i = 0; i < width; ++i) out[i] = join<unit>(first[i], second[i]);
      } else {
        for (int64_t i = 0; i < width; ++i) out[i] = join<unit>(first[i], T{});
      }
      for (int64_t i = width; i < padded; ++i) out[i] = 0;
    }
  }
};

struct Range {
  int64_t begin, end;
  // Up to the end of the last strip.
  FASTLLM_INLINE int32_t columns() const {
    return static_cast<int32_t>(end - begin + kStrip - 1) & -static_cast<int32_t>(kStrip);
  }
};

// A block of scores: query i sees key j where lower <= j - i <= upper.
struct Block {
  int64_t keys, queries;
  int32_t lower, upper;
  float scale, softcap;  // softcap 0: none; else `scale` is over it

  FASTLLM_INLINE bool full() const { return upper >= keys - 1 && lower <= 1 - queries; }
  int64_t strip() const { return full() ? kBlock : kStrip; }

  // The keys that the strip of queries from `query` on sees, in whole strips; and the reverse.
  FASTLLM_INLINE Range keys_of(int64_t query) const {
    return band(query + lower, query + kStrip + upper, keys);
  }
  FASTLLM_INLINE Range queries_of(int64_t key) const {
    return band(key - upper, key + kStrip - lower, queries);
  }

  static FASTLLM_INLINE Range band(int64_t first, int64_t last, int64_t size) {
    const int64_t begin = first > 0 ? first / kStrip * kStrip : 0;
    const int64_t up = round_up(last, kStrip), end = up < size ? up : size;
    return {begin, end > begin ? end : begin};
  }
};

// One key's scores for a strip of queries: scaled, capped, and -inf where a query does not see it.
template <bool masked, bool capped>
struct Scores {
  float scale, softcap;
  int32_t distance;  // of the key above the lowest that the strip's first query sees
  uint32_t width;    // upper - lower

  FASTLLM_INLINE Scores(const Block& block, int64_t key, int64_t query)
      : scale(block.scale),
        softcap(block.softcap),
        distance(static_cast<int32_t>(key - query) - block.lower),
        width(static_cast<uint32_t>(block.upper - block.lower)) {}

  // The slope of the cap at this score goes to *slope.
  FASTLLM_INLINE float operator()(float raw, int32_t i, float* slope) const {
    float score = raw * scale;
    if constexpr (capped) {
      const float t = fast_tanh(score);
      score = softcap * t;
      *slope = 1.0f - t * t;
    }
    if constexpr (masked) {
      const bool seen = static_cast<uint32_t>(distance - i) <= width;
      score = choose(seen, score, -std::numeric_limits<float>::infinity());
    }
    return score;
  }
};

// The online softmax: scores (keys, kBlock) become e^(score - max) as units along keys, (units of
// keys, kBlock). `max` and `sum` of every query are carried on; `decay` is what the values summed
// so far must be multiplied by. Returns whether any decay is not 1.
template <Unit unit, bool masked, bool capped>
struct SoftmaxBlock {
  static constexpr float kNone = -std::numeric_limits<float>::infinity();
  static constexpr int64_t step = unit == Unit::fp32 ? 1 : 2;

  static FASTLLM_INLINE bool run(float* __restrict scores, Block block, float* __restrict max,
                                 float* __restrict sum, float* __restrict decay,
                                 uint32_t* __restrict out) {
    const int64_t columns = round_up(block.queries, kStrip);
    float top[kBlock], base[kBlock], add[kBlock];
    for (int64_t i = 0; i < columns; ++i) top[i] = max[i];
    for (int64_t j = 0; j < block.keys; ++j) {
      const Range seen = block.queries_of(j / kStrip * kStrip);
      finish_scores({block, j, seen.begin}, seen.columns(), scores + j * kBlock + seen.begin,
                    top + seen.begin);
    }
    int32_t changed = 0;
    for (int64_t i = 0; i < columns; ++i) {
      // A query that has seen nothing yet keeps -inf; its exponentials are taken from 0.
      base[i] = top[i] == kNone ? 0.0f : top[i];
      changed |= top[i] != max[i];
      decay[i] = fast_exp(max[i] - base[i]);
      max[i] = top[i];
      add[i] = 0.0f;
    }
    for (int64_t j = 0; j < block.keys; j += step) {
      const Range seen = block.queries_of(j / kStrip * kStrip);
      const bool pair = j + 1 < block.keys;
      exponentials(scores + j * kBlock + seen.begin, pair, seen.columns(), base + seen.begin,
                   add + seen.begin, out + j / step * kBlock + seen.begin);
    }
    for (int64_t i = 0; i < columns; ++i) sum[i] = sum[i] * decay[i] + add[i];
    return changed != 0;
  }

  static FASTLLM_INLINE void finish_scores(const Scores<masked, capped>& score, int32_t columns,
                                           float* __restrict row, float* __restrict top) {
    for (int32_t i = 0; i < columns; ++i) {
      float slope;
      const float s = score(row[i], i, &slope);
      row[i] = s;
      top[i] = larger(s, top[i]);
    }
  }

  // Of one key, or of two that make units; `pair`: whether there is a second.
  static FASTLLM_INLINE void exponentials(const float* __restrict row, bool pair, int32_t columns,
                                          const float* __restrict base, float* __restrict add,
                                          uint32_t* __restrict out) {
    const float* next = pair ? row + kBlock : row;
    const float keep = pair ? 1.0f : 0.0f;
    for (int32_t i = 0; i < columns; ++i) {
      const float p = fast_exp(row[i] - base[i]);
      add[i] += p;
      if constexpr (unit == Unit::fp32) {
        out[i] = std::bit_cast<uint32_t>(p);
      } else {
        const float q = fast_exp(next[i] - base[i]) * keep;
        add[i] += q;
        out[i] = join<unit>(from_float<bf16>(p), from_float<bf16>(q));
      }
    }
  }
};

struct ScaleRows {
  static FASTLLM_INLINE void run(float* __restrict x, const float* __restrict by, int64_t rows,
                                 int64_t width) {
    for (int64_t row = 0; row < rows; ++row, x += width)
      for (int64_t i = 0; i < width; ++i) x[i] *= by[row];
  }
};

// out = x * by, row by row; x is (rows, padded) in fp32.
struct StoreRows {
  template <typename T>
  static FASTLLM_INLINE void run(const float* __restrict x, int64_t padded, float by,
                                 T* __restrict out, int64_t stride, int64_t rows, int64_t width) {
    for (int64_t row = 0; row < rows; ++row, x += padded, out += stride)
      for (int64_t i = 0; i < width; ++i) out[i] = from_float<T>(x[i] * by);
  }
};

// The gradient: from the scores and dP (both (keys, kBlock)) to P and dS = P (dP - delta),
//   by_key   (keys, units of kBlock): P, and dS: units along queries, for dV and dK
//   by_query (units of keys, kBlock): dS: units along keys, for dQ. With fp32 that is the same
//   array.
template <Unit unit, bool masked, bool capped>
struct GradientBlock {
  using Lane = std::conditional_t<unit == Unit::fp32, float, bf16>;

  static FASTLLM_INLINE void run(const float* __restrict scores, const float* __restrict dp,
                                 Block block, const float* __restrict lse,
                                 const float* __restrict delta, uint32_t* __restrict p_by_key,
                                 uint32_t* __restrict ds_by_key, uint32_t* __restrict ds_by_query) {
    Lane* p = reinterpret_cast<Lane*>(p_by_key);
    Lane* ds = reinterpret_cast<Lane*>(ds_by_key);
    for (int64_t j = 0; j < block.keys; ++j) {
      const Range seen = block.queries_of(j / kStrip * kStrip);
      const bool joins = j % 2 == 1 || j + 1 == block.keys;
      const int64_t first = seen.begin, at = j * kBlock + first;
      gradient({block, j, first}, seen.columns(), scores + at, dp + at, lse + first, delta + first,
               p + at, ds + at);
      if (unit == Unit::bf16_pair && joins)
        join_keys(ds_by_key, at, j % 2 == 1, seen.columns(), ds_by_query + j / 2 * kBlock + first);
    }
  }

  static FASTLLM_INLINE void gradient(const Scores<masked, capped>& score, int32_t columns,
                                      const float* __restrict scores, const float* __restrict dp,
                                      const float* __restrict lse, const float* __restrict delta,
                                      Lane* __restrict p_out, Lane* __restrict ds_out) {
    for (int32_t i = 0; i < columns; ++i) {
      float slope = 1.0f;
      const float p = fast_exp(score(scores[i], i, &slope) - lse[i]);
      float ds = p * (dp[i] - delta[i]);
      if constexpr (capped) ds *= slope;
      p_out[i] = from_float<Lane>(p);
      ds_out[i] = from_float<Lane>(ds);
    }
  }

  // Units of this key and the one before it, or of this one alone.
  static FASTLLM_INLINE void join_keys(const uint32_t* __restrict by_key, int64_t at, bool second,
                                       int32_t columns, uint32_t* __restrict out) {
    const uint16_t* own = reinterpret_cast<const uint16_t*>(by_key) + at;
    const uint16_t* low = second ? own - kBlock : own;
    const uint32_t keep = second ? 0xffff0000u : 0u;
    for (int32_t i = 0; i < columns; ++i)
      out[i] = low[i] | (static_cast<uint32_t>(own[i]) << 16 & keep);
  }
};

// delta[row] = sum_i a[row][i] b[row][i].
struct DotRows {
  template <typename T>
  static FASTLLM_INLINE void run(const T* a, int64_t a_stride, const T* b, int64_t b_stride,
                                 int64_t rows, int64_t width, float* out) {
    for (int64_t row = 0; row < rows; ++row, a += a_stride, b += b_stride) {
      float lanes[kLanes] = {};
      int64_t i = 0;
      for (; i + kLanes <= width; i += kLanes)
        for (int64_t l = 0; l < kLanes; ++l) lanes[l] += to_float(a[i + l]) * to_float(b[i + l]);
      for (int64_t l = 0; i + l < width; ++l) lanes[l] += to_float(a[i + l]) * to_float(b[i + l]);
      out[row] = fold_sum(lanes);
    }
  }
};

// ---------------------------------------------- products, of the strips that see each other

// scores (keys, kBlock) = rows (keys, depth) columns (depth, kBlock).
template <Unit unit>
void score_product(const Block& block, int64_t depth, const uint32_t* rows, const uint32_t* columns,
                   float* scores) {
  const int64_t step = block.strip();
  for (int64_t key = 0; key < block.keys; key += step) {
    const Range seen = block.queries_of(key);
    tile_product(unit, std::min(step, block.keys - key), round_up(seen.end - seen.begin, kStrip),
                 depth, rows + key * depth, depth, 1, columns + seen.begin, kBlock,
                 scores + key * kBlock + seen.begin, kBlock, false);
  }
}

// sums (queries, padded) = weights^T values, or +=; weights (units of keys, kBlock).
template <Unit unit>
void sum_over_keys(const Block& block, int64_t padded, const uint32_t* weights,
                   const uint32_t* values, float* sums, bool accumulate) {
  const int64_t step = block.strip();
  for (int64_t query = 0; query < block.queries; query += step) {
    const Range seen = block.keys_of(query);
    const int64_t begin = units<unit>(seen.begin);
    tile_product(unit, std::min(step, block.queries - query), padded, units<unit>(seen.end) - begin,
                 weights + begin * kBlock + query, 1, kBlock, values + begin * padded, padded,
                 sums + query * padded, padded, accumulate);
  }
}

// sums (keys, padded) += weights pairs; weights (keys, units of kBlock).
template <Unit unit>
void sum_over_queries(const Block& block, int64_t padded, const uint32_t* weights,
                      const uint32_t* pairs, float* sums) {
  const int64_t step = block.strip(), row = units<unit>(kBlock);
  for (int64_t key = 0; key < block.keys; key += step) {
    const Range seen = block.queries_of(key);
    const int64_t begin = units<unit>(seen.begin);
    tile_product(unit, std::min(step, block.keys - key), padded, units<unit>(seen.end) - begin,
                 weights + key * row + begin, row, 1, pairs + begin * padded, padded,
                 sums + key * padded, padded, true);
  }
}

// Calls f(constant<masked>, constant<capped>) with what the block needs.
template <typename F>
auto with_options(const Block& block, const F& f) {
  const auto with = [&](auto masked) {
    return block.softcap > 0.0f ? f(masked, std::true_type{}) : f(masked, std::false_type{});
  };
  return block.full() ? with(std::false_type{}) : with(std::true_type{});
}

}  // namespace fastllm
