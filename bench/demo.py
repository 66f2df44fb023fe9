"""Run the demo in a fresh folder and keep what it reached: bits per byte beside `xz -9`.

    python bench/demo.py [--out bench/results/cpu-2core/demo.json]
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from fastllm.cli import main as command

KEPT = ("val_bpb", "xz_bpb", "val_loss", "steps", "tokens", "seconds", "parameters",
        "continuations")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="bench/results/cpu-2core/demo.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "demo"
        if code := command(["demo", "--out", str(run)]):
            sys.exit(code)
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    record = {"benchmark": "demo", "command": " ".join(["python", *sys.argv]),
              "machine": environment, **{key: summary[key] for key in KEPT}}
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    Path(options.out).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n",
                                 encoding="utf-8")


if __name__ == "__main__":
    main()
