"""AdamW over many tensors in one launch, with unscaling, clipping and the 16-bit write-back in it.

For each element, in float32 (the scalars are worked out in double on the host):
    g = grad * grad_scale                      m = m + (g - m) * (1 - beta1)
    v = v * beta2 + g * g * (1 - beta2)        denom = sqrt(v) / sqrt(1 - beta2^step) + eps
    p = p * (1 - lr * weight_decay) - lr / (1 - beta1^step) * m / denom
p is the float32 parameter itself, or the float32 master of a 16-bit parameter, which then gets p
rounded to nearest, or, for bfloat16 with stochastic_rounding, up or down with the probability that
makes the mean right: bits = (bits(p) + r) >> 16 with 16 random bits r, for finite p. r is the high
half of a hash of (seed, step, global element index), all uint32:
    h = seed ^ (step * 0x9E3779B9)             x = low(index) ^ h ^ (high(index) * 0x85EBCA6B)
    r = mix(mix(x) + h + 0x632BE5AB) >> 16     (mix is lowbias32: see `_triton.mix`)
so the split into tensors, and the order of anything, changes no bit. A non-finite grad_scale
leaves everything untouched; it is read on the device, so nothing waits for the host.
Floor: 28 bytes an element, as 4 + 2 x 12 in float32, or 2 + 2 + 2 x 12 with 16-bit weights.
Sources: Loshchilov and Hutter, arXiv:1711.05101; Zamirai et al., arXiv:2010.06192 (rounding).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastllm.kernels._spec import Call, Direction, Kernel, Shape, compute_dtype, normal
from fastllm.kernels._triton import WORD, jit, mix, mix_reference, require, tl

CHUNK = 16384  # elements a program updates
BLOCK = 2048
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _scalars(lr: float, beta1: float, beta2: float, weight_decay: float,
             step: int) -> tuple[float, float, float]:
    """1 - lr * weight_decay, lr / (1 - beta1^step) and sqrt(1 - beta2^step)."""
    return 1 - lr * weight_decay, lr / (1 - beta1**step), math.sqrt(1 - beta2**step)


def random_bits(index: Tensor, seed: int, step: int) -> Tensor:
    """The 16 random bits of each global element index (int64), as int64."""
    key = (seed & WORD) ^ ((step * 0x9E3779B9) & WORD)
    x = (index & WORD) ^ key ^ (((index >> 32) * 0x85EBCA6B) & WORD)
    return mix_reference((mix_reference(x) + key + 0x632BE5AB) & WORD) >> 16


def round_stochastically(values: Tensor, index: Tensor, seed: int, step: int) -> Tensor:
    """float32 values as bfloat16; NaN and infinities convert as they always do."""
    bits = values.view(torch.int32).to(torch.int64) & WORD
    rounded = ((bits + random_bits(index, seed, step)) >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(values.isfinite(), rounded, values.to(torch.bfloat16))


@torch.no_grad()
def reference(params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor],
              exp_avg_sqs: Sequence[Tensor], masters: Sequence[Tensor | None], *, lr: float,
              beta1: float, beta2: float, eps: float, weight_decay: float, step: int,
              grad_scale: Tensor, stochastic_rounding: bool = False, seed: int = 0,
              offsets: Sequence[int] | None = None) -> None:
    """The same in plain PyTorch (it reads grad_scale on the host)."""
    check(params, grads, exp_avgs, exp_avg_sqs, masters, step, grad_scale, stochastic_rounding,
          offsets)
    if not bool(grad_scale.isfinite()):
        return
    decay, step_size, correction = _scalars(lr, beta1, beta2, weight_decay, step)
    starts = _offsets(params, offsets)
    for p, grad, m, v, master, start in zip(params, grads, exp_avgs, exp_avg_sqs, masters, starts,
                                            strict=True):
        wide = p if master is None else master
        g = grad.to(compute_dtype(wide)) * grad_scale
        m.add_((g - m) * (1 - beta1))
        v.mul_(beta2).add_(g * g * (1 - beta2))
        denom = v.sqrt() / correction + eps
        new = wide.to(g.dtype) * decay - step_size * m / denom
        if master is not None:
            master.copy_(new)
        if stochastic_rounding and p.dtype == torch.bfloat16:
            index = start + torch.arange(p.numel(), device=p.device).view(p.shape)
            new = round_stochastically(new, index, seed, step)
        p.copy_(new)


@jit
def _round_stochastically(values, index, key):
    low = (index & 0xFFFFFFFF).to(tl.uint32)
    high = (index >> 32).to(tl.uint32)
    bits = values.to(tl.uint32, bitcast=True)
    random = mix(mix(low ^ key ^ (high * 0x85EBCA6B)) + key + 0x632BE5AB) >> 16
    # Adding a multiple of 2^16 below the exponent cannot reach the bits of NaN or infinity from a
    # finite number except by rounding up to infinity, as the largest bfloat16 must.
    rounded = ((bits + random) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    return tl.where(finite, rounded, values.to(tl.bfloat16))


@jit
def _update(param, grad, exp_avg, exp_avg_sq, master, at, count, index, key, scale, gain1, beta2,
            gain2, eps, decay, step_size, correction, MASTER: tl.constexpr,
            STOCHASTIC: tl.constexpr, WHOLE: tl.constexpr):
    """One block of one tensor; WHOLE blocks need no mask, which keeps their accesses wide."""
    mask = None if WHOLE else at < count
    g = tl.load(grad + at, mask=mask).to(tl.float32) * scale
    m = tl.load(exp_avg + at, mask=mask)
    v = tl.load(exp_avg_sq + at, mask=mask)
    wide = master if MASTER else param
    p = tl.load(wide + at, mask=mask).to(tl.float32)
    m = m + (g - m) * gain1
    v = v * beta2 + g * g * gain2
    p = p * decay - step_size * m / (tl.sqrt(v) / correction + eps)
    tl.store(exp_avg + at, m, mask=mask)
    tl.store(exp_avg_sq + at, v, mask=mask)
    if MASTER:
        tl.store(master + at, p, mask=mask)
    if STOCHASTIC:
        tl.store(param + at, _round_stochastically(p, index + at, key), mask=mask)
    else:
        tl.store(param + at, p.to(param.dtype.element_ty), mask=mask)


@jit
def _pointer(table, field, tensors, tensor, kind: tl.constexpr, ALIGNED: tl.constexpr):
    """Entry `tensor` of a row of the table as a pointer; ALIGNED promises 16 bytes."""
    pointer = tl.load(table + field * tensors + tensor).to(tl.pointer_type(kind))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@jit
def _kernel(table, owner, grad_scale, tensors, gain1, beta2, gain2, eps, decay, step_size,
            correction, PARAM: tl.constexpr, GRAD: tl.constexpr, MASTER: tl.constexpr,
            STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
            BLOCK: tl.constexpr):
    """One program CHUNK elements of one tensor: `owner` says which, `table` where it lies.

    The table's rows: parameter, gradient, two moments, master, element count, first program,
    first global index, hash key.
    """
    scale = tl.load(grad_scale)
    if tl.abs(scale) < float("inf"):  # false for NaN too
        # int64: an element's place in a flat buffer passes 2^31.
        program = tl.program_id(0).to(tl.int64)
        tensor = tl.load(owner + program)
        param = _pointer(table, 0, tensors, tensor, PARAM, ALIGNED)
        grad = _pointer(table, 1, tensors, tensor, GRAD, ALIGNED)
        exp_avg = _pointer(table, 2, tensors, tensor, tl.float32, ALIGNED)
        exp_avg_sq = _pointer(table, 3, tensors, tensor, tl.float32, ALIGNED)
        master = _pointer(table, 4, tensors, tensor, tl.float32, ALIGNED)
        count = tl.load(table + 5 * tensors + tensor)
        start = (program - tl.load(table + 6 * tensors + tensor)) * CHUNK
        index = tl.load(table + 7 * tensors + tensor)
        key = tl.load(table + 8 * tensors + tensor).to(tl.uint32)
        for piece in range(0, CHUNK, BLOCK):
            at = start + piece + tl.arange(0, BLOCK)
            if start + piece + BLOCK <= count:
                _update(param, grad, exp_avg, exp_avg_sq, master, at, count, index, key, scale,
                        gain1, beta2, gain2, eps, decay, step_size, correction, MASTER,
                        STOCHASTIC, True)
            elif start + piece < count:
                _update(param, grad, exp_avg, exp_avg_sq, master, at, count, index, key, scale,
                        gain1, beta2, gain2, eps, decay, step_size, correction, MASTER,
                        STOCHASTIC, False)


def _tables(columns: list[tuple[int, ...]], device: torch.device) -> tuple[Tensor, Tensor]:
    """The table (9, tensors) and each program's tensor, on the device without waiting for it."""
    table = torch.tensor(columns, dtype=torch.int64).t().contiguous()
    programs = (table[5] + CHUNK - 1) // CHUNK
    table[6] = programs.cumsum(0) - programs
    owner = torch.repeat_interleave(torch.arange(len(columns), dtype=torch.int32), programs)
    if device.type == "cuda":
        # Pinned, so that the copies queue behind running kernels rather than wait for them.
        table, owner = table.pin_memory(), owner.pin_memory()
    return table.to(device, non_blocking=True), owner.to(device, non_blocking=True)


