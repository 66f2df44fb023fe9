"""fastllm: a training runtime for language models, fast on NVIDIA GPUs and exact everywhere."""

from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

# In a checkout kernels/ lies beside this package; setup.py installs it as fastllm.kernels.
if (Path(__file__).parents[1] / "setup.py").is_file():
    __path__.append(str(Path(__file__).parents[1]))

_LAZY = {"patch": "patching", "unpatch": "patching"}


def __getattr__(name: str) -> Any:
    """fastllm.ops, fastllm.nn, fastllm.patch(model): imported at first use, so that
    `import fastllm` costs nothing."""
    if name in _LAZY:
        return getattr(import_module(f"fastllm.{_LAZY[name]}"), name)
    if name in ("nn", "ops", "patching"):
        return import_module(f"fastllm.{name}")
    raise AttributeError(f"module 'fastllm' has no attribute {name!r}")
