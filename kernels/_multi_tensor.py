"""What optimizer steps share: one launch over many tensors, whatever their number, for any rule.

A rule is what an optimizer does to one element, in float32: a @jit function
    p, s0, s1, s2 = rule(p, g, s0, s1, s2, c0, ..., c7)
of the weight, the gradient times grad_scale, up to three states and eight scalars, and its twin in
plain torch. A state that is not kept reads as zero and costs nothing.
p is the float32 parameter itself, or the float32 master of a 16-bit parameter, which then gets p
rounded to nearest, or, for bfloat16 with stochastic rounding, up or down with the probability that
makes the mean right: bits = (bits(p) + r) >> 16 with 16 random bits r, for finite p. r is the high
half of a hash of (seed, step, global element index), all uint32:
    h = seed ^ (step * 0x9E3779B9)             x = low(index) ^ h ^ (high(index) * 0x85EBCA6B)
    r = mix(mix(x) + h + 0x632BE5AB) >> 16     (mix is lowbias32: see `_triton.mix`)
so the split into tensors, and the order of anything, changes no bit. A non-finite grad_scale
leaves everything untouched; it is read on the device, so nothing waits for the host.
Source of the rounding: Zamirai et al., arXiv:2010.06192.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from fastllm.kernels._spec import compute_dtype
from fastllm.kernels._triton import WORD, addresses, cdiv, jit, mix, mix_reference, require, tl

P = ParamSpec("P")
S = TypeVar("S", bound="Step")
CHUNK = 16384  # elements a program updates
BLOCK = 2048
STATES, SCALARS = 3, 8
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
WIDE = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Rule:
    """What an optimizer does to an element."""

    op: str
    """The public function's name, for messages."""
    device: Any
    """@jit: (p, g, s0, s1, s2, c0, ..., c7) -> (p, s0, s1, s2)."""
    plain: Callable[..., tuple[Tensor, ...]]
    """The same in torch, of the states named below: (p, g, s0, ..., c0, ...) -> (p, s0, ...)."""
    states: tuple[str, ...] = ()
    """The names of the lists of states, for messages."""

    def __post_init__(self) -> None:
        RULES[self.op] = self


RULES: dict[str, Rule] = {}  # by op: an operator takes names and numbers


@dataclass(frozen=True)
class Step:
    """One call of a step function, ready to run."""

    rule: Rule
    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    states: Sequence[Sequence[Tensor] | None]
    """A list for each of the rule's states, None for those that are not kept."""
    masters: Sequence[Tensor | None]
    scalars: Sequence[float]
    step: int
    grad_scale: Tensor
    stochastic_rounding: bool = False
    seed: int = 0
    offsets: Sequence[int] | None = None
    starts: list[int] = field(init=False)
    """Each tensor's first global element index: as given, or as if they lay end to end."""

    def __post_init__(self) -> None:
        self._check_lists()
        for i, param in enumerate(self.params):
            self._check_tensors(i)
            self._check_type(i, param)
        ends = [0]
        for param in self.params:
            ends.append(ends[-1] + param.numel())
        object.__setattr__(self, "starts", ends[:-1] if self.offsets is None
                           else list(self.offsets))

    @property
    def key(self) -> int:
        return key_of(self.seed, self.step)

    def named(self) -> dict[str, Sequence[Tensor]]:
        """The lists of states that are kept, by name."""
        return {name: given for name, given in zip(self.rule.states, self.states, strict=True)
                if given is not None}

    def types(self, name: str, i: int) -> tuple[torch.dtype, ...]:
        """The types that a state or a master may have."""
        return WIDE

    def read(self, slot: int, i: int) -> Any:
        """A state in plain torch."""
        given = self.states[slot]
        return 0.0 if given is None else given[i]

    def store(self, slot: int, i: int, value: Tensor) -> None:
        """A state's new value in plain torch."""
        given = self.states[slot]
        if given is not None:
            given[i].copy_(value)

    def _check_lists(self) -> None:
        op, scale = self.rule.op, self.grad_scale
        lists: dict[str, Sequence[Any]] = {"grads": self.grads, **self.named(),
                                           "masters": self.masters}
        if self.offsets is not None:
            lists["offsets"] = self.offsets
        for name, given in lists.items():
            if len(given) != len(self.params):
                raise ValueError(f"{op}: {len(self.params)} params but {len(given)} {name}")
        if self.step < 1:
            raise ValueError(f"{op}: step {self.step} is not a count of updates, from 1")
        if scale.numel() != 1 or not scale.is_floating_point():
            raise ValueError(f"{op}: grad_scale must be one floating-point number in a tensor, "
                             f"not {tuple(scale.shape)} {scale.dtype}")

    def _check_tensors(self, i: int) -> None:
        op, param = self.rule.op, self.params[i]
        wide = {name: given[i] for name, given in self.named().items()}
        for name, tensor in {"params": param, "grads": self.grads[i], **wide,
                             "masters": self.masters[i]}.items():
            if tensor is None:
                continue
            if tensor.shape != param.shape or not (name == "grads" or tensor.is_contiguous()):
                raise ValueError(f"{op}: {name}[{i}] {tuple(tensor.shape)} must be contiguous and "
                                 f"of its parameter's shape {tuple(param.shape)}")
            if name not in ("params", "grads") and tensor.dtype not in self.types(name, i):
                raise ValueError(f"{op}: {name}[{i}] is {tensor.dtype}, not "
                                 f"{str(self.types(name, i)[0])[6:]}")

    def _check_type(self, i: int, param: Tensor) -> None:
        op, master = self.rule.op, self.masters[i]
        stochastic = self.stochastic_rounding and param.dtype == torch.bfloat16
        if master is None and param.dtype not in WIDE and not stochastic:
            raise ValueError(f"{op}: params[{i}] is {param.dtype} and needs a float32 master (or, "
                             "for bfloat16, stochastic_rounding)")
        if master is not None and param.dtype == torch.float32:
            raise ValueError(f"{op}: params[{i}] is float32 and its own master; masters[{i}] must "
                             "be None")
        if self.stochastic_rounding and param.dtype == torch.float16:
            raise ValueError(f"{op}: params[{i}] is float16, but stochastic_rounding is for "
                             "bfloat16")