@torch.library.custom_op(
    "fastllm::adamw_", mutates_args={"params", "exp_avgs", "exp_avg_sqs", "masters"})
def _step(params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor],
          exp_avg_sqs: list[Tensor], masters: list[Tensor], grad_scale: Tensor, lr: float,
          beta1: float, beta2: float, eps: float, weight_decay: float, step: int,
          stochastic: bool, seed: int, offsets: list[int]) -> None:
    """One launch for tensors of one type, all with masters or (an empty list) all without."""
    require("adamw_step", *params, *grads, grad_scale)
    tensors = [params, grads, exp_avgs, exp_avg_sqs, masters or exp_avgs]
    key = (seed & WORD) ^ ((step * 0x9E3779B9) & WORD)
    columns = [(*(t.data_ptr() for t in group), group[0].numel(), 0, offset, key)
               for *group, offset in zip(*tensors, offsets, strict=True) if group[0].numel()]
    if not columns:
        return
    aligned = all(address % 16 == 0 for column in columns for address in column[:5])
    decay, step_size, correction = _scalars(lr, beta1, beta2, weight_decay, step)
    table, owner = _tables(columns, params[0].device)
    with torch.cuda.device_of(params[0]):
        _kernel[(owner.numel(),)](
            table, owner, grad_scale, table.shape[1], 1 - beta1, float(beta2), 1 - beta2,
            float(eps), float(decay), float(step_size), correction,
            PARAM=TYPES[params[0].dtype], GRAD=TYPES[grads[0].dtype], MASTER=bool(masters),
            STOCHASTIC=stochastic, ALIGNED=aligned, CHUNK=CHUNK, BLOCK=BLOCK, num_warps=8)


