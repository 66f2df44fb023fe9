#include "tile.h"

#include <algorithm>
#include <cstring>

#include "vector.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastllm {
namespace {

// FASTLLM_AVX512 and one more: functions of the one are inlined into those of the other.
#define FASTLLM_AVX512_BF16 \
  __attribute__((target(    \
      "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,prefer-vector-width=512")))

// One instruction set each: a vector, the rows of a register tile, and acc + a * b where a is one
// unit in all lanes. Two vectors of b and kRows x 2 sums fill the registers.
struct Plain {
  typedef float Vector __attribute__((vector_size(16), aligned(4)));
  static constexpr int kLanes = 4, kRows = 4;
  static FASTLLM_INLINE Vector zero() { return Vector{}; }
  static FASTLLM_INLINE Vector load(const void* p) { return *static_cast<const Vector*>(p); }
  static FASTLLM_INLINE void store(float* p, Vector x) { *reinterpret_cast<Vector*>(p) = x; }
  static FASTLLM_INLINE Vector splat(const uint32_t* p) {
    const float x = std::bit_cast<float>(*p);
    return Vector{x, x, x, x};
  }
  static FASTLLM_INLINE Vector add(Vector a, Vector b) { return a + b; }
  static FASTLLM_INLINE Vector dot(Vector sum, Vector a, Vector b) { return sum + a * b; }
};

#if defined(__x86_64__)
struct Avx2 {
  using Vector = __m256;
  static constexpr int kLanes = 8, kRows = 6;
  static FASTLLM_INLINE FASTLLM_AVX2 Vector zero() { return _mm256_setzero_ps(); }
  static FASTLLM_INLINE FASTLLM_AVX2 Vector load(const void* p) {
    return _mm256_loadu_ps(static_cast<const float*>(p));
  }
  static FASTLLM_INLINE FASTLLM_AVX2 void store(float* p, Vector x) { _mm256_storeu_ps(p, x); }
  static FASTLLM_INLINE FASTLLM_AVX2 Vector splat(const uint32_t* p) {
    return _mm256_set1_ps(std::bit_cast<float>(*p));
  }
  static FASTLLM_INLINE FASTLLM_AVX2 Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
  static FASTLLM_INLINE FASTLLM_AVX2 Vector dot(Vector sum, Vector a, Vector b) {
    return _mm256_fmadd_ps(a, b, sum);
  }
};

struct Avx512 {
  using Vector = __m512;
  static constexpr int kLanes = 16, kRows = 8;
  static FASTLLM_INLINE FASTLLM_AVX512 Vector zero() { return _mm512_setzero_ps(); }
  static FASTLLM_INLINE FASTLLM_AVX512 Vector load(const void* p) { return _mm512_loadu_ps(p); }
  static FASTLLM_INLINE FASTLLM_AVX512 void store(float* p, Vector x) { _mm512_storeu_ps(p, x); }
  static FASTLLM_INLINE FASTLLM_AVX512 Vector splat(const uint32_t* p) {
    return _mm512_set1_ps(std::bit_cast<float>(*p));
  }
  static FASTLLM_INLINE FASTLLM_AVX512 Vector add(Vector a, Vector b) {
    return _mm512_add_ps(a, b);
  }
  static FASTLLM_INLINE FASTLLM_AVX512 Vector dot(Vector sum, Vector a, Vector b) {
    return _mm512_fmadd_ps(a, b, sum);
  }
};

struct Avx512Bf16 : Avx512 {
  static FASTLLM_INLINE FASTLLM_AVX512_BF16 Vector dot(Vector sum, Vector a, Vector b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
};
#endif

struct Operands {
  const uint32_t* a;
  int64_t a_row, a_col;
  const uint32_t* b;
  int64_t b_row;
  float* c;
  int64_t c_row, depth;
  bool accumulate;
};

// A function that must be compiled for an instruction set cannot take it from a template argument,
// so the one text is instantiated by a macro.
#define FASTLLM_TILE(NAME, TARGET, SET)                                                     \
  template <int kRows, int kVectors>                                                        \
  TARGET void NAME##_tile(const Operands& o, int64_t row, int64_t column) {                 \
    SET::Vector sum[kRows][kVectors];                                                       \
    for (int i = 0; i < kRows; ++i)                                                         \
      for (int v = 0; v < kVectors; ++v) sum[i][v] = SET::zero();                           \
    const uint32_t* a = o.a + row * o.a_row;                                                \
    const uint32_t* b = o.b + column;                                                       \
    for (int64_t k = 0; k < o.depth; ++k, a += o.a_col, b += o.b_row) {                     \
      SET::Vector right[kVectors];                                                          \
      for (int v = 0; v < kVectors; ++v) right[v] = SET::load(b + v * SET::kLanes);         \
      _Pragma("GCC unroll 16") for (int i = 0; i < kRows; ++i) {                            \
        const SET::Vector left = SET::splat(a + i * o.a_row);                               \
        for (int v = 0; v < kVectors; ++v) sum[i][v] = SET::dot(sum[i][v], left, right[v]); \
      }                                                                                     \
    }                                                                                       \
    _Pragma("GCC unroll 16") for (int i = 0; i < kRows; ++i) {                              \
      for (int v = 0; v < kVectors; ++v) {                                                  \
        float* to = o.c + (row + i) * o.c_row + column + v * SET::kLanes;                   \
        SET::store(to, o.accumulate ? SET::add(SET::load(to), sum[i][v]) : sum[i][v]);      \
      }                                                                                     \
    }                                                                                       \
  }                                                                                         \
  template <int kRows, int kVectors>                                                        \
  void NAME##_rows(const Operands& o, int64_t row, int64_t rows, int64_t column) {          \
    if constexpr (kRows > 0) {                                                              \
      if (rows == kRows) return NAME##_tile<kRows, kVectors>(o, row, column);               \
      return NAME##_rows<kRows - 1, kVectors>(o, row, rows, column);                        \
    }                                                                                       \
  }                                                                                         \
  void NAME##_product(const Operands& o, int64_t m, int64_t n) {                            \
    constexpr int64_t kWidth = 2 * SET::kLanes;                                             \
    for (int64_t column = 0; column < n; column += kWidth) {                                \
      for (int64_t row = 0; row < m; row += SET::kRows) {                                   \
        const int64_t rows = std::min<int64_t>(SET::kRows, m - row);                        \
        if (n - column >= kWidth) {                                                         \
          NAME##_rows<SET::kRows, 2>(o, row, rows, column);                                 \
        } else {                                                                            \
          NAME##_rows<SET::kRows, 1>(o, row, rows, column);                                 \
        }                                                                                   \
      }                                                                                     \
    }                                                                                       \
  }

