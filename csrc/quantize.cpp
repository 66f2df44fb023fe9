#include "quantize.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <bit>
#include <type_traits>

namespace fastllm {
namespace {

constexpr int64_t kGrain = 32;  // blocks of one task at least
constexpr uint32_t kInfinity = 0x7f800000u;

// -------------------------------------------------------------------------------------- quantize

// The largest magnitude as bits: as whole numbers they are in the order of the magnitudes, with
// infinity and then the NaNs on top.
FASTLLM_INLINE uint32_t largest(const float* v) {
  int32_t most = 0;
  for (int64_t i = 0; i < kTile; ++i) {
    const int32_t bits = static_cast<int32_t>(std::bit_cast<uint32_t>(v[i]) & 0x7fffffffu);
    most = bits > most ? bits : most;
  }
  return static_cast<uint32_t>(most);
}

// q for finite v and scale > 0, and v becomes what is lost. v / scale is beyond 127 only where the
// scale is subnormal, and then below 191. It is cut off as a whole number: the compiler would not
// vectorise a choice between floats here.
FASTLLM_INLINE void round_block(float* __restrict v, float scale, int8_t* __restrict q) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, half to even
  constexpr int32_t kRoundBits = std::bit_cast<int32_t>(kRound);
  for (int64_t i = 0; i < kTile; ++i) {
    int32_t n = std::bit_cast<int32_t>(v[i] / scale + kRound) - kRoundBits;
    n = n < 127 ? n : 127;
    n = n > -127 ? n : -127;
    q[i] = static_cast<int8_t>(n);
    v[i] -= static_cast<float>(n) * scale;
  }
}

template <typename T, bool has_error>
struct Quantize {
  static FASTLLM_INLINE void run(const T* x, float* error, uint8_t* wire, int64_t blocks,
                                 float pre_scale) {
    for (int64_t b = 0; b < blocks; ++b) {
      block(x + b * kTile, has_error ? error + b * kTile : nullptr, wire + b * kInt8Bytes,
            pre_scale);
    }
  }

  static FASTLLM_INLINE void block(const T* __restrict x, float* __restrict error,
                                   uint8_t* __restrict wire, float pre_scale) {
    float v[kTile];
    for (int64_t i = 0; i < kTile; ++i) {
      const float scaled = static_cast<float>(widen(x[i])) * pre_scale;
      v[i] = has_error ? scaled + error[i] : scaled;
    }
    const uint32_t most = largest(v);
    float scale = std::bit_cast<float>(most) / 127.0f;
    int8_t* q = reinterpret_cast<int8_t*>(wire + sizeof(scale));
    if (most >= kInfinity) {
      scale = std::bit_cast<float>(0x7fc00000u);  // one NaN, whatever the inputs' were
      std::memset(q, 0, kTile);
      std::memset(v, 0, sizeof(v));
    } else if (scale == 0.0f) {  // also where it underflows: then all of v is kept as error
      std::memset(q, 0, kTile);
    } else {
      round_block(v, scale, q);
    }
    std::memcpy(wire, &scale, sizeof(scale));
    if (has_error) std::memcpy(error, v, sizeof(v));
  }
};

template <typename T>
void quantize(const at::Tensor& wire, const at::Tensor& x, float* error, float pre_scale) {
  const T* from = static_cast<const T*>(x.const_data_ptr());
  uint8_t* to = wire.mutable_data_ptr<uint8_t>();
  at::parallel_for(0, x.numel() / kTile, kGrain, [&](int64_t begin, int64_t end) {
    const T* const first = from + begin * kTile;
    uint8_t* const bytes = to + begin * kInt8Bytes;
    if (error == nullptr) {
      dispatch<Quantize<T, false>>(first, error, bytes, end - begin, pre_scale);
    } else {
      dispatch<Quantize<T, true>>(first, error + begin * kTile, bytes, end - begin, pre_scale);
    }
  });
}

// ------------------------------------------------------------------------------------ dequantize

template <typename T>
struct Dequantize {
  static FASTLLM_INLINE void run(const uint8_t* wire, T* __restrict out, int64_t blocks) {
    for (int64_t b = 0; b < blocks; ++b) {
      float x[kTile];
      dequantize_block<Place::first>(wire + b * kInt8Bytes, x);
      for (int64_t i = 0; i < kTile; ++i) out[b * kTile + i] = convert(x[i]);
    }
  }

