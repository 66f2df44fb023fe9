"""Divergences: beside TRL's and Liger's definitions, masked words, overwriting, and chunks."""

import kernel_check as kc
import pytest
import torch
from kernel_check import DEVICE

from fastllm import ops
from fastllm.kernels import jsd as module
from fastllm.kernels import linear_jsd as linear

BACKENDS = ["triton", "reference"]
F = torch.nn.functional


def case(tokens=6, vocab=33, scale=2.0):
    generator = torch.Generator(DEVICE).manual_seed(0)
    student, teacher = (scale * torch.randn(tokens, vocab, generator=generator, device=DEVICE)
                        for _ in range(2))
    labels = torch.randint(vocab, (tokens,), generator=generator, device=DEVICE)
    return student.requires_grad_(), teacher, labels


def divergence(backend, *args, op="jsd", **kwargs):
    with ops.use_backend(backend, op):
        return getattr(ops, op)(*args, **kwargs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reverse", [False, True])
def test_kl_is_torchs(backend, reverse):
    student, teacher, _ = case()
    ours = divergence(backend, student, teacher, op="kl_div", reverse=reverse, temperature=2.0)
    logs = F.log_softmax(student / 2, -1), F.log_softmax(teacher / 2, -1)
    theirs = F.kl_div(*(logs[::-1] if reverse else logs), reduction="sum", log_target=True)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student) for loss in (ours, theirs)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_liger_agrees(backend, beta):
    """Liger's chunked distillation loss, whose definition is TRL's: plain torch, any device."""
    pytest.importorskip("liger_kernel")
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction as Liger

    student, teacher, labels = case()
    labels[2] = -100
    ours = divergence(backend, student, teacher, labels, beta=beta)
    theirs = Liger.distillation_loss_fn(student, teacher, beta=beta, target=labels)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student) for loss in (ours, theirs)))


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_ligers_kernel_agrees(beta):
    """Liger's Triton kernel takes log-probabilities and means over the trained tokens."""
    pytest.importorskip("liger_kernel")
    from liger_kernel.ops.jsd import LigerJSDFunction

    student, teacher, labels = case(5, 40)
    labels[1] = -100
    ours = module.jsd(student, teacher, labels, beta=beta, reduction="mean")
    theirs = LigerJSDFunction.apply(student.log_softmax(-1), teacher.log_softmax(-1), labels, beta)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student) for loss in (ours, theirs)),
                               rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vocab", [33, 9000])
def test_a_student_that_is_the_teacher_has_no_divergence(backend, vocab):
    """`vocab` short and long: read in one piece, and block by block."""
    student, _, _ = case(3, vocab)
    for beta in (0.0, 0.3, 1.0):
        losses = divergence(backend, student, student.detach(), beta=beta, reduction="none")
        (gradient,) = torch.autograd.grad(losses.sum(), student)
        assert losses.abs().max() < 2e-6
        assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("vocab", [33, 9000])
def test_words_that_neither_can_say_count_for_nothing(backend, beta, vocab):
    student, teacher, _ = case(3, 2 * vocab)
    with torch.no_grad():
        student -= 200.0
    cut = student.detach()[:, vocab:].clone().requires_grad_()
    expected = module.reference(cut, teacher[:, vocab:], beta=beta)
    (slope,) = torch.autograd.grad(expected, cut)
    with torch.no_grad():
        student[:, :vocab] = teacher[:, :vocab] = -float("inf")
    loss = divergence(backend, student, teacher, beta=beta)
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert not gradient[:, :vocab].any()
    torch.testing.assert_close(gradient[:, vocab:], slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vocab", [33, 9000])
def test_a_word_that_only_one_can_say(backend, vocab):
    """The mixture stays finite; a KL divergence from what cannot be said is infinite."""
    student, teacher, _ = case(2, vocab)
    for limited, infinite in ((student, 0.0), (teacher, 1.0)):
        kept = limited.detach()[0, 5].clone()
        with torch.no_grad():
            limited[0, 5] = -float("inf")
        for beta in (0.0, 0.5, 1.0):
            losses = divergence(backend, student, teacher, beta=beta, reduction="none")
            assert losses.isinf().tolist() == [beta == infinite, False]
            if beta == 0.5:
                (gradient,) = torch.autograd.grad(losses.sum(), student)
                assert gradient.isfinite().all()
        with torch.no_grad():
            limited[0, 5] = kept


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("vocab", [33, 9000])
def test_the_teachers_nan_shows(backend, beta, vocab):
    student, teacher, _ = case(3, vocab)
    teacher[1, 7] = float("nan")
    losses = divergence(backend, student, teacher, beta=beta, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), student)
    assert losses.isnan().tolist() == [False, True, False]
    assert torch.equal(gradient.isnan().all(1), losses.isnan())
    assert gradient[[0, 2]].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_ignored_row_is_zero_whatever_it_holds(backend):
    student, teacher, labels = case()
    with torch.no_grad():
        student[1], teacher[4, 3] = float("nan"), float("inf")
    labels[1], labels[4] = -100, -100
    loss = divergence(backend, student, teacher, labels, reduction="mean")
    (gradient,) = torch.autograd.grad(loss, student)
    kept = [0, 2, 3, 5]
    torch.testing.assert_close(loss, module.reference(student[kept], teacher[kept],
                                                      reduction="mean"))
    assert not gradient[[1, 4]].any()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("vocab", [33, 9000])
