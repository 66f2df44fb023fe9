"""A base of a few thousand weights, and rows to fine-tune it on."""

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import torch

from fastllm import cli
from fastllm.data import TokenizerConfig
from fastllm.data.tokenizer import Tokenizer, train_bpe
from fastllm.export import export
from fastllm.model import Decoder, ModelConfig

WORDS = ["red", "green", "blue", "white", "black", "north", "south", "east", "west", "one", "two",
         "three", "four", "five", "six", "seven", "eight", "nine", "ten", "up", "down", "left",
         "right"]
SHAPE = ModelConfig(vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)


def tokenizer() -> Tokenizer:
    """Byte-level BPE that knows the words, with ChatML's tokens."""
    return train_bpe([" ".join(WORDS)] * 4, TokenizerConfig(vocab_size=320))


@cache
def base() -> Path:
    """A Hugging Face folder of an untrained model; made once a process."""
    folder = Path(mkdtemp(prefix="fastllm-tests-")) / "base"
    model = Decoder(SHAPE, generator=torch.Generator().manual_seed(7))
    return export(model, folder, tokenizer=tokenizer())


def _sentence(number: int, count: int) -> str:
    return " ".join(WORDS[(number * 7 + place * 5) % len(WORDS)] for place in range(count))


def chats(folder: Path, count: int = 40) -> Path:
    """Conversations of one and two turns."""
    rows = []
    for number in range(count):
        turns = []
        for turn in range(1 + number % 2):
            turns += [{"role": "user", "content": _sentence(number + turn, 2)},
                      {"role": "assistant", "content": _sentence(3 * number + turn, 4)}]
        rows.append({"messages": turns})
    return _write(folder / "chats.jsonl", rows)


def pairs(folder: Path, count: int = 40) -> Path:
    """Pairs of which the chosen answer is always the same word, three times."""
    return _write(folder / "pairs.jsonl", [
        {"prompt": _sentence(number, 3), "chosen": "green green green",
         "rejected": _sentence(number + 1, 3)} for number in range(count)])


def judged(folder: Path, count: int = 40) -> Path:
    """Answers with a judgement: the same word is wanted, others are not."""
    return _write(folder / "judged.jsonl", [
        {"prompt": _sentence(number, 3), "label": number % 2 == 0,
         "completion": "green green green" if number % 2 == 0 else _sentence(number + 1, 3)}
        for number in range(count)])


def _write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def arguments(folder: Path, data: Path, **changes: object) -> list[str]:
    """Flags of a short run from the base on `data`: `**{"train.steps": 3}` changes or adds one."""
    flat = {"from": base(), "out": folder / "run", "data.path": data,
            "data.cache-dir": folder / "cache", "data.holdout": 0.1, "train.device": "cpu",
            "train.dtype": "fp32", "train.batch-size": 2, "train.seq-len": 64, "train.steps": 6,
            "optim.lr": 3e-3, "checkpoint.every": 3, "eval.every": 3, "eval.new-tokens": 4}
    flat |= changes
    return [word for key, value in flat.items() if value is not None
            for word in (f"--{key}", str(value))]


def run(verb: str, folder: Path, data: Path, **changes: object) -> dict:
    """One command; its summary."""
    assert cli.main([verb, *arguments(folder, data, **changes), "--debug"]) == 0
    out = Path(changes.get("out", folder / "run"))
    return json.loads((out / "summary.json").read_text("utf-8"))


def metrics(folder: Path) -> tuple[list[dict], list[dict]]:
    """The lines of a run's metrics: steps, evaluations."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return ([line for line in lines if "loss" in line],
            [line for line in lines if "val_loss" in line])
