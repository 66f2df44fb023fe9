"""Which implementation runs attention on CUDA tensors: the one that is fastest for the shape.

The first call of a kind times those that can take it, on random tensors of its shape, forward and,
where a gradient is needed, backward; what was chosen is kept for this machine (`_memory`) and
serves every call of that kind, here and in later processes. Kinds: type, numbers of heads, width,
options, and batch and lengths up to the next power of two, single queries of decoding included: a
cache that grows to 4,096 tokens is measured twelve times.

Nothing is timed at import, while torch.compile or export traces, under fake tensors or any other
dispatch mode, nor while a CUDA graph is captured: what is remembered serves there, or ours.
The random tensors come from a generator of their own and no generator moves; they are freed at
once, but the device's peak of memory may rise by what one more call of the shape takes. Where that
does not fit, ours runs, in this process for good, and nothing is kept.

Training is bitwise repeatable by default: `deterministic` leaves out whoever's backward is not, and
what was chosen is kept. Ours is left only for one that is clearly faster, so that a file that is
lost or cannot be written does not change the choice by chance; with flash-attn 3 installed it could
at worst. Every process, and so every rank, chooses for itself. `set_backend("attention", "triton")`
is ours, unmeasured.
"""

import functools
import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from fastllm.kernels import attention as _attention
from fastllm.kernels._spec import autocast
from fastllm.ops import _memory
from fastllm.ops._contenders import CONTENDERS, Contender
from fastllm.ops._timing import fastest, line, measure

OPTIONS = frozenset(inspect.signature(_attention.attention).parameters) - {"q", "k", "v"}
PLAIN = (Tensor, torch.nn.Parameter)
MOST = 4096
_used: dict[tuple[str, str], str] = {}
"""By machine and kind, what runs in this process."""
_settled: dict[tuple[Any, ...], Contender] = {}
"""The same by the very call, as finding its kind takes longer than a launch; at most MOST."""