@_step.register_fake
def _step_fake(*args: Any) -> None:
    return None


def _offsets(params: Sequence[Tensor], offsets: Sequence[int] | None) -> list[int]:
    """Each tensor's first global element index: as given, or as if they lay end to end."""
    if offsets is not None:
        return list(offsets)
    ends = [0]
    for param in params:
        ends.append(ends[-1] + param.numel())
    return ends[:-1]


def check(params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor],
          exp_avg_sqs: Sequence[Tensor], masters: Sequence[Tensor | None], step: int,
          grad_scale: Tensor, stochastic_rounding: bool, offsets: Sequence[int] | None) -> None:
    """Raise ValueError, naming the tensor, for lists that cannot be updated as asked."""
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "masters": masters}
    if offsets is not None:
        lists["offsets"] = offsets  # type: ignore[assignment]
    for name, given in lists.items():
        if len(given) != len(params):
            raise ValueError(f"adamw_step: {len(params)} params but {len(given)} {name}")
    if step < 1:
        raise ValueError(f"adamw_step: step {step} is not a count of updates, from 1")
    if grad_scale.numel() != 1 or not grad_scale.is_floating_point():
        raise ValueError("adamw_step: grad_scale must be one floating-point number in a tensor, "
                         f"not {tuple(grad_scale.shape)} {grad_scale.dtype}")
    for i, p in enumerate(params):
        master, wide = masters[i], (torch.float32, torch.float64)
        for name, tensor in (("params", p), ("grads", grads[i]), ("exp_avgs", exp_avgs[i]),
                             ("exp_avg_sqs", exp_avg_sqs[i]), ("masters", master)):
            if tensor is None:
                continue
            if tensor.shape != p.shape or not (name == "grads" or tensor.is_contiguous()):
                raise ValueError(f"adamw_step: {name}[{i}] {tuple(tensor.shape)} must be "
                                 f"contiguous and of its parameter's shape {tuple(p.shape)}")
            if name not in ("params", "grads") and tensor.dtype not in wide:
                raise ValueError(f"adamw_step: {name}[{i}] is {tensor.dtype}, not float32")
        if master is None and p.dtype not in wide and not (
                stochastic_rounding and p.dtype == torch.bfloat16):
            raise ValueError(f"adamw_step: params[{i}] is {p.dtype} and needs a float32 master "
                             "(or, for bfloat16, stochastic_rounding)")
        if master is not None and p.dtype == torch.float32:
            raise ValueError(f"adamw_step: params[{i}] is float32 and its own master; masters[{i}] "
                             "must be None")
        if stochastic_rounding and p.dtype == torch.float16:
            raise ValueError(f"adamw_step: params[{i}] is float16, but stochastic_rounding is for "
                             "bfloat16")


