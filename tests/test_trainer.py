"""fastllm.trainer: token-weighted accumulation, the finite gate, signals, bitwise resume."""

import json
import os
import signal

import pytest
import tiny
import torch

from fastllm import checkpoint, config, run
from fastllm.config import RunError, UserError
from fastllm.optim import OPTIMIZERS
from fastllm.run import stages
from fastllm.trainer import MAX_SKIPPED_IN_A_ROW, TrainConfig


def settings(folder, **changes):
    layer = config.from_arguments(tiny.arguments(folder, **changes))
    return config.build(run.RunConfig, run.complete(layer))


def final_hash(folder):
    """The hash of everything a finished run's last checkpoint holds."""
    return checkpoint.load(checkpoint.steps(folder / "run" / "checkpoints")[-1]).state["state_hash"]


def make(folder, **changes):
    """A run with its parts built and its folder made, not yet trained."""
    chosen = settings(folder, **changes)
    run.open_folder(folder / "run", resume=False)
    prepared = run.prepare_data(chosen.data, chosen.tokenizer,
                                vocab_size=chosen.model.vocab_size)
    dtype = run.DTYPES[chosen.train.dtype] if chosen.train.dtype != "auto" else torch.float32
    return run.Run(chosen, folder / "run", torch.device("cpu"), dtype, prepared)


def step_gradients(folder, **changes):
    """The first step's gradients, as the optimizer receives them."""
    built = make(folder, **{"model.dropout": 0.0, "train.dtype": "fp32", **changes})
    seen = {}
    optimizer = built.trainer.optimizer
    original = optimizer.step

    def step(lr, gradients, **options):
        seen["gradients"] = [gradient.clone() for gradient in gradients]
        return original(lr, gradients, **options)

    optimizer.step = step
    built.trainer._batches = iter(built.loader)
    seen["record"] = built.trainer.step()
    built.loader.close()
    return seen


def test_accumulation_is_weighted_by_tokens(tmp_path):
    """1 x 8, 2 x 4 and 8 x 1 rows are one step: rows differ in their number of trained tokens."""
    splits = {}
    for batch, accum in ((8, 1), (4, 2), (1, 8)):
        (tmp_path / f"{batch}").mkdir()
        splits[batch] = step_gradients(tmp_path / f"{batch}", **{
            "train.batch_size": batch, "train.grad_accum": accum, "data.pack": "false"})
    whole = splits[8]
    for batch in (4, 1):
        assert splits[batch]["record"]["loss"] == pytest.approx(whole["record"]["loss"], rel=1e-6)
        assert splits[batch]["record"]["tokens"] == whole["record"]["tokens"]
        for a, b in zip(whole["gradients"], splits[batch]["gradients"], strict=True):
            assert (a - b).norm() <= 2e-6 * a.norm() + 1e-12


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_resume_is_bitwise_at_every_checkpoint(tmp_path, dtype):
    """Dropout on, micro-batches, an epoch's end on the way: N + M steps equal N, then M."""
    changes = {"train.dtype": dtype, "checkpoint.every": 1, "eval.every": 5, "train.steps": 8}
    whole = tmp_path / "whole"
    whole.mkdir()
    run.train(settings(whole, **changes))
    expected = final_hash(whole)
    for stop in (1, 3, 6):
        part = tmp_path / f"part-{stop}"
        part.mkdir()
        first = make(part, **changes)
        first.total_steps = first.trainer.total_steps
        interrupted(first, stop)
        run.train(settings(part, **changes, resume="true"))
        assert final_hash(part) == expected, f"stopped after step {stop}"
        lines = [json.loads(line) for line in
                 (part / "run" / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - {"adamw"}))
def test_every_optimizer_resumes_bitwise(tmp_path, name):
    changes = {"optim.name": name, "train.dtype": "bf16", "checkpoint.every": 2, "eval.every": 0,
               "train.steps": 4, "model.hidden_size": 64}
    hashes = []
    for stop in (None, 2):
        folder = tmp_path / str(stop)
        folder.mkdir()
        if stop:
            interrupted(make(folder, **changes), stop)
        run.train(settings(folder, **changes, **({"resume": "true"} if stop else {})))
        hashes.append(final_hash(folder))
    assert hashes[0] == hashes[1]


def test_eight_bit_moments_train_as_well(tmp_path):
    """Mean loss of the last twenty of 150 steps within 1 % of fp32 moments'."""
    losses = {}
    for name in ("adamw", "adamw8bit"):
        (tmp_path / name).mkdir()
        built = make(tmp_path / name, **{
            "optim.name": name, "model.hidden_size": 64, "model.intermediate_size": 128,
            "model.dropout": 0.0, "train.dtype": "fp32", "train.steps": 150, "train.grad_accum": 1})
        built.trainer._batches = iter(built.loader)
        records = [built.trainer.step() for _ in range(150)]
        built.loader.close()
        losses[name] = sum(record["loss"] for record in records[-20:]) / 20
        assert losses[name] < 0.8 * records[0]["loss"]
    coded = [states for states in built.trainer.optimizer.states if "exp_avg_scale" in states]
    assert len(coded) > len(built.trainer.optimizer.states) / 2
    assert losses["adamw8bit"] == pytest.approx(losses["adamw"], rel=0.01)


