"""What the commands other than training do: data, tokenizer, eval, generate, export, info."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from rich.console import Console
from rich.table import Table

from fastllm import checkpoint, config, data, doctor, generate
from fastllm.config import UserError
from fastllm.data import DataConfig, Tokenizer, TokenizerConfig
from fastllm.evaluate import evaluate
from fastllm.export import export, export_checkpoint
from fastllm.generate import GenerateConfig
from fastllm.model import Decoder, ModelConfig, hf
from fastllm.objectives import pretrain
from fastllm.run import (
    RunConfig,
    data_progress,
    pick_device,
    prepare_data,
    training_dtype,
)

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "bf16", "fp16", "fp32"]


@dataclass(kw_only=True)
class RowConfig:
    """Rows that the documents are packed into, for the figures that depend on them."""

    seq_len: Annotated[int, Field(gt=1)] = 512
    """Tokens in a row."""
    seed: Annotated[int, Field(ge=0)] = 42
    """Of the order of documents."""


@dataclass(kw_only=True)
class DataRun:
    """Settings of `data prepare`, `data stats` and `data preview`."""

    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    train: RowConfig = field(default_factory=RowConfig)
    rows: Annotated[int, Field(gt=0)] = 2
    """data preview: how many rows to show."""


@dataclass(kw_only=True)
class TokenizerRun:
    """Settings of `tokenizer train`."""

    out: str | None = None
    """The tokenizer.json to write, or a folder for it."""
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)


@dataclass(kw_only=True)
class EvalRun:
    """Settings of `eval MODEL`."""

    data: DataConfig = field(default_factory=lambda: DataConfig(holdout=0.0))
    """What to evaluate on: all of it with holdout 0 (the default here), else the held-out part."""
    seq_len: Annotated[int, Field(gt=1)] | None = None
    """Tokens in a row; none: 512, or the model's longest if that is shorter."""
    batch_size: Annotated[int, Field(gt=0)] = 8
    """Rows in a batch."""
    device: Device = "auto"
    """auto: the GPU where there is one."""
    dtype: Dtype = "auto"
    """Of weights and activations."""


@dataclass(kw_only=True)
class GenerateRun(GenerateConfig):
    """Settings of `generate MODEL`."""

    prompt: list[str] = field(default_factory=list)
    """One or more texts to continue; none: the model begins a document by itself."""
    device: Device = "auto"
    """auto: the GPU where there is one."""
    dtype: Dtype = "auto"
    """Of weights and activations."""


@dataclass(kw_only=True)
class ExportRun:
    """Settings of `export MODEL`."""

    out: str | None = None
    """The folder to write in Hugging Face layout."""
    dtype: Dtype = "auto"
    """Of the written weights; auto: as they are."""


@dataclass(kw_only=True)
class InfoRun:
    """Settings of `info`."""

    device: Device = "auto"
    """The device whose backends are listed; auto: the GPU where there is one."""


def open_model(path: str, *, device: torch.device, dtype: torch.dtype | None = None
               ) -> tuple[Decoder, Tokenizer]:
    """Model and tokenizer of a run folder (its model/, else its newest checkpoint) or of a folder
    in Hugging Face layout. dtype None: as stored. Raises UserError where it is neither."""
    found, shape = find_model(path)
    if shape is None:
        model = hf.load(found, dtype=dtype)
        return model.to(device).eval(), data.load_tokenizer(found)
    saved = _newest(found)
    model = Decoder(shape, initialize=False)
    model.to(saved.layout["model"]["embed_tokens.weight"].dtype)
    saved.fill("model", dict(model.named_parameters()))
    return model.to(device, dtype).eval(), data.load_tokenizer(found)


