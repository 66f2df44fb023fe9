"""A folder that is made once, whole, by one process, while others that want it wait."""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fastllm.config import UserError
from fastllm.data.sources import Progress
from fastllm.data.store import ABSENT
from fastllm.files import sync


def made_once(
    folder: Path, fault: Callable[[Path], str | None], build: Callable[[Path], None],
    progress: Progress | None = None,
) -> list[str]:
    """Makes `folder` by `build` unless it is there and sound; returns what the user should know.

    Processes that want the same folder wait for the one that makes it.
    """
    if fault(folder) is None:
        return []
    try:
        with _locked(folder.with_name(f"{folder.name}.lock"), progress):
            found = fault(folder)
            if found is None:
                return []
            # We hold the lock, so what another process left half-made has no owner.
            for leftover in folder.parent.glob(f"{folder.name}.tmp-*"):
                shutil.rmtree(leftover)
            temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
            temporary.mkdir()
            try:
                build(temporary)
                _sync(temporary)
                if folder.exists():
                    os.replace(folder, folder.with_name(f"{folder.name}.tmp-damaged"))
                os.replace(temporary, folder)
                sync(folder.parent)
            finally:
                for leftover in folder.parent.glob(f"{folder.name}.tmp-*"):
                    shutil.rmtree(leftover, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder.parent}: "
                        f"{error.strerror or error}; free some space or set data.cache_dir"
                        ) from error
    return [] if found == ABSENT else [f"{folder} was damaged ({found}); it was made again"]


@contextmanager
def _locked(path: Path, progress: Progress | None) -> Iterator[None]:
    """Holds an advisory lock on `path`; it goes with the process, however that ends."""
    with path.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if progress:
                progress("waiting for another process that prepares the same data", 0, None)
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _sync(folder: Path) -> None:
    """The files and then the folder reach the disk before the rename does."""
    for path in [*folder.iterdir(), folder]:
        sync(path)