@torch.no_grad()
def adamw_step(params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor],
               exp_avg_sqs: Sequence[Tensor], masters: Sequence[Tensor | None], *, lr: float,
               beta1: float, beta2: float, eps: float, weight_decay: float, step: int,
               grad_scale: Tensor, stochastic_rounding: bool = False, seed: int = 0,
               offsets: Sequence[int] | None = None) -> None:
    """Update params, exp_avgs, exp_avg_sqs and masters in place; one launch a kind of tensor.

    params: float32 (masters[i] None: its own master), or bfloat16 / float16 with a float32 master,
    or bfloat16 alone with stochastic_rounding. grads: any of the three types. step counts from 1.
    grad_scale: one float32 number that multiplies every gradient. offsets: each tensor's first
    index among all elements of the model, for the random bits (default: end to end, in order).
    stochastic_rounding applies to bfloat16 params, with a master or without.
    """
    check(params, grads, exp_avgs, exp_avg_sqs, masters, step, grad_scale, stochastic_rounding,
          offsets)
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, (p, grad, master) in enumerate(zip(params, grads, masters, strict=True)):
        groups.setdefault((p.device, p.dtype, grad.dtype, master is not None), []).append(i)
    starts = _offsets(params, offsets)
    for (_, dtype, _, mastered), members in groups.items():
        _step([params[i] for i in members], [grads[i].contiguous() for i in members],
              [exp_avgs[i] for i in members], [exp_avg_sqs[i] for i in members],
              [master for i in members if (master := masters[i]) is not None] if mastered else [],
              grad_scale.to(torch.float32), lr, beta1, beta2, eps, weight_decay, step,
              stochastic_rounding and dtype == torch.bfloat16, seed, [starts[i] for i in members])


def inputs(shape: Shape, dtype: torch.dtype, device, generator, *, masters: bool = True,
           grad_dtype=None, stochastic: bool = False, offset: int = 0, bad_scale: bool = False,
           **options: Any) -> Call:
    tensors, numel = shape
    sizes = [(max(numel - i, 0),) for i in range(tensors)]
    # Float32 is its own master, and float16 has no stochastic rounding: there the option is moot.
    mastered = dtype == torch.float16 or (masters and dtype == torch.bfloat16)

    def draw(kind: torch.dtype, scale: float = 1.0) -> list[Tensor]:
        return [normal(size, kind, device, generator, grad=False, scale=scale) for size in sizes]

    wide = draw(torch.float32)
    params = [w.to(dtype) for w in wide]
    grads, m = draw(grad_dtype or dtype, 8.0), draw(torch.float32, 0.1)
    v = [x.square() for x in draw(torch.float32, 0.1)]
    scale = torch.full((), float("nan") if bad_scale else 0.125, device=device)
    scalars = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "step": 3,
               "grad_scale": scale, **options}
    if stochastic:
        scalars["stochastic_rounding"] = dtype == torch.bfloat16
        scalars["offsets"] = [offset + i * numel for i in range(tensors)]
    return Call((params, grads, m, v, wide if mastered else [None] * tensors), scalars)


def floor_bytes(shape: Shape, dtype: torch.dtype, direction: Direction, **_: Any) -> int:
    elements = sum(max(shape[1] - i, 0) for i in range(shape[0]))
    return 28 * elements if direction == "forward" else 0


def floor_flops(shape: Shape, dtype: torch.dtype, direction: Direction, **_: Any) -> int:
    return 14 * sum(max(shape[1] - i, 0) for i in range(shape[0])) if direction == "forward" else 0


KERNEL = Kernel(
    name="adamw", public=adamw_step, reference=reference, inputs=inputs,
    axes=("tensors", "elements"), mutates=True,
    test_shapes=((1, 1), (3, 1000), (2, 20001)),
    empty_shapes=((0, 8), (2, 1)),
    bench_shapes=((16, 4 << 20), (8, 64 << 20)),
    audit_shapes=((2, 1 << 16),),
    variants={"fp32 gradients": {"grad_dtype": torch.float32},
              "first step": {"step": 1}, "no decay": {"weight_decay": 0.0},
              "not finite": {"bad_scale": True},
              "stochastic": {"stochastic": True, "seed": 7, "offset": (1 << 33) + 5},
              "stochastic, no masters": {"stochastic": True, "masters": False}},
    floor_bytes=floor_bytes, floor_flops=floor_flops,
)
