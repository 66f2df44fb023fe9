"""Log-probabilities and entropies of hidden @ weight.T + bias, a chunk of tokens at a time.

hidden (T, H), weight (V, H), bias (V,) of one type, labels (T,); results as in `logprobs`. The
logits are rounded to that type, as a linear layer rounds them, and are never all in memory: a chunk
of them is made and read once, and only each token's statistics stay. The backward, where every
token has upstream gradients of its own, makes the chunk again, overwrites it with its gradient and
multiplies that by weight and hidden. The weight's gradient is gathered in float32.
Floor: 2THV FLOPs forward, 4THV backward (which does 6THV, as the logits are not kept); e(TH + VH)
bytes in, as much out. Each chunk reads weight anew.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastllm.kernels import _chunks as chunks
from fastllm.kernels import logprobs as lp
from fastllm.kernels._spec import Call, Direction, Kernel, Shape, autocast, normal
from fastllm.kernels._triton import cdiv

Options = tuple[float, float | None, int]
"""temperature, softcap, ignore_index."""


def reference(hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None,
              chunk_size: int | None = None, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
    """A linear layer, then the log-probabilities: all logits at once."""
    return lp.reference(torch.nn.functional.linear(hidden, weight, bias), labels, **options)


def plain(hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None,
          temperature: float = 1.0, softcap: float | None = None, ignore_index: int = -100,
          return_entropy: bool = False,
          chunk_size: int | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """In plain PyTorch, on any device: chunks of the reference, made again in the backward."""
    held, _ = chunks.rows(*hidden.shape, weight.shape[0], hidden.element_size(),
                          chunk_size=chunk_size, cached=hidden.device.type == "cpu")

    def part(hidden: Tensor, labels: Tensor) -> Any:
        return reference(hidden, weight, labels, bias=bias, temperature=temperature,
                         softcap=softcap, ignore_index=ignore_index, return_entropy=return_entropy)

    if hidden.shape[0] <= held:
        return part(hidden, labels)
    parts = [checkpoint(part, hidden[rows], labels[rows], use_reentrant=False,
                        preserve_rng_state=False) for rows in chunks.spans(hidden.shape[0], held)]
    if not return_entropy:
        return torch.cat(parts)
    logp, entropy = map(torch.cat, zip(*parts, strict=True))
    return logp, entropy


def _held(hidden: Tensor, weight: Tensor, chunk_size: int | None) -> int:
    return chunks.rows(*hidden.shape, weight.shape[0], hidden.element_size(),
                       chunk_size=chunk_size)[0]


@torch.library.custom_op("fastllm::linear_logprobs", mutates_args=())
def _forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor,
             temperature: float, softcap: float | None, ignore_index: int, return_entropy: bool,
             chunk_size: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """logp, entropy (or empty) and statistics, as `logprobs` has them."""
    logp, entropy, stats = lp.empty(hidden, return_entropy)
    held = _held(hidden, weight, chunk_size)
    buffer = hidden.new_empty((held, weight.shape[0]))
    for rows in chunks.spans(hidden.shape[0], held):
        logits = buffer[: rows.stop - rows.start]
        chunks.linear(hidden[rows], weight, bias, logits)
        lp.measure(logits, labels[rows], logp[rows], entropy[rows], stats[rows], temperature,
                   softcap, ignore_index)
    return logp, entropy, stats


@_forward.register_fake
def _forward_fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor,
                  temperature: float, softcap: float | None, ignore_index: int,
                  return_entropy: bool, chunk_size: int | None) -> tuple[Tensor, Tensor, Tensor]:
    return lp.empty(hidden, return_entropy)


@torch.library.custom_op("fastllm::linear_logprobs_backward", mutates_args=())
def _backward(dlogp: Tensor, dentropy: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None,
              labels: Tensor, entropy: Tensor, stats: Tensor, temperature: float,
              softcap: float | None, ignore_index: int, chunk_size: int | None, for_hidden: bool,
              for_weight: bool, for_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; empty where they are not wanted."""
    held = _held(hidden, weight, chunk_size)
    dhidden = hidden.new_empty(hidden.shape if for_hidden else (0,))
    dbias = weight.new_zeros(weight.shape[:1] if for_bias else (0,), dtype=torch.float32)
    dweight = chunks.Sum(weight.shape, weight, cdiv(hidden.shape[0], held)) if for_weight else None
    buffer = hidden.new_empty((held, weight.shape[0]))
    for rows in chunks.spans(hidden.shape[0], held):
        logits = buffer[: rows.stop - rows.start]
        chunks.linear(hidden[rows], weight, bias, logits)
        lp.differentiate(logits, labels[rows], entropy[rows], stats[rows], dlogp[rows],
                         dentropy[rows], logits, temperature, softcap, ignore_index)
        if for_hidden:
            chunks.product(logits, weight, dhidden[rows])
        if dweight:
            dweight.add(logits.t(), hidden[rows])
        if for_bias:
            dbias += logits.sum(0, dtype=torch.float32)
    return (dhidden, dweight.result() if dweight else weight.new_empty((0,)),
            dbias.to(weight.dtype))


