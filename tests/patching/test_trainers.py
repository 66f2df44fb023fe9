"""Patched models inside transformers.Trainer and TRL, and the examples as they stand."""

import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDS = {"patch_llama": ("transformers",), "trainer": ("transformers", "accelerate"),
         "sft_trl": ("trl", "peft", "datasets"), "torch_loop": ()}

pytest.importorskip("transformers")
import families  # noqa: E402

import fastllm  # noqa: E402


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_example(name, capsys):
    for package in NEEDS[name]:
        pytest.importorskip(package)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert capsys.readouterr().out


def losses_of(tmp_path, patched, family="llama", **options):
    """Training losses by step, and the evaluation's, by transformers.Trainer."""
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model = families.build(family)
    if patched:
        fastllm.patch(model)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(32):
        ids = torch.randint(3, families.VOCAB, (12,), generator=generator)
        labels = ids.clone()
        labels[:i % 7] = -100  # micro-batches of unequal numbers of trained tokens
        rows.append({"input_ids": ids, "labels": labels})
    trainer = Trainer(model, TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=3,
        learning_rate=1e-2, logging_steps=1, report_to="none", save_strategy="no", use_cpu=True,
        disable_tqdm=True, **options), train_dataset=rows, eval_dataset=rows[:6])
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    evaluated = trainer.evaluate()["eval_loss"]
    predicted = trainer.predict(rows[:2]).predictions
    predicted = predicted if isinstance(predicted, tuple) else (predicted,)
    assert any(array.shape == (2, 12, families.VOCAB) for array in predicted)
    return [*logged, evaluated]


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt2"])
def test_trainer_logs_the_same(tmp_path, family):
    ours, theirs = (losses_of(tmp_path, patched, family) for patched in (True, False))
    assert len(ours) == 5
    assert ours == pytest.approx(theirs, abs=2e-4)


def test_trainer_with_options(tmp_path):
    options = {"gradient_checkpointing": True, "label_smoothing_factor": 0.1, "max_grad_norm": 0.5}
    ours, theirs = (losses_of(tmp_path, patched, **options) for patched in (True, False))
    assert ours == pytest.approx(theirs, abs=2e-4)


def test_trainer_in_bfloat16(tmp_path):
    """accelerate wraps the forward for mixed precision, and unwraps it again."""
    ours, theirs = (losses_of(tmp_path, patched, bf16=True) for patched in (True, False))
    assert ours == pytest.approx(theirs, abs=0.05)


def test_trainer_takes_our_optimizer(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    from fastllm import nn

    model = families.build("llama")
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, families.VOCAB, (8, 12))]
    optimizer = nn.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=4)
    trainer = Trainer(model, TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=4, logging_steps=1,
        report_to="none", save_strategy="steps", save_steps=2, use_cpu=True, disable_tqdm=True),
        train_dataset=rows, optimizers=(optimizer, schedule))
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged[-1] < logged[0]


def test_accelerate_unwraps_to_the_patched_forward():
    accelerate = pytest.importorskip("accelerate")
    model = families.build("llama")
    fastllm.patch(model)
    forward = model.forward.__func__
    accelerate.state.AcceleratorState._reset_state(True)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare(model)
    assert prepared(**families.batch()).loss.isfinite()
    assert accelerator.unwrap_model(prepared, keep_fp32_wrapper=False).forward.__func__ is forward
    accelerate.state.AcceleratorState._reset_state(True)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_sft(tmp_path, packing):
    """TRL's trainer packs without padding and tells documents by their position_ids."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    tokenizers, hf = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    words = {f"<{i}>": i for i in range(families.VOCAB)}
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<0>")),
        pad_token="<0>", eos_token="<2>")
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(3, families.VOCAB, (5 + i % 7,), generator=generator)
             .tolist()} for i in range(16)]
    losses = []
    for patched in (True, False):
        model = families.build("llama")
        if patched:
            report = fastllm.patch(model, skip=("loss",))
            assert any("ops.attention" in entry.by for entry in report.replaced)
        trainer = trl.SFTTrainer(model, args=trl.SFTConfig(
            str(tmp_path), max_steps=3, per_device_train_batch_size=4, logging_steps=1,
            report_to="none", save_strategy="no", use_cpu=True, bf16=False, disable_tqdm=True,
            learning_rate=1e-2, max_length=32, packing=packing),
            train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)
