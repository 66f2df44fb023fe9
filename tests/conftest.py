"""Where there is no GPU, the Triton kernels run in Triton's interpreter, on CPU tensors."""

import os
import tempfile

import torch

# Before anything imports triton: its own library functions are bound to the mode they are met in.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
else:  # what tests measure is not for the user's runs, nor what those measured for tests
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="fastllm-tests-")
