// Run-time choice of instruction set, and the 16-bit float conversions that every kernel shares.
//
// A kernel is a struct with a static `run`, written as plain loops over raw pointers and marked
// FASTLLM_INLINE. `dispatch<Kernel>(args...)` compiles it once per instruction set (the compiler
// vectorises each copy) and calls the best copy that this CPU can run:
//
//   struct Scale {
//     static FASTLLM_INLINE void run(float* x, int64_t n, float by) {
//       for (int64_t i = 0; i < n; ++i) x[i] *= by;
//     }
//   };
//   at::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
//     dispatch<Scale>(x + begin, end - begin, by);
//   });
//
// Everything that `run` calls must be FASTLLM_INLINE as well: a function that is not inlined is
// compiled for the baseline. Threads go outside, as above. A sum is not vectorised by itself
// (that would change its order): write it over a fixed array of lanes, which also makes the
// result the same on every CPU. Code in intrinsics takes FASTLLM_AVX512 / FASTLLM_AVX2 itself and
// asks isa().
#pragma once

#include <bit>
#include <cstdint>

#define FASTLLM_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__)
#define FASTLLM_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c," \
                        "prefer-vector-width=512")))
#define FASTLLM_AVX2 __attribute__((target("avx2,fma,f16c")))
#endif

namespace fastllm {

enum class Isa { baseline, avx2, avx512 };

// The instruction set in use: the best that this CPU has, or less where ATEN_CPU_CAPABILITY
// ("default", "avx2", "avx512": the variable that torch itself reads) asks for less. Read once.
Isa isa();

#if defined(__x86_64__)
template <typename Kernel, typename... Args>
FASTLLM_AVX512 auto run_avx512(Args... args) {
  return Kernel::run(args...);
}

template <typename Kernel, typename... Args>
FASTLLM_AVX2 auto run_avx2(Args... args) {
  return Kernel::run(args...);
}
#endif

template <typename Kernel, typename... Args>
inline auto dispatch(Args... args) {
#if defined(__x86_64__)
  if (isa() == Isa::avx512) return run_avx512<Kernel, Args...>(args...);
  if (isa() == Isa::avx2) return run_avx2<Kernel, Args...>(args...);
#endif
  return Kernel::run(args...);
}

// Storage of one 16-bit element. They are the same bits as c10::BFloat16 and c10::Half, as types
// whose conversions are inlined into every instruction set.
struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

FASTLLM_INLINE float to_float(float x) { return x; }

FASTLLM_INLINE float to_float(bf16 x) {
  return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}

// Exact for every value, subnormals included (also where the CPU flushes fp32 subnormals).
FASTLLM_INLINE float to_float(fp16 x) {
  const uint32_t magnitude = x.bits & 0x7fffu;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t exponent_shift = magnitude >= 0x7c00u ? (255u - 31u) << 23 : (127u - 15u) << 23;
  const uint32_t normal = (magnitude << 13) + exponent_shift;
  const float tiny = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
  // A mask, not `?:`: the compiler would branch around the product, which stops vectorisation.
  const uint32_t mask = 0u - static_cast<uint32_t>(magnitude < 0x400u);
  const uint32_t bits = (std::bit_cast<uint32_t>(tiny) & mask) | (normal & ~mask);
  return std::bit_cast<float>(bits | sign);
}

template <typename T>
T from_float(float x);

template <>
FASTLLM_INLINE float from_float<float>(float x) {
  return x;
}

// To nearest, ties to even; a NaN stays a quiet NaN of the same sign.
template <>
FASTLLM_INLINE bf16 from_float<bf16>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  // One select in 32 bits and then one narrowing: half the shuffles of selecting in 16 bits.
  const uint32_t rounded = nan ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1u);
  return {static_cast<uint16_t>(rounded >> 16)};
}

// To nearest, ties to even; from 65520 on to infinity; a NaN stays a quiet NaN.
template <>
FASTLLM_INLINE fp16 from_float<fp16>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t rounding = 0xfffu + ((magnitude >> 13) & 1u);
  const uint32_t normal = (magnitude - ((127u - 15u) << 23) + rounding) >> 13;
  // Adding 0.5 puts the last bit of an fp16 subnormal (2^-24) at the last bit of the sum.
  const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
  const uint32_t subnormal = std::bit_cast<uint32_t>(shifted) - std::bit_cast<uint32_t>(0.5f);
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return {static_cast<uint16_t>(half | sign)};
}

}  // namespace fastllm
