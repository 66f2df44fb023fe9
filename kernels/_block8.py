"""Adam's moments in 8 bits: a code an element, a float32 scale (largest magnitude) a block of 256.

A block is 256 elements of one tensor, counted from its first; the last may be shorter.
    m:       int8,  m = scale * y |y|,      y = code / 127: sqrt(|m| / scale), to nearest
    sqrt(v): uint8, sqrt(v) = scale * y^2,  y = code / 255: sqrt(sqrt(v) / scale), up or down by the
                                                            low half of the element's random number
Square roots, because what matters is m / sqrt(v): they leave small moments beside large ones more
codes. On the moments of small language models they err less in m / sqrt(v) than the dynamic map of
Dettmers et al. (root mean square 1.1 % and 0.6 % against 1.5 % and 1.0 %), and need no table. v
takes random bits because nearest would lose a change of 1 - beta2 = 0.1 % between codes 1.6 %
apart: its root would drift 4 % up. A v above zero never becomes zero, which would make m / sqrt(v)
explode.
Source of the block-wise scales: Dettmers et al., arXiv:2110.02861.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.kernels import _multi_tensor as multi
from fastllm.kernels._multi_tensor import CHUNK, TYPES, place, pointer, random_word, write_back
from fastllm.kernels._triton import addresses, cdiv, jit, require, tl

SIZE = 256  # elements of a block
BLOCK = 2048
SMALLEST = 1e-37  # a scale below counts as zero: its reciprocal would overflow


def blocks(numel: int) -> int:
    """Scales of a tensor of so many elements."""
    return cdiv(numel, SIZE)


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """The moment that int8 (m) or uint8 (v) codes stand for, in the type of the scales."""
    number = codes.reshape(-1).to(scales.dtype)
    each = scales.repeat_interleave(SIZE)[:number.numel()]
    if codes.dtype == torch.int8:
        return (number * (number.abs() * (each * (1 / 127**2)))).view(codes.shape)
    return (number * (number * (each * (1 / 255**2)))).square().view(codes.shape)


def encode(values: Tensor, codes: Tensor, scales: Tensor, random: Tensor | None = None) -> None:
    """Write codes and scales of m, or of v where its random numbers, 16 bits each, are given."""
    flat = (values if random is None else values.sqrt()).reshape(-1)
    padded = F.pad(flat, (0, scales.numel() * SIZE - flat.numel())).view(-1, SIZE)
    largest = padded.abs().amax(1, keepdim=True)
    scales.copy_(largest.view(-1))
    share = padded.abs() * torch.where(largest > SMALLEST, 1 / largest, 0.0)
    if random is None:
        code = (share.sqrt() * 127 + 0.5).floor().copysign(padded)
    else:
        bits = F.pad(random.reshape(-1).to(flat.dtype), (0, padded.numel() - flat.numel()))
        up = (share.sqrt() * 255 + bits.view(-1, SIZE) * 2.0**-16).floor()
        code = torch.where(share > 0, up.clamp(1, 255), 0.0)
    codes.copy_(code.view(-1)[:flat.numel()].view(codes.shape))


def encoded(values: Sequence[Tensor], kind: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Codes and scales of float32 moments: int8 for m, uint8 for v (rounded down)."""
    codes = [torch.zeros_like(value, dtype=kind) for value in values]
    scales = [value.new_zeros(blocks(value.numel())) for value in values]
    for value, code, scale in zip(values, codes, scales, strict=True):
        encode(value, code, scale, None if kind == torch.int8 else torch.zeros_like(value))
    return codes, scales


