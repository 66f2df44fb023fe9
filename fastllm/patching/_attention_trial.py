"""Whether ops.attention, with our masks, is a model's own attention: by forwards of the model."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from fastllm.patching import _check
from fastllm.patching._attention import Function, beyond, fused, running
from fastllm.patching._instance import Replacement, current, method_of, put, take_back
from fastllm.patching._masks import Mask
from fastllm.patching._rope import rotating


def watch(modules: Mapping[str, nn.Module], makers: Mapping[str, tuple[nn.Module, Replacement]],
          run: Callable[[Tensor | None], object], samples: list[Tensor | None]) -> dict[str, str]:
    """Run the model by its own attention, then by ours with our masks, on the same inputs.

    run: a forward with an attention mask (B, S), or None for none. Returns why ours cannot stand
    for theirs, by path, for the modules where that is so.
    """
    whys = dict.fromkeys(modules, "its attention was not reached in a trial run")
    before = {path: current(module) for path, module in modules.items()}
    try:
        for padding in samples:
            results: dict[str, list[tuple[Tensor, Tensor]]] = {path: [] for path in modules}
            _trial(modules, before, partial(_record, results))
            run(padding)
            _trial(modules, before, partial(_compare, results, whys, padding))
            for module, replacement in makers.values():
                put(module, replacement)
            run(padding)
            for module, _ in makers.values():
                take_back(module)
    except Exception as error:
        whys = dict.fromkeys(modules, f"the model could not be run on sample ids: {error}")
    for path, module in modules.items():
        take_back(module)
        if before[path]:
            put(module, Replacement(rotating(type(module).forward), before[path],
                                    method_of(module)))
    for module, _ in makers.values():
        take_back(module)
    return {path: why for path, why in whys.items() if why}


def _trial(modules: Mapping[str, nn.Module], before: Mapping[str, str],
           around: Callable[[str, str, Function], Function]) -> None:
    for path, module in modules.items():
        forward: Any = type(module).forward
        function = running(forward, partial(around, path), bool(before[path]))
        put(module, Replacement(function, "trial", method_of(module)))


def _record(results: dict[str, list[tuple[Tensor, Tensor]]], path: str, kind: str,
            theirs: Function) -> Function:
    """Their function, which notes its result, and that of float32 inputs: eager functions round
    the scores."""
    def function(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any,
                 **options: Any) -> tuple[Tensor, Tensor | None]:
        out = theirs(module, query, key, value, *args, **options)
        wide = (x.float() if x.element_size() < 4 else x for x in (query, key, value))
        exact = theirs(module, *wide, *args, **options)[0]
        results[path].append((out[0], exact.to(out[0].dtype)))
        return out

    return function


def _compare(results: dict[str, list[tuple[Tensor, Tensor]]], whys: dict[str, str],
             padding: Tensor | None, path: str, kind: str, theirs: Function) -> Function:
    """Ours, compared with what theirs gave, which is returned: layers do not add up errors."""
    def function(module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
                 mask: Any = None, **options: Any) -> tuple[Tensor, Tensor | None]:
        out, exact = results[path].pop(0)
        why = beyond(kind, module, query, key, value, mask, options)
        if why and padding is None:
            whys[path] = f"its call has what ops.attention has not: {why}"
        if why:
            return out, None
        try:
            ours = fused(kind, module, query, key, value, mask, options)
            if padding is not None and isinstance(mask, Mask) and mask.padded and (
                    (mask.left, mask.right) != (-1, -1)):
                real = padding.bool()  # what padding sees is nobody's concern
                ours, exact = ours[real], exact[real]
            _check.agree("its output", ours, exact)
            if whys[path].endswith("trial run"):
                whys[path] = ""
        except (_check.Differs, TypeError, ValueError) as error:
            whys[path] = str(error)
        return out, None

    return function
