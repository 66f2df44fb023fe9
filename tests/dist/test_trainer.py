"""The trainer on several ranks: bitwise resume, other numbers of ranks, kills, signals, peers."""

import json
import random
import re
import signal
import sys
import time

import pytest
import torch
from rank_runs import sample_order, tiny_arguments

from fastllm import checkpoint

RUNS = "rank_runs"


def run_folder(folder):
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def pretrain(job, world, arguments, timeout=120):
    """One whole run of the command line; the codes must be 0."""
    one = job(world, None, "pretrain", *arguments)
    codes = one.codes(timeout)
    assert codes == [0] * world, one.text() + one.text(world - 1)
    return one


def resume_points(ranks, folder, stage, dtype, steps):
    world = 1 if stage is None else 2
    arguments = tiny_arguments(run_folder(folder), **{
        "train.steps": steps, "checkpoint.every": 1, "checkpoint.keep": steps + 1,
        "train.dtype": dtype, "dist.zero": stage or 0})
    found = ranks(world, f"{RUNS}:resume_everywhere", arguments, steps)
    assert len(set(found)) == 1
    return found[0]


@pytest.mark.parametrize("stage", [2, 3])
def test_resume_is_bitwise(ranks, tmp_path, stage):
    """Dropout on, micro-batches, masters: a step after a resume is the step without one."""
    assert resume_points(ranks, tmp_path, stage, "bf16", 4) == 3


@pytest.mark.battery
def test_resume_is_bitwise_at_eighty_points(ranks, tmp_path):
    """Every step of 20 for one rank and for stages 1 to 3 on two."""
    equal = sum(resume_points(ranks, tmp_path / str(stage), stage, "fp32", 21)
                for stage in (None, 1, 2, 3))
    assert equal == 80


def test_stages_train_to_the_same_state(job, tmp_path):
    """Weights, masters and states of stages 1 to 3, one micro-batch a step: the same hashes; and
    the export of stage 3, made from the checkpoint, is that of stage 1, to the byte; so are the
    texts that all ranks write together there."""
    hashes, exports, texts = [], [], []
    for stage in (1, 2, 3):
        folder = run_folder(tmp_path / str(stage))
        pretrain(job, 2, tiny_arguments(folder, **{
            "train.steps": 4, "train.grad_accum": 1, "train.dtype": "bf16", "dist.zero": stage,
            "eval.new_tokens": 4}))
        state = checkpoint.newest(folder / "run" / "checkpoints").state
        hashes.append(state["part_hashes"])
        exports.append((folder / "run" / "model" / "model.safetensors").read_bytes())
        summary = json.loads((folder / "run" / "summary.json").read_text())
        texts.append(summary["continuations"])
        assert summary["sent_bytes"] > 0
    assert hashes[0] == hashes[1] == hashes[2]
    assert exports[0] == exports[1] == exports[2]
    assert texts[0] == texts[1] == texts[2] != []


LEGS = ((1, 0), (2, 2), (4, 3), (1, 0))


def elastic(job, folder, seed):
    """Ranks 1 -> 2 -> 4 -> 1, the first three legs killed at a moment that the seed draws."""
    draw, steps = random.Random(seed), 24
    log = folder / "rows"
    resumed = []
    for leg, (world, stage) in enumerate(LEGS):
        last = leg == len(LEGS) - 1
        arguments = tiny_arguments(folder, **{
            "train.steps": steps, "train.batch_size": 2, "train.grad_accum": 4,
            "model.dropout": 0.0, "checkpoint.every": 2, "dist.zero": stage})
        one = job(world, f"{RUNS}:logged_pretrain",
                  ["pretrain", *arguments, *(["--resume"] if leg else [])], str(log))
        if not last:
            wanted = 4 + 6 * leg + 2 * draw.randrange(2)
            saved = wait_for_save(one, folder, wanted)
            time.sleep(draw.random() * 0.1)
            one.kill_all(signal.SIGKILL)
            one.codes()
            resumed.append(saved)
        else:
            assert one.values(120) == [0]
    return sample_order(log), checkpoint.newest(folder / "run" / "checkpoints")


