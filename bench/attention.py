"""Attention on the CPU against torch's scaled_dot_product_attention, interleaved in one run.

    python bench/attention.py [--case NAME ...] [--rounds 15] [--threads 2] [--out FILE]

Forward and backward together, 8 query heads of 64 elements, bfloat16 and float32:
  dense    8 sequences of 340 tokens, causal. SDPA in bfloat16 also by way of float32, which may be
           the faster one
  gqa      the same with 2 key heads. SDPA: with enable_gqa, and with the heads repeated before it
  packed   8 rows of 340 tokens, each of 6 documents of mixed lengths and a padding tail, which is
           one more, as in training. SDPA: with a boolean mask of each row, also by way of float32,
           and once a document
  window   one sequence of 2,048 tokens, each of which sees 128. SDPA: with the window as a mask,
           and causal, which is another function
  long     the same sequence, causal
Ours takes (B, S, H, D) or packed (T, H, D), SDPA (B, H, S, D), each contiguous. Outputs and
gradients of all are held to float64 first: an error above TOLERANCE, as the norm of the difference
over that of the truth, ends the run. A round times each contestant once, in turns; the ratio is the
median of those within a round. Another program on the machine slows torch's side more, so a round
during which others took more than 3% of the processors is made again, up to three times as many
rounds in all; then the quietest count, and the result says what others took during the worst.
"""

import argparse
import json
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from optim import environment, processor_seconds, seconds  # noqa: E402

from fastllm import ops  # noqa: E402
from fastllm.kernels.attention import Window, reference  # noqa: E402

OUT = ROOT / "bench" / "results" / "cpu-2core" / "attention.json"
DTYPES = (torch.bfloat16, torch.float32)
TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-5}
TARGET = {"dense bfloat16": {"SDPA": 2.0}, "packed bfloat16": {"SDPA, mask": 2.0}}
HEADS, WIDTH = 8, 64
OURS = "fastllm"
SAMPLE, QUIET = 0.05, 0.03  # least seconds of a sample; others' share of the processors
Layout = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class Side:
    """A contestant: its call, its layout made of (T, H, D) and back, and what it computes."""

    call: Callable[[Tensor, Tensor, Tensor], Tensor]
    layout: Layout
    window: Window
    narrow: bool = False
    """Whether it is for bfloat16 alone."""


@dataclass(frozen=True)
class Case:
    """The lengths of the sequences one after another, the number of key heads, the contestants."""

    lengths: list[int]
    key_heads: int
    sides: dict[str, Side]


def tokens_first(rows: int) -> Layout:
    return lambda x: x.unflatten(0, (rows, -1)), lambda x: x.flatten(0, 1)


def heads_first(rows: int) -> Layout:
    return (lambda x: x.unflatten(0, (rows, -1)).transpose(1, 2).contiguous(),
            lambda x: x.transpose(1, 2).flatten(0, 1))


def dense(rows: int, length: int, key_heads: int) -> Case:
    """Causal sequences of one length."""
    causal, grouped = (-1, 0), key_heads != HEADS
    sides = {OURS: Side(partial(ops.attention, causal=True), tokens_first(rows), causal),
             "SDPA": Side(partial(sdpa, is_causal=True, enable_gqa=grouped), heads_first(rows),
                          causal)}
    if grouped:
        sides["SDPA, repeated"] = Side(repeated, heads_first(rows), causal)
    else:
        sides["SDPA, float32"] = widened(sides["SDPA"])
    return Case([length] * rows, key_heads, sides)


def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal SDPA with as many key heads as query heads."""
    return sdpa(q, *(x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v)),
                is_causal=True)


def widened(side: Side) -> Side:
    """The same by way of float32."""
    def call(*tensors: Tensor) -> Tensor:
        return side.call(*(x.float() for x in tensors)).to(tensors[0].dtype)

    return replace(side, call=call, narrow=True)


def packed(rows: int, length: int, documents: int) -> Case:
    """Rows of so many documents, whose lengths are drawn once, and a tail."""
    pick = random.Random(0)
    lengths: list[int] = []
    for _ in range(rows):
        ends = sorted(pick.sample(range(1, length), documents))
        lengths += [b - a for a, b in zip([0, *ends], [*ends, length], strict=True)]
    of_token = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).view(rows, -1)
    mask = (of_token[:, None, :, None] == of_token[:, None, None, :]) & seen(length, length)
    bounds = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    ours = partial(ops.attention, causal=True, cu_seqlens_q=bounds, max_seqlen_q=max(lengths))

    def each(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(*(x.split(lengths, 2) for x in (q, k, v)), strict=True)
        return torch.cat([sdpa(*part, is_causal=True) for part in parts], 2)

    masked = Side(partial(sdpa, attn_mask=mask), heads_first(rows), (-1, 0))
    return Case(lengths, HEADS, {
        OURS: Side(ours, (torch.clone, torch.clone), (-1, 0)),
        "SDPA, mask": masked, "SDPA, mask, float32": widened(masked),
        "SDPA, each": Side(each, heads_first(1), (-1, 0))})


def window(length: int, width: int) -> Case:
    """One sequence whose tokens see so many, themselves the last."""
    near = (width - 1, 0)
    return Case([length], HEADS, {
        OURS: Side(partial(ops.attention, window=near), tokens_first(1), near),
        "SDPA, mask": Side(partial(sdpa, attn_mask=seen(length, width)), heads_first(1), near),
        "SDPA, causal": Side(partial(sdpa, is_causal=True), heads_first(1), (-1, 0))})


def seen(length: int, width: int) -> Tensor:
    """(length, length) bool: a token sees itself and those before it, `width` in all."""
    return torch.ones(length, length, dtype=torch.bool).tril().triu(1 - width)


CASES: dict[str, Callable[[], Case]] = {
    "dense": partial(dense, 8, 340, HEADS), "gqa": partial(dense, 8, 340, 2),
    "packed": partial(packed, 8, 340, 6), "window": partial(window, 2048, 128),
    "long": partial(dense, 1, 2048, HEADS)}


def drawn(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the output's gradient, (T, H, D)."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(sum(case.lengths), heads, WIDTH, generator=generator).to(dtype)
            for heads in (HEADS, case.key_heads, case.key_heads, HEADS)]


def truth(case: Case, given: list[Tensor], window: Window) -> list[Tensor]:
    """The output and the gradients of q, k and v in float64, a sequence at a time."""
    found = []
    for pieces in zip(*(x.double().split(case.lengths) for x in given), strict=True):
        *inputs, upstream = (x[None] for x in pieces)
        out = reference(*(x.requires_grad_() for x in inputs), window=window)
        found.append([x[0] for x in (out.detach(), *torch.autograd.grad(out, inputs, upstream))])
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def prepare(side: Side, given: list[Tensor]) -> Callable[[], list[Tensor]]:
    """The output and gradients, in the contestant's own layout."""
    *inputs, upstream = (side.layout[0](x) for x in given)
    inputs = [x.requires_grad_() for x in inputs]

    def run() -> list[Tensor]:
        out = side.call(*inputs)
        return [out, *torch.autograd.grad(out, inputs, upstream)]

    return run


