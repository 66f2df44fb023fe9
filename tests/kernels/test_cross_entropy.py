"""What is particular to the loss: labels that are not there, overwriting, and what it costs."""

import pytest
import torch
from kernel_check import DEVICE

from fastllm import cpu, ops
from fastllm.kernels import cross_entropy as ce

BACKENDS = ["triton", "reference", *(["cpp"] if DEVICE == "cpu" and cpu.available() else [])]
NAN_BACKENDS = ["triton", "reference"]


def case(tokens=6, vocab=33, grad=True):
    generator = torch.Generator(DEVICE).manual_seed(0)
    logits = torch.randn(tokens, vocab, generator=generator, device=DEVICE)
    labels = torch.randint(vocab, (tokens,), generator=generator, device=DEVICE)
    return logits.requires_grad_(grad), labels


def loss_of(backend, *args, **kwargs):
    with ops.use_backend(backend, "cross_entropy"):
        return ops.cross_entropy(*args, **kwargs)


@pytest.mark.parametrize("backend", NAN_BACKENDS)
@pytest.mark.parametrize("label", [33, 1 << 40, -1, -(1 << 40)])
def test_a_label_that_is_not_there_poisons_its_token_alone(backend, label):
    logits, labels = case()
    labels[2] = label
    losses = loss_of(backend, logits, labels, reduction="none")
    losses.sum().backward()
    rows = torch.arange(6, device=DEVICE) == 2
    assert torch.equal(losses.isnan(), rows)
    assert torch.equal(logits.grad.isnan().all(1), rows)
    assert not logits.grad[~rows].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_ignored_row_is_zero_whatever_it_holds(backend):
    logits, labels = case()
    with torch.no_grad():
        logits[1], logits[4, 3] = float("nan"), float("inf")
    labels[1], labels[4] = -100, -100
    losses = loss_of(backend, logits, labels, reduction="none")
    losses.sum().backward()
    assert losses[1] == losses[4] == 0
    assert not logits.grad[[1, 4]].any()
    assert losses.isfinite().all()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_masked_vocabulary_is_fine(backend):
    """-inf for words that must not be said, a whole block of them, costs nothing and is no NaN."""
    logits, labels = case(3, 40_000)
    with torch.no_grad():
        logits[:, :20_000] = -float("inf")
    labels = labels // 2 + 20_000
    loss = loss_of(backend, logits, labels)
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(
        loss, torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
    assert not gradient[:, :20_000].any()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_in_place_overwrites_the_logits_with_their_gradient(reduction, factor):
    leaf, labels = case()
    expected = torch.autograd.grad(
        factor * ce.reference(leaf, labels, reduction=reduction).sum(), leaf)[0]
    logits = leaf * 1
    kept = logits.data_ptr()
    loss = ce.cross_entropy(logits, labels, reduction=reduction, inplace=True)
    (gradient,) = torch.autograd.grad(factor * loss.sum(), leaf)
    torch.testing.assert_close(gradient, expected)
    assert logits.data_ptr() == kept
    torch.testing.assert_close(logits.detach(), expected)


def test_overwriting_is_seen_by_whoever_kept_the_logits():
    leaf, labels = case()
    logits = leaf.exp()  # exp keeps its result for its backward
    ce.cross_entropy(logits, labels, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logits.sum().backward()


def test_a_second_backward_in_place_is_refused_and_otherwise_works():
    leaf, labels = case()
    loss = ce.cross_entropy(leaf * 1, labels, inplace=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss = ce.cross_entropy(leaf, labels)
    first, second = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_in_place_without_a_gradient_leaves_the_logits():
    logits, labels = case(grad=False)
    before = logits.clone()
    ce.cross_entropy(logits, labels, inplace=True)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_agrees(backend):
    """An oracle that shares no line with ours."""
    logits, labels = case(9, 257)
    labels[3] = 5
    for smoothing in (0.0, 0.2):
        ours = loss_of(backend, logits, labels, label_smoothing=smoothing, ignore_index=5,
                       reduction="mean")
        theirs = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing,
                                                   ignore_index=5)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(torch.autograd.grad(ours, logits),
                                   torch.autograd.grad(theirs, logits))


@pytest.mark.parametrize("backend", NAN_BACKENDS)
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_class_weights_are_torchs(backend, reduction, smoothing):
    logits, labels = case(9, 257)
    labels[3] = -100
    weight = torch.rand(257, device=DEVICE)
    weight[labels[0]] = 0.0
    options = {"weight": weight, "reduction": reduction, "label_smoothing": smoothing}
    ours = loss_of(backend, logits, labels, **options)
    theirs = torch.nn.functional.cross_entropy(logits, labels, **options)
    torch.testing.assert_close(ours, theirs)
    upstream = torch.rand_like(ours)
    torch.testing.assert_close(torch.autograd.grad(ours, logits, upstream),
                               torch.autograd.grad(theirs, logits, upstream))


@pytest.mark.parametrize("backend", NAN_BACKENDS)
@pytest.mark.parametrize("inplace", [False, True])
def test_options_keep_their_promises_in_odd_rows(backend, inplace):
    """NaN in an ignored row and a label that is not there, with every new option at once."""
    leaf, labels = case()
    rows = torch.zeros(6, dtype=torch.bool, device=DEVICE)
    labels[1], labels[2], rows[2] = -100, 33, True
    logits = leaf * 1
    with torch.no_grad():
        logits[1] = float("nan")
    losses, metrics = loss_of(
        backend, logits, labels, weight=torch.rand(33, device=DEVICE), label_smoothing=0.1,
        z_loss=1e-3, softcap=9.0, logit_scale=2.0, reduction="none", inplace=inplace,
        return_metrics=True)
    assert torch.equal(losses.isnan(), rows)
    assert losses[1] == 0 and metrics.predicted[1] == -1
    assert all(metric[1] == 0 for metric in (metrics.lse, metrics.entropy, metrics.z_loss))
    assert all(metric.isfinite().all() for metric in metrics)
    (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    assert torch.equal(gradient.isnan().all(1), rows)
    assert not gradient[1].any()


@pytest.mark.parametrize("backend", NAN_BACKENDS)
def test_metrics_are_what_torch_says(backend):
    logits, labels = case(7, 300)
    with torch.no_grad():
        logits[0, 17] = logits[0, 5] = 9.0  # the first of equals is predicted
        logits[1, :200] = -float("inf")
    _, metrics = loss_of(backend, logits, labels, z_loss=0.1, return_metrics=True)
    spread = torch.distributions.Categorical(logits=logits.detach().clamp(min=-1e30))
    torch.testing.assert_close(metrics.lse, logits.detach().logsumexp(1))
    torch.testing.assert_close(metrics.entropy, spread.entropy())
    torch.testing.assert_close(metrics.z_loss, 0.1 * metrics.lse.square())
    assert torch.equal(metrics.predicted, logits.argmax(1)) and metrics.predicted[0] == 5
    assert not any(metric.requires_grad for metric in metrics)


@pytest.mark.parametrize("options", [{}, {"return_metrics": True, "label_smoothing": 0.1,
                                          "weight": None}])
def test_a_row_longer_than_registers_hold(options):
    """Its head is read twice, blocks of -inf and the label's place in head and tail included."""
    vocab = 60_001
    logits, labels = case(2, vocab)
    labels[0], labels[1] = 3, vocab - 1
    if "weight" in options:
        options["weight"] = torch.rand(vocab, device=DEVICE)
    with torch.no_grad():
        logits[0, 4096:30_000] = -float("inf") if not options else -50.0
        logits[1] -= 300
        logits[1, 7] = logits[1, vocab - 9] = -250.0  # equals in head and tail: the first is it
    plain = {name: value for name, value in options.items() if name != "return_metrics"}
    expected = ce.reference(logits.double(), labels, **plain)
    (truth,) = torch.autograd.grad(expected, logits)
    for inplace in (False, True):
        logits.grad = None
        loss = ce.cross_entropy(logits * 1, labels, inplace=inplace, **options)
        loss, metrics = loss if options else (loss, None)
        loss.backward()
        torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=0)
        torch.testing.assert_close(logits.grad, truth, rtol=1e-4, atol=1e-8)
        if metrics:
            assert torch.equal(metrics.predicted, logits.argmax(1))


@pytest.mark.parametrize(("change", "match"), [
    ({"label_smoothing": 1.5}, "label_smoothing 1.5"), ({"softcap": -2.0}, "softcap -2.0"),
    ({"logit_scale": 0.0}, "logit_scale 0"), ({"reduction": "median"}, "median"),
    ({"weight": torch.ones(3, device=DEVICE)}, r"\(33,\)"),
    ({"weight": torch.ones(33, dtype=torch.int64, device=DEVICE)}, "floating point")])
def test_impossible_options_raise(change, match):
    with pytest.raises(ValueError, match=match):
        ce.cross_entropy(*case(), **change)


def test_shapes_that_do_not_fit_raise():
    logits, labels = case()
    with pytest.raises(ValueError, match="must be"):
        ce.cross_entropy(logits, labels[:-1])
    with pytest.raises(ValueError, match="unit stride"):
        ce.overwrite(logits.detach().t().contiguous().t(), labels, None, None, False, *ce.Options())
    with pytest.raises(TypeError, match="float64"):
        ce.cross_entropy(logits.double(), labels)
