#include "reduce.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "quantize.h"

namespace fastllm {
namespace {

// ------------------------------------------------------------------- chunks as they come in

// A wire format reads one tile of a chunk as the numbers that are summed.
template <typename T>
struct Plain {
  using Sum = decltype(widen(T{}));
  static constexpr int64_t kTileBytes = kTile * sizeof(T);

  template <Place place>
  static FASTLLM_INLINE void read(const uint8_t* tile, Sum* __restrict sum) {
    const T* x = reinterpret_cast<const T*>(tile);
    for (int64_t i = 0; i < kTile; ++i) {
      sum[i] = place == Place::first ? widen(x[i]) : sum[i] + widen(x[i]);
    }
  }
};

struct Int8 {
  using Sum = float;
  static constexpr int64_t kTileBytes = kInt8Bytes;

  template <Place place>
  static FASTLLM_INLINE void read(const uint8_t* tile, float* __restrict sum) {
    dequantize_block<place>(tile, sum);
  }
};

struct Chunks {
  const uint8_t* own;
  const uint8_t* received;
  int64_t bytes;  // of one
  int64_t rank;
  int64_t world;

  FASTLLM_INLINE const uint8_t* of(int64_t r) const {
    return r == rank ? own : received + (r < rank ? r : r - 1) * bytes;
  }
};

// ------------------------------------------------------------------------------------- the sum

// Elements whose squares are added up together, in a fixed set of lanes.
constexpr int64_t kBlock = 4096;
constexpr int64_t kLanes = 16;
constexpr int64_t kGrain = 8;  // blocks of one task at least

// One block. Returns its sum of squares, in double: the square of an fp32 number is exact there, and
// the sum so close that how a model is cut into buckets and shards does not show in the fp32 norm.
template <typename Wire, bool accumulate>
struct Reduce {
  using Sum = typename Wire::Sum;

  static FASTLLM_INLINE double run(const Chunks& chunks, Sum* shard, int64_t first_tile,
                                   int64_t tiles, Sum scale) {
    double lanes[kLanes] = {};
    for (int64_t t = first_tile; t < first_tile + tiles; ++t) {
      // All is read before the tile of the shard is written: the shard may be a chunk.
      Sum sum[kTile];
      const int64_t at = t * Wire::kTileBytes;
      Wire::template read<Place::first>(chunks.of(0) + at, sum);
      for (int64_t r = 1; r < chunks.world; ++r) {
        Wire::template read<Place::later>(chunks.of(r) + at, sum);
      }
      write(sum, shard + t * kTile, scale, lanes);
    }
    double total = 0;
    for (const double lane : lanes) total += lane;
    return total;
  }

  static FASTLLM_INLINE void write(const Sum* __restrict sum, Sum* __restrict shard, Sum scale,
                                   double* __restrict lanes) {
    for (int64_t i = 0; i < kTile; i += kLanes) {
      for (int64_t j = 0; j < kLanes; ++j) {
        const Sum scaled = sum[i + j] * scale;
        const Sum x = accumulate ? shard[i + j] + scaled : scaled;
        shard[i + j] = x;
        const double wide = static_cast<double>(x);
        lanes[j] += wide * wide;
      }
    }
  }
};

template <typename Wire, bool accumulate>
double reduce(const Chunks& chunks, const at::Tensor& shard, double scale) {
  using Sum = typename Wire::Sum;
  constexpr int64_t kTiles = kBlock / kTile;
  Sum* to = shard.mutable_data_ptr<Sum>();
  const int64_t tiles = shard.numel() / kTile;
  std::vector<double> squares((tiles + kTiles - 1) / kTiles);
  at::parallel_for(0, squares.size(), kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kTiles;
      squares[block] = dispatch<Reduce<Wire, accumulate>, const Chunks&>(
          chunks, to, first, std::min(kTiles, tiles - first), static_cast<Sum>(scale));
    }
  });
  double total = 0;
  for (const double square : squares) total += square;
  return total;
}

template <typename Wire>
double reduce(const Chunks& chunks, const at::Tensor& shard, double scale, bool accumulate) {
  return accumulate ? reduce<Wire, true>(chunks, shard, scale)
                    : reduce<Wire, false>(chunks, shard, scale);
}

// ---------------------------------------------------------------------------------- what is asked

