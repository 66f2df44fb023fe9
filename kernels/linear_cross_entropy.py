"""Cross-entropy of hidden @ weight.T against labels, a block of rows of logits at a time.

hidden (T, H), weight (V, H) of one type, labels (T,); options and loss as in `cross_entropy`. The
logits are rounded to that type, as a linear layer rounds them, and are never all in memory: a block
of them is made, overwritten by its gradient in the pass that reads its loss, and consumed by the
two products of the backward. The weight's gradient is gathered in float32. For "sum" and "mean" the
gradients are ready when the forward returns and the backward only scales them; for "none", where
each token has its own upstream gradient, the backward makes the logits again.
Floor: 2THV FLOPs forward, 4THV backward; e(TH + VH) bytes in, as much out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastllm.kernels import cross_entropy as ce
from fastllm.kernels._spec import Call, Direction, Kernel, Shape, normal

Options = tuple[int, float, float, float | None]
"""ignore_index, label_smoothing, z_loss, softcap."""


def _matmul(a: Tensor, b: Tensor, out: Tensor) -> None:
    torch.mm(a, b, out=out)


@dataclass(frozen=True)
class Parts:
    """What the loop over blocks is made of, for one kind of tensor."""

    losses: Callable[..., Tensor]
    """losses(logits, labels, *options) -> (T,) float32."""
    overwrite: Callable[..., Tensor]
    """The same, and the logits become the gradient of each row's loss."""
    matmul: Callable[[Tensor, Tensor, Tensor], None] = _matmul
    """matmul(a, b, out) writes a @ b."""


def _torch_losses(logits: Tensor, labels: Tensor, *options: Any) -> Tensor:
    names = ("ignore_index", "label_smoothing", "z_loss", "softcap")
    return ce.reference(logits, labels, **dict(zip(names, options, strict=True)), reduction="none")


PARTS = {
    "triton": Parts(lambda *args: ce._forward(*args)[0], ce.overwrite),
    "torch": Parts(_torch_losses, ce.overwrite_reference),
}
"""By name, since an operator's arguments cannot be functions; `fastllm.ops` adds its C++ parts."""


def reference(hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk_size: int | None = None,
              **options: Any) -> Tensor:
    """A linear layer, then the cross-entropy: all logits at once."""
    return ce.reference(torch.nn.functional.linear(hidden, weight), labels, **options)