def interrupted(built, stop):
    """Run until SIGTERM arrives in step `stop`."""
    original = built.trainer.step

    def step():
        if built.trainer.progress.step == stop - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original()

    built.trainer.step = step
    summary = built.go(None)
    assert summary["stopped_by"] == "SIGTERM"
    assert summary["steps"] == stop
    assert not summary["finished"]


def test_sigint_saves_and_the_handlers_are_put_back(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    built = make(tmp_path)
    original = built.trainer.step

    def step():
        os.kill(os.getpid(), signal.SIGINT)
        return original()

    built.trainer.step = step
    assert built.go(None)["stopped_by"] == "SIGINT"
    assert signal.getsignal(signal.SIGINT) is before
    assert checkpoint.newest(tmp_path / "run" / "checkpoints").step == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_non_finite_step_changes_nothing(tmp_path, bad, dtype):
    built = make(tmp_path, **{"train.dtype": dtype})
    trainer = built.trainer
    trainer._batches = iter(built.loader)
    trainer.step()
    tensors, counters = trainer.optimizer.state_dict()
    before = checkpoint.digest({"model": dict(built.model.named_parameters()), "optim": tensors})
    good = trainer.loss
    trainer.loss = lambda model, batch: (good(model, batch)[0] * bad, batch.num_tokens)
    record = trainer.step()
    built.loader.close()
    assert record["skipped"]
    tensors, after = trainer.optimizer.state_dict()
    assert checkpoint.digest({"model": dict(built.model.named_parameters()),
                              "optim": tensors}) == before
    assert after == counters
    assert trainer.progress.skipped == 1
    assert trainer.progress.step == 2


def test_a_run_that_never_recovers_ends(tmp_path):
    built = make(tmp_path, **{"train.steps": 100})
    good = built.trainer.loss
    built.trainer.loss = lambda model, batch: (good(model, batch)[0] * float("nan"),
                                               batch.num_tokens)
    with pytest.raises(RunError, match=f"{MAX_SKIPPED_IN_A_ROW} steps in a row"):
        built.go(None)


def test_fp16_scale_falls_on_overflow_and_the_run_goes_on(tmp_path):
    built = make(tmp_path, **{"train.dtype": "fp16"})
    built.trainer.scaler.scale = 2.0**40
    built.trainer._batches = iter(built.loader)
    records = [built.trainer.step() for _ in range(3)]
    built.loader.close()
    assert records[0]["skipped"]
    assert built.trainer.scaler.scale < 2.0**40


def test_activation_checkpointing_gives_the_same_bits(tmp_path):
    hashes = set()
    for recompute in ("none", "selective", "full"):
        (tmp_path / recompute).mkdir()
        run.train(settings(tmp_path / recompute, **{"model.recompute": recompute,
                                                       "train.steps": 4, "train.dtype": "fp32"}))
        hashes.add(final_hash(tmp_path / recompute))
    assert len(hashes) == 1


def test_workers_do_not_change_a_bit(tmp_path):
    hashes = set()
    for workers in (0, 2):
        (tmp_path / str(workers)).mkdir()
        run.train(settings(tmp_path / str(workers), **{"data.num_workers": workers,
                                                          "train.steps": 4}))
        hashes.add(final_hash(tmp_path / str(workers)))
    assert len(hashes) == 1


def test_best_checkpoint_is_kept(tmp_path):
    """The rate is far too high: the loss rises after the first evaluation, whose step stays."""
    run.train(settings(tmp_path, **{
        "train.steps": 24, "eval.every": 3, "checkpoint.every": 3, "optim.lr": 0.5,
        "schedule.name": "constant", "schedule.warmup": 0, "train.dtype": "fp32"}))
    lines = [json.loads(line) for line in
             (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    best = min((line for line in lines if "val_loss" in line), key=lambda line: line["val_loss"])
    kept = [int(path.name.split("-")[1]) for path in
            checkpoint.steps(tmp_path / "run" / "checkpoints")]
    assert kept == sorted({best["step"], 21, 24})


def test_epochs_cover_the_documents(tmp_path):
    built = make(tmp_path, **{"train.steps": "none", "train.epochs": 2, "train.batch_size": 2,
                              "train.grad_accum": 1, "model.dropout": 0.0})
    rows = built.loader.rows_per_epoch
    built.loader.close()
    assert built.total_steps == -(-2 * rows // 2)


def test_both_steps_and_epochs_are_refused():
    with pytest.raises(ValueError, match=r"train\.steps and train\.epochs"):
        TrainConfig(steps=1, epochs=1).validate()


def test_a_checkpoint_of_another_dtype_is_refused(tmp_path):
    run.train(settings(tmp_path, **{"train.steps": 1, "train.dtype": "fp32"}))
    with pytest.raises(UserError, match="dtype"):
        run.train(settings(tmp_path, **{"train.steps": 2, "train.dtype": "bf16",
                                           "resume": "true"}))


def test_the_last_step_is_evaluated_once(tmp_path, monkeypatch):
    """The summary takes the last step's evaluation; a run resumed at its end makes its own."""
    calls = []
    evaluate = stages.evaluate
    monkeypatch.setattr(stages, "evaluate", lambda *a, **k: calls.append(1) or evaluate(*a, **k))
    first = run.train(settings(tmp_path, **{"train.steps": 4, "eval.every": 2}))
    assert len(calls) == 2
    again = run.train(settings(tmp_path, **{"train.steps": 4, "eval.every": 2,
                                               "resume": "true"}))
    assert len(calls) == 3
    assert again["val_bpb"] == first["val_bpb"]
