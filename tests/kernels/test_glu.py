"""What the registry cannot know of the gated linear units: what is kept, what is not copied."""

import kernel_check as kc
import pytest
import torch

from fastllm import ops
from fastllm.kernels._layout import TILE, matrices, matrix_of, tiling


def drawn(*shape, dtype=torch.float32):
    generator = torch.Generator(kc.DEVICE).manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, device=kc.DEVICE).to(dtype).requires_grad_()


@pytest.fixture(autouse=True)
def kernels():
    with ops.use_backend("triton", "swiglu", "swiglu_linear", "geglu", "geglu_linear"):
        yield


def test_one_projection_gets_one_gradient():
    """The packed form's gradient reaches the projection as the kernel wrote it: nothing joins."""
    x, weight = drawn(2, 3, 8), drawn(32, 8)
    both = torch.nn.functional.linear(x, weight)
    with torch.profiler.profile() as profile:
        ops.swiglu(both).backward(torch.ones(2, 3, 16, device=kc.DEVICE))
    ran = {event.key for event in profile.key_averages()}
    assert "aten::mm" in ran
    assert not ran & {"aten::cat", "aten::add", "aten::add_", "aten::zeros"}
    gate, up = torch.nn.functional.linear(x.detach(), weight.detach()).chunk(2, -1)
    separate = [half.clone().requires_grad_() for half in (gate, up)]
    ops.swiglu(*separate).backward(torch.ones(2, 3, 16, device=kc.DEVICE))
    joined = torch.cat([half.grad for half in separate], -1).view(-1, 32)
    assert torch.allclose(weight.grad, joined.T @ x.detach().view(-1, 8), atol=1e-5)


@pytest.mark.parametrize("packed", [True, False])
def test_before_a_linear_layer_only_its_inputs_are_kept(packed):
    gate, up, weight = drawn(4, 16), drawn(4, 16), drawn(5, 16)
    if packed:
        gate, up = drawn(4, 32), None
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t,
                                                  lambda t: t):
        ops.swiglu_linear(gate, up, weight)
    assert set(kept) == {t.data_ptr() for t in (gate, up, weight) if t is not None}


@pytest.mark.parametrize("frozen", [("gate", "up"), ("weight",), ("up",)])
def test_frozen_inputs_cost_nothing_and_change_nothing(frozen):
    def run(frozen):
        tensors = {"gate": drawn(4, 16), "up": drawn(4, 16), "weight": drawn(5, 16)}
        for name in frozen:
            tensors[name].requires_grad_(False)
        ops.geglu_linear(**tensors).square().sum().backward()
        return {name: tensor.grad for name, tensor in tensors.items()}

    whole, part = run(()), run(frozen)
    for name, gradient in part.items():
        assert (gradient is None) == (name in frozen)
        assert gradient is None or torch.equal(gradient, whole[name])


def test_autocast_reaches_the_product():
    gate, up, weight = drawn(4, 16), drawn(4, 16), drawn(5, 16)
    with torch.autocast(kc.DEVICE, torch.bfloat16):
        y = ops.swiglu_linear(gate, up, weight)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert {t.grad.dtype for t in (gate, up, weight)} == {torch.float32}
    exact = ops.swiglu_linear(gate, up, weight)
    assert (y.float() - exact).abs().max() < 0.02 * exact.abs().max()


@pytest.mark.parametrize("op", ["geglu", "geglu_linear", "swiglu_linear"])
def test_gradients_in_float64(op):
    tensors = [drawn(*shape, dtype=torch.float64).detach().requires_grad_()
               for shape in ((3, 5), (3, 5), (2, 5))]
    with ops.use_backend("auto", op):
        assert torch.autograd.gradcheck(getattr(ops, op), tensors[:3 if "linear" in op else 2])


def test_what_cannot_be_is_refused():
    gate = drawn(4, 6)
    with pytest.raises(ValueError, match=r"geglu: gate \(4, 6\) .* and up \(4, 5\) .* must agree"):
        ops.geglu(gate, drawn(4, 5))
    with pytest.raises(ValueError, match=r"swiglu: gate \(4, 5\) without up must be"):
        ops.swiglu(drawn(4, 5))
    with pytest.raises(ValueError, match=r"geglu: approximate must be .* not 'erf'"):
        ops.geglu(gate, gate, approximate="erf")
    with pytest.raises(ValueError, match=r"swiglu_linear: weight \(6, 5\) must be \(O, 6\)"):
        ops.swiglu_linear(gate, gate, drawn(6, 5))
    with pytest.raises(ValueError, match=r"swiglu_linear: weight \(5, 6\) must be \(O, 3\)"):
        ops.swiglu_linear(gate, None, drawn(5, 6))
    with pytest.raises(TypeError, match=r"swiglu_linear: gate is torch.float32, weight torch.bfl"):
        ops.swiglu_linear(gate, gate, drawn(5, 6, dtype=torch.bfloat16))


# ---------------------------------------------------------------------------- how memory is walked


@pytest.mark.parametrize("columns", [1408, 2816, 5632, 8192, 11008, 14336, 18944, 28672])
def test_tiles_fill_the_rows_of_real_models(columns):
    programs, launch = tiling(4096, columns)
    lanes = programs * launch["ROWS"] * launch["BLOCK"]
    assert launch["ROWS"] * launch["BLOCK"] == TILE
    assert lanes == 4096 * columns, "lanes without an element"
    assert launch["BLOCK"] >= 128, "256-byte pieces of a row"


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 129), (2, 2049), (1, 5000), (70, 64)])
def test_tiles_cover_every_element(shape):
    rows, columns = shape
    programs, launch = tiling(rows, columns)
    assert launch["blocks"] * launch["BLOCK"] >= columns
    assert programs // launch["blocks"] * launch["ROWS"] >= rows


def test_what_strides_can_say_is_not_copied():
    both = torch.zeros(2, 3, 8)
    for x in (both, both[..., :4], both[:, 1], both.sum().expand(2, 3, 8), both[..., :1]):
        assert matrix_of(x).data_ptr() == x.data_ptr()
        assert torch.equal(matrix_of(x).view(x.shape), x)
    flat, = matrices(both)
    assert flat.shape == (1, 48)
    rows, = matrices(both[..., :4])
    assert rows.shape == (6, 4)
    assert [m.stride() for m in matrices(both.sum().expand(2, 3, 8), both)] == [(0, 0), (8, 1)]


def test_expanded_inputs_and_gradients():
    """Columns that are one number: the gradient of a sum is read in place, inputs are laid out."""
    gate, up = drawn(5, 1), drawn(5, 64)
    ops.swiglu(gate.expand(5, 64), up).sum().backward()
    exact = [t.detach().clone().requires_grad_() for t in (gate, up)]
    (torch.nn.functional.silu(exact[0]) * exact[1]).sum().backward()
    assert torch.allclose(gate.grad, exact[0].grad, atol=1e-5)
    assert torch.allclose(up.grad, exact[1].grad, atol=1e-6)