// `length` is the number of elements of own for a shard of this size: bytes, for int8.
Chunks check_chunks(const at::Tensor& shard, const at::Tensor& own, const at::Tensor& received,
                    int64_t rank, int64_t length, const char* op) {
  check_flat(shard, op, "shard");
  check_flat(own, op, "own");
  check_flat(received, op, "received");
  check_tiles(shard.numel(), op, "shard");
  check_dtype(received, own.scalar_type(), op, "received");
  TORCH_CHECK_VALUE(own.numel() == length, op, ": own must have ", length,
                    " elements for a shard of ", shard.numel(), ", found ", own.numel());
  TORCH_CHECK_VALUE(length == 0 ? received.numel() == 0 : received.numel() % length == 0, op,
                    ": received must be whole chunks of ", length, " elements, found ",
                    received.numel());
  const int64_t world = length == 0 ? rank + 1 : received.numel() / length + 1;
  TORCH_CHECK_VALUE(rank >= 0 && rank < world, op, ": rank must be in [0, ", world,
                    "), as received has ", world - 1, " chunks, found ", rank);
  if (shard.const_data_ptr() != own.const_data_ptr() || shard.nbytes() != own.nbytes()) {
    check_apart(shard, own, op, "shard", "own");
  }
  check_apart(shard, received, op, "shard", "received");
  return {static_cast<const uint8_t*>(own.const_data_ptr()),
          static_cast<const uint8_t*>(received.const_data_ptr()),
          length * static_cast<int64_t>(own.element_size()), rank, world};
}

double reduce_plain(const Chunks& chunks, const at::Tensor& shard, at::ScalarType wire,
                    double scale, bool accumulate) {
  switch (wire) {
    case at::kFloat:
      return reduce<Plain<float>>(chunks, shard, scale, accumulate);
    case at::kBFloat16:
      return reduce<Plain<bf16>>(chunks, shard, scale, accumulate);
    case at::kHalf:
      return reduce<Plain<fp16>>(chunks, shard, scale, accumulate);
    default:
      return reduce<Plain<double>>(chunks, shard, scale, accumulate);
  }
}

}  // namespace

double reduce_chunks(const at::Tensor& shard, const at::Tensor& own, const at::Tensor& received,
                     int64_t rank, double scale, bool accumulate) {
  constexpr const char* kOp = "reduce_chunks_";
  const at::ScalarType wire = own.scalar_type();
  TORCH_CHECK_VALUE(wire == at::kFloat || wire == at::kBFloat16 || wire == at::kHalf ||
                        wire == at::kDouble,
                    kOp, ": own must be Float, BFloat16, Half or Double, found ", wire);
  check_dtype(shard, wire == at::kDouble ? at::kDouble : at::kFloat, kOp, "shard");
  const Chunks chunks = check_chunks(shard, own, received, rank, shard.numel(), kOp);
  const double squares = reduce_plain(chunks, shard, wire, scale, accumulate);
  bump_version(shard);
  return squares;
}

double reduce_int8(const at::Tensor& shard, const at::Tensor& own, const at::Tensor& received,
                   int64_t rank, double scale, bool accumulate) {
  constexpr const char* kOp = "reduce_int8_";
  check_dtype(own, at::kByte, kOp, "own");
  check_dtype(shard, at::kFloat, kOp, "shard");
  const Chunks chunks =
      check_chunks(shard, own, received, rank, shard.numel() / kTile * kInt8Bytes, kOp);
  const double squares = reduce<Int8>(chunks, shard, scale, accumulate);
  bump_version(shard);
  return squares;
}

}  // namespace fastllm

TORCH_LIBRARY_FRAGMENT(fastllm_cpu, m) {
  m.def(
      "reduce_chunks_(Tensor(a!) shard, Tensor own, Tensor received, int rank, float scale, "
      "bool accumulate) -> float");
  m.def(
      "reduce_int8_(Tensor(a!) shard, Tensor own, Tensor received, int rank, float scale, "
      "bool accumulate) -> float");
}

TORCH_LIBRARY_IMPL(fastllm_cpu, CPU, m) {
  m.impl("reduce_chunks_", &fastllm::reduce_chunks);
  m.impl("reduce_int8_", &fastllm::reduce_int8);
}