def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    """`ops.attention` by whoever is fastest for this shape."""
    _attention.check(q, k, v, *map(options.get, ("window", "softcap", "scale", "cu_seqlens_q",
                                                 "cu_seqlens_k", "sinks")))
    ours = CONTENDERS[0]
    # Ours alone says what is wrong with a call, and has no sizes that an export would be bound to.
    if q.shape[-1] > _attention.WIDEST or any(name not in OPTIONS for name in options) or (
            torch.compiler.is_exporting()):
        return ours.run(q, k, v, **options)
    q, k, v = autocast(q, k, v)
    needed = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if torch.compiler.is_compiling() or type(q) not in PLAIN:  # sizes that may be symbols
        chosen = _choose(q, k, v, needed, options)[0]
        return (chosen if chosen.traced else ours).run(q, k, v, **options)
    call = (q.device, q.dtype, q.shape, k.shape, needed, *[
        (name, True if isinstance(value, Tensor) else value) for name, value in options.items()])
    settled = _settled.get(call)
    if settled is None:
        settled, for_good = _choose(q, k, v, needed, options)
        if for_good:
            if len(_settled) >= MOST:
                _settled.clear()
            _settled[call] = settled
    try:
        return settled.run(q, k, v, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of the same kind, but not the shape that was timed
        if settled is ours:
            raise
        kind = kind_of(q, k, needed, _able(q, k, v, needed, options), **options)
        warnings.warn(f"attention: {settled.name} failed and triton takes its place for {kind}: "
                      f"{line(error)}", stacklevel=2)
        _keep(str(q.device), kind, {"chosen": ours.name, "out": {settled.name: line(error)}})
        _settled.clear()
        return ours.run(q, k, v, **options)


def _able(q: Tensor, k: Tensor, v: Tensor, differentiated: bool,
          options: dict[str, Any]) -> list[Contender]:
    return [one for one in CONTENDERS
            if not one.lacks(q, k, v, differentiated=differentiated, **options)]


def _choose(q: Tensor, k: Tensor, v: Tensor, differentiated: bool,
            options: dict[str, Any]) -> tuple[Contender, bool]:
    """Who runs a call, and whether that is for good: it is not where nothing may be timed yet."""
    able = _able(q, k, v, differentiated, options)
    if len(able) == 1:
        return able[0], True
    kind = kind_of(q, k, differentiated, able, **options)
    name = known(str(q.device), kind)
    if not name and _may_measure(q):
        name = _measure(able, q, k, v, options, differentiated, kind)
    return next((one for one in able if one.name == name), CONTENDERS[0]), bool(name)


def rounded(n: int) -> int:
    """The next power of two. Compared only, so that a dynamic size gives torch.compile a range."""
    power = 1
    while power < n:
        power *= 2
    return power


def kind_of(q: Tensor, k: Tensor, differentiated: bool, able: Iterable[Contender], *,
            causal: bool = False, window: tuple[int, int] | None = None,
            softcap: float | None = None, cu_seqlens_q: Tensor | None = None,
            max_seqlen_q: int | None = None, sinks: Tensor | None = None,
            return_lse: bool = False, deterministic: bool = True, **_: Any) -> str:
    """What calls must share to share a choice; among whom it is made belongs to it."""
    words = [str(q.dtype)[6:]]
    if cu_seqlens_q is None:
        words.append(f"batch {rounded(q.shape[0])}")
    else:
        words.append("packed" if max_seqlen_q is None else f"packed {rounded(max_seqlen_q)}")
    words.append(f"queries {rounded(q.shape[-3])} keys {rounded(k.shape[-3])} "
                 f"heads {q.shape[-2]}/{k.shape[-2]} width {q.shape[-1]}")
    if window is not None:
        left, right = (n if n < 0 else rounded(n) for n in window)
        words.append(f"window {left} {right}")
    flags = {"causal": causal, "softcap": bool(softcap), "sinks": sinks is not None,
             "lse": return_lse, "gradient": differentiated, "deterministic": deterministic}
    words += [name for name, wanted in flags.items() if wanted]
    return " ".join(words) + ": " + ", ".join([one.name for one in able])


@torch.compiler.assume_constant_result
def known(device: str, kind: str) -> str:
    """The name of what was chosen, here or by an earlier process; empty where nothing was."""
    place = _memory.machine(device)
    if (place, kind) not in _used:
        entry = _memory.recall(place, "choices").get(kind)
        name = entry.get("chosen") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            return ""
        _used[place, kind] = name
    return _used[place, kind]


def _may_measure(q: Tensor) -> bool:
    if torch.compiler.is_compiling() or type(q) not in PLAIN:
        return False
    if _get_current_dispatch_mode() is not None:
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:  # vmap and its like
        return False
    return q.device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def _measure(able: list[Contender], q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any],
             differentiated: bool, kind: str) -> str:
    """Time those who can take the call; the name of the fastest, which is kept."""
    device = str(q.device)
    with ExitStack() as within:
        within.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # torch's, on why a backend refuses: its error is kept
        on_gpu = q.device.type == "cuda"
        within.enter_context(torch.cuda.device_of(q))
        within.enter_context(torch.random.fork_rng([q.device] if on_gpu else []))
        if differentiated:  # what an outer checkpoint counts must not count ours
            within.enter_context(torch.autograd.graph.saved_tensors_hooks(_same, _same))
        else:
            within.enter_context(torch.no_grad())
        try:
            times, out = measure(_calls(able, q, k, v, options, differentiated), q.device)
        except torch.OutOfMemoryError:
            _used[_memory.machine(device), kind] = CONTENDERS[0].name
            return CONTENDERS[0].name
    name = fastest(times, CONTENDERS[0].name)
    _keep(device, kind, {"chosen": name, "out": out, "milliseconds": {
        name: float(f"{taken:.4g}") for name, taken in times.items()}})
    return name


def _calls(able: list[Contender], q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any],
           differentiated: bool) -> dict[str, Callable[[], Any]]:
    """A call of each by name, on tensors made for it."""
    generator = torch.Generator(q.device).manual_seed(0)
    *drawn, upstream = (torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
                        for x in (q, k, v, q))
    given = {name: value.detach().clone() if isinstance(value, Tensor) else value
             for name, value in options.items()}

    def call(run: Callable[..., Any]) -> None:
        inputs = [x.requires_grad_(differentiated) for x in drawn]
        out = run(*inputs, **given)
        if differentiated:
            torch.autograd.grad(out[0] if isinstance(out, tuple) else out, inputs, upstream)

    return {one.name: functools.partial(call, one.run) for one in able}


def _same(x: Tensor) -> Tensor:
    return x


def _keep(device: str, kind: str, entry: Mapping[str, Any]) -> None:
    place = _memory.machine(device)
    _used[place, kind] = entry["chosen"]
    _memory.remember(place, "choices", {kind: dict(entry)})


def summary(device: torch.device) -> str:
    """What was chosen, in words: in this process or, where nothing was yet, before it."""
    place = _memory.machine(str(device))
    names = [name for (where, _), name in _used.items() if where == place]
    if not names:
        names = [str(entry.get("chosen")) for entry in _memory.recall(place, "choices").values()
                 if isinstance(entry, dict)]
    counts = [f"{name} {n}" for name, n in Counter(names).most_common()]
    if not counts:
        return "measured per shape"
    counts[0] += " shape" if counts[0].endswith(" 1") else " shapes"
    return f"measured per shape: {', '.join(counts)}"
