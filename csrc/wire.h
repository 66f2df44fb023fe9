// What the ops on what ranks send each other share: their checks, and fp64 beside vector.h's types.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "vector.h"

namespace fastllm {

// Shards, chunks and quantized runs are whole numbers of these.
constexpr int64_t kTile = 256;

FASTLLM_INLINE double widen(double x) { return x; }
FASTLLM_INLINE float widen(float x) { return x; }
FASTLLM_INLINE float widen(bf16 x) { return to_float(x); }
FASTLLM_INLINE float widen(fp16 x) { return to_float(x); }

inline void check_flat(const at::Tensor& t, const char* op, const char* name) {
  TORCH_CHECK_VALUE(t.device().is_cpu() && t.layout() == at::kStrided && t.is_contiguous(), op,
                    ": ", name, " must be a contiguous tensor on the CPU, found shape ", t.sizes(),
                    " and layout ", t.layout(), " on ", t.device());
}

inline void check_dtype(const at::Tensor& t, at::ScalarType type, const char* op,
                        const char* name) {
  TORCH_CHECK_VALUE(t.scalar_type() == type, op, ": ", name, " must be ", type, ", found ",
                    t.scalar_type());
}

inline void check_tiles(int64_t size, const char* op, const char* name) {
  TORCH_CHECK_VALUE(size % kTile == 0, op, ": ", name, " must have a multiple of ", kTile,
                    " elements, found ", size);
}

// What is written may not lie in what is read: the kernels read and write in pieces.
inline void check_apart(const at::Tensor& written, const at::Tensor& read, const char* op,
                        const char* written_name, const char* read_name) {
  const char* a = static_cast<const char*>(written.const_data_ptr());
  const char* b = static_cast<const char*>(read.const_data_ptr());
  const bool apart = written.nbytes() == 0 || read.nbytes() == 0 || a + written.nbytes() <= b ||
                     b + read.nbytes() <= a;
  TORCH_CHECK_VALUE(apart, op, ": ", written_name, " and ", read_name, " must not overlap");
}

// Autograd must notice a change.
inline void bump_version(const at::Tensor& t) {
  if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
}

}  // namespace fastllm