@_backward.register_fake
def _backward_fake(dlogp: Tensor, dentropy: Tensor, hidden: Tensor, weight: Tensor,
                   *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    for_hidden, for_weight, for_bias = rest[-3:]
    return (hidden.new_empty(hidden.shape if for_hidden else (0,)),
            weight.new_empty(weight.shape if for_weight else (0,)),
            weight.new_empty(weight.shape[:1] if for_bias else (0,)))


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:4], *output[1:])
    ctx.options = (*inputs[4:7], inputs[8])


def _autograd(ctx, dlogp: Tensor, dentropy: Tensor, _: Tensor):
    wanted = ctx.needs_input_grad[:3]
    made = _backward(dlogp, dentropy, *ctx.saved_tensors, *ctx.options, *wanted)
    return *(each if due else None for each, due in zip(made, wanted, strict=True)), *[None] * 6


_forward.register_autograd(_autograd, setup_context=_setup)


def linear_logprobs(hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None,
                    temperature: float = 1.0, softcap: float | None = None,
                    ignore_index: int = -100, return_entropy: bool = False,
                    chunk_size: int | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability (T,) float32 of each label under softmax(hidden @ weight.T + bias).

    hidden (T, H), weight (V, H), bias (V,) or None, labels (T,) int64; the options and the entropy
    are those of `logprobs`. The logits are never all in memory. Frozen arguments cost nothing.
    chunk_size: tokens whose logits are held at once (default: by cost and memory).
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or (
            labels.shape != hidden.shape[:1] or labels.dtype != torch.int64):
        raise ValueError(f"linear_logprobs: hidden {tuple(hidden.shape)}, weight "
                         f"{tuple(weight.shape)} and labels {tuple(labels.shape)} {labels.dtype} "
                         "must be (T, H), (V, H) and (T,) int64")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear_logprobs: bias {tuple(bias.shape)} is not ({weight.shape[0]},)")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"linear_logprobs: chunk_size {chunk_size} is not positive")
    lp.check_options("linear_logprobs", temperature, softcap)
    hidden, weight = autocast(hidden, weight)
    bias = None if bias is None else autocast(bias)[0]
    if hidden.dtype != weight.dtype or (bias is not None and bias.dtype != weight.dtype):
        raise TypeError(f"linear_logprobs: hidden is {hidden.dtype}, weight {weight.dtype}"
                        + ("" if bias is None else f", bias {bias.dtype}") + "; make them one")
    logp, entropy, _ = _forward(hidden, weight, bias, labels, temperature, softcap, ignore_index,
                                return_entropy, chunk_size)
    return (logp, entropy) if return_entropy else logp


def inputs(shape: Shape, dtype: torch.dtype, device, generator, *, ignored: float = 0.2,
           biased: bool = False, **options: Any) -> Call:
    tokens, width, vocab = shape
    hidden = normal((tokens, width), dtype, device, generator)
    weight = normal((vocab, width), dtype, device, generator, scale=2 * width**-0.5)
    if biased:
        options["bias"] = normal((vocab,), dtype, device, generator)
    labels = torch.randint(vocab, (tokens,), generator=generator, device=device)
    drawn = torch.rand((tokens,), generator=generator, device=device)
    return Call((hidden, weight, labels.masked_fill(drawn < ignored, -100)), options)


def floor_bytes(shape: Shape, dtype: torch.dtype, direction: Direction, **_: Any) -> int:
    tokens, width, vocab = shape
    both = (tokens + vocab) * width * dtype.itemsize
    return (both if direction == "forward" else 2 * both) + 12 * tokens


def floor_flops(shape: Shape, dtype: torch.dtype, direction: Direction, **_: Any) -> int:
    return (2 if direction == "forward" else 4) * shape[0] * shape[1] * shape[2]


KERNEL = Kernel(
    name="linear_logprobs", public=linear_logprobs, reference=reference, inputs=inputs,
    axes=("tokens", "hidden_size", "vocab_size"), composition=True, bound="flops",
    test_shapes=((1, 1, 1), (5, 16, 33), (13, 24, 100)),
    empty_shapes=((0, 4, 8),),
    bench_shapes=((65536, 2048, 151936), (8192, 4096, 128256)),
    audit_shapes=((2, 512, 6400),),
    traffic_shapes=((64, 32, 256), (256, 32, 256)),
    variants={
        "chunks": {"chunk_size": 3}, "entropy": {"return_entropy": True, "chunk_size": 4},
        "bias": {"biased": True, "chunk_size": 4}, "all ignored": {"ignored": 2.0},
        "every option": {"biased": True, "return_entropy": True, "temperature": 0.8,
                         "softcap": 5.0, "chunk_size": 2},
    },
    overflow_shape=(3, 8, 5),
    floor_bytes=floor_bytes, floor_flops=floor_flops,
)