@dataclass(frozen=True)
class Step(multi.Step):
    """An Adam step some of whose tensors have their moments in 8 bits: those with scales."""

    scales: Sequence[Sequence[Tensor | None] | None] = (None, None)

    def __post_init__(self) -> None:
        if (self.scales[0] is None) != (self.scales[1] is None):
            raise ValueError(f"{self.rule.op}: exp_avg_scales and exp_avg_sq_scales go together")
        for name, given in zip(("exp_avg_scales", "exp_avg_sq_scales"), self.scales, strict=True):
            for i, param in enumerate(self.params if given is not None else ()):
                self._check_scales(name, given, i, param)
        super().__post_init__()

    def _check_scales(self, name: str, given: Any, i: int, param: Tensor) -> None:
        op = self.rule.op
        if len(given) != len(self.params):
            raise ValueError(f"{op}: {len(self.params)} params but {len(given)} {name}")
        if (given[i] is not None) != self.eight(i):
            raise ValueError(f"{op}: exp_avg_scales[{i}] and exp_avg_sq_scales[{i}] go together")
        if given[i] is not None and (given[i].shape != (blocks(param.numel()),) or given[
                i].dtype not in multi.WIDE or not given[i].is_contiguous()):
            raise ValueError(f"{op}: {name}[{i}] {tuple(given[i].shape)} {given[i].dtype} must be "
                             f"({blocks(param.numel())},) float32: one for {SIZE} elements")

    def eight(self, i: int) -> bool:
        """Whether the tensor's moments are in 8 bits."""
        given = self.scales[0]
        return given is not None and given[i] is not None

    def types(self, name: str, i: int) -> tuple[torch.dtype, ...]:
        if name == "masters" or not self.eight(i):
            return super().types(name, i)
        return (torch.int8,) if name == "exp_avgs" else (torch.uint8,)

    def scales_of(self, slot: int, members: Sequence[int]) -> list[Tensor]:
        given = self.scales[slot] or ()
        found = [given[i] for i in members]
        return [tensor for tensor in found if tensor is not None]

    def read(self, slot: int, i: int) -> Any:
        state = super().read(slot, i)
        return decode(state, *self.scales_of(slot, [i])) if self.eight(i) else state

    def store(self, slot: int, i: int, value: Tensor) -> None:
        if not self.eight(i):
            return super().store(slot, i, value)
        index = self.starts[i] + torch.arange(value.numel(), device=value.device)
        random = multi.random_words(index, self.key) & 0xFFFF if slot else None
        (scales,) = self.scales_of(slot, [i])
        encode(value, super().read(slot, i), scales, random)


