"""Writes the tables of README.md from the JSON files under bench/results; `--check` only compares.

A table stands between `<!-- bench:NAME -->` and `<!-- /bench -->`. No figure in README.md is typed
by hand: tests/test_readme.py runs the check.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
SECTION = re.compile(r"(<!-- bench:(\w+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


def load(name: str) -> dict:
    """A result file by its path under bench/results, without the ending."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the first column is text, the others are figures."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def train() -> str:
    """Tokens a second and peak memory beside transformers."""
    result = load("cpu-2core/train")
    base = result["contestants"]["transformers fp32"]
    rows = []
    for name, one in result["contestants"].items():
        rows.append([name, f"{one['tokens_per_second']:,.0f}",
                     f"{one['tokens_per_second'] / base['tokens_per_second']:.2f}x",
                     f"{one['peak_memory_bytes'] / 1e9:.2f} GB"])
    ratio = result["ratios"]
    autocast = "bf16 over transformers bf16 autocast"
    note = (f"\nOver bf16 autocast: {ratio['speed: ' + autocast]:.2f}x the speed and "
            f"{ratio['memory: ' + autocast]:.2f}x the memory. "
            f"Over {len(base['losses'])} steps in fp32 the loss curves differ by "
            f"{ratio['loss: largest fp32 difference']:.1e} at most.\n")
    return table(["minimind-26m, batch 8 x 340", "tokens/s", "speed", "peak memory"], rows) + note


def optim() -> str:
    """The optimizer step beside torch's fused AdamW."""
    result = load("cpu-2core/optim")
    names = {"mixed": "bf16 gradients, fp32 masters, bf16 weights written back",
             "clipped": "the same, with the global norm and clipping", "fp32": "plain fp32"}
    rows = [[names[key], f"{one['torch_ms']:.0f} ms", f"{one['ours_ms']:.0f} ms",
             f"{one['ratio']:.2f}x"] for key, one in result["results"].items()]
    millions = f"{result['parameters'] / 1e6:.0f}M parameters"
    return table([f"optimizer step, {millions}", "torch fused", "fastllm", "speed"], rows)


def demo() -> str:
    """What `make demo` reached."""
    result = load("cpu-2core/demo")
    return table(["held-out documents", "bits per byte"], [
        ["the model after `make demo`", f"{result['val_bpb']:.3f}"],
        ["`xz -9`", f"{result['xz_bpb']:.3f}"]])


SECTIONS: dict[str, Callable[[], str]] = {"train": train, "optim": optim, "demo": demo}


def render(text: str) -> str:
    """README.md with every section made anew. Raises KeyError for a section that nobody makes."""
    return SECTION.sub(lambda m: m[1] + SECTIONS[m[2]]() + m[3], text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit 1 if README.md is stale")
    options = parser.parse_args()
    path = ROOT / "README.md"
    before = path.read_text(encoding="utf-8")
    after = render(before)
    if options.check and after != before:
        sys.exit("README.md does not match bench/results: run python bench/readme.py")
    if not options.check:
        path.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
