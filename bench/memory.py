"""Peak memory of linear_cross_entropy, counted on a CPU and worked out for a GPU, beside others.

    python bench/memory.py [--check]

Counted: what torch's CPU allocator holds at most during one forward and backward of bfloat16, above
what it held before; our Triton kernels and Liger's run in the interpreter. At these small shapes
each contender's chunks have as many rows as Liger's, or a chunk would be all. Worked out: the same
for shapes of real models from the chunks that each would choose there. Results go to
bench/results/interpreter/memory.json; --check fails where a count is above what the file says.
"""

import argparse
import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
from peers import prepare  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from fastllm.kernels import _chunks as chunks  # noqa: E402
from fastllm.kernels import linear_cross_entropy as module  # noqa: E402
from fastllm.kernels._triton import cdiv, next_power_of_2  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "interpreter" / "memory.json"
COUNTED = ((128, 128, 1024), (256, 128, 1024), (256, 256, 2048))
WORKED_OUT = ((2720, 512, 6400), (8192, 2304, 256000), (8192, 4096, 128256), (32768, 4096, 128256))
OURS = {"ours": {}, "ours, main_grad": {"main_grad": True}, "ours, recompute": {"recompute": True},
        "ours, recompute, main_grad": {"recompute": True, "main_grad": True}}


def liger_rows(tokens: int, width: int, vocab: int) -> int:
    """Rows of a chunk of Liger's."""
    return next_power_of_2(cdiv(tokens, cdiv(vocab, width)))


def peak(run: Callable[[], Any]) -> int:
    """The most bytes that torch's CPU allocator holds during a call, above those before it."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                profile_memory=True) as profile:
        run()
    events = sorted((event for event in profile.profiler.kineto_results.events()
                     if event.name() == "[memory]"), key=lambda event: event.start_ns())
    held = most = 0
    for event in events:
        held += event.nbytes()
        most = max(most, held)
    return most


def count(shape: tuple[int, int, int], contender: str, rows: int | None = None) -> int:
    """The peak of one forward and backward, gradients included, with chunks of so many rows.

    A CPU's products pack their operands in memory of the same allocator, ours and Liger's alike.
    """
    call = module.KERNEL.inputs(shape, torch.bfloat16, "cpu", torch.Generator().manual_seed(0))
    hidden, weight, labels = call.args
    if contender in OURS:
        options: dict[str, Any] = {"chunk_size": rows or liger_rows(*shape), **OURS[contender]}
        if "main_grad" in options:
            options["main_grad"] = torch.zeros(weight.shape)
        forward: Callable[[], Any] = lambda: module.linear_cross_entropy(  # noqa: E731
            hidden, weight, labels, **options)
    else:
        forward = prepare(module.KERNEL, call, contender)

    def run() -> None:
        loss = next(x for x in tree_leaves(forward()) if x.requires_grad)
        loss.backward()

    return peak(run)


def formula(shape: tuple[int, int, int], contender: str) -> int:
    """Bytes at the peak in bfloat16, gradients included, (T,) vectors left out."""
    tokens, width, vocab = shape
    logits, dhidden, dweight = 2 * vocab, 2 * tokens * width, 2 * vocab * width
    if contender == "eager":  # logits, their float32 copy, its log-softmax and the gradient of it
        return tokens * logits + 3 * 4 * tokens * vocab
    if contender == "liger":
        return dhidden + dweight + liger_rows(*shape) * logits
    if contender == "liger, float32 sums":  # cast to the weight's type at the end
        return dhidden + 2 * dweight + max(liger_rows(*shape) * logits, dweight)
    if contender == "cce":  # gradients, summed in bfloat16
        return dhidden + dweight
    if contender == "cce, float32 sums":
        return 3 * dhidden + 3 * dweight
    given = "main_grad" in OURS[contender]
    if "recompute" in OURS[contender] and tokens < vocab:
        forward = chunks.rows(*shape, 2, tight=True)[0] * logits
        block = 2 * tokens * chunks.columns(*shape, 2)
        return max(forward, (0 if given else dweight) + 2 * dhidden + max(block, dhidden))
    held = chunks.rows(*shape, 2, tight="recompute" in OURS[contender])[0]
    several = held < tokens and not given
    own = 0 if given else 2 * dweight if several else dweight
    return dhidden + own + max(held * logits, dweight if several else 0)


def measure() -> dict[str, Any]:
    counted = [{"shape": shape, "bytes": {name: count(shape, name) for name in (*OURS, "liger")}}
               for shape in COUNTED]
    others = ("eager", "liger", "liger, float32 sums", "cce", "cce, float32 sums")
    return {"counted": counted,
            "worked_out": [{"shape": shape, "bytes": {name: formula(shape, name)
                                                      for name in (*OURS, *others)}}
                           for shape in WORKED_OUT]}


def table(results: dict[str, Any]) -> str:
    """Markdown: MiB by contender, a row a shape."""
    lines = []
    for part, title in (("counted", "counted on a CPU"), ("worked_out", "worked out")):
        names = list(results[part][0]["bytes"])
        lines += [f"| T x H x V, {title} | " + " | ".join(names) + " |",
                  "|---" + "|---:" * len(names) + "|"]
        for row in results[part]:
            cells = (f"{row['bytes'][name] / 2**20:,.2f}" for name in names)
            lines.append(f"| {' x '.join(map(str, row['shape']))} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    check = parser.parse_args().check
    torch.set_num_threads(1)
    results = measure()
    print(table(results))
    if not check:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        return 0
    stored = json.loads(RESULTS.read_text(encoding="utf-8"))
    worse = [f"{row['shape']} {name}: {row['bytes'][name]} bytes, {before['bytes'][name]} stored"
             for row, before in zip(results["counted"], stored["counted"], strict=True)
             for name in OURS if row["bytes"][name] > 1.01 * before["bytes"][name]]
    print("\n".join(worse), file=sys.stderr)
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