@jit
def _update(param, grad, master, exp_avg, exp_avg_sq, scales1, scales2, start, count, index, key,
            scale, c0, c1, c2, c3, c4, c5, c6, RULE: tl.constexpr, MASTER: tl.constexpr,
            STOCHASTIC: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK elements from `start` of one tensor, a row a block of 256."""
    row = start // 256 + tl.arange(0, BLOCK // 256)
    at = start + tl.arange(0, BLOCK // 256)[:, None] * 256 + tl.arange(0, 256)[None, :]
    mask = None if WHOLE else at < count
    rows = None if WHOLE else row * 256 < count
    # Zeros beyond the end: they must not raise the last block's scale.
    none = None if WHOLE else 0.0
    zero = None if WHOLE else 0
    g = tl.load(grad + at, mask=mask, other=none).to(tl.float32) * scale
    wide = master if MASTER else param
    p = tl.load(wide + at, mask=mask, other=none).to(tl.float32)
    m = tl.load(exp_avg + at, mask=mask, other=zero).to(tl.float32)
    v = tl.load(exp_avg_sq + at, mask=mask, other=zero).to(tl.float32)
    m *= tl.abs(m) * (tl.load(scales1 + row, mask=rows, other=none) * (1 / 16129))[:, None]
    v *= v * (tl.load(scales2 + row, mask=rows, other=none) * (1 / 65025))[:, None]
    v *= v
    p, m, v, _ = RULE(p, g, m, v, 0.0, c0, c1, c2, c3, c4, c5, c6, 0.0)
    write_back(param, master, at, mask, p, index, key, MASTER, STOCHASTIC)
    largest = tl.max(tl.abs(m), axis=1)
    tl.store(scales1 + row, largest, mask=rows)
    share = tl.abs(m) * tl.where(largest > 1e-37, 1 / largest, 0.0)[:, None]
    # Casts to integers truncate, which is the floor of what is positive.
    code = (tl.sqrt(share) * 127 + 0.5).to(tl.int32)
    tl.store(exp_avg + at, tl.where(m < 0, -code, code).to(tl.int8), mask=mask)
    root = tl.sqrt(v)
    largest = tl.max(root, axis=1)
    tl.store(scales2 + row, largest, mask=rows)
    share = root * tl.where(largest > 1e-37, 1 / largest, 0.0)[:, None]
    bits = (random_word(index + at, key) & 0xFFFF).to(tl.float32)
    code = tl.minimum(tl.sqrt(share) * 255 + bits * (1 / 65536), 255.0)
    code = tl.where(share > 0, tl.maximum(code, 1.0), 0.0)
    tl.store(exp_avg_sq + at, code.to(tl.uint8), mask=mask)


@jit
def _kernel(table, owner, grad_scale, tensors, c0, c1, c2, c3, c4, c5, c6, RULE: tl.constexpr,
            PARAM: tl.constexpr, GRAD: tl.constexpr, MASTER: tl.constexpr,
            STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
            BLOCK: tl.constexpr):
    """One program CHUNK elements of one tensor, a multiple of 256."""
    scale = tl.load(grad_scale)
    if tl.abs(scale) < float("inf"):  # false for NaN too
        tensor, count, start = place(table, owner, tensors, CHUNK)
        param = pointer(table, 0, tensors, tensor, PARAM, ALIGNED)
        grad = pointer(table, 1, tensors, tensor, GRAD, ALIGNED)
        master = pointer(table, 2, tensors, tensor, tl.float32, ALIGNED)
        exp_avg = pointer(table, 3, tensors, tensor, tl.int8, ALIGNED)
        exp_avg_sq = pointer(table, 4, tensors, tensor, tl.uint8, ALIGNED)
        scales1 = pointer(table, 5, tensors, tensor, tl.float32, ALIGNED)
        scales2 = pointer(table, 6, tensors, tensor, tl.float32, ALIGNED)
        index = tl.load(table + 9 * tensors + tensor)
        key = tl.load(table + 10 * tensors + tensor).to(tl.uint32)
        for piece in range(0, CHUNK, BLOCK):
            if start + piece + BLOCK <= count:
                _update(param, grad, master, exp_avg, exp_avg_sq, scales1, scales2, start + piece,
                        count, index, key, scale, c0, c1, c2, c3, c4, c5, c6, RULE, MASTER,
                        STOCHASTIC, True, BLOCK)
            elif start + piece < count:
                _update(param, grad, master, exp_avg, exp_avg_sq, scales1, scales2, start + piece,
                        count, index, key, scale, c0, c1, c2, c3, c4, c5, c6, RULE, MASTER,
                        STOCHASTIC, False, BLOCK)


@torch.library.custom_op("fastllm::step8_", mutates_args={
    "params", "exp_avgs", "exp_avg_sqs", "exp_avg_scales", "exp_avg_sq_scales", "masters"})
def _launch(rule: str, params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor],
            exp_avg_sqs: list[Tensor], exp_avg_scales: list[Tensor],
            exp_avg_sq_scales: list[Tensor], masters: list[Tensor], grad_scale: Tensor,
            scalars: list[float], stochastic: bool, key: int, offsets: list[int]) -> None:
    """One launch for tensors of one type, none empty, all with masters or all without."""
    require(multi.RULES[rule].op, *params, *grads, grad_scale)
    rows, aligned = addresses(params, grads, masters or params, exp_avgs, exp_avg_sqs,
                              exp_avg_scales, exp_avg_sq_scales)
    table, owner = multi.plan([p.numel() for p in params], [*rows, offsets, [key] * len(params)],
                              params[0].device)
    with torch.cuda.device_of(params[0]):
        _kernel[(owner.numel(),)](
            table, owner, grad_scale, len(params), *map(float, scalars),
            RULE=multi.RULES[rule].device, PARAM=TYPES[params[0].dtype],
            GRAD=TYPES[grads[0].dtype], MASTER=bool(masters), STOCHASTIC=stochastic,
            ALIGNED=aligned, CHUNK=CHUNK, BLOCK=BLOCK, num_warps=8)


@_launch.register_fake
def _launch_fake(*args: Any) -> None:
    return None


def run(step: Step) -> None:
    """The step by the kernels: one launch a kind of tensor."""
    for part in multi.parts(step):
        if not step.eight(part.members[0]):
            multi.launch(step, part)
            continue
        scales = [step.scales_of(slot, part.members) for slot in range(2)]
        _launch(step.rule.op, part.params, part.grads, *part.states, *scales, part.masters,
                part.grad_scale, list(step.scalars), part.stochastic, step.key, part.offsets)
