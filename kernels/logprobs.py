"""Log-probability of each token's label under logits (T, V), and the distribution's entropy.

With z = logits / temperature, or softcap * tanh(logits / softcap) / temperature where a softcap is
given, and p = softmax(z), a token's results in float32 are
    logp = z[label] - log sum exp z        entropy = -sum p log p
and for their upstream gradients a and h
    dz_j = a (1[j = label] - p_j) - h p_j (log p_j + entropy)
A token labelled ignore_index has results 0 and gradient exactly 0, whatever its logits hold, and
they are not read. A label that is neither ignore_index nor in [0, V) is never used as an index: its
token's results and gradient are NaN, so that a finite check catches it without a host sync.
Floor, e bytes an element: forward eTV (one read, rows of any length), backward 2eTV.
`linear_logprobs` makes the logits from hidden states a chunk at a time and makes them again in the
backward: 2THV + 6THV FLOPs, of which 6THV are the floor, and (T,) statistics kept.
Sources: Milakov and Gimelshein, arXiv:1805.02867 (online softmax); Shao et al., arXiv:2402.03300
(GRPO, which wants both results of every sampled token).
"""

from typing import Any

import torch
from torch import Tensor

from fastllm.kernels._softmax import LN2, fold, level, load_rows, scales, tiling, weigh
from fastllm.kernels._spec import Call, Direction, Kernel, Shape, compute_dtype, normal
from fastllm.kernels._triton import cdiv, jit, require, rows_of, tanh, tl


