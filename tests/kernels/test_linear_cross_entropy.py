"""The linear loss: how much it holds, how it is divided, and when it computes gradients."""

import kernel_check as kc
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastllm.kernels import linear_cross_entropy as module


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operator returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_the_logits_are_never_whole(reduction):
    """The loop over blocks is run bare here: inside an operator no mode can look."""
    tokens, width, vocab, chunk = 64, 4, 50, 8
    call = kc.make(module.KERNEL, (tokens, width, vocab), torch.float32)
    hidden, weight, labels = (t.detach() for t in call.args)
    upstream = None if reduction == "sum" else torch.ones(tokens, device=hidden.device)
    with Largest() as largest:
        module._loop(hidden, weight, labels, upstream, (-100, 0.0, 0.0, None), chunk,
                     module.PARTS["torch"], (True, True))
    assert largest.elements <= chunk * vocab


@pytest.mark.parametrize("chunk", [1, 2, 5, 13, 100])
def test_the_division_into_chunks_is_a_matter_of_rounding(chunk):
    call = kc.make(module.KERNEL, (13, 24, 100), torch.float32, chunk_size=chunk)
    kc.check(module.KERNEL, module.linear_cross_entropy, call)


def test_blocks_keep_a_cpus_rows_in_cache_and_a_gpus_products_large():
    class Like:
        def __init__(self, device):
            self.device = torch.device(device)

        def element_size(self):
            return 2

    assert module._blocks(2720, 6400, Like("cpu"), None) == (1360, 256)
    assert module._blocks(8192, 131072, Like("cpu"), None) == (512, 256)
    assert module._blocks(8192, 131072, Like("cuda"), None) == (1024, 1024)
    assert module._blocks(8192, 131072, Like("cuda"), 300) == (300, 300)
    assert module._blocks(5, 10, Like("cpu"), None)[0] == 5


def test_without_gradients_the_logits_are_not_differentiated(monkeypatch):
    call = kc.make(module.KERNEL, (5, 16, 33), torch.float32)

    def refuse(*args):
        raise AssertionError("a gradient was computed that nobody asked for")

    parts = module.PARTS["triton"]
    monkeypatch.setitem(module.PARTS, "triton", module.Parts(parts.losses, refuse))
    with torch.no_grad():
        loss = module.linear_cross_entropy(*call.args)
    torch.testing.assert_close(loss, module.reference(*call.args).detach())
    with pytest.raises(AssertionError, match="nobody asked"):
        module.linear_cross_entropy(*call.args)


def test_a_frozen_weight_gets_no_gradient():
    hidden, weight, labels = kc.make(module.KERNEL, (5, 16, 33), torch.float32).args
    weight.requires_grad_(False)
    loss = module.linear_cross_entropy(hidden, weight, labels)
    (ours,) = torch.autograd.grad(loss, hidden)
    (theirs,) = torch.autograd.grad(module.reference(hidden, weight, labels), hidden)
    torch.testing.assert_close(ours, theirs)


def test_arguments_that_do_not_fit_raise():
    hidden, weight, labels = kc.make(module.KERNEL, (5, 16, 33), torch.float32).args
    with pytest.raises(ValueError, match="must be"):
        module.linear_cross_entropy(hidden, weight[:, :3], labels)
    with pytest.raises(TypeError, match="bfloat16"):
        module.linear_cross_entropy(hidden.bfloat16(), weight, labels)
    with pytest.raises(ValueError, match="chunk_size 0"):
        module.linear_cross_entropy(hidden, weight, labels, chunk_size=0)
