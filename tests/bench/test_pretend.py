"""bench/pretend.py refuses what a GPU refuses. It changes all of torch, so in another process."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = """
import gc
import pretend
pretend.install()
import numpy as np
import torch
from fastllm import ops
from fastllm.kernels.swiglu import reference, swiglu

assert torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
there, here = torch.randn(4, 6, device="cuda"), torch.randn(4, 6)
index, first = torch.tensor([1, 2], device="cuda"), torch.tensor([1, 2])


def refused(call, error, words):
    try:
        call()
    except error as reason:
        assert words in str(reason), reason
    else:
        raise AssertionError(f"not refused: {words}")


# Views, copies and results lie where they should.
gc.collect()
for x in (there[1:], there.T, there.detach(), there.view(-1)[::2], there * 2, there.double(),
          torch.zeros_like(there), there.new_ones(2), here.cuda(), here.to(there), there[first],
          there + torch.ones(()), torch.nn.Parameter(there), torch.arange(3, device=0)):
    assert x.is_cuda and x.device == torch.device("cuda", 0) and x.get_device() == 0, x
for x in (here, there.cpu(), there.to("cpu", torch.float64), torch.zeros_like(there, device="cpu")):
    assert x.device.type == "cpu" and x.is_cpu and not x.is_cuda
copied, kept = there.cpu(), there[0, 0].item()
copied[0, 0] += 1
assert there[0, 0] == kept and there.cuda() is there
layer = torch.nn.Linear(6, 2).cuda()
layer(there).sum().backward()
assert layer.weight.grad.is_cuda
there.copy_(here)
assert torch.equal(there.cpu(), here)

# Mixtures, numpy and generators are refused.
mixed = "Expected all tensors to be on the same device"
for call in (lambda: there + here, lambda: here @ there.T, lambda: torch.cat([there, here]),
             lambda: torch.stack([torch.ones(()), torch.ones((), device="cuda")]),
             lambda: torch.where(there > 0, there, here), lambda: torch.equal(there, here),
             lambda: here.add_(torch.ones((), device="cuda")),
             lambda: there.__setitem__(first, here[:2])):
    refused(call, RuntimeError, mixed)
refused(lambda: here[index], RuntimeError, "indices should be either on cpu")
refused(lambda: there.numpy(), TypeError, "can't convert cuda:0")
refused(lambda: np.asarray(there), TypeError, "can't convert cuda:0")
refused(lambda: torch.autograd.grad(layer(there), layer.weight, torch.ones(4, 2)), RuntimeError,
        "expected device cuda:0")
refused(lambda: torch.rand(2, generator=torch.Generator(), device="cuda"), RuntimeError,
        "'cuda' device type for generator")
refused(lambda: torch.rand(2, generator=torch.Generator("cuda")), RuntimeError, "found 'cuda'")
draws = [torch.rand(2, generator=torch.Generator("cuda").manual_seed(1), device="cuda")
         for _ in range(2)]
assert torch.equal(*draws) and torch.Generator("cuda").device.type == "cuda"

# Autocast of one device leaves the other's products alone.
with torch.autocast("cuda", torch.bfloat16):
    assert (there @ there.T).dtype == torch.bfloat16 and (here @ here.T).dtype == torch.float32

# A kernel runs forward and backward, and takes nothing of the CPU's.
gate, up = (torch.randn(4, 6, device="cuda", requires_grad=True) for _ in range(2))
with ops.use_backend("triton", "swiglu"):
    grads = torch.autograd.grad(ops.swiglu(gate, up).square().sum(), (gate, up))
exact = torch.autograd.grad(reference(gate, up).square().sum(), (gate, up))
for a, b in zip(grads, exact, strict=True):
    assert a.is_cuda
    torch.testing.assert_close(a, b)
refused(lambda: swiglu(here, here), ValueError, "cannot be accessed from Triton (cpu tensor?)")

# What a graph has captured is made again, and nothing waits while it is.
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    doubled = swiglu(gate.detach(), up.detach()) * 2
    refused(lambda: there.sum().item(), RuntimeError, "stream is capturing")
gate.data.zero_()
graph.replay()
assert not doubled.any()
print("done")
"""


def test_what_a_gpu_refuses_is_refused():
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT / "bench", text=True,
                          capture_output=True, timeout=300,
                          env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""})
    assert done.stdout == "done\n", done.stderr[-3000:]
