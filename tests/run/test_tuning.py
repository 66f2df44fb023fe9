"""The stages after pretraining, from the command line to the model that loads elsewhere."""

import json
import math

import pytest
import torch
import tuned

from fastllm import checkpoint, cli
from fastllm.run import find_base, open_model, stages
from fastllm.trainer import Trainer

STAGES = {
    "sft": ("sft", tuned.chats, {}),
    "lora": ("sft", tuned.chats, {"adapter.name": "lora", "adapter.rank": 4,
                                  "adapter.dropout": 0.1}),
    "neftune": ("sft", tuned.chats, {"loss.neftune-alpha": 5}),
    "dpo": ("dpo", tuned.pairs, {}),
    "dpo-lora": ("dpo", tuned.pairs, {"adapter.name": "lora", "adapter.rank": 4}),
    "ipo": ("dpo", tuned.pairs, {"loss.name": "ipo"}),
    "kto": ("dpo", tuned.judged, {"loss.name": "kto"}),
    "orpo": ("dpo", tuned.pairs, {"loss.name": "orpo"}),
    "simpo": ("dpo", tuned.pairs, {"loss.name": "simpo"}),
    "reward": ("reward", tuned.pairs, {}),
}


def last_hash(run):
    return checkpoint.load(checkpoint.steps(run / "checkpoints")[-1]).state["state_hash"]