def find_model(path: str) -> tuple[Path, ModelConfig | None]:
    """(a Hugging Face folder, None), or (a run folder with checkpoints alone, its model's config).

    Raises UserError where the path is neither.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"no such model: {path} (a run folder or a Hugging Face folder)")
    for exported in (folder / "model", folder):
        if (exported / hf.CONFIG).is_file():
            return exported, None
    if not (folder / "checkpoints").is_dir():
        raise UserError(f"{path} is neither a run folder (no checkpoints/) nor a Hugging Face "
                        f"folder (no {hf.CONFIG})")
    return folder, config.build(RunConfig, config.from_yaml(folder / "config.yaml")).model


def _newest(folder: Path) -> checkpoint.Checkpoint:
    """The newest good checkpoint of a run folder."""
    saved = checkpoint.newest(folder / "checkpoints", lambda line: print(line))
    if saved is None:
        raise UserError(f"{folder} holds no checkpoint yet: train it first")
    return saved


def train_tokenizer(settings: TokenizerRun) -> None:
    """`tokenizer train`."""
    if settings.out is None:
        raise UserError("tokenizer train needs --out FILE: where to write tokenizer.json")
    with data_progress() as progress:
        tokenizer, report = data.train_tokenizer(settings.data, settings.tokenizer, progress)
    target = Path(settings.out)
    if target.suffix != ".json":
        target.mkdir(parents=True, exist_ok=True)
    tokenizer.save(target)
    for line in report.summary():
        print(line)
    print(f"{tokenizer.vocab_size:,} tokens: {target}")


def data_prepare(settings: DataRun) -> None:
    """`data prepare`."""
    prepared = prepare_data(settings.data, settings.tokenizer)
    for line in prepared.summary():
        print(line)


def data_stats(settings: DataRun) -> None:
    """`data stats`."""
    prepared = prepare_data(settings.data, settings.tokenizer)
    Console().print(data.render_stats(data.stats(prepared, settings.train.seq_len,
                                                 seed=settings.train.seed)))


def data_preview(settings: DataRun) -> None:
    """`data preview`."""
    prepared = prepare_data(settings.data, settings.tokenizer)
    Console().print(data.render_preview(data.preview(
        prepared, settings.train.seq_len, seed=settings.train.seed, rows=settings.rows)))


def evaluate_model(path: str, settings: EvalRun) -> None:
    """`eval MODEL`."""
    device = pick_device(settings.device)
    dtype, _ = training_dtype(settings.dtype, device)
    model, tokenizer = open_model(path, device=device, dtype=dtype)
    seq_len = settings.seq_len or min(512, model.config.max_position_embeddings)
    prepared = prepare_data(settings.data, TokenizerConfig(), tokenizer=tokenizer,
                            vocab_size=model.config.vocab_size)
    split = "heldout" if settings.data.holdout else "train"
    held = data.EvalSet(prepared, seq_len, settings.batch_size, split=split)
    result = evaluate(model, held, held.num_bytes, device=device, loss=pretrain.loss)
    table = Table(title=path)
    for name, value in (("loss (nats a token)", f"{result['val_loss']:.4f}"),
                        ("bits per byte", f"{result['val_bpb']:.4f}"),
                        ("tokens", f"{result['val_tokens']:,}"),
                        ("bytes", f"{held.num_bytes:,}")):
        table.add_row(name, value)
    Console().print(table)


def generate_from_model(path: str, settings: GenerateRun) -> None:
    """`generate MODEL`."""
    device = pick_device(settings.device)
    dtype, _ = training_dtype(settings.dtype, device)
    model, tokenizer = open_model(path, device=device, dtype=dtype)
    prompts = settings.prompt or [""]
    texts = generate.generate_text(model, tokenizer, prompts, settings,
                                   bos_token_id=tokenizer.bos_id,
                                   eos_token_ids={tokenizer.eos_id, *hf.stop_tokens(path)})
    for prompt, text in zip(prompts, texts, strict=True):
        print(prompt + text)


def export_model(path: str, settings: ExportRun) -> None:
    """`export MODEL`."""
    if settings.out is None:
        raise UserError("export needs --out DIR: where to write the model")
    device = torch.device("cpu")
    dtype = None if settings.dtype == "auto" else training_dtype(settings.dtype, device)[0]
    found, shape = find_model(path)
    if shape is None:
        model, tokenizer = open_model(path, device=device)
        target = export(model, settings.out, tokenizer=tokenizer, dtype=dtype)
    else:
        target = export_checkpoint(_newest(found), shape, settings.out, dtype=dtype,
                                   tokenizer=data.load_tokenizer(found))
    print(target)


def info(settings: InfoRun) -> None:
    """`info`."""
    print(doctor.render_info(doctor.info(pick_device(settings.device))), end="")


