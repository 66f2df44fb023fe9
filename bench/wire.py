"""What narrower wires cost and save: the demo's model in stage 3 on two ranks, once for each.

    python bench/wire.py [--steps N] [--quick] [--out FILE]

Every run trains the same model from the same weights on the same rows, through `fastllm-train
launch`; they differ in what travels between ranks. Reported are the bytes that a rank sends a step
and the held-out loss at the end, beside fp32's. A last run in fp32 with another seed says how much
of a difference means nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from optim import environment

ROOT = Path(__file__).parents[1]
OUT = ROOT / "bench" / "results" / "cpu-2core" / "wire.json"
WORLD = 2
SIDES = {
    "fp32": {},
    "bf16 gradients": {"dist.wire-dtype": "bf16"},
    "int8 gradients": {"dist.wire-dtype": "int8"},
    "int8 parameters": {"dist.param-wire-dtype": "int8"},
    "int8 gradients and parameters": {"dist.wire-dtype": "int8", "dist.param-wire-dtype": "int8"},
    "fp32, another seed": {"train.seed": 1},
}


def run(steps: int, folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """Train, and return the run's summary. Raises RuntimeError with what a failed run said."""
    settings = {"dist.zero": 3, "train.dtype": "fp32", "train.batch-size": 4, "train.steps": steps,
                "schedule.warmup": 0.1, "eval.every": steps, "checkpoint.every": steps,
                "eval.new-tokens": 0, "out": folder, **changes}
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    done = subprocess.run(
        [sys.executable, "-m", "fastllm", "launch", "--nproc", str(WORLD), "pretrain", "--preset",
         "demo", *words], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def measure(steps: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, changes in SIDES.items():
        with tempfile.TemporaryDirectory() as folder:
            summary = run(steps, Path(folder) / "run", changes)
        results[name] = {
            "sent_bytes_a_step": round(summary["sent_bytes"] / steps),
            **{key: summary[key] for key in ("val_loss", "val_bpb", "parameters", "tokens")}}
        gap = summary["val_loss"] - results["fp32"]["val_loss"]
        results[name]["loss_gap"] = gap
        sent = results[name]["sent_bytes_a_step"] / 1e6
        print(f"{name:30} {sent:8.1f} MB a step   held-out loss {summary['val_loss']:.4f} "
              f"({gap:+.4f})", flush=True)
    return {"bench": "wire", "world": WORLD, "stage": 3, "steps": steps, **environment(1),
            "results": results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--quick", action="store_true", help="six steps, no file")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    record = measure(6 if options.quick else options.steps)
    out = options.out or (None if options.quick or options.steps != 300 else OUT)
    if out:
        out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {out}")


if __name__ == "__main__":
    main()
