"""Training speed on this CPU beside transformers' LlamaForCausalLM with torch's AdamW.

The same model (minimind-26m), initial weights, batches (8 x 340) and steps. Each contestant is a
process of its own, so that peak memory is its own; they take turns in blocks of steps within one
run, so that the machine's moods fall on all alike. Every step is forward, backward, clipping to
norm 1 and the update. The fp32 contestants also give their loss curves, which must agree.

    python bench/train.py [--steps 100] [--out bench/results/cpu-2core/train.json]
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BATCH, LENGTH, VOCAB, BLOCK, CLIP = 8, 340, 6400, 5, 1.0
# The rate rises to PEAK over all steps of the race. It is low on purpose: at a high one Adam
# amplifies rounding tenfold every dozen steps, and any two implementations part by that alone.
PEAK, WARMUP = 1e-4, 100
CONTESTANTS = {
    "transformers fp32": "LlamaForCausalLM, defaults",
    "fastllm fp32": "fp32 weights",
    "transformers bf16 autocast": "LlamaForCausalLM under torch.autocast(bfloat16)",
    "fastllm bf16": "bf16 weights, fp32 masters",
}
OURS = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100, help="of the fp32 contestants")
    parser.add_argument("--steps-bf16", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", default="bench/results/cpu-2core/train.json")
    parser.add_argument("--worker", choices=CONTESTANTS)
    parser.add_argument("--shared", help="folder with the weights and batches (of a worker)")
    options = parser.parse_args()
    if options.worker:
        work(options.worker, Path(options.shared), options.threads)
        return
    with tempfile.TemporaryDirectory() as shared:
        prepare(Path(shared), options.steps)
        results = race(shared, options)
    record = {
        "benchmark": "train", "command": " ".join(["python", *sys.argv]),
        "model": "minimind-26m", "batch": [BATCH, LENGTH], "threads": options.threads,
        **machine(), "contestants": results, "ratios": ratios(results),
    }
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    Path(options.out).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for name, value in record["ratios"].items():
        print(f"{name}: {value:.4g}")


def prepare(shared: Path, steps: int) -> None:
    """Initial weights in Hugging Face layout and batches of real text, for all contestants."""
    import torch
    from safetensors.torch import save_file

    from fastllm.config import build
    from fastllm.data.sources import DataConfig
    from fastllm.data.tokenizer import TokenizerConfig, train_tokenizer
    from fastllm.export import export
    from fastllm.model import Decoder, ModelConfig, shapes

    data = DataConfig(format="python-docs")
    tokenizer, _ = train_tokenizer(data, TokenizerConfig(vocab_size=VOCAB))
    from fastllm.data.accounting import Report
    from fastllm.data.sources import find_files, read_documents
    documents = list(read_documents(data, find_files(data, Report()), Report()))
    random.Random(0).shuffle(documents)
    ids: list[int] = []
    needed = steps * BATCH * LENGTH
    for document in documents:
        ids += [*tokenizer.encode(document.text), tokenizer.eos_id]
    ids = (ids * (needed // len(ids) + 1))[:needed]
    save_file({"ids": torch.tensor(ids).view(steps, BATCH, LENGTH)}, shared / "batches.safetensors")
    config = build(ModelConfig, shapes.minimind_26m())
    model = Decoder(config, generator=torch.Generator().manual_seed(0))
    export(model, shared / "model")


def race(shared: str, options: argparse.Namespace) -> dict:
    """Blocks of steps in turn until every contestant has run its own number of steps."""
    workers = {}
    for name in CONTESTANTS:
        command = [sys.executable, __file__, "--worker", name, "--shared", shared,
                   "--threads", str(options.threads)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
        workers[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         text=True, env=environment)
        ask(workers[name], 0)  # built before the next one starts
    results = {name: {"description": text, "seconds": [], "losses": []}
               for name, text in CONTESTANTS.items()}
    for start in range(0, options.steps, BLOCK):
        for name, worker in workers.items():
            if "bf16" in name and start >= options.steps_bf16:
                continue
            answer = ask(worker, BLOCK)
            results[name]["seconds"] += answer["seconds"]
            results[name]["losses"] += answer["losses"]
            results[name]["peak_memory_bytes"] = answer["peak_memory_bytes"]
        print(f"{start + BLOCK}/{options.steps} " + "  ".join(
            f"{name}: {statistics.median(r['seconds'][1:]):.3f} s" for name, r in results.items()),
            flush=True)
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    for result in results.values():
        # The first block warms allocators and kernels' own caches up.
        median = statistics.median(result["seconds"][BLOCK:] or result["seconds"])
        result["median_seconds"] = median
        result["tokens_per_second"] = BATCH * LENGTH / median
    return results


def ask(worker: subprocess.Popen, steps: int) -> dict:
    worker.stdin.write(f"{steps}\n")
    worker.stdin.flush()
    return json.loads(worker.stdout.readline())


def ratios(results: dict) -> dict[str, float]:
    """The figures that the README quotes; speed is tokens a second, ours over theirs."""
    theirs, ours = results["transformers fp32"], results["fastllm fp32"]
    theirs16, ours16 = results["transformers bf16 autocast"], results["fastllm bf16"]
    def speed(a: dict, b: dict) -> float:
        return a["tokens_per_second"] / b["tokens_per_second"]
    def memory(a: dict, b: dict) -> float:
        return a["peak_memory_bytes"] / b["peak_memory_bytes"]
    return {
        "speed: bf16 over transformers fp32": speed(ours16, theirs),
        "speed: bf16 over transformers bf16 autocast": speed(ours16, theirs16),
        "speed: fp32 over transformers fp32": speed(ours, theirs),
        "memory: bf16 over transformers fp32": memory(ours16, theirs),
        "memory: bf16 over transformers bf16 autocast": memory(ours16, theirs16),
        "memory: fp32 over transformers fp32": memory(ours, theirs),
        "loss: largest fp32 difference": max(
            abs(a - b) for a, b in zip(ours["losses"], theirs["losses"], strict=True)),
    }


def work(name: str, shared: Path, threads: int) -> None:
    """A contestant: builds its model, then runs as many steps as each line of stdin says."""
    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(threads)
    batches = load_file(shared / "batches.safetensors")["ids"]
    step = build_ours(name, shared) if name.startswith("fastllm") else build_peer(name, shared)
    at = 0
    for line in sys.stdin:
        seconds, losses = [], []
        for ids in batches[at:at + int(line)]:
            start = time.perf_counter()
            losses.append(step(ids))
            seconds.append(time.perf_counter() - start)
        at += int(line)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": seconds, "losses": losses, "peak_memory_bytes": peak}),
              flush=True)


def build_peer(name: str, shared: Path):
    """transformers with torch.optim.AdamW, as its users run it; returns step(ids) -> loss."""
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(shared / "model", dtype=torch.float32)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, betas=(0.9, 0.95), weight_decay=0.0)
    autocast = "bf16" in name
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / WARMUP))

    def step(ids):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def build_ours(name: str, shared: Path):
    """The trainer's own pieces: model, objective and optimizer; returns step(ids) -> loss."""
    import torch

    from fastllm.data.collate import Batch
    from fastllm.model import hf
    from fastllm.objectives import pretrain
    from fastllm.optim import AdamW, OptimConfig

    dtype = torch.bfloat16 if "bf16" in name else torch.float32
    model = hf.load(shared / "model", dtype=dtype)
    model.train()
    optimizer = AdamW(model.named_parameters(), OptimConfig(
        lr=PEAK, betas=(0.9, 0.95), weight_decay=0.0, grad_clip=CLIP))
    positions = torch.arange(LENGTH).expand(BATCH, LENGTH)
    rows = torch.arange(0, BATCH * LENGTH + 1, LENGTH, dtype=torch.int32)

    def step(ids):
        labels = torch.full_like(ids, -100)
        labels[:, :-1] = ids[:, 1:]
        batch = Batch(input_ids=ids, labels=labels, position_ids=positions, cu_seqlens=rows,
                      max_seqlen=LENGTH, num_tokens=BATCH * (LENGTH - 1))
        total, count = pretrain.loss(model, batch)
        loss = total / count
        loss.backward()
        norm = optimizer.step(PEAK * min(1, (optimizer.steps + 1) / WARMUP))
        for parameter in optimizer.parameters():
            parameter.grad = None
        optimizer.applied(bool(norm.isfinite()))
        return loss.item()

    return step


def machine() -> dict:
    """Where and with what this was measured."""
    import torch
    import transformers

    from fastllm.monitor import environment
    return {"machine": environment(torch.device("cpu")), "transformers": transformers.__version__}


if __name__ == "__main__":
    main()