def errors(case: Case, given: list[Tensor],
           runs: dict[str, Callable[[], list[Tensor]]]) -> dict[str, float]:
    """The largest error of each contestant. Raises RuntimeError for one above TOLERANCE."""
    truths = {window: truth(case, given, window)
              for window in {side.window for side in case.sides.values()}}
    found = {}
    for name, run in runs.items():
        side = case.sides[name]
        results = [side.layout[1](x.detach()).double() for x in run()]
        found[name] = max(float((x - exact).norm() / exact.norm())
                          for x, exact in zip(results, truths[side.window], strict=True))
        if not found[name] <= TOLERANCE[given[0].dtype]:
            raise RuntimeError(f"{name} is wrong: {found[name]:.1e} from float64")
    return found


def compare(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Any]:
    """All in turns, after a warm-up each; times and ratios of the quietest rounds."""
    repeats = {}
    for name, run in runs.items():
        run()
        repeats[name] = math.ceil(SAMPLE / seconds(run))
    names, made = list(runs), []
    while len(made) < 3 * rounds and sum(share <= QUIET for share, _ in made) < rounds:
        names = [*names[1:], names[0]]
        wall, before = time.perf_counter(), processor_seconds()
        times = {name: seconds(lambda run=runs[name], times=repeats[name]: [
            run() for _ in range(times)]) / repeats[name] for name in names}
        after = processor_seconds()
        # The kernel counts in steps of 10 ms, two of which are forgiven.
        others = (after[0] - before[0]) - (after[1] - before[1]) - 0.02
        wall = time.perf_counter() - wall
        made.append((max(others, 0.0) / wall / (os.cpu_count() or 1), times))
    kept = sorted(made, key=lambda one: one[0])[:rounds]
    ratios = {name: [times[name] / times[OURS] for _, times in kept]
              for name in runs if name != OURS}
    return {"milliseconds": {name: round(1e3 * statistics.median(
                times[name] for _, times in kept), 2) for name in runs},
            "ratio": {name: round(statistics.median(r), 3) for name, r in ratios.items()},
            "ratio_min": {name: round(min(r), 3) for name, r in ratios.items()},
            "ratio_max": {name: round(max(r), 3) for name, r in ratios.items()},
            "discarded_rounds": len(made) - len(kept), "others_share": round(kept[-1][0], 3),
            "samples_ms": {name: [round(1e3 * times[name], 2) for _, times in kept]
                           for name in runs}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="*", default=list(CASES), choices=CASES, help="only these")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results: dict[str, dict[str, Any]] = {}
    with ops.use_backend("cpp", "attention"):
        for name in options.case:
            case = CASES[name]()
            for dtype in DTYPES:
                key, given = f"{name} {str(dtype)[6:]}", drawn(case, dtype)
                runs = {who: prepare(side, given) for who, side in case.sides.items()
                        if dtype != torch.float32 or not side.narrow}
                wrong = errors(case, given, runs)
                results[key] = {**compare(runs, options.rounds), "error": wrong}
                print(line(key, results[key]), flush=True)
    report = {"bench": "attention", "heads": HEADS, "head_dim": WIDTH, "target": TARGET,
              "tolerance": {str(dtype)[6:]: most for dtype, most in TOLERANCE.items()},
              **environment(options.threads), "results": results}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {options.out}")


def line(key: str, result: dict[str, Any]) -> str:
    """A case for people."""
    taken = result["milliseconds"]
    cells = [f"{key:16} {OURS} {taken[OURS]:7.1f} ms"]
    for name, ratio in result["ratio"].items():
        cells.append(f"{name} {taken[name]:7.1f} ms {ratio:.2f}x")
        if goal := TARGET.get(key, {}).get(name):
            cells[-1] += f" (target {goal}: {'met' if ratio >= goal else 'missed'})"
    return "   ".join(cells)


if __name__ == "__main__":
    main()