def test_in_place_overwrites_the_students_logits_with_their_gradient(reduction, dtype, vocab):
    leaf, teacher, _ = case(4, vocab)
    leaf, teacher = leaf.detach().to(dtype).requires_grad_(), teacher.to(dtype)
    (expected,) = torch.autograd.grad(
        0.5 * module.jsd(leaf, teacher, reduction=reduction).sum(), leaf)
    logits = leaf * 1
    kept = logits.data_ptr()
    loss = module.jsd(logits, teacher, reduction=reduction, inplace=True)
    (gradient,) = torch.autograd.grad(0.5 * loss.sum(), leaf, retain_graph=True)
    torch.testing.assert_close(gradient, expected)
    assert logits.data_ptr() == kept
    assert torch.equal(logits, gradient)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss.sum(), leaf)


def test_the_teacher_is_a_constant():
    student, teacher, _ = case()
    teacher.requires_grad_()
    module.jsd(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


def test_arguments_that_do_not_fit_raise():
    student, teacher, labels = case()
    for arguments, options, message in [
            ((student, teacher[:, :3]), {}, "one shape"),
            ((student, teacher, labels[:3]), {}, r"labels \(3,\) torch.int64"),
            ((student, teacher), {"beta": 1.5}, "beta 1.5 is not in"),
            ((student, teacher), {"temperature": 0.0}, "temperature 0.0 is not positive"),
            ((student, teacher), {"reduction": "batchmean"}, "'batchmean' is not one of"),
            ((student.T, teacher.T), {"inplace": True}, "unit stride")]:
        with pytest.raises(ValueError, match=message):
            module.jsd(*arguments, **options)


# ------------------------------------------------------------------------ from hidden states


@pytest.mark.parametrize("factor", [torch.ones((), device=DEVICE), torch.ones(64, device=DEVICE)])
def test_the_logits_are_never_whole(factor):
    tokens, vocab, chunk = 64, 50, 8
    call = kc.make(linear.KERNEL, (tokens, 4, 6, vocab), torch.float32)
    tensors = [t.detach() for t in call.args]
    with kc.Largest() as largest:
        linear._loop(*tensors, factor, (0.5, 1.0, -100), chunk, (True, True))
    assert largest.elements <= chunk * vocab


def test_the_plain_loop_divides_too():
    call = kc.make(linear.KERNEL, (64, 4, 6, 50), torch.float32)
    with kc.Largest() as largest:
        linear.plain(*call.args, chunk_size=8).backward()
    assert largest.elements <= 8 * 50


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_argument_costs_no_product(reduction, frozen):
    call = kc.make(linear.KERNEL, (5, 16, 8, 33), torch.float32, reduction=reduction)
    call.args[frozen].requires_grad_(False)
    ours = torch.autograd.grad(linear.linear_jsd(*call.args, **call.kwargs).sum(),
                               call.args[1 - frozen])
    theirs = torch.autograd.grad(linear.reference(*call.args, **call.kwargs).sum(),
                                 call.args[1 - frozen])
    torch.testing.assert_close(ours, theirs)
    detached = [t.detach() for t in call.args]
    gradients = (frozen != 0, frozen != 1)
    _, dhidden, dweight = linear._loop(*detached, torch.ones((), device=DEVICE),
                                       (0.5, 1.0, -100), None, gradients)
    assert (dhidden.numel() > 0, dweight.numel() > 0) == gradients


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_gradients_that_lie_ready_are_given_once(reduction):
    call = kc.make(linear.KERNEL, (5, 16, 8, 33), torch.float32, reduction=reduction)
    loss = linear.linear_jsd(*call.args, **call.kwargs)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_mean_in_float16_keeps_small_gradients():
    """Divided by 8,192 tokens before the loss scale lifts them, most would vanish."""
    tokens, vocab = 8192, 16
    student = torch.zeros(tokens, vocab, device=DEVICE, dtype=torch.float16, requires_grad=True)
    teacher = torch.linspace(0, 0.01, vocab, device=DEVICE, dtype=torch.float16).expand_as(student)
    loss = module.jsd(student * 1, teacher, reduction="mean", inplace=True) * 8192
    (gradient,) = torch.autograd.grad(loss, student)
    exact = student.detach().double().requires_grad_()
    module.reference(exact, teacher.double(), reduction="sum").backward()
    torch.testing.assert_close(gradient.double(), exact.grad, rtol=1e-3, atol=6e-8)


def test_a_teacher_of_another_type_under_no_autocast_is_fine():
    call = kc.make(linear.KERNEL, (5, 16, 8, 33), torch.float32)
    student, weight, teacher, teacher_weight, labels = call.args
    mixed = linear.linear_jsd(student, weight, teacher.bfloat16(), teacher_weight.bfloat16(),
                              labels)
    torch.testing.assert_close(mixed, linear.linear_jsd(*call.args), rtol=3e-2, atol=1e-2)
    with pytest.raises(TypeError, match=r"teacher_hidden is torch\.bfloat16"):
        linear.linear_jsd(student, weight, teacher.bfloat16(), teacher_weight)
    with pytest.raises(ValueError, match="must be"):
        linear.linear_jsd(student, weight, teacher, weight)
