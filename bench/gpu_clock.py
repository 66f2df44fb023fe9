"""Times calls on a GPU, and the GPU's own rates to hold those times against."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

DEVICE = "cuda"
WARM_UP, LEAST = 3, 5
AHEAD = 1_000_000
"""Clock cycles of the GPU that a host may need to launch a call, about half a millisecond."""


class Clock:
    """Times calls with CUDA events, the L2 cache flushed before each.

    As many samples as `seconds` hold, from LEAST to `samples`.
    """

    def __init__(self, samples: int, seconds: float, flush: int = 512 << 20):
        self.samples, self.seconds = samples, seconds
        # Several times the largest L2 cache there is, so that nothing of the last call is left.
        self.flush = torch.empty(flush, dtype=torch.int8, device=DEVICE)

    def __call__(self, call: Callable[[], Any]) -> tuple[list[float], float]:
        """(milliseconds of each sample, milliseconds that the host takes to launch one)."""
        began = time.perf_counter()
        for done in range(1, WARM_UP + 1):
            call()
            torch.cuda.synchronize()
            taken = (time.perf_counter() - began) / done
            if taken * done > self.seconds:
                break
        number = max(LEAST, min(self.samples, int(self.seconds / (taken + 1e-3))))
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(number)]
        hosts = []
        for start, stop in events:
            self.flush.zero_()
            # The host runs ahead meanwhile: what is timed is the GPU, not how fast it is fed.
            torch.cuda._sleep(AHEAD)
            start.record()
            began = time.perf_counter()
            call()
            hosts.append(time.perf_counter() - began)
            stop.record()
        torch.cuda.synchronize()
        return ([start.elapsed_time(stop) for start, stop in events],
                1e3 * statistics.median(hosts))


def rates(clock: Clock, size: int = 2 << 30, edge: int = 8192) -> dict[str, float]:
    """This GPU's own ceilings: bytes a second of a large copy, FLOP a second of large products."""
    source = torch.empty(size, dtype=torch.int8, device=DEVICE).random_(0, 100)
    target = torch.empty_like(source)
    taken = statistics.median(clock(lambda: target.copy_(source))[0]) * 1e-3
    found = {"copy": 2 * source.numel() / taken}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a, b = (torch.randn(edge, edge, device=DEVICE).to(dtype) for _ in range(2))
        taken = statistics.median(clock(lambda a=a, b=b: a @ b)[0]) * 1e-3
        found[str(dtype)[6:]] = 2 * edge**3 / taken
    return found


def timed(run: Callable[[], Any], size: int, work: int, clock: Clock, copy: float,
          product: float) -> dict[str, Any]:
    """Time and memory of a call that must move `size` bytes and do `work` FLOPs, on a GPU that
    copies and multiplies at these rates a second."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    samples, host = clock(run)
    seconds = statistics.median(samples) / 1e3
    # An op is bound by whichever of its floors takes longer at this GPU's own rates.
    return {"milliseconds": seconds * 1e3, "gigabytes_per_second": size / seconds / 1e9,
            "teraflops": work / seconds / 1e12,
            "bound": "bytes" if size / copy >= work / product else "flops",
            "share_of_ceiling": max(size / copy, work / product) / seconds,
            "peak_bytes": peak, "host_milliseconds": host, "samples_milliseconds": samples}