def reference(logits: Tensor, labels: Tensor, *, temperature: float = 1.0,
              softcap: float | None = None, ignore_index: int = -100, return_entropy: bool = False,
              inplace: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """The same in plain PyTorch; `inplace` is a permission that it does not use."""
    vocab = logits.shape[-1]
    ignored = labels == ignore_index
    bad = ~ignored & ((labels < 0) | (labels >= vocab))
    # Filled first: a NaN in an ignored row would come back as NaN times zero in the backward.
    wide = logits.masked_fill(ignored[:, None], 0.0).to(compute_dtype(logits))
    if softcap:
        wide = softcap * torch.tanh(wide / softcap)
    # A product carries the poison of a bad label into the gradient too.
    poison = torch.ones_like(labels, dtype=wide.dtype).masked_fill(bad, float("nan"))
    every = torch.log_softmax(wide / temperature, -1) * poison[:, None]
    index = labels.masked_fill(ignored | bad, 0)[:, None]
    logp = every.gather(-1, index)[:, 0].masked_fill(ignored, 0.0)
    if not return_entropy:
        return logp
    p = every.exp()
    entropy = -(p * every.masked_fill(p == 0, 0.0)).sum(-1)
    return logp, entropy.masked_fill(ignored, 0.0)


@jit
def _forward_kernel(logits, labels, logp, entropy, stats, stride, label_stride, tokens, vocab,
                    ignore_index, scale, softcap, ln2, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr,
                    ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """One program ROWS tokens, whose rows are read once, BLOCK columns at a time."""
    # int64: row * stride passes 2^31 at 16,384 tokens of a 131,072-word vocabulary.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    within = row < tokens
    label = tl.load(labels + row * label_stride, mask=within, other=ignore_index)
    kept = label != ignore_index
    valid = kept & (label >= 0) & (label < vocab)
    source = logits + row * stride
    peak = tl.full((ROWS,), -float("inf"), tl.float32)
    # Sums stay apart by lane to the end: a reduction over the warps costs more than an addition.
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    moment = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, vocab, BLOCK):
        values = load_rows(source, start + tl.arange(0, BLOCK), kept, vocab, softcap, SOFTCAP)
        peak, above, weight, shift = fold(values, peak, scale)
        if ENTROPY:
            moment = (moment + shift * total) * tl.exp2(shift) + weigh(weight, above)
        total = total * tl.exp2(shift) + weight
    total = tl.sum(total, axis=1)
    log_sum = tl.log2(total)
    labelled = tl.load(source + label, mask=valid, other=float("nan")).to(tl.float32)
    if SOFTCAP:
        labelled = tanh(labelled / softcap)
    result = ((labelled - peak) * scale - log_sum) * ln2
    tl.store(logp + row, tl.where(kept, result, 0.0), mask=within)
    tl.store(stats + row * 2, peak, mask=within)
    tl.store(stats + row * 2 + 1, log_sum, mask=within)
    if ENTROPY:
        result = (log_sum - tl.sum(moment, axis=1) / total) * ln2
        result = tl.where(valid, result, float("nan"))
        tl.store(entropy + row, tl.where(kept, result, 0.0), mask=within)


@jit
def _backward_kernel(logits, labels, stats, entropy, dlogp, dentropy, gradient, stride,
                     label_stride, dlogp_stride, dentropy_stride, gradient_stride, tokens, vocab,
                     blocks, ignore_index, scale, softcap, slope, ln2, SOFTCAP: tl.constexpr,
                     ENTROPY: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """One program a tile of ROWS tokens by BLOCK columns; `gradient` may be `logits` itself."""
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks * ROWS + tl.arange(0, ROWS)
    column = program % blocks * BLOCK + tl.arange(0, BLOCK)
    within = row < tokens
    label = tl.load(labels + row * label_stride, mask=within, other=ignore_index)
    kept = label != ignore_index
    peak = tl.load(stats + row * 2, mask=kept, other=0.0)
    log_sum = tl.load(stats + row * 2 + 1, mask=kept, other=0.0)
    values = load_rows(logits + row * stride, column, kept, vocab, softcap, SOFTCAP)
    log_p = level(values, peak, log_sum, scale)
    p = tl.exp2(log_p)
    upstream = tl.load(dlogp + row * dlogp_stride, mask=kept, other=0.0).to(tl.float32)
    upstream = tl.where((label >= 0) & (label < vocab), upstream, float("nan"))[:, None]
    dz = tl.where(column[None, :] == label[:, None], upstream, 0.0) - upstream * p
    if ENTROPY:
        weight = tl.load(dentropy + row * dentropy_stride, mask=kept, other=0.0).to(tl.float32)
        center = tl.load(entropy + row, mask=kept, other=0.0) / ln2
        dz -= (weight * ln2)[:, None] * weigh(p, log_p + center[:, None])
    dz *= slope
    if SOFTCAP:
        dz *= 1.0 - values * values
    dz = tl.where(kept[:, None], dz, 0.0)
    tl.store(gradient + (row * gradient_stride)[:, None] + column[None, :],
             dz.to(gradient.dtype.element_ty), mask=within[:, None] & (column < vocab)[None, :])


def measure(logits: Tensor, labels: Tensor, logp: Tensor, entropy: Tensor, stats: Tensor,
            temperature: float, softcap: float | None, ignore_index: int) -> None:
    """Write logp (T,), entropy (T,) unless it is empty, and the statistics (T, 2)."""
    require("logprobs", logits, labels)
    tokens, vocab = logits.shape
    if not tokens or not vocab:
        logp.zero_()
        entropy.zero_()
        return
    matrix = rows_of(logits)
    rows, block, warps = tiling(vocab)
    with torch.cuda.device_of(logits):
        _forward_kernel[(cdiv(tokens, rows),)](
            matrix, labels, logp, entropy, stats, matrix.stride(0), labels.stride(0), tokens,
            vocab, ignore_index, *scales(temperature, softcap), LN2, SOFTCAP=bool(softcap),
            ENTROPY=entropy.shape[0] > 0, ROWS=rows, BLOCK=block, num_warps=warps)


def differentiate(logits: Tensor, labels: Tensor, entropy: Tensor, stats: Tensor, dlogp: Tensor,
                   dentropy: Tensor, gradient: Tensor, temperature: float, softcap: float | None,
                   ignore_index: int) -> None:
    """Write the logits' gradient into `gradient` (unit column stride), which may be `logits`."""
    tokens, vocab = logits.shape
    if not tokens or not vocab:
        return
    matrix = rows_of(logits)
    rows, block, warps = tiling(vocab)
    blocks = cdiv(vocab, block)
    with torch.cuda.device_of(logits):
        _backward_kernel[(cdiv(tokens, rows) * blocks,)](
            matrix, labels, stats, entropy, dlogp, dentropy, gradient, matrix.stride(0),
            labels.stride(0), dlogp.stride(0), dentropy.stride(0), gradient.stride(0), tokens,
            vocab, blocks, ignore_index, *scales(temperature, softcap), 1.0 / temperature, LN2,
            SOFTCAP=bool(softcap),
            ENTROPY=entropy.shape[0] > 0, ROWS=rows, BLOCK=block, num_warps=warps)


@torch.library.custom_op("fastllm::logprobs", mutates_args=())
def _forward(logits: Tensor, labels: Tensor, temperature: float, softcap: float | None,
             ignore_index: int, return_entropy: bool,
             inplace: bool) -> tuple[Tensor, Tensor, Tensor]:
    """logp (T,), entropy (T,) or empty, statistics (T, 2): peak and log of the sum above it."""
    made = empty(logits, return_entropy)
    measure(logits, labels, *made, temperature, softcap, ignore_index)
    return made


def empty(logits: Tensor, return_entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """logp, entropy and statistics of as many rows, yet to be written."""
    tokens = logits.shape[0]
    return (logits.new_empty((tokens,), dtype=torch.float32),
            logits.new_empty((tokens if return_entropy else 0,), dtype=torch.float32),
            logits.new_empty((tokens, 2), dtype=torch.float32))


@_forward.register_fake
def _forward_fake(logits: Tensor, labels: Tensor, temperature: float, softcap: float | None,
                  ignore_index: int, return_entropy: bool,
                  inplace: bool) -> tuple[Tensor, Tensor, Tensor]:
    return empty(logits, return_entropy)


@torch.library.custom_op("fastllm::logprobs_backward", mutates_args=())
def _backward(logits: Tensor, labels: Tensor, entropy: Tensor, stats: Tensor, dlogp: Tensor,
              dentropy: Tensor, temperature: float, softcap: float | None,
              ignore_index: int) -> Tensor:
    """The logits' gradient, contiguous, for upstream gradients (T,) of any stride."""
    gradient = logits.new_empty(logits.shape)
    differentiate(logits, labels, entropy, stats, dlogp, dentropy, gradient, temperature, softcap,
                   ignore_index)
    return gradient


@_backward.register_fake
def _backward_fake(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


@torch.library.custom_op("fastllm::logprobs_backward_", mutates_args={"logits"})
def overwrite(logits: Tensor, labels: Tensor, entropy: Tensor, stats: Tensor, dlogp: Tensor,
              dentropy: Tensor, temperature: float, softcap: float | None,
              ignore_index: int) -> None:
    """The logits (unit column stride) become their gradient."""
    differentiate(logits, labels, entropy, stats, dlogp, dentropy, logits, temperature, softcap,
                   ignore_index)


@overwrite.register_fake
def _overwrite_fake(logits: Tensor, *_: Any) -> None:
    return None


def _setup(ctx, inputs, output) -> None:
    logits, labels, temperature, softcap, ignore_index, _, inplace = inputs
    ctx.save_for_backward(logits, labels, output[1], output[2])
    ctx.options, ctx.inplace = (temperature, softcap, ignore_index), inplace


def _autograd(ctx, dlogp: Tensor, dentropy: Tensor, _: Tensor):
    logits, *rest = ctx.saved_tensors
    if ctx.inplace and not torch.compiler.is_compiling():  # which reuses memory by itself
        # Detached, the logits share their version counter: whoever else saved them will see.
        logits = logits.detach()
        overwrite(logits, *rest, dlogp, dentropy, *ctx.options)
        return logits, *[None] * 6
    return _backward(logits, *rest, dlogp, dentropy, *ctx.options), *[None] * 6


_forward.register_autograd(_autograd, setup_context=_setup)


def check_options(op: str, temperature: float, softcap: float | None = None) -> None:
    """Raise ValueError where an option makes no sense."""
    if not temperature > 0:
        raise ValueError(f"{op}: temperature {temperature} is not positive")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{op}: softcap {softcap} is not positive (None: no cap)")


def logprobs(logits: Tensor, labels: Tensor, *, temperature: float = 1.0,
             softcap: float | None = None, ignore_index: int = -100, return_entropy: bool = False,
             inplace: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability (T,) float32 of each label (T,) int64 under softmax(logits (T, V)).

    temperature: divides the logits, after softcap * tanh(logits / softcap) where a cap is given.
    return_entropy: also the entropy (T,) of each row's (tempered) distribution. Both are
    differentiable, each token with an upstream gradient of its own. Ignored tokens have 0 for both.
    inplace: the backward writes the gradient over the logits, whose columns must have unit stride;
    anything else that saved them, and a second backward, then raises.
    """
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"logprobs: logits {tuple(logits.shape)} and labels "
                         f"{tuple(labels.shape)} {labels.dtype} must be (T, V) and (T,) int64")
    check_options("logprobs", temperature, softcap)
    if inplace and logits.shape[1] > 1 and logits.stride(1) != 1:
        raise ValueError("logprobs in place: the logits must have unit stride along a row, "
                         f"not {logits.stride()}")
    logp, entropy, _ = _forward(logits, labels, temperature, softcap, ignore_index, return_entropy,
                                inplace)
    return (logp, entropy) if return_entropy else logp


def inputs(shape: Shape, dtype: torch.dtype, device, generator, *, ignored: float = 0.2,
           offset: float = 0.0, scale: float = 3.0, **options: Any) -> Call:
    tokens, vocab = shape
    logits = normal((tokens, vocab), dtype, device, generator, grad=False, scale=scale)
    labels = torch.randint(vocab, (tokens,), generator=generator, device=device)
    drawn = torch.rand((tokens,), generator=generator, device=device)
    labels = labels.masked_fill(drawn < ignored, options.get("ignore_index", -100))
    return Call(((logits + offset).requires_grad_(), labels), options)


def floor_bytes(shape: Shape, dtype: torch.dtype, direction: Direction, *, ignored: float = 0.2,
                return_entropy: bool = False, **_: Any) -> int:
    """Ignored rows are not read, but their gradients are written."""
    tokens, vocab = shape
    read = (1 - min(ignored, 1.0)) * tokens
    columns = read if direction == "forward" else read + tokens
    return round(dtype.itemsize * vocab * columns) + (16 if return_entropy else 12) * tokens


def floor_flops(shape: Shape, dtype: torch.dtype, direction: Direction, *,
                return_entropy: bool = False, **_: Any) -> int:
    each = (4 if direction == "forward" else 5) + (3 if return_entropy else 0)
    return each * shape[0] * shape[1]


KERNEL = Kernel(
    name="logprobs", public=logprobs, reference=reference, inputs=inputs,
    axes=("tokens", "vocab_size"),
    test_shapes=((1, 1), (3, 7), (13, 300), (3, 9001)),
    empty_shapes=((0, 8),),
    bench_shapes=((65536, 32000), (8192, 131072)),
    audit_shapes=((2, 6400), (2, 32000), (2, 131072)),
    traffic_shapes=((256, 512), (4096, 512)),
    variants={
        "temperature": {"temperature": 0.7}, "softcap": {"softcap": 5.0},
        "ignore index": {"ignore_index": 0}, "all ignored": {"ignored": 2.0},
        "shifted": {"offset": 200.0, "return_entropy": True}, "in place": {"inplace": True},
        "entropy": {"return_entropy": True},
        "every option": {"return_entropy": True, "temperature": 1.3, "softcap": 5.0,
                         "ignore_index": 1, "inplace": True},
    },
    bench_options={"entropy": {"return_entropy": True}},
    overflow_shape=(3, 9),
    floor_bytes=floor_bytes, floor_flops=floor_flops,
)
