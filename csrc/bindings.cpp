// The Python module fastllm._C. It binds nothing itself: importing it loads the shared library,
// and every other file of csrc/ registers its ops under torch.ops.fastllm_cpu as it is loaded.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_C, m) { m.doc() = "Registers the ops of torch.ops.fastllm_cpu"; }
