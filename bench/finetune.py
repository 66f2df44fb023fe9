"""LoRA fine-tuning and DPO of a real model on a CPU, with the curves.

SmolLM2-135M-Instruct (see bench/real.py) on grade-school mathematics (GSM8K, MIT licence):

    1. `sft`, LoRA on every projection, on questions and answers: held-out loss before and after;
       the merged folder is loaded in transformers and its logits compared.
    2. `dpo` of the result on pairs of a right solution, by the strongest of four models, and a
       wrong one, by the weakest: one pair a question, so that no held-out question is trained on.

Questions of the pairs are of GSM8K's test set, and those of the fine-tuning of its train set.

    python bench/finetune.py --gsm8k train.jsonl --pairs pairs.jsonl [--gguf FILE]
        [--steps 200] [--dpo-steps 240] [--out bench/results/cpu-2core/finetune.json]

train.jsonl: rows of question and answer (github.com/openai/grade-school-math). pairs.jsonl: rows of
prompt, chosen, rejected, chosen_model and rejected_model (of that project's model solutions).
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import real
import torch

from fastllm import config
from fastllm.cli import main as command
from fastllm.monitor import environment
from fastllm.run import open_model

ROWS = 1500
"""Of train.jsonl: more than the steps see."""
STRONGEST, WEAKEST = "175b_verification", "6b_finetuning"
"""Models whose solutions are compared, by their names in the pairs."""


def conversations(source: Path, target: Path) -> Path:
    """GSM8K's rows as conversations."""
    with source.open(encoding="utf-8") as lines, target.open("w", encoding="utf-8") as out:
        for _, line in zip(range(ROWS), lines, strict=False):
            row = json.loads(line)
            out.write(json.dumps({"messages": [
                {"role": "user", "content": row["question"]},
                {"role": "assistant", "content": row["answer"]}]}, ensure_ascii=False) + "\n")
    return target


def contrasted(source: Path, target: Path) -> Path:
    """The pairs of the strongest model's right solution and the weakest model's wrong one."""
    with source.open(encoding="utf-8") as lines, target.open("w", encoding="utf-8") as out:
        for line in lines:
            row = json.loads(line)
            if (row["chosen_model"], row["rejected_model"]) == (STRONGEST, WEAKEST):
                out.write(line)
    return target


def run(arguments: dict[str, Any], verb: str) -> None:
    """One command of ours; the benchmark ends where it fails."""
    words = [verb]
    for name, value in arguments.items():
        words += [f"--{name}", *([] if value is True else [str(value)])]
    print("fastllm-train", *words, flush=True)
    if code := command(words):
        sys.exit(code)


def curves(folder: Path) -> dict[str, Any]:
    """The lines of metrics.jsonl, steps and evaluations apart."""
    text = (folder / "metrics.jsonl").read_text("utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    kept = ("step", "loss", "accuracy", "margin", "seconds", "tokens", "lr", "grad_norm",
            "memory_bytes")
    steps = [{key: line[key] for key in kept if key in line} for line in lines if "loss" in line]
    return {"steps": steps, "evaluations": [line for line in lines if "val_loss" in line]}


@torch.no_grad()
def merged_logits(folder: Path) -> float:
    """Largest difference of a logit between the merged folder here and in transformers."""
    import transformers

    ours, tokenizer, _ = open_model(str(folder), device=torch.device("cpu"), dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=torch.float32).eval()
    ids = torch.tensor([tokenizer.encode(real.PROSE)])
    return float((ours.logits(ours(ids)) - theirs(ids).logits).abs().max())


def plot(record: dict[str, Any], target: Path) -> None:
    """The curves as one picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    sft, dpo = record["sft"], record["dpo"]
    for axis, part, title in ((left, sft, "LoRA SFT on GSM8K"), (middle, dpo, "DPO on solutions")):
        x = [step["step"] for step in part["steps"]]
        axis.plot(x, [step["loss"] for step in part["steps"]], lw=0.8, alpha=0.6,
                  label="training step")
        axis.plot([one["step"] for one in part["evaluations"]],
                  [one["val_loss"] for one in part["evaluations"]], "o-", label="held out")
        axis.set(title=title, xlabel="step", ylabel="loss (nats a token)" if part is sft
                 else "loss (nats a pair)")
        axis.legend()
    right.plot([one["step"] for one in dpo["evaluations"]],
               [100 * one["val_accuracy"] for one in dpo["evaluations"]], "o-", label="held out")
    right.axhline(50, ls=":", color="grey", label="chance")
    right.set(title="DPO: pairs ranked rightly", xlabel="step", ylabel="%")
    right.legend()
    figure.savefig(target, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gsm8k", required=True, type=Path)
    parser.add_argument("--pairs", required=True, type=Path)
    parser.add_argument("--gguf", help="the model's file, where it is there already")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--dpo-steps", type=int, default=240)
    parser.add_argument("--work", help="folder for the runs, kept; none: a temporary one")
    parser.add_argument("--out", default="bench/results/cpu-2core/finetune.json")
    parser.add_argument("--plot", default="docs/finetune.png")
    options = parser.parse_args()
    base = options.gguf or real.download(config.cache_folder() / "downloads")
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(options.work or temporary)
        work.mkdir(parents=True, exist_ok=True)
        common = {"train.dtype": "fp32", "data.num-workers": 1, "checkpoint.every": 50}
        run({"from": base, "out": work / "sft", "data.path": conversations(
                options.gsm8k, work / "gsm8k.jsonl"), "adapter.name": "lora", "adapter.rank": 16,
             "train.steps": options.steps, "train.batch-size": 1, "train.seq-len": 512,
             "optim.lr": 5e-4, "data.holdout": 0.04, "eval.every": 50, "eval.on-start": True,
             "resume": True, **common}, "sft")
        run({"from": work / "sft", "out": work / "dpo", "data.path": contrasted(
                options.pairs, work / "pairs.jsonl"),
             "adapter.name": "lora", "adapter.rank": 16, "train.steps": options.dpo_steps,
             "train.batch-size": 1, "train.seq-len": 512, "optim.lr": 1e-4, "loss.beta": 0.1,
             "data.holdout": 0.25, "eval.every": 80, "eval.on-start": True, "resume": True,
             **common}, "dpo")
        record: dict[str, Any] = {
            "benchmark": "finetune", "command": real.command_line(),
            "model": Path(base).name, "machine": environment(torch.device("cpu"))}
        for stage in ("sft", "dpo"):
            summary = json.loads((work / stage / "summary.json").read_text("utf-8"))
            record[stage] = {**curves(work / stage), "summary": summary,
                             "transformers_logit_difference": merged_logits(work / stage)}
    Path(options.out).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf-8")
    plot(record, Path(options.plot))
    first, last = (record["sft"]["evaluations"][place]["val_loss"] for place in (0, -1))
    print(f"sft: held-out loss {first:.4f} -> {last:.4f} ({last / first - 1:+.1%})")
    first, last = (record["dpo"]["evaluations"][place]["val_accuracy"] for place in (0, -1))
    print(f"dpo: held-out accuracy {first:.1%} -> {last:.1%}")


if __name__ == "__main__":
    main()
