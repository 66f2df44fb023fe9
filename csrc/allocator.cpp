// How the C library's allocator treats the large blocks that torch takes from it on a CPU.
#include <torch/library.h>

#include <climits>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace fastllm {
namespace {

// By default a large freed block goes back to the system, and the next step pays for its pages
// again: faults and zeroing are a tenth of a training step in fp32. Returns whether the allocator
// took both settings.
bool keep_freed_memory() {
#if defined(__GLIBC__)
  // Older versions allow no more than 32 MiB for the first.
  const bool heap =
      mallopt(M_MMAP_THRESHOLD, 1 << 30) == 1 || mallopt(M_MMAP_THRESHOLD, 1 << 25) == 1;
  return mallopt(M_TRIM_THRESHOLD, INT_MAX) == 1 && heap;
#else
  return false;
#endif
}

}  // namespace
}  // namespace fastllm

TORCH_LIBRARY_FRAGMENT(fastllm_cpu, m) {
  m.def("keep_freed_memory() -> bool", &fastllm::keep_freed_memory);
}
