"""Activation checkpointing: the same gradients to the bit, and the work that it says."""

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastllm import ops
from fastllm.model import Decoder, ModelConfig, block

GEMMA = {"hidden_act": "gelu_pytorch_tanh", "scale_embeddings": True, "rms_norm_offset": 1.0,
         "sandwich_norms": True, "sliding_window": 4, "rope_local_base_freq": 100.0,
         "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}


def run(recompute, *, backend=None, dropout=0.2, dtype=torch.float32, **changes):
    config = ModelConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16,
                         dropout=dropout, recompute=recompute, qk_norm=True, **changes)
    torch.manual_seed(0)
    model = Decoder(config, generator=torch.Generator().manual_seed(0)).to(dtype).train()
    ids = torch.randint(0, 64, (2, 16))
    documents = {"position_ids": torch.tensor([[*range(9), *range(7)], [*range(16)]]),
                 "cu_seqlens": torch.tensor([0, 9, 16, 32], dtype=torch.int32), "max_seqlen": 16}
    chosen = ops.use_backend(backend) if backend else nullcontext()
    with chosen, Count() as count:
        hidden = model(ids, **documents)
        model.logits(hidden).float().logsumexp(-1).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return hidden.detach(), gradients, torch.rand(()).item(), count.seen


class Count(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[func.name().split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("changes", [{}, GEMMA], ids=["plain", "gemma"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_gradients_and_random_state_are_the_same_to_the_bit(recompute, dtype, changes):
    hidden, gradients, after, _ = run("none", dtype=dtype, **changes)
    hidden2, gradients2, after2, _ = run(recompute, dtype=dtype, **changes)
    assert torch.equal(hidden, hidden2)
    assert after == after2
    for name, gradient in gradients.items():
        assert gradient.abs().sum() > 0, name
        assert torch.equal(gradient, gradients2[name]), name


def attentions(seen):
    """Forward runs of attention, whatever operator it is."""
    return sum(count for name, count in seen.items()
               if "attention" in name and "backward" not in name)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_full_runs_attention_again_and_selective_does_not(backend):
    plain, full, selective = (attentions(run(kind, backend=backend)[3])
                              for kind in ("none", "full", "selective"))
    assert plain > 0
    assert (full, selective) == (2 * plain, plain)


def test_full_runs_the_products_again_and_selective_does_not():
    plain, full, selective = (run(kind, backend="reference", dropout=0.0)[3]
                              for kind in ("none", "full", "selective"))
    products = {kind: seen["aten::mm"] + seen["aten::addmm"]
                for kind, seen in (("none", plain), ("full", full), ("selective", selective))}
    assert products["selective"] == products["none"]
    # The last product of a block is not needed again, so that a block runs three of its four.
    assert products["none"] + 3 * 3 <= products["full"] <= products["none"] + 3 * 4
    assert selective["aten::rsqrt"] > plain["aten::rsqrt"]


def test_nothing_is_run_twice_without_gradients():
    config = ModelConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, max_position_embeddings=16, recompute="full")
    model = Decoder(config)
    with torch.no_grad():
        assert not model(torch.randint(0, 64, (1, 8))).requires_grad


@pytest.mark.parametrize(("act", "op"), [("silu", "swiglu"), ("gelu_pytorch_tanh", "geglu")])
def test_what_the_gate_gives_is_made_again_and_not_kept(act, op, monkeypatch):
    """The MLP keeps gate and up but not their product; gradients are the same bits."""
    torch.manual_seed(0)
    mlp = block.MLP(ModelConfig(hidden_size=32, intermediate_size=48, hidden_act=act))
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x = torch.randn(2, 5, 32)
    made = []
    gate = getattr(ops, op)
    monkeypatch.setattr(ops, op, lambda *halves, **how: made.append(1) or gate(*halves, **how))
    gradients = []
    for times in (2, 1):
        if times == 1:
            monkeypatch.setattr(block, "made_again", lambda *_: nullcontext())
        made.clear()
        mlp.zero_grad()
        mlp(x).square().sum().backward()
        assert len(made) == times
        gradients.append([parameter.grad.clone() for parameter in mlp.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
