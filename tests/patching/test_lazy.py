"""Logits that are not made: one fused loss where it is that, the model's arithmetic elsewhere."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastllm.patching._lazy import LazyLogits


@pytest.fixture
def head():
    torch.manual_seed(0)
    return nn.Linear(6, 11)


@pytest.fixture
def hidden():
    torch.manual_seed(1)
    return torch.randn(2, 5, 6, requires_grad=True)


LABELS = torch.tensor([[1, 2, 3, -100, 4], [0, 10, -100, 5, 5]])
CHAINS = {
    "plain": lambda x: x, "float": lambda x: x.float(), "to": lambda x: x.to(torch.float32),
    "scale": lambda x: x * 0.25, "divide": lambda x: x / 4,
    "cap": lambda x: torch.tanh(x / 3.0) * 3.0,
    "cap and cast": lambda x: ((x / 3.0).tanh() * 3.0).float().contiguous(),
}
OPTIONS = {"mean": {}, "sum": {"reduction": "sum"}, "none": {"reduction": "none"},
           "ignore": {"ignore_index": 5}, "smooth": {"label_smoothing": 0.1},
           "weight": {"weight": torch.linspace(0.5, 1.5, 11)}}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("chain", CHAINS)
def test_loss_is_fused_and_the_same(head, hidden, chain, options):
    labels, kwargs = LABELS.reshape(-1), OPTIONS[options]
    if "ignore_index" in kwargs:
        labels = labels.masked_fill(labels == -100, 5)
    results = []
    for logits in (LazyLogits(hidden, head), head(hidden)):
        flat = CHAINS[chain](logits).view(-1, 11)
        loss = F.cross_entropy(flat, labels, **kwargs)
        if isinstance(flat, LazyLogits):
            assert flat._tensor is None and logits._tensor is None
        grads = torch.autograd.grad(loss.sum(), [hidden, head.weight, head.bias])
        results.append((loss, *grads))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


OTHER = {
    "shifted": lambda x: F.cross_entropy(x[..., :-1, :].reshape(-1, 11), LABELS[:, 1:].flatten()),
    "classes second": lambda x: F.cross_entropy(x.transpose(1, 2), LABELS),
    "not a cap": lambda x: F.cross_entropy((torch.tanh(x / 3.0) * 2.0).view(-1, 11),
                                           LABELS.flatten()),
    "scaled, capped": lambda x: F.cross_entropy((torch.tanh(x / 3.0) * 2.0).view(-1, 11),
                                                LABELS.flatten()),
    "probabilities": lambda x: F.cross_entropy(x.view(-1, 11), torch.full((10, 11), 1 / 11)),
    "log_softmax": lambda x: F.log_softmax(x, -1)[..., 3].sum(), "argmax": lambda x: x.argmax(-1),
    "method": lambda x: x.softmax(-1), "index": lambda x: x[:, -1], "arithmetic": lambda x: 1 - x,
    "tensor scale": lambda x: x * torch.tensor(2.0), "compare": lambda x: x > 0,
    "other view": lambda x: x.view(2, 55), "stack": lambda x: torch.stack([x, x]),
    "size": lambda x: torch.tensor([*x.size(), x.size(-1), x.dim(), x.ndim, len(x)]),
    "attributes": lambda x: torch.tensor([x.dtype == torch.float32, x.device.type == "cpu",
                                          x.requires_grad, x.is_floating_point()]),
}


@pytest.mark.parametrize("use", OTHER)
def test_everything_else_is_the_tensors(head, hidden, use):
    torch.testing.assert_close(OTHER[use](LazyLogits(hidden, head)), OTHER[use](head(hidden)))


def test_made_logits_are_kept_and_may_be_changed(head, hidden):
    with torch.no_grad():
        first = LazyLogits(hidden, head)
        first.div_(2.0)
        assert torch.equal(first.tensor(), head(hidden) / 2)
        # What was changed in place is what the loss is taken of.
        torch.testing.assert_close(F.cross_entropy(first.view(-1, 11), LABELS.flatten()),
                                   F.cross_entropy((head(hidden) / 2).view(-1, 11),
                                                   LABELS.flatten()))


def test_gradients_after_a_look_without(head, hidden):
    logits = LazyLogits(hidden, head)
    with torch.no_grad():
        assert not logits.argmax(-1).requires_grad
    assert logits.sum().requires_grad
