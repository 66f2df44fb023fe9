"""Log-probabilities: bad labels, masked words, overwriting, one read of long rows, and chunks."""

import kernel_check as kc
import pytest
import torch
from kernel_check import DEVICE

from fastllm import ops
from fastllm.kernels import _chunks as chunks
from fastllm.kernels import linear_logprobs as linear
from fastllm.kernels import logprobs as module

BACKENDS = ["triton", "reference"]
F = torch.nn.functional


def case(tokens=6, vocab=33):
    generator = torch.Generator(DEVICE).manual_seed(0)
    logits = torch.randn(tokens, vocab, generator=generator, device=DEVICE)
    labels = torch.randint(vocab, (tokens,), generator=generator, device=DEVICE)
    return logits.requires_grad_(), labels


def both(backend, *args, **kwargs):
    with ops.use_backend(backend, "logprobs"):
        return ops.logprobs(*args, return_entropy=True, **kwargs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_agrees(backend):
    """An oracle that shares no line with ours, for an upstream gradient of each token."""
    logits, labels = case(9, 257)
    upstream = torch.randn(2, 9, device=DEVICE)
    ours = both(backend, logits, labels, temperature=0.7)
    distribution = torch.distributions.Categorical(logits=logits / 0.7)
    theirs = distribution.log_prob(labels), distribution.entropy()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(*(torch.autograd.grad(results, logits, tuple(upstream))
                                 for results in (ours, theirs)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_result_has_a_gradient_of_its_own(backend):
    logits, labels = case()
    p = logits.detach().softmax(-1)
    logp, entropy = both(backend, logits, labels)
    (a,) = torch.autograd.grad(logp.sum(), logits, retain_graph=True)
    torch.testing.assert_close(a, F.one_hot(labels, 33) - p)
    (h,) = torch.autograd.grad(entropy.sum(), logits)
    torch.testing.assert_close(h, -p * (p.log() + entropy.detach()[:, None]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("label", [33, 1 << 40, -1, -(1 << 40)])
def test_a_label_that_is_not_there_poisons_its_token_alone(backend, label):
    logits, labels = case()
    labels[2] = label
    results = both(backend, logits, labels)
    sum(x.sum() for x in results).backward()
    rows = torch.arange(6, device=DEVICE) == 2
    for x in results:
        assert torch.equal(x.isnan(), rows)
    assert torch.equal(logits.grad.isnan().all(1), rows)
    assert not logits.grad[~rows].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_ignored_row_is_zero_whatever_it_holds(backend):
    logits, labels = case()
    with torch.no_grad():
        logits[1], logits[4, 3] = float("nan"), float("inf")
    labels[1], labels[4] = -100, -100
    logp, entropy = both(backend, logits, labels)
    (logp + entropy).sum().backward()
    for x in (logp, entropy, logits.grad):
        assert not x[[1, 4]].any()
        assert x.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_masked_vocabulary_is_fine(backend):
    """-inf for words that must not be said: whole blocks of them first, the rest far below zero."""
    logits, labels = case(3, 9000)
    with torch.no_grad():
        logits -= 300.0
        logits[:, :6000] = -float("inf")
    labels = labels // 3 + 6000
    logp, entropy = both(backend, logits, labels)
    (logp + entropy).sum().backward()
    kept = torch.distributions.Categorical(logits=logits.detach()[:, 6000:])
    torch.testing.assert_close(logp, kept.log_prob(labels - 6000))
    torch.testing.assert_close(entropy, kept.entropy())
    assert not logits.grad[:, :6000].any()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("slope", [10.0, -10.0])
def test_a_long_row_whose_peak_moves(slope):
    """Block by block: what was summed above a lower peak is carried to the higher one."""
    logits = torch.linspace(-slope, slope, 9000, device=DEVICE)[None].requires_grad_()
    label = torch.tensor([4000], device=DEVICE)
    ours = module.logprobs(logits, label, return_entropy=True)
    distribution = torch.distributions.Categorical(logits=logits)
    theirs = distribution.log_prob(label), distribution.entropy()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(sum(results), logits)
                                 for results in (ours, theirs)))


def test_in_place_the_backward_writes_over_the_logits():
    leaf, labels = case()
    (expected,) = torch.autograd.grad(module.logprobs(leaf, labels).sum(), leaf)
    logits = leaf * 1
    before, kept = logits.detach().clone(), logits.data_ptr()
    logp = module.logprobs(logits, labels, inplace=True)
    assert torch.equal(logits, before), "the forward changes nothing"
    (gradient,) = torch.autograd.grad(logp.sum(), leaf, retain_graph=True)
    assert torch.equal(gradient, expected)
    assert logits.data_ptr() == kept
    assert torch.equal(logits, expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(logp.sum(), leaf)


def test_overwriting_is_seen_by_whoever_kept_the_logits():
    leaf, labels = case()
    logits = leaf.exp()  # exp keeps its result for its backward
    logp = module.logprobs(logits, labels, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logp.sum().backward()


def test_not_in_place_a_second_backward_works():
    logits, labels = case()
    logp = module.logprobs(logits, labels)
    first, second = (torch.autograd.grad(logp.sum(), logits, retain_graph=True)[0]
                     for _ in range(2))
    assert torch.equal(first, second)


def test_many_rows_need_no_second_grid_axis():
    """A second axis of a launch ends at 65,535: rows of GRPO's batches go on the first."""
    tokens = 70_000
    labels = torch.arange(tokens, device=DEVICE) % 2
    logits = torch.zeros(tokens, 2, device=DEVICE, requires_grad=True)
    logp = module.logprobs(logits, labels)
    logp.sum().backward()
    torch.testing.assert_close(logp, torch.full_like(logp, -0.6931472))
    torch.testing.assert_close(logits.grad, F.one_hot(labels, 2) - 0.5)


def test_arguments_that_do_not_fit_raise():
    logits, labels = case()
    for arguments, options, message in [
            ((logits, labels[:3]), {}, "must be"), ((logits, labels.int()), {}, "int32"),
            ((logits, labels), {"temperature": 0.0}, "temperature 0.0 is not positive"),
            ((logits, labels), {"softcap": 0.0}, "softcap 0.0 is not positive"),
            ((logits.T, labels.new_zeros(33)), {"inplace": True}, "unit stride")]:
        with pytest.raises(ValueError, match=message):
            module.logprobs(*arguments, **options)


# ------------------------------------------------------------------------ from hidden states


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_logits_are_never_whole(backend):
    tokens, width, vocab, chunk = 64, 4, 50, 8
    call = kc.make(linear.KERNEL, (tokens, width, vocab), torch.float32, chunk_size=chunk)
    hidden, weight, labels = call.args
    with kc.Largest() as largest, torch.no_grad():
        if backend == "reference":
            with torch.enable_grad():
                linear.plain(hidden, weight, labels, chunk_size=chunk).sum().backward()
        else:  # bare: inside an operator no mode can look
            logp, entropy, stats = linear._forward._init_fn(
                hidden, weight, None, labels, 1.0, None, -100, False, chunk)
            linear._backward._init_fn(logp, entropy, hidden, weight, None, labels, entropy, stats,
                                      1.0, None, -100, chunk, True, True, False)
    assert largest.elements <= chunk * vocab


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_a_frozen_argument_costs_no_product(frozen, monkeypatch):
    call = kc.make(linear.KERNEL, (5, 16, 33), torch.float32, biased=True)
    hidden, weight, labels = call.args
    tensors = {"hidden": hidden, "weight": weight, "bias": call.kwargs["bias"]}
    tensors[frozen].requires_grad_(False)
    made = {"hidden": 0, "weight": 0}
    product, add = chunks.product, chunks.Sum.add
    monkeypatch.setattr(chunks, "product", lambda *a: (
        made.update(hidden=made["hidden"] + 1), product(*a))[1])
    monkeypatch.setattr(chunks.Sum, "add", lambda *a: (
        made.update(weight=made["weight"] + 1), add(*a))[1])
    linear.linear_logprobs(hidden, weight, labels, bias=tensors["bias"]).sum().backward()
    assert (tensors[frozen].grad is None) == (frozen in tensors)
    assert made == {name: int(name != frozen) for name in made}


def test_under_autocast_the_product_is_made_in_its_type():
    hidden, weight, labels = kc.make(linear.KERNEL, (5, 16, 33), torch.float32).args
    with torch.autocast(DEVICE, torch.bfloat16):
        logp = linear.linear_logprobs(hidden, weight, labels)
    logp.sum().backward()
    expected = linear.linear_logprobs(hidden.bfloat16(), weight.bfloat16(), labels)
    assert torch.equal(logp, expected)
    assert weight.grad.dtype == torch.float32


def test_linear_arguments_that_do_not_fit_raise():
    hidden, weight, labels = kc.make(linear.KERNEL, (5, 16, 33), torch.float32).args
    with pytest.raises(ValueError, match="must be"):
        linear.linear_logprobs(hidden, weight[:, :3], labels)
    with pytest.raises(ValueError, match="bias"):
        linear.linear_logprobs(hidden, weight, labels, bias=hidden[0])
    with pytest.raises(TypeError, match="bfloat16"):
        linear.linear_logprobs(hidden.bfloat16(), weight, labels)
    with pytest.raises(ValueError, match="chunk_size 0"):
        linear.linear_logprobs(hidden, weight, labels, chunk_size=0)
