"""What the registry cannot know of the embedding: runs of every length, wild ids, who pays."""

import kernel_check as kc
import pytest
import torch

from fastllm import ops
from fastllm.kernels.embedding import PIECE

GENERATOR = torch.Generator(kc.DEVICE).manual_seed(3)


@pytest.fixture(autouse=True)
def kernel():
    with ops.use_backend("triton", "embedding"):
        yield


@pytest.fixture
def poisoned():
    """Memory that nobody has written is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def gradient(ids, dy, vocab, **options):
    weight = torch.zeros(vocab, dy.shape[-1], dtype=dy.dtype, device=kc.DEVICE, requires_grad=True)
    ops.embedding(ids, weight, **options).backward(dy)
    return weight.grad


def exact(ids, dy, vocab):
    total = torch.zeros(vocab, dy.shape[-1], dtype=torch.float64, device=kc.DEVICE)
    return total.index_add_(0, ids.flatten(), dy.double().flatten(0, -2))


@pytest.mark.parametrize("lengths", [
    [PIECE], [PIECE + 1], [1, PIECE, 1], [5 * PIECE], [PIECE - 1, 2 * PIECE], [1, 3 * PIECE, 1, 65],
    [70] * 5, [63, 64, 65, 0, 127, 128, 129, 0, 1, 600, 2], [2 * PIECE + 1] * 2, [1] * 70])
def test_runs_of_every_length_at_every_place(lengths, poisoned):
    """Whole numbers, whose sums are exact in any order: a token lost or counted twice shows."""
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(kc.DEVICE)
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]
    dy = torch.randint(-50, 50, (len(ids), 3), generator=GENERATOR, device=kc.DEVICE).float()
    assert torch.equal(gradient(ids, dy, len(lengths)), exact(ids, dy, len(lengths)).float())


def test_a_frequent_token_is_summed_in_float32_and_rounded_once():
    ids = torch.zeros(3000, dtype=torch.int64, device=kc.DEVICE)
    dy = torch.rand(3000, 8, generator=GENERATOR, device=kc.DEVICE).bfloat16()
    got, wanted = gradient(ids, dy, 2), exact(ids, dy, 2)
    assert torch.equal(got, wanted.bfloat16())
    assert (got[1] == 0).all()


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_ids_that_no_vocabulary_has(backend, poisoned):
    """Rows of NaN, no gradient, and nothing read or written elsewhere."""
    wild = [-1, 5, 1 << 40, -(1 << 40), 1 << 32, torch.iinfo(torch.int64).max]
    ids = torch.tensor([[0, *wild], [4, *wild]] * PIECE, device=kc.DEVICE)
    weight = torch.randn(5, 3, generator=GENERATOR, device=kc.DEVICE, requires_grad=True)
    with ops.use_backend(backend, "embedding"):
        y = ops.embedding(ids, weight)
    assert y.shape == (2 * PIECE, 7, 3)
    assert y[:, 1:].isnan().all()
    assert torch.equal(y[::2, 0], weight[0].expand(PIECE, 3))
    y.backward(torch.ones_like(y))
    assert torch.equal(weight.grad[:, 0], torch.tensor([PIECE, 0.0, 0, 0, PIECE], device=kc.DEVICE))


@pytest.mark.parametrize("padding", [0, 3, -1])
def test_padding_gets_no_gradient(padding, poisoned):
    ids = torch.randint(4, (500,), generator=GENERATOR, device=kc.DEVICE)
    dy = torch.randint(-9, 9, (500, 5), generator=GENERATOR, device=kc.DEVICE).float()
    wanted = exact(ids, dy, 4)
    wanted[padding] = 0
    assert torch.equal(gradient(ids, dy, 4, padding_idx=padding), wanted.float())


def test_equals_torch():
    ids = torch.randint(50, (4, 30), generator=GENERATOR, device=kc.DEVICE)
    weight = torch.randn(50, 16, generator=GENERATOR, device=kc.DEVICE, requires_grad=True)
    ours, theirs = ops.embedding(ids, weight), torch.nn.functional.embedding(ids, weight)
    assert torch.equal(ours, theirs)
    upstream = torch.randn(4, 30, 16, generator=GENERATOR, device=kc.DEVICE)
    assert torch.allclose(*(torch.autograd.grad(y, weight, upstream)[0] for y in (ours, theirs)),
                          atol=1e-5)


def test_what_cannot_be_is_refused():
    weight = torch.zeros(4, 8, device=kc.DEVICE)
    ids = torch.zeros(3, dtype=torch.int64, device=kc.DEVICE)
    with pytest.raises(ValueError, match=r"embedding: input torch.float32 and weight \(4, 8\)"):
        ops.embedding(ids.float(), weight)
    with pytest.raises(ValueError, match=r"weight \(8,\) must be"):
        ops.embedding(ids, weight[0])
    for bad in (4, -5):
        with pytest.raises(ValueError, match=rf"embedding: padding_idx {bad} is no row of weight"):
            ops.embedding(ids, weight, padding_idx=bad)
