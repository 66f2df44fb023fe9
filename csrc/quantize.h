// The int8 wire format: blocks of 256 elements, each 4 bytes of fp32 scale and 256 of int8. An
// element is q * scale. Blocks do not depend on each other, so the chunk of elements
// [a, b), both multiples of 256, is the bytes [a / 256 * 260, b / 256 * 260).
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <cstring>
#include <optional>

#include "wire.h"

namespace fastllm {

constexpr int64_t kInt8Bytes = 4 + kTile;  // of one block

// Whether the numbers are the first of a sum or more of it.
enum class Place { first, later };

template <Place place>
FASTLLM_INLINE void dequantize_block(const uint8_t* block, float* __restrict out) {
  float scale;
  std::memcpy(&scale, block, sizeof(scale));  // a slice of bytes may begin anywhere
  const int8_t* q = reinterpret_cast<const int8_t*>(block + sizeof(scale));
  for (int64_t i = 0; i < kTile; ++i) {
    const float x = static_cast<float>(q[i]) * scale;
    out[i] = place == Place::first ? x : out[i] + x;
  }
}

// wire <- v = x * pre_scale + error in fp32, and error <- v - what the wire says. The scale of a
// block is max|v| / 127, an element round-half-even(v / scale). A block with a NaN or an infinity
// is all NaN on the wire, so that none is hidden, and its errors are 0.
void quantize_int8(const at::Tensor& wire, const at::Tensor& x,
                   const std::optional<at::Tensor>& error, double pre_scale);

void dequantize_int8(const at::Tensor& out, const at::Tensor& wire);

}  // namespace fastllm
