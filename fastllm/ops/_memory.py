"""What was measured on this machine, for the processes after this one.

One file, `attention.json` in the user's cache (`config.cache_folder`): {machine: {section: {key:
entry}}}, machine being the GPU and the versions that a time depends on. It is read once, at first
need, and written by renaming a whole file over it. Of two processes that write at the same moment
one may lose its entries, which are then measured again. A disk that cannot be written is no error:
what was measured serves this process. A damaged file is named in one warning and begun anew.
"""

import functools
import importlib.metadata
import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

Sections = dict[str, dict[str, Any]]
_machines: dict[str, Sections] | None = None


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


@functools.lru_cache(64)
def machine(device: str) -> str:
    """The GPU by its name, and every version that a time on it depends on."""
    from fastllm import __version__

    gpu = device.startswith("cuda") and torch.cuda.is_available()
    name = torch.cuda.get_device_name(device) if gpu else torch.device(device).type
    return (f"{name}; torch {torch.__version__}; triton {version('triton')}; "
            f"cudnn {torch.backends.cudnn.version() if gpu else 'none'}; "
            f"flash-attn {version('flash_attn_3')}; fastllm {__version__}")


def recall(place: str, section: str) -> dict[str, Any]:
    """What is remembered of a machine in a section; the file is read if it was not yet."""
    global _machines
    if _machines is None:
        _machines = _read(_path(), warn=True)
    return _machines.setdefault(place, {}).setdefault(section, {})


def remember(place: str, section: str, entries: dict[str, Any], *, forget: str = "") -> None:
    """Add entries (JSON-able) to a section, here and in the file; empty the section `forget`."""
    known = recall(place, section)
    known.update(entries)
    path = _path()
    others = _read(path, warn=False)  # what other processes have written since
    for found in (others, _machines or {}):
        sections = found.setdefault(place, {})
        sections.setdefault(section, {}).update(entries)
        sections.pop(forget, None)
    if path is not None:
        _write(path, others)


def _path() -> Path | None:
    try:
        from fastllm import config

        return config.cache_folder() / "attention.json"
    except (RuntimeError, ImportError):  # a user without a home, or the ops without pydantic
        return None


def _read(path: Path | None, *, warn: bool) -> dict[str, Sections]:
    if path is None:
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        whole = isinstance(found, dict) and all(
            isinstance(sections, dict) and all(isinstance(part, dict) for part in sections.values())
            for sections in found.values())
        if not whole:
            raise ValueError("not the tables that belong there")
    except OSError:  # not there, or not to be read
        return {}
    except ValueError as error:
        if warn:
            warnings.warn(f"{path} is damaged ({error}): attention is measured anew and the file "
                          "written again", stacklevel=2)
        return {}
    return found


def _write(path: Path, found: dict[str, Sections]) -> None:
    """Put a whole file in the place of the old one; nothing where the disk does not let us."""
    name = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)
        os.replace(name, path)
    except OSError:
        if name is not None and os.path.exists(name):
            os.unlink(name)
