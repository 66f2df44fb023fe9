"""The one line that a process says before it ends with an exit code other than 0.

`fastllm-train launch` gives each of its ranks a file for it, so that of many ranks that fail for
one reason it can show one line; a process on its own says it on stderr.
"""

import os
import sys
from pathlib import Path

from fastllm.config import environment

PROGRAM = "fastllm-train"
VARIABLE = "FASTLLM_LAST_WORDS"


def say(line: str, *, stuck: bool = False) -> None:
    """Say the line.

    stuck: past Python's streams, whose locks another thread may hold for ever.
    """
    text = f"{PROGRAM}: {line}\n"
    path = environment(VARIABLE)
    try:
        if path is not None:
            with Path(path).open("ab", buffering=0) as file:
                file.write(text.encode(errors="replace"))
        elif stuck:
            os.write(2, text.encode(errors="replace"))
        else:
            print(text, end="", file=sys.stderr, flush=True)
    except OSError:
        pass  # nobody listens, and the exit code says it too


def heard(path: Path) -> str | None:
    """The first line that the process with this file said, without its end; None if it said
    nothing."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return text.splitlines()[0] if text.strip() else None
