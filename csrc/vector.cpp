#include "vector.h"

#include <torch/library.h>

#include <cstdlib>
#include <string>
#include <string_view>

namespace fastllm {
namespace {

Isa detect() {
  const char* wanted = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view limit = wanted == nullptr ? "" : wanted;
  if (limit == "default") return Isa::baseline;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512 && limit != "avx2") return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::baseline;
}

std::string isa_name() {
  switch (isa()) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    case Isa::baseline:
      break;
  }
  return "baseline";
}

}  // namespace

Isa isa() {
  static const Isa chosen = detect();
  return chosen;
}

TORCH_LIBRARY_FRAGMENT(fastllm_cpu, m) { m.def("isa() -> str", isa_name); }

}  // namespace fastllm
