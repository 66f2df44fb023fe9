"""What the registry cannot know of dropout: the mask is random, and depends on nothing else."""

import kernel_check as kc
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastllm import ops
from fastllm.kernels._triton import jit, tl
from fastllm.kernels.dropout import bits_of, kept, random_bits

COUNT = 1 << 18


@pytest.fixture(autouse=True)
def kernel():
    with ops.use_backend("triton", "dropout"):
        yield


def mask(p, seed, count=COUNT):
    """As numbers of mean 0 and variance 1."""
    drawn = kept(torch.Size([count]), p, torch.tensor(seed)).double()
    return (drawn - (1 - p)) / (p * (1 - p)) ** 0.5


def ones(*shape):
    return torch.ones(shape, device=kc.DEVICE, requires_grad=True)


# ---------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_the_share_of_dropped_elements_is_p(p):
    sums = torch.stack([mask(p, seed).sum() / COUNT**0.5 for seed in range(40)])
    assert sums.abs().max() < 4.5  # standard normal numbers
    assert 0.5 < sums.square().mean() < 1.6


@pytest.mark.parametrize("lag", [1, 2, 3, 8, 32, 512, 4096, 4099])
def test_neighbours_are_independent(lag):
    for p, seed in ((0.5, 0), (0.1, 1), (0.1, 1 << 40)):
        x = mask(p, seed)
        assert abs((x[lag:] * x[:-lag]).sum()) / (COUNT - lag) ** 0.5 < 4.5


def test_eight_neighbours_take_every_pattern_alike():
    for seed in range(8):
        bits = (mask(0.5, seed) > 0).view(-1, 8).long()
        seen = (bits << torch.arange(8)).sum(1).bincount(minlength=256)
        expected = COUNT / 8 / 256
        squares = ((seen - expected) ** 2 / expected).sum()
        assert 150 < squares < 370  # chi-square with 255 degrees of freedom


def test_seeds_are_independent():
    """Consecutive ones, and those that differ in one bit of either half."""
    seeds = [0, 1, 2, 3, -1, *(1 << bit for bit in range(2, 64, 7) if bit < 63)]
    masks = torch.stack([mask(0.3, seed, 1 << 16) for seed in seeds])
    together = masks @ masks.T / (1 << 16) ** 0.5
    assert (together - together.diag().diag()).abs().max() < 4.5
    # Nor is one the other in another order: blocks of 256 elements keep other numbers of them.
    blocks = masks.view(len(seeds), 256, 256).sum(-1).sort(-1).values
    assert len({tuple(row.tolist()) for row in blocks}) == len(seeds)


@jit
def draw(index, seed, out, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(out + at, bits_of(tl.load(index + at), tl.load(seed)).to(tl.int64))


@pytest.mark.parametrize("seed", [0, 1, -1, 1 << 40, -(1 << 63), (1 << 63) - 1])
def test_indices_and_seeds_of_64_bits(seed):
    index = torch.tensor([0, 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 32) + 1,
                          (1 << 40) + 7], device=kc.DEVICE)
    at, out = torch.tensor(seed, device=kc.DEVICE), torch.empty_like(index)
    draw[(1,)](index, at, out, COUNT=8)
    assert torch.equal(out, random_bits(index, at))
    assert len(set(out.tolist())) == 8


# ------------------------------------------------------------------------- what they depend on


def test_layout_and_shape_change_nothing():
    wanted = kept(torch.Size([60]), 0.4, torch.tensor(3))
    long = torch.ones(5, 24, device=kc.DEVICE)
    for x in (ones(60), ones(5, 12), ones(3, 4, 5), long[:, :12], long[:, ::2], ones(12, 5).T,
              torch.ones((), device=kc.DEVICE).expand(5, 12)):
        assert torch.equal(ops.dropout(x, 0.4, seed=3).flatten().cpu() != 0, wanted)


@pytest.mark.parametrize(("p", "kept"), [(0.5, 2.0), (0.2, 1.25), (0.75, 4.0)])
def test_the_gradient_is_dropped_where_the_element_was(p, kept):
    x = ones(6, 40)
    y = ops.dropout(x, p)
    y.sum().backward()
    assert torch.equal(y, x.grad)
    assert set(y.unique().tolist()) == {0.0, kept}


def test_a_drawn_seed_follows_torch():
    x = ones(4, 64)
    torch.manual_seed(5)
    first, second = ops.dropout(x, 0.5), ops.dropout(x, 0.5)
    torch.manual_seed(5)
    assert torch.equal(ops.dropout(x, 0.5), first)
    assert not torch.equal(first, second)
    with ops.use_backend("reference", "dropout"):
        torch.manual_seed(5)
        assert torch.equal(ops.dropout(x, 0.5), first)


def test_checkpointing_drops_the_same_again():
    x = ones(4, 64)
    y = checkpoint(lambda t: ops.dropout(t * 1.0, 0.5), x, use_reentrant=False)
    y.sum().backward()
    assert torch.equal(y, x.grad)


def test_compiled_with_a_drawn_seed():
    compiled = torch.compile(lambda t: ops.dropout(t, 0.5, residual=t), fullgraph=True,
                             backend="aot_eager")
    x = ones(4, 64)
    first, second = compiled(x), compiled(x)
    assert not torch.equal(first, second)
    second.sum().backward()
    assert torch.equal(x.grad, second)


# ------------------------------------------------------------------------------------ its costs


def test_nothing_but_the_seed_is_kept_and_the_residual_gets_the_gradient_itself():
    x, residual = ones(4, 64), ones(4, 64)
    kept_tensors = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept_tensors.append(t) or t,
                                                  lambda t: t):
        y = ops.dropout(x, 0.5, residual=residual)
    assert [t.numel() for t in kept_tensors] == [1]
    upstream = torch.randn(4, 64, device=kc.DEVICE)
    _, gradient = torch.autograd.grad(y, (x, residual), upstream)
    assert gradient.data_ptr() == upstream.data_ptr()


def test_what_cannot_be_is_refused():
    x = ones(4, 6)
    with pytest.raises(ValueError, match=r"dropout: p 1\.5 is not a probability"):
        ops.dropout(x, 1.5)
    with pytest.raises(ValueError, match=r"dropout: residual \(4, 5\) must have the shape"):
        ops.dropout(x, 0.5, residual=ones(4, 5))
    with pytest.raises(ValueError, match=r"dropout: seed \(\) torch.float32 must be one int64"):
        ops.dropout(x, 0.5, seed=torch.tensor(1.0, device=kc.DEVICE))
