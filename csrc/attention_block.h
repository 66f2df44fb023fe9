// The elementwise work on one block of attention: bringing operands into the layouts that
// tile_product reads, and the softmax of a block of scores and its gradient.
//
// Scores are kept transposed, (keys, queries), so that the softmax runs along queries and needs no
// sum across the lanes of a vector. A block is at most kBlock queries by kBlock keys.
#pragma once

#include <cstdint>
#include <limits>

#include "common.h"
#include "tile.h"

namespace fastllm {

constexpr int64_t kBlock = 64;

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

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

// (rows, width) -> (units of width, kBlock), with zeros from `rows` to the next multiple of 16.
template <Unit unit>
struct PackColumns {
  template <typename T>
  static FASTLLM_INLINE void run(const T* __restrict x, int64_t stride, int64_t rows, int64_t width,
                                 uint32_t* __restrict out) {
    constexpr int64_t step = unit == Unit::fp32 ? 1 : 2;
    const int64_t padded = (rows + 15) / 16 * 16;
    for (int64_t row = 0; row < rows; ++row, x += stride) {
      uint32_t* to = out + row;
      for (int64_t i = 0; i + step <= width; i += step, to += kBlock)
        *to = join<unit>(x[i], x[i + step - 1]);
      if (width % step != 0) *to = join<unit>(x[width - 1], T{});
    }
    for (int64_t k = 0; k < units<unit>(width); ++k)
      for (int64_t row = rows; row < padded; ++row) out[k * kBlock + row] = 0;
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

// Which scores of a block count: query i sees key j where j <= i + limit.
struct Block {
  int64_t keys, queries;  // queries: rounded up to a multiple of 16
  int64_t limit;
  float scale;
};

// Scores of a block, scaled, with -inf where a query does not see a key.
FASTLLM_INLINE float score(float raw, int32_t query, int32_t first, float scale) {
  const float scaled = raw * scale;
  return query >= first ? scaled : -std::numeric_limits<float>::infinity();
}

// The online softmax: scores (keys, kBlock) become e^(score - max) as units along keys, (units of
// keys, kBlock). `max` and `sum` of every query are carried on; `decay` is what the values summed
// so far must be multiplied by. Returns whether any decay is not 1.
template <Unit unit>
struct SoftmaxBlock {
  static FASTLLM_INLINE bool run(float* __restrict scores, Block block, float* __restrict max,
                                 float* __restrict sum, float* __restrict decay,
                                 uint32_t* __restrict out) {
    float top[kBlock], add[kBlock];
    const int32_t queries = static_cast<int32_t>(block.queries);
    for (int32_t i = 0; i < queries; ++i) top[i] = max[i];
    for (int64_t j = 0; j < block.keys; ++j) {
      float* row = scores + j * kBlock;
      const int32_t first = static_cast<int32_t>(j - block.limit);
      for (int32_t i = 0; i < queries; ++i) {
        const float s = score(row[i], i, first, block.scale);
        row[i] = s;
        top[i] = larger(s, top[i]);
      }
    }
    int32_t changed = 0;
    for (int32_t i = 0; i < queries; ++i) {
      // A query that has seen nothing yet keeps -inf; its exponentials are taken from 0.
      changed |= top[i] != max[i];
      decay[i] = fast_exp(max[i] - top[i]);
      max[i] = top[i];
      add[i] = 0.0f;
    }
    constexpr int64_t step = unit == Unit::fp32 ? 1 : 2;
    for (int64_t j = 0; j < block.keys; j += step) {
      const float* row = scores + j * kBlock;
      if constexpr (unit == Unit::fp32) {
        for (int32_t i = 0; i < queries; ++i) {
          const float p = fast_exp(row[i] - top[i]);
          add[i] += p;
          out[j * kBlock + i] = std::bit_cast<uint32_t>(p);
        }
      } else {
        const bool pair = j + 1 < block.keys;
        const float* next = pair ? row + kBlock : row;
        const float keep = pair ? 1.0f : 0.0f;
        for (int32_t i = 0; i < queries; ++i) {
          const float p = fast_exp(row[i] - top[i]);
          const float q = fast_exp(next[i] - top[i]) * keep;
          add[i] += p;
          add[i] += q;
          out[j / 2 * kBlock + i] = join<unit>(from_float<bf16>(p), from_float<bf16>(q));
        }
      }
    }
    for (int32_t i = 0; i < queries; ++i) sum[i] = sum[i] * decay[i] + add[i];
    return changed != 0;
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
template <Unit unit>
struct GradientBlock {
  static FASTLLM_INLINE void run(const float* __restrict scores, const float* __restrict dp,
                                 Block block, const float* __restrict lse,
                                 const float* __restrict delta, uint32_t* __restrict p_by_key,
                                 uint32_t* __restrict ds_by_key, uint32_t* __restrict ds_by_query) {
    const int32_t queries = static_cast<int32_t>(block.queries);
    if constexpr (unit == Unit::fp32) {
      for (int64_t j = 0; j < block.keys; ++j) {
        const int32_t first = static_cast<int32_t>(j - block.limit);
        const int64_t row = j * kBlock;
        for (int32_t i = 0; i < queries; ++i) {
          const float p = fast_exp(score(scores[row + i], i, first, block.scale) - lse[i]);
          p_by_key[row + i] = std::bit_cast<uint32_t>(p);
          ds_by_key[row + i] = std::bit_cast<uint32_t>(p * (dp[row + i] - delta[i]));
        }
      }
    } else {
      for (int64_t j = 0; j < block.keys; j += 2) {
        const bool pair = j + 1 < block.keys;
        const int64_t row = j * kBlock, next = pair ? row + kBlock : row;
        uint16_t* p_row = reinterpret_cast<uint16_t*>(p_by_key) + row;
        uint16_t* ds_row = reinterpret_cast<uint16_t*>(ds_by_key) + row;
        gradient_row(scores + row, dp + row, j, block, lse, delta, p_row, ds_row);
        if (pair)
          gradient_row(scores + next, dp + next, j + 1, block, lse, delta, p_row + kBlock,
                       ds_row + kBlock);
        const uint32_t keep = pair ? 0xffff0000u : 0u;
        const uint16_t* other = pair ? ds_row + kBlock : ds_row;
        uint32_t* to = ds_by_query + j / 2 * kBlock;
        for (int32_t i = 0; i < queries; ++i)
          to[i] = static_cast<uint32_t>(ds_row[i]) | (static_cast<uint32_t>(other[i]) << 16 & keep);
      }
    }
  }

  static FASTLLM_INLINE void gradient_row(const float* __restrict scores,
                                          const float* __restrict dp, int64_t j, Block block,
                                          const float* __restrict lse,
                                          const float* __restrict delta, uint16_t* __restrict p_out,
                                          uint16_t* __restrict ds_out) {
    const int32_t first = static_cast<int32_t>(j - block.limit);
    const int32_t queries = static_cast<int32_t>(block.queries);
    for (int32_t i = 0; i < queries; ++i) {
      const float p = fast_exp(score(scores[i], i, first, block.scale) - lse[i]);
      p_out[i] = from_float<bf16>(p).bits;
      ds_out[i] = from_float<bf16>(p * (dp[i] - delta[i])).bits;
    }
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

}  // namespace fastllm
