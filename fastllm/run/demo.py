"""`demo`: a small pretraining run on text that is on every machine."""

import json
from pathlib import Path

from fastllm import config
from fastllm.run.session import train
from fastllm.run.settings import RunConfig


def demo(settings: RunConfig) -> None:
    """`demo`: pretrain, then say what came of it; a finished demo is shown again, not run again."""
    settings.out = settings.out or "runs/demo"
    folder = Path(settings.out)
    done, stored = folder / "summary.json", folder / "config.yaml"
    summary = json.loads(done.read_text(encoding="utf-8")) if done.is_file() else {}
    if summary.get("finished") and stored.read_text(encoding="utf-8") == config.to_yaml(settings):
        print(f"{folder} is finished and nothing changed since; remove it to train again")
    else:
        settings.resume = (folder / "checkpoints").is_dir() and not summary.get("finished")
        summary = train(settings)
    if not summary["finished"]:
        return
    if "val_bpb" in summary:
        print(f"held-out documents: {summary['val_bpb']:.3f} bits per byte; "
              f"xz -9 on the same bytes: {summary['xz_bpb']:.3f}")
    for sample in summary["continuations"]:
        print(f"\n> {sample['prompt']}{sample['text']}")
    print(f"\nrun folder: {folder}  (config.yaml, metrics.jsonl, report.html, checkpoints/, "
          "model/)")
    print(f"try: fastllm-train generate {folder} --prompt 'Return the'")
