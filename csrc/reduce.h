// The sum of the chunks that the ranks sent each other, in order of rank, in one pass over memory.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace fastllm {

// sum = the chunk of rank 0 + that of rank 1 + ..., in fp32 (fp64 for fp64), times scale; then
// shard <- accumulate ? shard + sum : sum. `own` is the chunk of `rank`, `received` the others in
// order of rank, end to end. Returns the sum of squares of the new shard. shard is fp32 (fp64 where
// the chunks are), has a multiple of 256 elements, and may be `own` itself.
double reduce_chunks(const at::Tensor& shard, const at::Tensor& own, const at::Tensor& received,
                     int64_t rank, double scale, bool accumulate);

// The same of chunks in the int8 wire format (quantize.h).
double reduce_int8(const at::Tensor& shard, const at::Tensor& own, const at::Tensor& received,
                   int64_t rank, double scale, bool accumulate);

}  // namespace fastllm
