// A 64-bit hash of a tensor's bits that does not depend on how the tensor is cut: the sum, modulo
// 2^64, of one hash an element, of its bits and its index. The hashes of the pieces of a tensor add
// up to the hash of the whole, so ranks that hold pieces compare states without moving them.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <atomic>
#include <cstdint>

#include "vector.h"

namespace fastllm {
namespace {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u;

// The finalizer of splitmix64: a permutation of the 64-bit numbers.
FASTLLM_INLINE uint64_t mix64(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

// key: seed + kGolden * (index of the first element).
template <typename Bits>
struct HashBits {
  static FASTLLM_INLINE uint64_t run(const Bits* __restrict x, int64_t size, uint64_t key) {
    uint64_t sum = 0;
    for (int64_t i = 0; i < size; ++i) {
      sum += mix64(mix64(key + kGolden * static_cast<uint64_t>(i)) ^ x[i]);
    }
    return sum;
  }
};

template <typename Bits>
uint64_t hash_bits(const at::Tensor& x, uint64_t seed, uint64_t first_index) {
  const Bits* bits = static_cast<const Bits*>(x.const_data_ptr());
  std::atomic<uint64_t> total{0};  // integer addition commutes: threads add in any order
  at::parallel_for(0, x.numel(), 1 << 14, [&](int64_t begin, int64_t end) {
    const uint64_t key = seed + kGolden * (first_index + static_cast<uint64_t>(begin));
    total.fetch_add(dispatch<HashBits<Bits>>(bits + begin, end - begin, key),
                    std::memory_order_relaxed);
  });
  return total;
}

uint64_t hash_elements(const at::Tensor& x, uint64_t seed, uint64_t first_index) {
  switch (x.element_size()) {
    case 1:
      return hash_bits<uint8_t>(x, seed, first_index);
    case 2:
      return hash_bits<uint16_t>(x, seed, first_index);
    case 4:
      return hash_bits<uint32_t>(x, seed, first_index);
    case 8:
      return hash_bits<uint64_t>(x, seed, first_index);
    default:
      TORCH_CHECK_VALUE(false, "state_hash: expected elements of 1, 2, 4 or 8 bytes, found ",
                        x.scalar_type(), " of ", x.element_size());
  }
}

// Seed and index count modulo 2^64; the hash is returned as the signed number of the same bits.
int64_t state_hash(const at::Tensor& x, int64_t seed, int64_t first_index) {
  TORCH_CHECK_VALUE(x.device().is_cpu() && x.layout() == at::kStrided && x.is_contiguous(),
                    "state_hash: expected a contiguous tensor on the CPU, found shape ", x.sizes(),
                    " and layout ", x.layout(), " on ", x.device());
  return static_cast<int64_t>(hash_elements(x, static_cast<uint64_t>(seed),
                                            static_cast<uint64_t>(first_index)));
}

}  // namespace
}  // namespace fastllm

TORCH_LIBRARY_FRAGMENT(fastllm_cpu, m) {
  m.def("state_hash(Tensor x, int seed, int first_index) -> int");
}

TORCH_LIBRARY_IMPL(fastllm_cpu, CPU, m) { m.impl("state_hash", &fastllm::state_hash); }