def error(capsys, *words):
    """The one line of a command that is refused."""
    assert cli.main([str(word) for word in words]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_learns_and_resumes_to_the_bit(tmp_path, stage):
    """N + M steps are N and then M, with data in pairs, references, adapters and noise too."""
    verb, make, changes = STAGES[stage]
    data = make(tmp_path)
    summary = tuned.run(verb, tmp_path, data, **changes)
    steps, evals = tuned.metrics(tmp_path / "run")
    assert summary["finished"] and len(steps) == 6 and [e["step"] for e in evals] == [3, 6]
    assert all(math.isfinite(step["loss"]) for step in steps)
    assert evals[-1]["val_loss"] < evals[0]["val_loss"]
    if STAGES[stage][0] != "sft":
        assert {"accuracy", "margin"} <= steps[-1].keys() and steps[-1]["accuracy"] <= 1
    if stage in ("dpo", "dpo-lora"):
        assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert evals[-1]["val_accuracy"] == 1.0 and evals[-1]["val_margin"] > 0

    part = tmp_path / "part"
    tuned.run(verb, tmp_path, data, **changes, out=part, **{"train.steps": 6})
    # As a run that was stopped after its first checkpoint would stand.
    later = checkpoint.steps(part / "checkpoints")[1:]
    for folder in later:
        checkpoint.reading.files.remove_tree(folder)
    tuned.run(verb, tmp_path, data, **changes, out=part, resume="true")
    assert last_hash(part) == last_hash(tmp_path / "run")


@pytest.mark.battery
def test_compiled_steps_are_the_steps(tmp_path):
    """torch.compile with its own code generator, which takes a while."""
    data = tuned.chats(tmp_path)
    tuned.run("sft", tmp_path, data, **{"train.steps": 3})
    tuned.run("sft", tmp_path, data, out=tmp_path / "compiled",
              **{"train.steps": 3, "train.compile": "true"})
    plain, compiled = (tuned.metrics(tmp_path / name)[0] for name in ("run", "compiled"))
    assert [step["loss"] for step in compiled] == pytest.approx(
        [step["loss"] for step in plain], rel=1e-4)


def test_sft_overfits_what_it_sees(tmp_path):
    """32 conversations: the loss of their answers goes to nothing."""
    data = tuned.chats(tmp_path, 32)
    tuned.run("sft", tmp_path, data, **{"train.steps": 240, "train.batch-size": 8,
                                        "optim.lr": 1e-2, "data.holdout": 0, "eval.every": 0,
                                        "checkpoint.every": 240})
    steps, _ = tuned.metrics(tmp_path / "run")
    assert steps[0]["loss"] > 5 and steps[-1]["loss"] < 0.02
    model, tokenizer, _ = open_model(str(tmp_path / "run"), device=torch.device("cpu"))
    from fastllm.data.chat import ChatConfig, ChatEncoder
    from fastllm.generate import GenerateConfig, generate

    encoder = ChatEncoder(tokenizer, ChatConfig())
    row = json.loads(data.read_text().splitlines()[0])["messages"]
    ids = encoder.prompt(row[:1])
    written, = generate(model, [ids], GenerateConfig(max_new_tokens=30, temperature=0),
                        eos_token_ids=encoder.stop_ids)
    assert tokenizer.decode(written) == row[1]["content"]
    assert written[-1] == tokenizer.token_id("<|im_end|>")  # an answer ends


def test_the_result_is_a_chat_model_elsewhere(tmp_path):
    transformers = pytest.importorskip("transformers")
    tuned.run("sft", tmp_path, tuned.chats(tmp_path), **{"adapter.name": "lora"})
    run = tmp_path / "run"
    words = transformers.AutoTokenizer.from_pretrained(run / "model")
    from fastllm.data.chat import ChatConfig, ChatEncoder

    ours, tokenizer, base = open_model(str(run), device=torch.device("cpu"))
    messages = [{"role": "user", "content": "red green"}]
    ids = ChatEncoder(tokenizer, ChatConfig()).prompt(messages)
    assert words.apply_chat_template(messages, add_generation_prompt=True,
                                     return_dict=False) == ids
    theirs = transformers.AutoModelForCausalLM.from_pretrained(run / "model").eval()
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours(torch.tensor([ids]))),
                                   theirs(torch.tensor([ids])).logits, rtol=1e-5, atol=1e-5)
    end = tokenizer.token_id("<|im_end|>")
    assert end in base.stop_ids() and end in theirs.generation_config.eos_token_id
    # The adapter's folder gives the same model on its base.
    beside, _, _ = open_model(str(run / "adapter"), device=torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(beside.logits(beside(torch.tensor([ids]))),
                                   ours.logits(ours(torch.tensor([ids]))), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("verb", "make", "changes"), [
    ("sft", tuned.chats, {"adapter.name": "qlora", "adapter.block-size": 32}),
    ("sft", tuned.chats, {"adapter.name": "prefix", "train.dtype": "bf16"}),
    ("dpo", tuned.pairs, {"adapter.name": "dora"}),
    ("reward", tuned.pairs, {})], ids=["qlora", "prefix", "dora", "reward"])
def test_a_run_begins_with_what_it_will_hold(tmp_path, capsys, verb, make, changes):
    """The states are compared to what the optimizer holds, or the run would have failed."""
    tuned.run(verb, tmp_path, make(tmp_path), **changes, **{
        "train.steps": 1, "eval.every": 0, "checkpoint.every": 1})
    line, = [line for line in capsys.readouterr().out.splitlines() if "predicted" in line]
    assert ("trained weights" in line and "frozen weights" in line) == (verb != "reward")
    assert " states " in line and "activations" in line


@pytest.mark.parametrize(("verb", "make"), [("sft", tuned.chats), ("dpo", tuned.pairs),
                                            ("reward", tuned.pairs)])
def test_the_plan_is_of_the_batches_that_come(tmp_path, monkeypatch, verb, make):
    """Their positions, exactly; their documents, about; and no longer one than is said."""
    seen, planned = [], []
    monkeypatch.setattr(stages.Stage, "micro_batch", lambda stage, prepared, of=(
        stages.Stage.micro_batch): planned.append(of(stage, prepared)) or planned[-1])
    monkeypatch.setattr(Trainer, "step", lambda trainer, of=Trainer.step: seen.append(
        trainer.loader.packed.batch(trainer.loader.rows_at(0))) or of(trainer))
    tuned.run(verb, tmp_path, make(tmp_path), **{"train.steps": 1, "eval.every": 0,
                                                 "checkpoint.every": 1})
    batch, said = seen[0], planned[0]
    assert batch.input_ids.numel() == said.tokens and batch.max_seqlen <= said.longest
    assert 0.6 < said.documents / (len(batch.cu_seqlens) - 1) < 1.6


def test_prompt_tuning_leaves_an_adapter_and_no_merged_model(tmp_path, capsys):
    tuned.run("sft", tmp_path, tuned.chats(tmp_path), **{
        "adapter.name": "prompt", "adapter.virtual-tokens": 3, "optim.lr": 0.3})
    run = tmp_path / "run"
    assert (run / "adapter" / "adapter_config.json").is_file() and not (run / "model").exists()
    capsys.readouterr()
    assert cli.main(["generate", str(run), "--prompt", "red", "--max-new-tokens", "3",
                     "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("red")
    assert "cannot be merged" in error(capsys, "merge", run, "--out", tmp_path / "merged")


def test_merge_writes_the_model_that_the_run_wrote(tmp_path, capsys):
    tuned.run("sft", tmp_path, tuned.chats(tmp_path), **{"adapter.name": "dora"})
    out = tmp_path / "merged"
    assert cli.main(["merge", str(tmp_path / "run" / "adapter"), "--out", str(out)]) == 0
    assert "largest difference of a logit" in capsys.readouterr().out
    weights = "model.safetensors"
    assert (out / weights).read_bytes() == (tmp_path / "run" / "model" / weights).read_bytes()
    assert cli.main(["merge", str(tmp_path / "run" / "adapter"), "--out", str(tmp_path / "m2"),
                     "--bound", "1e-12"]) == 1
    assert "nothing is written" in capsys.readouterr().err and not (tmp_path / "m2").exists()
    assert "is not an adapter" in error(capsys, "merge", tuned.base(), "--out", tmp_path / "m3")


def test_the_reference_is_computed_once(tmp_path, capsys):
    data = tuned.pairs(tmp_path)
    tuned.run("dpo", tmp_path, data)
    assert "reference log-probabilities: computed once" in capsys.readouterr().out
    tuned.run("dpo", tmp_path, data, out=tmp_path / "again")
    assert "reference log-probabilities: from" in capsys.readouterr().out
    # Damaged values are noticed, another model has its own.
    folder, = (tmp_path / "cache").glob("reference-*[0-9a-f]")
    raw = bytearray((folder / "values.npy").read_bytes())
    raw[-1] ^= 1
    (folder / "values.npy").write_bytes(raw)
    tuned.run("dpo", tmp_path, data, out=tmp_path / "third")
    assert "computed once" in capsys.readouterr().out
    tuned.run("dpo", tmp_path, data, **{"from": tmp_path / "run", "out": tmp_path / "fourth"})
    assert "computed once" in capsys.readouterr().out
    firsts = [tuned.metrics(tmp_path / name)[0][0]["loss"]
              for name in ("run", "again", "third", "fourth")]
    assert firsts == pytest.approx([math.log(2)] * 4, abs=1e-6)


def test_another_reference_moves_the_beginning(tmp_path):
    data = tuned.pairs(tmp_path)
    tuned.run("dpo", tmp_path, data)
    tuned.run("dpo", tmp_path, data, out=tmp_path / "b", **{"from": tmp_path / "run",
                                                            "reference": tuned.base()})
    first = tuned.metrics(tmp_path / "b")[0][0]["loss"]
    assert first < math.log(2) - 0.05  # it begins where the first run ended


def test_a_loss_that_stays_at_ln_2_is_said(tmp_path, capsys):
    """MiniMind's learning rate for DPO, which its users report."""
    tuned.run("dpo", tmp_path, tuned.pairs(tmp_path), **{
        "train.steps": 60, "optim.lr": 4e-8, "eval.every": 0, "checkpoint.every": 60})
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert len(warnings) == 1 and "still ln 2" in warnings[0] and "--optim.lr" in warnings[0]


def test_early_stopping_takes_the_best_weights(tmp_path, capsys):
    """A rate that wrecks the model: the best evaluation is an early one, and its weights win."""
    changes = {"train.steps": 60, "optim.lr": 0.5, "eval.every": 2, "eval.patience": 2,
               "eval.load-best": "true", "checkpoint.every": 2, "schedule.warmup": 10}
    summary = tuned.run("sft", tmp_path, tuned.chats(tmp_path), **changes)
    out = capsys.readouterr().out
    steps, evals = tuned.metrics(tmp_path / "run")
    best = min(evals, key=lambda record: record["val_loss"])
    assert summary["ended_early"] and summary["finished"] and len(steps) < 60
    assert summary["best_step"] == best["step"] < steps[-1]["step"] == best["step"] + 4
    assert "no better for 2 evaluations" in out and "are the best: taken" in out
    assert summary["val_loss"] == pytest.approx(best["val_loss"], rel=1e-6)
    saved = checkpoint.load(tmp_path / "run" / "checkpoints" / f"step-{best['step']:08d}")
    model, _, _ = open_model(str(tmp_path / "run"), device=torch.device("cpu"))
    assert torch.equal(model.embed_tokens.weight, saved.tensor("model", "embed_tokens.weight"))
    # It is over: resuming trains no further.
    again = tuned.run("sft", tmp_path, tuned.chats(tmp_path), **changes, resume="true")
    assert again["steps"] == summary["steps"]


def test_an_evaluation_before_the_first_step(tmp_path):
    tuned.run("dpo", tmp_path, tuned.pairs(tmp_path), **{"eval.on-start": "true"})
    _, evals = tuned.metrics(tmp_path / "run")
    assert [record["step"] for record in evals] == [0, 3, 6]
    assert evals[0]["val_loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_a_reward_model_loads_elsewhere(tmp_path):
    transformers = pytest.importorskip("transformers")
    summary = tuned.run("reward", tmp_path, tuned.pairs(tmp_path))
    assert summary["val_accuracy"] == 1.0
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "run" / "model")
    assert theirs.config.num_labels == 1


@pytest.mark.parametrize(("verb", "make", "changes", "words"), [
    ("sft", tuned.chats, {"from": None}, ["--from MODEL is missing"]),
    ("sft", tuned.chats, {"from": "nowhere"}, ["no such model: nowhere", ".gguf"]),
    ("sft", tuned.chats, {"model.hidden-size": 64},
     ["model.hidden-size is 64", "has 32", "leave it out"]),
    ("sft", tuned.chats, {"train.seq-len": 4096}, ["train.seq-len 4096 is longer"]),
    ("sft", tuned.pairs, {}, ["pairs.jsonl:1"]),
    ("dpo", tuned.chats, {}, ["chats.jsonl:1"]),
    ("sft", tuned.chats, {"adapter.name": "lora", "dist.zero": 3}, ["use dist.zero 2"]),
    ("sft", tuned.chats, {"adapter.virtual-tokens": 3, "adapter.name": "lora"},
     ["adapter.virtual-tokens"]),
    ("reward", tuned.pairs, {"adapter.name": "lora"}, ["does not go with `reward`"]),
    ("dpo", tuned.pairs, {"loss.name": "orpo", "reference": "x"}, ["--reference", "orpo"]),
    ("dpo", tuned.pairs, {"loss.gamma": 1}, ["loss.gamma", "simpo"]),
    ("dpo", tuned.pairs, {"data.truncation": "split"}, ["split does not go with preference"]),
    ("sft", tuned.chats, {"data.truncation": "error", "train.seq-len": 8},
     ["longer than train.seq-len 8", "chats.jsonl"]),
    ("sft", tuned.chats, {"eval.every": 0, "eval.patience": 2}, ["eval.patience"]),
    ("sft", tuned.chats, {"eval.load-best": "true", "checkpoint.best": "false"},
     ["eval.load-best", "checkpoint.best"]),
    ("sft", tuned.chats, {"chat.template": "nothing.jinja"}, ["nothing.jinja"]),
])
def test_mistakes_are_one_line(tmp_path, capsys, verb, make, changes, words):
    said = error(capsys, verb, *tuned.arguments(tmp_path, make(tmp_path), **changes))
    assert len(said.strip().splitlines()) == 1
    for word in words:
        assert word in said


def test_a_run_of_another_base_does_not_resume(tmp_path, capsys):
    data = tuned.chats(tmp_path)
    changes = {"adapter.name": "lora", "adapter.rank": 4}
    tuned.run("sft", tmp_path, data, **changes)
    tuned.run("sft", tmp_path, data, out=tmp_path / "other")
    said = error(capsys, "sft", *tuned.arguments(tmp_path, data, **changes, **{
        "from": tmp_path / "other", "resume": "true", "train.steps": 9}))
    assert "another base" in said


class TestFrom:
    def test_continued_pretraining_warms_up_again(self, tmp_path):
        text = tmp_path / "text.txt"
        text.write_text("\n\n".join(" ".join(tuned.WORDS[n % 9:] * 2) for n in range(36)))
        flags = {"data.holdout": 0.2, "data.txt-documents": "blank-line", "schedule.warmup": 4,
                 "train.seq-len": 32}
        tuned.run("pretrain", tmp_path, text, **flags)
        first, evals = tuned.metrics(tmp_path / "run")
        tuned.run("pretrain", tmp_path, text, **flags, out=tmp_path / "next",
                  **{"from": tmp_path / "run"})
        again, _ = tuned.metrics(tmp_path / "next")
        assert [step["lr"] for step in again] == [step["lr"] for step in first]
        assert again[0]["lr"] < again[1]["lr"] < again[2]["lr"] < again[3]["lr"]
        # It goes on from where the first one ended, not from new weights.
        assert again[0]["loss"] == pytest.approx(evals[-1]["val_loss"], rel=0.1)
        assert again[0]["loss"] < first[0]["loss"] - 0.3

    def test_a_run_that_was_stopped_is_a_base(self, tmp_path):
        tuned.run("sft", tmp_path, tuned.chats(tmp_path))
        checkpoint.reading.files.remove_tree(tmp_path / "run" / "model")
        base = find_base(tmp_path / "run")
        saved = checkpoint.load(checkpoint.steps(tmp_path / "run" / "checkpoints")[-1])
        built = dict(base.build(None).named_parameters())
        for name, tensor in saved.stream("model"):
            assert torch.equal(built[name], tensor)