def _blocks(tokens: int, vocab: int, logits: Tensor, chunk_size: int | None) -> tuple[int, int]:
    """Rows of logits to hold, and rows to make, reduce and consume at once.

    On a GPU the two are one: 256 MB of logits, or at least 1024 rows, keep the products efficient.
    A CPU wants the rows it works on in its cache, 256 of them being where its products stop
    gaining, and few additions into the large weight gradient, hence 512 rows or 20 MB held, in
    blocks of one size.
    """
    row = max(1, vocab * logits.element_size())
    if logits.device.type == "cpu":
        held = chunk_size or max(512, (20 << 20) // row)
        if not chunk_size and tokens:
            held = -(-tokens // -(-tokens // held))
        return min(tokens, held), min(held, 256)
    held = chunk_size or max(1024, (256 << 20) // row)
    return min(tokens, held), held


def _gather(total: Tensor, gradient: Tensor, hidden: Tensor, first: bool, parts: Parts) -> None:
    """total (V, H) float32 += gradient.T @ hidden."""
    a = gradient.t()
    if total.is_cuda:
        # cuBLAS adds 16-bit products to a float32 matrix; beta 0 ignores what the memory held.
        torch.addmm(total, a, hidden, out_dtype=total.dtype, beta=0 if first else 1, out=total)
    elif first and total.dtype == a.dtype:
        parts.matmul(a, hidden, total)
    else:
        block = torch.empty(total.shape, dtype=a.dtype, device=a.device)
        parts.matmul(a, hidden, block)
        # A CPU's 16-bit product rounds once a block, the sum over blocks stays in float32.
        total.copy_(block) if first else total.add_(block)


def _loop(hidden: Tensor, weight: Tensor, labels: Tensor, upstream: Tensor | None, options: Options,
          chunk_size: int | None, parts: Parts, gradients: tuple[bool, bool]) -> tuple[Tensor, ...]:
    """Losses (T,), and where wanted d/dhidden (T, H) and d/dweight (V, H) float32, of their sum
    weighted by upstream (T,)."""
    (tokens, width), vocab = hidden.shape, weight.shape[0]
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    losses = hidden.new_empty((tokens,), dtype=wide)
    dhidden = hidden.new_empty((tokens, width) if gradients[0] else (0,))
    dweight = hidden.new_empty((vocab, width) if gradients[1] else (0,), dtype=wide)
    if not tokens:
        return losses, dhidden, dweight.zero_()
    held, tile = _blocks(tokens, vocab, hidden, chunk_size)
    buffer = hidden.new_empty((held, vocab))
    transposed = weight.t()
    for start in range(0, tokens, held):
        stop = min(start + held, tokens)
        for row in range(start, stop, tile):
            rows = slice(row, min(row + tile, stop))
            logits = buffer[row - start: rows.stop - start]
            parts.matmul(hidden[rows], transposed, logits)
            if not any(gradients):
                losses[rows] = parts.losses(logits, labels[rows], *options)
                continue
            losses[rows] = parts.overwrite(logits, labels[rows], *options)
            if upstream is not None:
                logits *= upstream[rows, None]  # in float32, then rounded to the logits' type
            if gradients[0]:
                parts.matmul(logits, weight, dhidden[rows])
        if gradients[1]:
            _gather(dweight, buffer[: stop - start], hidden[start:stop], start == 0, parts)
    return losses, dhidden, dweight


@torch.library.custom_op("fastllm::linear_cross_entropy_sum", mutates_args=())
def _sum(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, label_smoothing: float,
         z_loss: float, softcap: float | None, chunk_size: int | None, parts: str,
         hidden_gradient: bool, weight_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of the losses, and its gradients where wanted (empty elsewhere)."""
    losses, dhidden, dweight = _loop(
        hidden, weight, labels, None, (ignore_index, label_smoothing, z_loss, softcap), chunk_size,
        PARTS[parts], (hidden_gradient, weight_gradient))
    return losses.sum(), dhidden, dweight


@_sum.register_fake
def _sum_fake(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int,
              label_smoothing: float, z_loss: float, softcap: float | None, chunk_size: int | None,
              parts: str, hidden_gradient: bool, weight_gradient: bool) -> tuple[Tensor, ...]:
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return (hidden.new_empty((), dtype=wide),
            hidden.new_empty(hidden.shape if hidden_gradient else (0,)),
            weight.new_empty(weight.shape if weight_gradient else (0,), dtype=wide))


def _sum_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.dtype = inputs[1].dtype


def _sum_autograd(ctx, upstream: Tensor, *_: Tensor):
    dhidden, dweight = ctx.saved_tensors
    # 0-d times a matrix keeps the matrix's type: the float32 sum is scaled before it is rounded.
    return ((dhidden * upstream) if ctx.needs_input_grad[0] else None,
            (dweight * upstream).to(ctx.dtype) if ctx.needs_input_grad[1] else None, *[None] * 9)


_sum.register_autograd(_sum_autograd, setup_context=_sum_setup)


@torch.library.custom_op("fastllm::linear_cross_entropy", mutates_args=())
def _each(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, label_smoothing: float,
          z_loss: float, softcap: float | None, chunk_size: int | None, parts: str) -> Tensor:
    """Each token's loss (T,)."""
    return _loop(hidden, weight, labels, None, (ignore_index, label_smoothing, z_loss, softcap),
                 chunk_size, PARTS[parts], (False, False))[0]


@_each.register_fake
def _each_fake(hidden: Tensor, *_: Any) -> Tensor:
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return hidden.new_empty(hidden.shape[:1], dtype=wide)


@torch.library.custom_op("fastllm::linear_cross_entropy_backward", mutates_args=())
def _each_backward(upstream: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor,
                   ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None,
                   chunk_size: int | None, parts: str) -> tuple[Tensor, Tensor]:
    """Gradients of hidden and weight for upstream gradients (T,), from logits made again."""
    _, dhidden, dweight = _loop(
        hidden, weight, labels, upstream, (ignore_index, label_smoothing, z_loss, softcap),
        chunk_size, PARTS[parts], (True, True))
    return dhidden, dweight.to(weight.dtype)


@_each_backward.register_fake
def _each_backward_fake(upstream: Tensor, hidden: Tensor, weight: Tensor,
                        *_: Any) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape)


def _each_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _each_autograd(ctx, upstream: Tensor):
    return *_each_backward(upstream, *ctx.saved_tensors, *ctx.options), *[None] * 7


_each.register_autograd(_each_autograd, setup_context=_each_setup)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, *,
                         ignore_index: int = -100, label_smoothing: float = 0.0,
                         z_loss: float = 0.0, softcap: float | None = None, reduction: str = "sum",
                         chunk_size: int | None = None, parts: str = "triton") -> Tensor:
    """Cross-entropy of hidden (T, H) @ weight (V, H).T against labels (T,) int64, in float32.

    reduction as in `cross_entropy`. chunk_size: rows of logits held at once (default: by memory and
    device). parts: which of PARTS the loop over blocks uses.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or (
            labels.shape != hidden.shape[:1] or labels.dtype != torch.int64):
        raise ValueError(f"linear_cross_entropy: hidden {tuple(hidden.shape)}, weight "
                         f"{tuple(weight.shape)} and labels {tuple(labels.shape)} {labels.dtype} "
                         "must be (T, H), (V, H) and (T,) int64")
    if hidden.dtype != weight.dtype:
        raise TypeError(f"linear_cross_entropy: hidden is {hidden.dtype}, weight {weight.dtype}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"linear_cross_entropy: chunk_size {chunk_size} is not positive")
    ce.check_options(label_smoothing, softcap)
    options = (ignore_index, label_smoothing, z_loss, softcap, chunk_size, parts)
    if reduction == "none":
        return _each(hidden, weight, labels, *options)
    due = torch.is_grad_enabled()
    total = _sum(hidden, weight, labels, *options, due and hidden.requires_grad,
                 due and weight.requires_grad)[0]
    # The one sum stands for the tokens' losses: reduce() divides it where a mean is asked.
    return ce.reduce(total, labels, reduction, ignore_index)


def inputs(shape: Shape, dtype: torch.dtype, device, generator, *, ignored: float = 0.2,
           **options: Any) -> Call:
    tokens, width, vocab = shape
    hidden = normal((tokens, width), dtype, device, generator)
    weight = normal((vocab, width), dtype, device, generator, scale=width**-0.5)
    labels = torch.randint(vocab, (tokens,), generator=generator, device=device)
    drawn = torch.rand((tokens,), generator=generator, device=device)
    return Call((hidden, weight, labels.masked_fill(drawn < ignored, -100)), options)


def floor_bytes(shape: Shape, dtype: torch.dtype, direction: Direction, **_: Any) -> int:
    tokens, width, vocab = shape
    both = (tokens + vocab) * width * dtype.itemsize
    return both if direction == "forward" else 2 * both


def floor_flops(shape: Shape, dtype: torch.dtype, direction: Direction, **_: Any) -> int:
    return (2 if direction == "forward" else 4) * shape[0] * shape[1] * shape[2]


KERNEL = Kernel(
    name="linear_cross_entropy", public=linear_cross_entropy, reference=reference, inputs=inputs,
    axes=("tokens", "hidden_size", "vocab_size"), composition=True,
    test_shapes=((1, 1, 1), (5, 16, 33), (13, 24, 100)),
    empty_shapes=((0, 4, 8),),
    bench_shapes=((2720, 512, 6400), (8192, 4096, 128256)),
    audit_shapes=((2, 512, 6400),),
    variants={
        "chunks": {"chunk_size": 3}, "mean": {"reduction": "mean", "chunk_size": 4},
        "none": {"reduction": "none", "chunk_size": 4}, "all ignored": {"ignored": 2.0},
        "all ignored, mean": {"ignored": 2.0, "reduction": "mean"},
        "every option": {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 5.0, "chunk_size": 2},
    },
    overflow_shape=(2, 8, 5),
    floor_bytes=floor_bytes, floor_flops=floor_flops,
)
