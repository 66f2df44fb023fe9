"""RoPE: positions in every way they can be given, both kinds of pairs, and the tables."""

import math

import kernel_check as kc
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllm import cpu, ops
from fastllm.kernels import _rotary
from fastllm.kernels import rope as module

DEVICE = kc.DEVICE
rope, rope_tables = module.rope, module.rope_tables


def heads(*shape, seed=0):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=DEVICE)


def turned(x, position, theta=10000.0, interleaved=False):
    """Rotation as the definition has it: pairs as complex numbers, in float64."""
    half = x.shape[-1] // 2
    rate = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.as_tensor(position, dtype=torch.float64)[..., None, None] * rate
    x = x.double().cpu()
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    pair = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)
    parts = (pair.real, pair.imag)
    return torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)


@pytest.mark.parametrize("function", [rope, module.reference], ids=["triton", "reference"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_against_complex_numbers(function, interleaved):
    q, k = heads(2, 7, 3, 8), heads(2, 7, 1, 8, seed=1)
    tables = rope_tables(7, 8, device=DEVICE)
    for x, y in zip((q, k), function(q, k, *tables, interleaved=interleaved), strict=True):
        exact = turned(x, torch.arange(7).expand(2, 7), interleaved=interleaved)
        torch.testing.assert_close(y.cpu().double(), exact, rtol=0, atol=1e-6)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(lengths=st.lists(st.integers(0, 9), max_size=6), tail=st.integers(0, 5),
       kind=st.sampled_from([torch.int32, torch.int64]), rows=st.sampled_from([1, 2]))
def test_documents_of_any_lengths(lengths, tail, kind, rows):
    """Empty documents, none at all, a tail after the last, boundaries anywhere in a row."""
    tokens = sum(lengths) + tail
    tokens += tokens % rows
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()] if lengths else [0])
    place = [i - max(b for b in bounds.tolist() if b <= i) for i in range(tokens)]
    q, k = heads(rows, tokens // rows, 2, 8), heads(rows, tokens // rows, 1, 8, seed=1)
    options = {"cu_seqlens": bounds.to(DEVICE, kind)}
    for function in (rope, module.reference):
        got = function(q, k, *rope_tables(tokens + 1, 8, device=DEVICE), **options)[0]
        exact = turned(q, torch.tensor(place).view(rows, -1))
        torch.testing.assert_close(got.cpu().double(), exact, rtol=0, atol=1e-5)


def test_every_way_to_say_a_position_is_the_same():
    tokens = torch.arange(12, device=DEVICE).view(2, 6) % 5
    q, k = heads(2, 6, 3, 16), heads(2, 6, 1, 16, seed=1)
    cos, sin = rope_tables(5, 10, device=DEVICE)
    expected = rope(q, k, cos[tokens], sin[tokens])
    bounds = torch.tensor([0, 5, 10, 12], device=DEVICE)
    flat = (q.flatten(0, 1), k.flatten(0, 1))
    for got in (rope(q, k, cos, sin, position_ids=tokens),
                rope(q, k, cos, sin, position_ids=tokens.int()),
                rope(q, k, cos, sin, cu_seqlens=bounds),
                rope(*flat, cos, sin, cu_seqlens=bounds),
                rope(*flat, cos, sin, position_ids=tokens.flatten()),
                rope(*flat, cos[tokens.flatten()], sin[tokens.flatten()])):
        assert all(torch.equal(a, b.view_as(a)) for a, b in zip(expected, got, strict=True))
    # One row of ids or of tables for the whole batch, as Hugging Face's models give it.
    row = tokens[:1]
    expected = rope(q, k, cos, sin, position_ids=row.expand(2, -1))
    for got in (rope(q, k, cos, sin, position_ids=row), rope(q, k, cos[row], sin[row])):
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_16_bit_tables_are_taken_as_they_are():
    q, k = heads(1, 4, 2, 8), heads(1, 4, 1, 8, seed=1)
    tables = [table.bfloat16() for table in rope_tables(4, 8, device=DEVICE)]
    expected = rope(q, k, *(table.float() for table in tables))
    assert torch.equal(rope(q, k, *tables)[0], expected[0])
    if DEVICE == "cpu" and cpu.available():
        torch.testing.assert_close(cpu.rope(q, k, *tables), expected)


@pytest.mark.parametrize("function", [rope, module.reference], ids=["triton", "reference"])
@pytest.mark.parametrize("bad", [4, -1, 1 << 40])
def test_a_position_that_the_tables_lack_shows(function, bad):
    """Its token is NaN and so is its gradient; every other token is untouched."""
    q, k = (heads(1, 3, 2, 8, seed=i).requires_grad_() for i in range(2))
    cos, sin = rope_tables(4, 4, device=DEVICE)
    got = function(q, k, cos, sin, position_ids=torch.tensor([[0, bad, 2]], device=DEVICE))
    grads = torch.autograd.grad(got, (q, k), [torch.ones_like(x) for x in got])
    good = function(q, k, cos, sin, position_ids=torch.tensor([[0, 1, 2]], device=DEVICE))
    for x, y in zip((*got, *grads), (*good, *good), strict=True):
        assert x[:, 1, :, :4].isnan().all()
        assert x[:, [0, 2]].isfinite().all()
        assert torch.equal(x[:, 1, :, 4:].isnan(), torch.zeros_like(y[:, 1, :, 4:]).bool())


def test_the_cpp_op_refuses_such_a_position():
    if DEVICE != "cpu" or not cpu.available():
        pytest.skip("the C++ extension was not built")
    q = heads(1, 3, 2, 8)
    with pytest.raises(IndexError):
        cpu.rope(q, q, *rope_tables(4, 8), position_ids=torch.tensor([[0, 4, 2]]))


@pytest.mark.parametrize(("changes", "error", "match"), [
    ({"k": (2, 5, 1, 6)}, ValueError, "alike"), ({"k": (2, 4, 1, 8)}, ValueError, "alike"),
    ({"q": (5, 8), "k": (5, 8)}, ValueError, "alike"),
    ({"cos": (5, 5), "sin": (5, 5)}, ValueError, "R at most 8"),
    ({"sin": (5, 2)}, ValueError, "must be"), ({"cos": (3, 5, 4)}, ValueError, "must be"),
    ({"cos": (4, 4), "sin": (4, 4)}, ValueError, "4 positions, a row has 5"),
    ({"position_ids": (2, 4)}, ValueError, "position_ids"),
    ({"position_ids": (2, 5), "cu_seqlens": (3,)}, ValueError, "give one"),
    ({"cos": (2, 5, 4), "sin": (2, 5, 4), "cu_seqlens": (3,)}, ValueError, "give one"),
    ({"cu_seqlens": (3, 1)}, ValueError, "N \\+ 1"),
    ({"position_ids": torch.zeros(2, 5)}, TypeError, "int32 or int64"),
    ({"cos": torch.zeros(5, 4, dtype=torch.int64)}, TypeError, "floating-point")])
@pytest.mark.parametrize("function", [ops.rope, rope, module.reference])
def test_what_does_not_fit_is_refused(changes, error, match, function):
    shapes = {"q": (2, 5, 2, 8), "k": (2, 5, 1, 8), "cos": (5, 4), "sin": (5, 4)}
    given = {name: value if isinstance(value, torch.Tensor) else torch.zeros(
        value, dtype=torch.int64 if name in ("position_ids", "cu_seqlens") else torch.float32)
        for name, value in (shapes | changes).items()}
    with pytest.raises(error, match=match):
        function(**given)


def test_slices_of_a_projection_are_not_copied(monkeypatch):
    """A wide stride reaches the launch, and no option is lost between the op and it."""
    launches = []

    class Launcher:
        def __getitem__(self, grid):
            return lambda *args, **options: launches.append((args, options))

    monkeypatch.setattr(module, "_kernel", Launcher())
    both = heads(1, 4, 5, 8)
    module._rotate(both[..., :2, :], both[..., 2:4, :], *rope_tables(4, 8, device=DEVICE), None,
                   None, True, True)
    (args, options), = launches
    assert args[0].data_ptr() == both.data_ptr()
    assert args[1].data_ptr() == both.data_ptr() + 2 * 8 * both.element_size()
    assert options["INTERLEAVED"] and options["BACKWARD"]


@pytest.mark.parametrize(("shape", "half"), [((8, 2), 32), ((32, 8), 64), ((1, 1), 1), ((9, 3), 48),
                                             ((64, 8), 64), ((1, 1), 2048), ((2, 2), 4096)])
def test_tiles_fit_the_registers(shape, half):
    q, k = (torch.empty(1, 4096, h, 2 * half, device="meta") for h in shape)
    tile = _rotary.tiles(q, k, half)
    for name in ("Q_TILE", "K_TILE"):
        elements = tile["TOKENS"] * tile[name] * tile["BLOCK"]
        assert elements <= max(1024, tile["BLOCK"])
    assert 1 <= tile["num_warps"] <= 4


# ----------------------------------------------------------------------------------- tables

SCALINGS = {
    "default": {}, "linear": {"factor": 4.0},
    "dynamic": {"factor": 3.0, "original_max_position_embeddings": 64},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "yarn to the letter": {"rope_type": "yarn", "factor": 16.0, "beta_fast": 20.0,
                           "beta_slow": 2.0, "original_max_position_embeddings": 4096,
                           "truncate": False, "attention_factor": 1.25},
    "yarn of DeepSeek": {"rope_type": "yarn", "factor": 40.0, "mscale": 0.707,
                         "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096},
    "yarn, no ramp": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 1.0, "beta_slow": 1.0,
                      "truncate": False, "original_max_position_embeddings": 64},
}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize(("dim", "theta", "length"), [(64, 10000.0, 300), (20, 5e5, 40)])
def test_tables_equal_transformers(name, dim, theta, length):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = {"rope_type": name, **SCALINGS[name]}
    kind = scaling["rope_type"]
    config = LlamaConfig(head_dim=dim, max_position_embeddings=64,
                         rope_parameters={"rope_theta": theta, **scaling})
    make = (LlamaRotaryEmbedding.compute_default_rope_parameters if kind == "default"
            else ROPE_INIT_FUNCTIONS[kind])
    rate, factor = make(config, seq_len=length if kind == "dynamic" else None)
    frequency, ours = module._frequencies(length, dim, theta, scaling)
    torch.testing.assert_close(frequency.float(), rate, rtol=2e-6, atol=0)
    assert ours == pytest.approx(factor, rel=1e-12)
    cos, sin = rope_tables(length, dim, theta=theta, scaling=scaling)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency)
    assert torch.equal(cos, (angle.cos() * factor).float())
    assert torch.equal(sin, (angle.sin() * factor).float())
    # transformers 5 keeps theta among the scaling's parameters.
    assert torch.equal(rope_tables(length, dim, scaling={**scaling, "rope_theta": theta})[0], cos)


def test_tables_by_hand():
    cos, sin = rope_tables(3, 4, theta=100.0)
    assert cos.dtype == sin.dtype == torch.float32
    torch.testing.assert_close(sin, torch.tensor(
        [[math.sin(p), math.sin(p / 10)] for p in range(3)]))
    assert cos[2].tolist() == pytest.approx([math.cos(2), math.cos(0.2)])
    assert rope_tables(0, 4)[0].shape == (0, 2)
    with torch.device("meta"):
        assert rope_tables(3, 4)[1].is_meta
    assert not rope_tables(3, 4)[1].is_meta


@pytest.mark.parametrize(("dim", "scaling", "match"), [
    (5, None, "even"), (0, None, "even"), (8, {"rope_type": "longrope"}, "longrope"),
    (8, {"type": "linear"}, "lacks factor"), (8, {"rope_type": "yarn", "factor": 2.0},
                                              "lacks original_max_position_embeddings"),
    (8, {"rope_type": "linear", "factor": 2.0, "facter": 3.0}, "unknown facter")])
def test_tables_refuse_what_they_do_not_do(dim, scaling, match):
    with pytest.raises(ValueError, match=match):
        rope_tables(4, dim, scaling=scaling)
