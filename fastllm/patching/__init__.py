"""patch(model): fastllm's ops inside a model that somebody else built.

Instance by instance: classes, modules and files of other packages stay as they are, and nothing
happens at import. A module is known by what it computes, not by its name: before one is replaced,
it and its replacement run on random input and must agree in value and gradient.
"""

import inspect
from collections.abc import Callable, Collection
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastllm.patching import (
    _activations,
    _attention,
    _attention_trial,
    _check,
    _layers,
    _loss,
    _masks,
    _norms,
    _rope,
)
from fastllm.patching._attention import register
from fastllm.patching._instance import Replacement, current, foreign, put, take_back
from fastllm.patching.report import Replaced, Report, Skipped

__all__ = ["KINDS", "Replaced", "Report", "Skipped", "patch", "register", "unpatch"]

KINDS: dict[str, Callable[[nn.Module], Replacement | str | None]] = {
    "norm": _norms.find, "activation": _activations.find, "rope": _rope.find,
    "attention": _attention.find, "embedding": _layers.find_embedding,
    "dropout": _layers.find_dropout, "loss": _loss.find,
}


Trials = dict[str, tuple[nn.Module, Replacement]]


def patch(model: nn.Module, *, skip: Collection[str] = ()) -> Report:
    """Let the model's modules run fastllm's fused ops; returns what was replaced, and what not.

    model: a transformers model, wrapped by peft or not, or any torch.nn.Module, with its weights
    loaded and before it is compiled, sharded or given to a trainer. skip: kinds to leave alone,
    out of "norm", "activation", "rope", "attention", "embedding", "dropout" and "loss".

    Parameters, classes, hooks and state_dict stay as they are; `unpatch` undoes it. In training
    with labels the logits are made only if something reads `output.logits`. Raises ValueError for
    a kind that there is not.
    """
    if unknown := set(skip) - set(KINDS):
        raise ValueError(f"patch: no kind {min(unknown)!r}; the kinds are {', '.join(KINDS)}")
    report = Report(type(model).__name__)
    todo = []
    for path, module in model.named_modules():
        if by := current(module):
            report.replaced.append(Replaced(path, type(module).__name__, by))
        else:
            todo.append((path, module))
    if why := _check.why_unreadable(model):
        report.skipped.append(Skipped("", type(model).__name__, why))
        return report
    with _still(model):
        trials: dict[str, Trials] = {"rope": {}, "attention": {}, "loss": {}}
        others = []
        for path, module in todo:
            for kind, find in KINDS.items():
                found = None if kind in skip else _find(find, module)
                if isinstance(found, str):
                    report.skipped.append(Skipped(path, type(module).__name__, found))
                    others += [path] if kind == "attention" else []
                elif found is not None and kind in trials:
                    trials[kind][path] = module, found
                elif found is not None:
                    _put(report, path, module, found)
        _try_rope(model, report, trials["rope"])
        _try_attention(model, report, trials["attention"], others)
        _try_loss(model, report, trials["loss"])
    order = {path: i for i, (path, _) in enumerate(model.named_modules())}
    report.replaced.sort(key=lambda entry: order[entry.path])
    report.skipped.sort(key=lambda entry: order[entry.path])
    return report


def unpatch(model: nn.Module) -> int:
    """Give every module of the model its own forward back; returns how many were replaced.

    A forward that somebody wrapped since, as accelerate does for mixed precision, stays: unwrap
    the model first.
    """
    return sum(take_back(module) for module in model.modules())


def _find(find: Callable[[nn.Module], Replacement | str | None],
          module: nn.Module) -> Replacement | str | None:
    try:
        found = find(module)
    except Exception as error:
        return f"it could not be tried: {type(error).__name__}: {error}"
    if isinstance(found, Replacement) and found.method != "_old_forward" and foreign(
            module, found.method):
        return f"its {found.method} was already replaced by somebody else"
    return found


def _put(report: Report, path: str, module: nn.Module, found: Replacement) -> None:
    put(module, found)
    report.replaced.append(Replaced(path, type(module).__name__, found.by))


def _try_rope(model: nn.Module, report: Report, trials: Trials) -> None:
    """Replace the attentions whose rotation agrees on the tables of a real forward."""
    if not trials:
        return
    modules = {path: module for path, (module, _) in trials.items()}
    whys = _rope.watch(modules, partial(_sample, model))
    for path, (module, found) in trials.items():
        if path in whys:
            report.skipped.append(Skipped(path, type(module).__name__, whys[path]))
        else:
            _put(report, path, module, found)


def _try_attention(model: nn.Module, report: Report, trials: Trials,
                   others: Collection[str]) -> None:
    """Replace the attentions that agree in a real forward, padded and not, and let the modules
    above them make our masks where all below take these; others: paths that do not."""
    if not trials:
        return
    register()
    modules = {path: module for path, (module, _) in trials.items()}
    makers = _masks.makers(model, others)
    whys = _attention_trial.watch(modules, makers, partial(_sample, model), _paddings(model))
    native = set()
    for path, (module, found) in trials.items():
        name = type(module).__name__
        if path in whys:
            report.skipped.append(Skipped(path, name, whys[path]))
            native.add(_masks.above(path, makers))
            continue
        if rope := current(module):
            report.replaced.remove(Replaced(path, name, rope))
            function = _attention.attending(type(module).forward, True)
            found = Replacement(function, f"{rope} + {found.by}", found.method)
        _put(report, path, module, found)
    for path, (module, found) in makers.items():
        if path not in native:
            put(module, found)


def _try_loss(model: nn.Module, report: Report, trials: Trials) -> None:
    """Replace the heads whose fused loss is the model's own on a real forward."""
    for path, (module, found) in trials.items():
        put(module, found)
        why = _loss.compare(module, partial(_sample, model))
        if why:
            take_back(module)
            report.skipped.append(Skipped(path, type(module).__name__, why))
        else:
            report.replaced.append(Replaced(path, type(module).__name__, found.by))


def _sample(model: Any, padding: Tensor | None = None) -> Any:
    """The model's output for a few random ids, with labels where it takes them."""
    config = model.config.get_text_config()
    device = next(model.parameters()).device
    torch.manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (2, 7), device=device)
    inputs = {"input_ids": ids}
    if padding is not None:
        inputs["attention_mask"] = padding
    if "labels" in _takes(model):
        inputs["labels"] = ids.masked_fill(ids % 3 == 0, -100)
    return model(**inputs)


def _paddings(model: Any) -> list[Tensor | None]:
    """Attention masks for `_sample`: none, and one whose rows are padded behind and before."""
    if "attention_mask" not in _takes(model):
        return [None]
    rows = [[1, 1, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 1]]
    return [None, torch.tensor(rows, device=next(model.parameters()).device)]


def _takes(model: Any) -> Collection[str]:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # peft's
    return inspect.signature(type(inner).forward).parameters


@contextmanager
def _still(model: nn.Module) -> Any:
    """Evaluation without gradients, every module's mode and the random state as they were."""
    modes = {module: module.training for module in model.modules()}
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(sorted(device.index for device in devices)), torch.no_grad():
        torch.manual_seed(0)
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