# ----------------------------------------------------------------------------- in plain torch


def key_of(seed: int, step: int) -> int:
    """What random bits depend on beside the element: h above."""
    return (seed & WORD) ^ ((step * 0x9E3779B9) & WORD)


def random_words(index: Tensor, key: int) -> Tensor:
    """The 32 random bits of each global element index (int64), as int64."""
    x = (index & WORD) ^ key ^ (((index >> 32) * 0x85EBCA6B) & WORD)
    return mix_reference((mix_reference(x) + key + 0x632BE5AB) & WORD)


def round_stochastically(values: Tensor, index: Tensor, key: int) -> Tensor:
    """float32 values as bfloat16; NaN and infinities convert as they always do."""
    bits = values.view(torch.int32).to(torch.int64) & WORD
    rounded = ((bits + (random_words(index, key) >> 16)) >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(values.isfinite(), rounded, values.to(torch.bfloat16))


def write(step: Step, i: int, new: Tensor) -> None:
    """The new weight into the parameter and its master."""
    param, master = step.params[i], step.masters[i]
    if master is not None:
        master.copy_(new)
    if step.stochastic_rounding and param.dtype == torch.bfloat16:
        index = step.starts[i] + torch.arange(param.numel(), device=param.device).view(param.shape)
        new = round_stochastically(new, index, step.key)
    param.copy_(new)


def wide_of(step: Step, i: int) -> tuple[Tensor, Tensor]:
    """The weight and the scaled gradient in the type that the update is computed in."""
    master = step.masters[i]
    weight = step.params[i] if master is None else master
    dtype = compute_dtype(weight)
    return weight.to(dtype), step.grads[i].to(dtype) * step.grad_scale


def run_plain(step: Step) -> None:
    """The step in plain PyTorch, in float32 (float64); it reads grad_scale on the host."""
    if not bool(step.grad_scale.isfinite()):
        return
    for i in range(len(step.params)):
        p, g = wide_of(step, i)
        new, *after = step.rule.plain(p, g, *(step.read(slot, i) for slot in range(
            len(step.states))), *step.scalars)
        for slot, value in enumerate(after):
            step.store(slot, i, value)
        write(step, i, new)


# ------------------------------------------------------------------------------- on the device


@jit
def place(table, owner, tensors, CHUNK: tl.constexpr):
    """(tensor, its element count, the first element) of this program's CHUNK elements."""
    # int64: an element's place in a flat buffer passes 2^31.
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(owner + program)
    count = tl.load(table + tensor)
    return tensor, count, (program - tl.load(table + tensors + tensor)) * CHUNK


@jit
def pointer(table, row: tl.constexpr, tensors, tensor, kind: tl.constexpr, ALIGNED: tl.constexpr):
    """Entry `tensor` of the table's row as a pointer; ALIGNED promises 16 bytes."""
    found = tl.load(table + (row + 2) * tensors + tensor).to(tl.pointer_type(kind))
    if ALIGNED:
        found = tl.multiple_of(found, 16)
    return found


@jit
def random_word(index, key):
    """32 random bits of each global element index."""
    low = (index & 0xFFFFFFFF).to(tl.uint32)
    high = (index >> 32).to(tl.uint32)
    return mix(mix(low ^ key ^ (high * 0x85EBCA6B)) + key + 0x632BE5AB)


@jit
def rounded_stochastically(values, index, key):
    bits = values.to(tl.uint32, bitcast=True)
    random = random_word(index, key) >> 16
    # Adding a multiple of 2^16 below the exponent cannot reach the bits of NaN or infinity from a
    # finite number except by rounding up to infinity, as the largest bfloat16 must.
    rounded = ((bits + random) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    return tl.where(finite, rounded, values.to(tl.bfloat16))


@jit
def write_back(param, master, at, mask, p, index, key, MASTER: tl.constexpr,
               STOCHASTIC: tl.constexpr):
    """The new weight into the parameter and its master."""
    if MASTER:
        tl.store(master + at, p, mask=mask)
    if STOCHASTIC:
        tl.store(param + at, rounded_stochastically(p, index + at, key), mask=mask)
    else:
        tl.store(param + at, p.to(param.dtype.element_ty), mask=mask)


@jit
def _update(param, grad, master, state0, state1, state2, at, count, index, key, scale, c0, c1, c2,
            c3, c4, c5, c6, c7, RULE: tl.constexpr, KEPT: tl.constexpr, MASTER: tl.constexpr,
            STOCHASTIC: tl.constexpr, WHOLE: tl.constexpr):
    """One block of one tensor; WHOLE blocks need no mask, which keeps their accesses wide."""
    mask = None if WHOLE else at < count
    g = tl.load(grad + at, mask=mask).to(tl.float32) * scale
    wide = master if MASTER else param
    p = tl.load(wide + at, mask=mask).to(tl.float32)
    s0 = tl.load(state0 + at, mask=mask) if KEPT & 1 else 0.0
    s1 = tl.load(state1 + at, mask=mask) if KEPT & 2 else 0.0
    s2 = tl.load(state2 + at, mask=mask) if KEPT & 4 else 0.0
    p, s0, s1, s2 = RULE(p, g, s0, s1, s2, c0, c1, c2, c3, c4, c5, c6, c7)
    if KEPT & 1:
        tl.store(state0 + at, s0, mask=mask)
    if KEPT & 2:
        tl.store(state1 + at, s1, mask=mask)
    if KEPT & 4:
        tl.store(state2 + at, s2, mask=mask)
    write_back(param, master, at, mask, p, index, key, MASTER, STOCHASTIC)


@jit
def _kernel(table, owner, grad_scale, tensors, c0, c1, c2, c3, c4, c5, c6, c7, RULE: tl.constexpr,
            KEPT: tl.constexpr, PARAM: tl.constexpr, GRAD: tl.constexpr, MASTER: tl.constexpr,
            STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
            BLOCK: tl.constexpr):
    """One program CHUNK elements of one tensor. KEPT has a bit for each state that there is.

    The table's rows: see `plan`; then parameter, gradient, master, states, global index, hash key.
    """
    scale = tl.load(grad_scale)
    if tl.abs(scale) < float("inf"):  # false for NaN too
        tensor, count, start = place(table, owner, tensors, CHUNK)
        param = pointer(table, 0, tensors, tensor, PARAM, ALIGNED)
        grad = pointer(table, 1, tensors, tensor, GRAD, ALIGNED)
        master = pointer(table, 2, tensors, tensor, tl.float32, ALIGNED)
        state0 = pointer(table, 3, tensors, tensor, tl.float32, ALIGNED)
        state1 = pointer(table, 4, tensors, tensor, tl.float32, ALIGNED)
        state2 = pointer(table, 5, tensors, tensor, tl.float32, ALIGNED)
        index = tl.load(table + 8 * tensors + tensor)
        key = tl.load(table + 9 * tensors + tensor).to(tl.uint32)
        for piece in range(0, CHUNK, BLOCK):
            at = start + piece + tl.arange(0, BLOCK)
            if start + piece + BLOCK <= count:
                _update(param, grad, master, state0, state1, state2, at, count, index, key, scale,
                        c0, c1, c2, c3, c4, c5, c6, c7, RULE, KEPT, MASTER, STOCHASTIC, True)
            elif start + piece < count:
                _update(param, grad, master, state0, state1, state2, at, count, index, key, scale,
                        c0, c1, c2, c3, c4, c5, c6, c7, RULE, KEPT, MASTER, STOCHASTIC, False)


# ------------------------------------------------------------------------------------ launching


def plan(counts: Sequence[int], rows: Sequence[Sequence[int]], device: torch.device,
         chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """A launch's table and each program's tensor, on the device without waiting for it.

    counts: elements of each tensor, none empty; a program takes `chunk` of one. The table, int64
    (2 + rows, tensors), holds the counts, the tensor's first program, and then `rows`: addresses
    (`pointer` numbers them from 0) and what else a program needs to know of its tensor. Raises
    RuntimeError while a CUDA graph is captured: a replay would copy the host's memory of then anew.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("lists of tensors are found by a table of addresses that the host "
                           "writes, which a CUDA graph cannot hold: leave this call out of it")
    programs = [cdiv(count, chunk) for count in counts]
    firsts, owner = [0], []
    for tensor, share in enumerate(programs):
        firsts.append(firsts[-1] + share)
        owner += [tensor] * share
    table = torch.tensor([list(counts), firsts[:-1], *rows], dtype=torch.int64)
    owners = torch.tensor(owner, dtype=torch.int32)
    if device.type == "cuda":
        # Pinned, so that the copies queue behind running kernels rather than wait for them.
        table, owners = table.pin_memory(), owners.pin_memory()
    return table.to(device, non_blocking=True), owners.to(device, non_blocking=True)


@torch.library.custom_op("fastllm::step_", mutates_args={"params", "states", "masters"})
def launch_(rule: str, params: list[Tensor], grads: list[Tensor], states: list[Tensor], kept: int,
            masters: list[Tensor], grad_scale: Tensor, scalars: list[float], stochastic: bool,
            key: int, offsets: list[int]) -> None:
    """One launch for tensors of one type, none empty, all with masters or (an empty list) without.

    states: one after another, each a tensor a parameter, for the bits that `kept` has set.
    """
    require(RULES[rule].op, *params, *grads, grad_scale)
    tensors, device = len(params), params[0].device
    given = iter(range(0, len(states), tensors))
    slots = [states[(at := next(given)):at + tensors] if kept >> i & 1 else params
             for i in range(STATES)]
    rows, aligned = addresses(params, grads, masters or params, *slots)
    table, owner = plan([p.numel() for p in params], [*rows, offsets, [key] * tensors], device)
    padded = [*map(float, scalars), *[0.0] * (SCALARS - len(scalars))]
    with torch.cuda.device_of(params[0]):
        _kernel[(owner.numel(),)](
            table, owner, grad_scale, tensors, *padded, RULE=RULES[rule].device, KEPT=kept,
            PARAM=TYPES[params[0].dtype], GRAD=TYPES[grads[0].dtype], MASTER=bool(masters),
            STOCHASTIC=stochastic, ALIGNED=aligned, CHUNK=CHUNK, BLOCK=BLOCK, num_warps=8)


@launch_.register_fake
def _launch_fake(*args: Any) -> None:
    return None


@dataclass(frozen=True)
class Part:
    """The tensors of a step that one launch can take together, none empty."""

    members: list[int]
    params: list[Tensor]
    grads: list[Tensor]
    states: list[list[Tensor]]
    """Those that are kept."""
    masters: list[Tensor]
    """One a parameter, or none."""
    grad_scale: Tensor
    stochastic: bool
    offsets: list[int]


def parts(step: Step) -> Iterator[Part]:
    """A step by kinds of tensor."""
    found: dict[tuple[Any, ...], list[int]] = {}
    for i, (p, grad, master) in enumerate(zip(step.params, step.grads, step.masters, strict=True)):
        if p.numel():
            states = tuple(given[i].dtype for given in step.named().values())
            kind = (p.device, p.dtype, grad.dtype, master is not None, states)
            found.setdefault(kind, []).append(i)
    for members in found.values():
        params, masters = [step.params[i] for i in members], [step.masters[i] for i in members]
        yield Part(members, params, [step.grads[i].contiguous() for i in members],
                   [[given[i] for i in members] for given in step.named().values()],
                   [master for master in masters if master is not None],
                   step.grad_scale.to(torch.float32),
                   step.stochastic_rounding and params[0].dtype == torch.bfloat16,
                   [step.starts[i] for i in members])


def launch(step: Step, part: Part) -> None:
    bits = sum(1 << i for i, given in enumerate(step.states) if given is not None)
    flat = [state for given in part.states for state in given]
    launch_(step.rule.op, part.params, part.grads, flat, bits, part.masters, part.grad_scale,
            list(step.scalars), part.stochastic, step.key, part.offsets)


def run(step: Step) -> None:
    """The step by the kernel: one launch a kind of tensor."""
    for part in parts(step):
        launch(step, part)


def faces(prepare: Callable[P, S], name: str, kernel: Callable[[S], None] = run,
          plain: Callable[[S], None] = run_plain) -> tuple[Callable[P, None], Callable[P, None]]:
    """(the step function, its reference), of the signature and docstring of `prepare`."""

    def face(execute: Callable[[S], None]) -> Callable[P, None]:
        @functools.wraps(prepare)
        def call(*args: P.args, **kwargs: P.kwargs) -> None:
            with torch.no_grad():
                execute(prepare(*args, **kwargs))

        call.__name__ = call.__qualname__ = name
        call.__annotations__ = {**prepare.__annotations__, "return": None}
        return call

    return face(kernel), face(plain)