def wait_for_save(one, folder, step, timeout=60.0):
    """Until the ranks have acknowledged a checkpoint of `step` or later; its step."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        found = acknowledged(one)
        if found >= step:
            return found
        assert all(one.forge.wait(pid, 0) is None for pid in one.pids), one.text()
        time.sleep(0.01)
    raise AssertionError(one.text())


def acknowledged(one):
    """The newest step that the first rank said it saved."""
    return max(map(int, re.findall(r"^step (\d+): saved", one.text(), re.MULTILINE)), default=0)


def compare_elastic(job, folder, seeds):
    alone = run_folder(folder / "alone")
    arguments = tiny_arguments(alone, **{
        "train.steps": 24, "train.batch_size": 2, "train.grad_accum": 4, "model.dropout": 0.0,
        "checkpoint.every": 24})
    assert job(1, f"{RUNS}:logged_pretrain", ["pretrain", *arguments],
               str(alone / "rows")).values() == [0]
    order = sample_order(alone / "rows")
    expected = checkpoint.newest(alone / "run" / "checkpoints").tensors("model")
    assert sorted(order) == list(range(1, 25))
    for seed in seeds:
        found, last = elastic(job, run_folder(folder / str(seed)), seed)
        assert found == order
        for name, weight in last.tensors("model").items():
            assert (weight - expected[name]).norm() <= 1e-6 * expected[name].norm()


def test_other_numbers_of_ranks_take_the_same_samples(job, tmp_path):
    compare_elastic(job, tmp_path, [0])


@pytest.mark.battery
def test_ten_elastic_runs(job, tmp_path):
    compare_elastic(job, tmp_path, range(1, 10))


def test_fp64_weights_over_changing_ranks(ranks, tmp_path):
    """1 -> 2 -> 4 -> 1 ranks of an own loop: up to the order of summation, 1e-12."""
    ranks(1, f"{RUNS}:fp64_leg", str(tmp_path / "alone"), 0, 0, 20)
    for world, stage, first, last in ((1, 1, 0, 5), (2, 2, 5, 10), (4, 3, 10, 15), (1, 3, 15, 20)):
        ranks(world, f"{RUNS}:fp64_leg", str(tmp_path / "many"), stage, first, last)
    alone = checkpoint.newest(tmp_path / "alone")
    many = checkpoint.newest(tmp_path / "many")
    for part in ("model", "momentum"):
        for name, tensor in alone.tensors(part).items():
            assert tensor.dtype == torch.float64
            assert (many.tensor(part, name) - tensor).norm() <= 1e-12 * max(tensor.norm(), 1)


def faults(job, folder, trials, stages=(1, 2, 3)):
    """One run that is stopped again and again; nothing that was acknowledged is lost.

    trials: (kind, seed) with kind "all" (SIGKILL of the job), "one" (of a rank) or "term".
    """
    kept = 0
    for number, (kind, seed) in enumerate(trials):
        draw = random.Random(f"{kind}/{seed}")
        arguments = tiny_arguments(folder, **{
            "train.steps": 100_000, "checkpoint.every": 2, "dist.zero": stages[number % 3]})
        one = job(2, None, "pretrain", *arguments, *(["--resume"] if number else []))
        wait_for_save(one, folder, kept + 2)
        time.sleep(draw.random() * 0.15)
        victim = draw.randrange(2)
        if kind == "all":
            one.kill_all()
        elif kind == "one":
            one.kill(victim)
        else:
            one.kill_all(signal.SIGTERM)
        codes = one.codes(60)
        if number:
            resumed = int(re.search(r"resuming .* at step (\d+)", one.text())[1])
            assert resumed >= kept, "an acknowledged save was lost"
        kept = acknowledged(one)
        if kind == "all":
            assert codes == [-9, -9]
        elif kind == "one":
            assert codes[victim] == -9 and codes[1 - victim] == 1, one.text(1 - victim)
            assert "the run failed" in one.text(1 - victim)
            assert "Traceback" not in one.text(1 - victim)
        else:
            assert codes == [0, 0], one.text() + one.text(1)
            last = int(re.search(r"stopped by .* after step (\d+)", one.text())[1])
            assert last == kept  # the step that the signal fell into is saved


def test_kills_and_signals_lose_nothing(job, tmp_path):
    faults(job, run_folder(tmp_path), [("all", 0), ("one", 0), ("term", 0)])


@pytest.mark.battery
def test_eighty_kills_and_signals(job, tmp_path):
    """40 SIGKILLs of the job, 20 of one rank, 20 SIGTERMs, one run after another."""
    trials = [("all", n) for n in range(40)] + [("one", n) for n in range(20)] \
        + [("term", n) for n in range(20)]
    random.Random(0).shuffle(trials)
    faults(job, run_folder(tmp_path), trials)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", 0, 2, 3])
def test_our_model_under_every_wrapper(ranks, tmp_path, kind):
    """torch's DDP and FSDP2, and our engine: the losses of one process."""
    arguments = tiny_arguments(run_folder(tmp_path))
    one = ranks(1, f"{RUNS}:peers", None, arguments)[0]
    two = ranks(2, f"{RUNS}:peers", kind, arguments)
    assert one[0] > one[-1]
    assert two[0] == two[1] == pytest.approx(one, rel=1e-5)


@pytest.mark.battery
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts memory in /proc")
def test_four_ranks_train_what_one_cannot_hold(job):
    """Weights, gradients and states of 16 bytes an element: 800 MB and more, where a process may take 800."""
    one = job(1, f"{RUNS}:under_a_limit", 800, 3)
    # Which allocation fails is chance: torch's, C++'s, or one of glibc's own, which aborts.
    assert one.codes(60)[0] in (1, -6)
    assert any(words in one.text() for words in ("emory", "bad_alloc"))
    for losses, numel in job(4, f"{RUNS}:under_a_limit", 800, 3).values(90):
        assert 16 * numel > 760e6
        assert losses[-1] < losses[0]
