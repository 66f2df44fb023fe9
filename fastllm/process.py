"""What a training process has beside its tensors: random generators, and signals that stop it."""

import hashlib
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastllm.dist.mesh import World

ECHO = 1.0
"""Seconds in which a second signal is the first one's echo."""


def seed_generators(seed: int, world: World, step: int = 0) -> None:
    """Seed torch's generators for this rank; the first rank's begin as those of a run alone."""
    number = seed
    if world.rank or step:
        text = f"{seed}/{step}/{world.rank}/{world.size}"
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        number = int.from_bytes(digest, "little") >> 1
    torch.manual_seed(number)


def rng_state(device: torch.device, rank: int = 0) -> dict[str, Tensor]:
    """The state of torch's generators that a step of this rank may draw from, each by a name that
    no other rank's has; the first rank's are those of a run without others."""
    suffix = f".{rank}" if rank else ""
    state = {f"cpu{suffix}": torch.get_rng_state()}
    if device.type == "cuda":
        state[f"cuda{suffix}"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Undo of `rng_state`."""
    for name, tensor in state.items():
        if name.startswith("cuda"):
            torch.cuda.set_rng_state(tensor, device)
        else:
            torch.set_rng_state(tensor)


@contextmanager
def stop_signals() -> Iterator[Callable[[], str | None]]:
    """Within: SIGTERM and SIGINT ask to stop after the step; the second one ends the process.

    One that follows within ECHO is taken for the same: a launcher passes on what a whole group of
    processes got. Yields a function that returns the name of the signal received, or None.
    """
    received: list[str] = []
    first = 0.0

    def ask(number: int, _: Any) -> None:
        nonlocal first
        if not received:
            received.append(signal.Signals(number).name)
            first = time.monotonic()
        elif time.monotonic() - first > ECHO:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: received[0] if received else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
