// Products of small matrices that lie in the cache: the inner loop of attention.
//
// Both operands are arrays of 32-bit units along the summed dimension: one float, or two
// consecutive bf16 where the CPU multiplies those in pairs (AVX512_BF16). Sums are in fp32.
#pragma once

#include <cstdint>

namespace fastllm {

enum class Unit { fp32, bf16_pair };

// Whether this CPU multiplies pairs of bf16 (and ATEN_CPU_CAPABILITY leaves it AVX-512).
bool has_bf16_pairs();

// c (m, n) = a (m, depth) b (depth, n), or c += a b. Unit (i, k) of a is a[i * a_row + k * a_col],
// unit (k, j) of b is b[k * b_row + j]; n is a multiple of 16.
void tile_product(Unit unit, int64_t m, int64_t n, int64_t depth, const uint32_t* a, int64_t a_row,
                  int64_t a_col, const uint32_t* b, int64_t b_row, float* c, int64_t c_row,
                  bool accumulate);

}  // namespace fastllm