  static FASTLLM_INLINE T convert(float x) {
    if constexpr (std::is_same_v<T, double>) {
      return x;
    } else {
      return from_float<T>(x);
    }
  }
};

template <typename T>
void dequantize(const at::Tensor& out, const at::Tensor& wire) {
  const uint8_t* from = wire.const_data_ptr<uint8_t>();
  T* to = static_cast<T*>(out.mutable_data_ptr());
  at::parallel_for(0, out.numel() / kTile, kGrain, [&](int64_t begin, int64_t end) {
    dispatch<Dequantize<T>>(from + begin * kInt8Bytes, to + begin * kTile, end - begin);
  });
}

void check_wire(const at::Tensor& wire, int64_t elements, const char* op) {
  check_flat(wire, op, "wire");
  check_dtype(wire, at::kByte, op, "wire");
  TORCH_CHECK_VALUE(wire.numel() == elements / kTile * kInt8Bytes, op, ": wire must have ",
                    elements / kTile * kInt8Bytes, " bytes for ", elements, " elements, found ",
                    wire.numel());
}

[[noreturn]] void bad_dtype(const char* op, const char* name, at::ScalarType found) {
  TORCH_CHECK_VALUE(false, op, ": ", name, " must be Float, BFloat16, Half or Double, found ",
                    found);
}

}  // namespace

void quantize_int8(const at::Tensor& wire, const at::Tensor& x,
                   const std::optional<at::Tensor>& error, double pre_scale) {
  constexpr const char* kOp = "quantize_int8_";
  check_flat(x, kOp, "x");
  check_tiles(x.numel(), kOp, "x");
  check_wire(wire, x.numel(), kOp);
  check_apart(wire, x, kOp, "wire", "x");
  float* lost = nullptr;
  if (error.has_value()) {
    check_flat(*error, kOp, "error");
    check_dtype(*error, at::kFloat, kOp, "error");
    TORCH_CHECK_VALUE(error->numel() == x.numel(), kOp, ": error must have the ", x.numel(),
                      " elements of x, found ", error->numel());
    check_apart(*error, x, kOp, "error", "x");
    check_apart(wire, *error, kOp, "wire", "error");
    lost = error->mutable_data_ptr<float>();
  }
  const float factor = static_cast<float>(pre_scale);
  switch (x.scalar_type()) {
    case at::kFloat:
      quantize<float>(wire, x, lost, factor);
      break;
    case at::kBFloat16:
      quantize<bf16>(wire, x, lost, factor);
      break;
    case at::kHalf:
      quantize<fp16>(wire, x, lost, factor);
      break;
    case at::kDouble:
      quantize<double>(wire, x, lost, factor);
      break;
    default:
      bad_dtype(kOp, "x", x.scalar_type());
  }
  bump_version(wire);
  if (error.has_value()) bump_version(*error);
}

void dequantize_int8(const at::Tensor& out, const at::Tensor& wire) {
  constexpr const char* kOp = "dequantize_int8_";
  check_flat(out, kOp, "out");
  check_tiles(out.numel(), kOp, "out");
  check_wire(wire, out.numel(), kOp);
  check_apart(out, wire, kOp, "out", "wire");
  switch (out.scalar_type()) {
    case at::kFloat:
      dequantize<float>(out, wire);
      break;
    case at::kBFloat16:
      dequantize<bf16>(out, wire);
      break;
    case at::kHalf:
      dequantize<fp16>(out, wire);
      break;
    case at::kDouble:
      dequantize<double>(out, wire);
      break;
    default:
      bad_dtype(kOp, "out", out.scalar_type());
  }
  bump_version(out);
}

}  // namespace fastllm

TORCH_LIBRARY_FRAGMENT(fastllm_cpu, m) {
  m.def(
      "quantize_int8_(Tensor(a!) wire, Tensor x, Tensor(b!)? error, float pre_scale) -> ()");
  m.def("dequantize_int8_(Tensor(a!) out, Tensor wire) -> ()");
}

TORCH_LIBRARY_IMPL(fastllm_cpu, CPU, m) {
  m.impl("quantize_int8_", &fastllm::quantize_int8);
  m.impl("dequantize_int8_", &fastllm::dequantize_int8);
}
