"""The language-model head and its cross entropy as one op, in training with labels."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastllm.patching import _check
from fastllm.patching._instance import Replacement, foreign, method_of
from fastllm.patching._lazy import LazyLogits

BY = "ops.linear_cross_entropy"


def find(module: Any) -> Replacement | str | None:
    """What replaces the forward of a model with a language-model head; why nothing does."""
    forward = type(module).forward
    if not hasattr(module, "get_output_embeddings") or (
            "labels" not in inspect.signature(forward).parameters):
        return None
    head = module.get_output_embeddings()
    if head is None:
        return None
    if foreign(head, "forward") or not _check.bare(head):
        kind = f"{type(head).__module__}.{type(head).__name__}"
        return f"its head, a {kind}, is not a torch Linear without hooks"
    model, of_head = _forwards(forward)
    return Replacement(model, BY, method_of(module), others=((head, Replacement(of_head, "")),))


def _forwards(original: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The model's forward and the head's, which is lazy while the model's is in training with
    labels."""
    signature = inspect.signature(original)
    lazy = [False]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind_partial(self, *args, **kwargs).arguments if args else kwargs
        lazy[0] = self.training and given.get("labels") is not None
        try:
            return original(self, *args, **kwargs)
        finally:
            lazy[0] = False

    def head_forward(self: Any, input: Tensor) -> Any:
        if lazy[0] and _check.bare(self):
            return LazyLogits(input, self)
        return type(self).forward(self, input)

    # Trainers read the names of the arguments; __wrapped__ would let accelerate unwrap too far.
    forward.__signature__ = signature  # type: ignore[attr-defined]
    forward.__doc__ = original.__doc__
    return forward, head_forward


def compare(module: Any, run: Callable[[], Any]) -> str:
    """Why the fused loss cannot stand for the module's own; empty where they agree.

    run: a forward of the model on sample ids with labels. `training` is set for this one module,
    so that dropout stays off.
    """
    try:
        theirs = run().loss
        module.training = True
        ours = run().loss
        dtype = module.get_output_embeddings().weight.dtype
        _check.agree("its loss", ours.to(dtype), theirs.to(dtype))
    except _check.Differs as error:
        return str(error)
    except Exception as error:
        return f"the model could not be run on sample ids: {error}"
    finally:
        module.training = False
    return ""
