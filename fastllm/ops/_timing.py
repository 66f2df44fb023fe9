"""Times several ways to do one thing against each other, on tensors that nobody else needs."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

WARM_UP, ROUNDS = 2, 7
REPEATS = 4
"""Calls of one sample, so that it shows whichever is slower of host and device, not both."""
SECONDS = 3.0
"""After so long three rounds are enough."""
CLEARLY = 0.97
"""The time, over that of the one to keep, at which another takes its place."""


def measure(calls: Mapping[str, Callable[[], Any]],
            device: torch.device) -> tuple[dict[str, float], dict[str, str]]:
    """({name: median milliseconds}, {name: why it is out}), in rounds of one sample each.

    A call that raises is out; only OutOfMemoryError passes.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    out: dict[str, str] = {}
    began = time.monotonic()
    for turn in range(WARM_UP + ROUNDS):
        if turn >= WARM_UP + 3 and time.monotonic() - began > SECONDS:
            break
        for name, call in calls.items():
            if name in out:
                continue
            try:
                taken = _time(call, device)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # a compiler's, a library's: any says that it cannot
                out[name] = line(error)
                continue
            if turn >= WARM_UP:
                samples[name].append(taken)
    return {name: statistics.median(taken) for name, taken in samples.items()
            if name not in out}, out


def _time(call: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of one call, by the device's own clock where it is a GPU."""
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - began)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(REPEATS):
        call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / REPEATS


def fastest(times: Mapping[str, float], kept: str) -> str:
    """The name of the shortest time, but `kept` where none is clearly shorter than its own, or
    where there are no times."""
    best = min(times, key=lambda name: times[name], default=kept)
    close = kept in times and times[best] > CLEARLY * times[kept]
    return kept if close else best


def line(error: Exception) -> str:
    """What an error says, in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
