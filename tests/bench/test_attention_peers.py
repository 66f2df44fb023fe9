"""Others' attention computes what ours does, or says why it cannot.

What runs on a GPU alone is tested by what it has in common with what runs here: SDPA's backends by
the math one, torch's varlen_attn by its definition, FlexAttention by its form that is not compiled.
"""

import functools
import types

import kernel_check as kc
import peers
import pytest
import torch
from torch.nn.attention import SDPBackend
from torch.nn.attention import flex_attention as flex_module

from fastllm.kernels.attention import KERNEL, reference
from fastllm.ops._contenders import Contender, sdpa, sdpa_lacks

SHAPES = [(2, 33, 33, 1, 2, 16), (1, 40, 40, 2, 1, 16), (2, 18, 30, 2, 2, 16)]
OPTIONS = {"": {}, **KERNEL.bench_options, "wide window": {"window": (5, 3)},
           "softcap": {"causal": True, "softcap": 3.0}, "scale": {"scale": 0.3},
           "sinks": {"sinks": True}, "lse": {"return_lse": True}}
MATH = peers.contender(Contender("math", functools.partial(sdpa, SDPBackend.MATH),
                                 functools.partial(sdpa_lacks, SDPBackend.MATH)))


def by_definition(q, k, v, q_bounds, k_bounds, max_q, max_k, *, scale, window_size,
                  enable_gqa=False):
    """varlen_attn in plain torch; garbage where it is told lengths that are not true."""
    for bounds, longest, x in ((q_bounds, max_q, q), (k_bounds, max_k, k)):
        assert longest == bounds.diff().max() and bounds[-1] == len(x)
    assert enable_gqa == (q.shape[1] != k.shape[1])
    return reference(q, k, v, scale=scale, window=window_size, cu_seqlens_q=q_bounds,
                     cu_seqlens_k=k_bounds)


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(flex_module, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(flex_module, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    stock = peers._torch_attention

    def module(name, options):
        found = stock(name, options)
        return types.SimpleNamespace(varlen_attn=by_definition) if name == "varlen" else found

    monkeypatch.setattr(peers, "_torch_attention", module)


def lacked(peer, shape, options):
    """What a contender says it lacks, and otherwise compares it; sums in bfloat16 are rounded."""
    call = kc.make(KERNEL, shape, torch.bfloat16, **options)
    try:
        forward = peer(*call.args, **call.kwargs)
    except peers.Lacks as reason:
        return str(reason)
    expected = peers.results(KERNEL, peers.prepare(KERNEL, call, "torch eager"), call)
    found = peers.results(KERNEL, forward, call)
    for a, b in zip(expected, found, strict=True):
        assert a.shape == b.shape
        assert (a - b).double().norm() <= 2e-2 * a.double().norm()
    return ""


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["math", "torch varlen", "flex attention"])
def test_the_same_results_or_a_reason(on_cpu, name, shape, option):
    peer = MATH if name == "math" else peers.PEERS[name]["attention"]
    reason = lacked(peer, shape, OPTIONS[option])
    lacks = {"sinks": "sinks", "lse": "return_lse"}
    if name != "flex attention":
        lacks["softcap"] = "softcap"
    if name == "math":
        lacks |= {"packed": "packed sequences", "window": "window", "wide window": "window"}
        if shape[1] != shape[2]:
            lacks |= dict.fromkeys(("causal", "causal, atomics"), "causal mask")
    assert bool(reason) == (option in lacks) and lacks.get(option, "") in reason


@pytest.mark.parametrize("name", ["sdpa cudnn", "sdpa flash", "flash-attn 3", "torch varlen",
                                  "flex attention"])
def test_every_contender_is_in_the_table_and_refuses_with_a_reason(name):
    call = kc.make(KERNEL, SHAPES[0], torch.bfloat16, sinks=True)
    with pytest.raises(peers.Lacks, match=r"sinks|not installed"):
        peers.prepare(KERNEL, call, name)


def test_a_torch_without_it_is_a_reason():
    with pytest.raises(peers.Lacks, match=r"has no torch\.nn.attention\.none"):
        peers._torch_attention("none", {"max_seqlen_q": 3})


def test_whoever_asks_for_the_longest_sequence_is_told():
    told = {}

    def lacks(*tensors, differentiated, **options):
        told.update(options)
        return "nothing"

    call = kc.make(KERNEL, (2, 40, 40, 1, 1, 16), torch.bfloat16, packed=True)
    with pytest.raises(peers.Lacks):
        peers.contender(Contender("toy", lacks, lacks))(*call.args, **call.kwargs)
    assert told["max_seqlen_q"] == told["max_seqlen_k"] == call.kwargs["cu_seqlens_q"].diff().max()


def test_varlen_of_before_grouped_queries_says_so(monkeypatch):
    """torch 2.11 has it without them."""
    def ungrouped(q, k, v, q_bounds, k_bounds, max_q, max_k, *, scale, window_size):
        return by_definition(q, k, v, q_bounds, k_bounds, max_q, max_k, scale=scale,
                             window_size=window_size)

    monkeypatch.setattr(peers, "_torch_attention",
                        lambda name, options: types.SimpleNamespace(varlen_attn=ungrouped))
    q, k = (torch.randn(1, 8, heads, 16, dtype=torch.bfloat16) for heads in (4, 2))
    with pytest.raises(peers.Lacks, match="has no grouped queries"):
        peers.varlen(q, k, k)
    assert peers.varlen(k, k, k)().shape == k.shape