FASTLLM_TILE(plain, , Plain)
#if defined(__x86_64__)
FASTLLM_TILE(avx2, FASTLLM_AVX2, Avx2)
FASTLLM_TILE(avx512, FASTLLM_AVX512, Avx512)
FASTLLM_TILE(avx512_bf16, FASTLLM_AVX512_BF16, Avx512Bf16)
#endif

}  // namespace

bool has_bf16_pairs() {
#if defined(__x86_64__)
  static const bool found = isa() == Isa::avx512 && __builtin_cpu_supports("avx512bf16");
  return found;
#else
  return false;
#endif
}

void tile_product(Unit unit, int64_t m, int64_t n, int64_t depth, const uint32_t* a, int64_t a_row,
                  int64_t a_col, const uint32_t* b, int64_t b_row, float* c, int64_t c_row,
                  bool accumulate) {
  const Operands o{a, a_row, a_col, b, b_row, c, c_row, depth, accumulate};
#if defined(__x86_64__)
  if (unit == Unit::bf16_pair) return avx512_bf16_product(o, m, n);
  if (isa() == Isa::avx512) return avx512_product(o, m, n);
  if (isa() == Isa::avx2) return avx2_product(o, m, n);
#endif
  plain_product(o, m, n);
}

}  // namespace fastllm
