"""What the commands other than training do: data, tokenizer, import, eval, generate, chat, merge,
export, info."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from rich.console import Console
from rich.table import Table

from fastllm import adapters, chat, data, doctor, generate, importing
from fastllm.config import RunError, UserError
from fastllm.data import DataConfig, Kind, Prepared, Rows, TokenizerConfig
from fastllm.data.chat import ChatConfig, ChatEncoder
from fastllm.evaluate import evaluate
from fastllm.export import export, export_checkpoint
from fastllm.generate import GenerateConfig
from fastllm.objectives import pretrain
from fastllm.run import (
    DTYPES,
    data_progress,
    find_base,
    open_model,
    pick_device,
    prepare_data,
    training_dtype,
)
from fastllm.run.settings import From
from fastllm.run.setup import write_json
from fastllm.tasks import TaskConfig, run_task

_PROBE = "The quick brown fox jumps over the lazy dog. 1 + 1 = 2; def f(x): return x"
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

    kind: Kind = "text"
    """What the records are: texts, conversations (chat), pairs of answers (preference), or answers
    with a judgement (judged, for KTO)."""
    from_: From = None
    """--from: the model whose tokenizer and chat template are used."""
    data: DataConfig = field(default_factory=DataConfig)
    chat: ChatConfig = field(default_factory=ChatConfig)
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
    task: TaskConfig = field(default_factory=TaskConfig)
    """With task.path: questions with known answers, in place of the loss on a text."""
    chat: ChatConfig = field(default_factory=ChatConfig)
    kind: Kind = "text"
    """What the records of --data.path are: texts, or conversations (chat), of which the loss is
    that of the answers."""
    out: str | None = None
    """A .json file that the results are written to as well."""
    seq_len: Annotated[int, Field(gt=1)] | None = None
    """Tokens in a row; none: 512, or the model's longest if that is shorter."""
    batch_size: Annotated[int, Field(gt=0)] = 8
    """Rows in a batch."""
    device: Device = "auto"
    """auto: the GPU where there is one."""
    dtype: Dtype = "auto"
    """Of weights and activations."""

    def validate(self) -> None:
        if self.task.path and (self.data.path or self.data.format == "python-docs"):
            raise ValueError("task.path and data.path are both given: evaluate one at a time")
        if self.kind in ("preference", "judged"):
            raise ValueError("--kind: eval takes text or chat; preferences are evaluated by `dpo` "
                             "and `reward` on what they hold out")


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
class ImportRun:
    """Settings of `import MODEL`."""

    out: str | None = None
    """The folder to write in Hugging Face layout."""
    dtype: Dtype = "auto"
    """Of the written weights; auto: as they are, and fp32 for what was quantised."""


@dataclass(kw_only=True)
class MergeRun:
    """Settings of `merge ADAPTER`."""

    out: str | None = None
    """The folder to write the merged model to, in Hugging Face layout."""
    base: str | None = None
    """The model to merge into; none: the one that the adapter names."""
    dtype: Dtype = "auto"
    """Of the merged weights; auto: as the base's are."""
    bound: Annotated[float, Field(gt=0)] | None = None
    """The largest difference of a logit that is let pass; none: what rounding in the dtype
    explains."""


@dataclass(kw_only=True)
class ChatRun(GenerateConfig):
    """Settings of `chat MODEL`."""

    max_new_tokens: Annotated[int, Field(gt=0)] = 512
    """Tokens of an answer at most."""
    chat: ChatConfig = field(default_factory=ChatConfig)
    device: Device = "auto"
    """auto: the GPU where there is one."""
    dtype: Dtype = "auto"
    """Of weights and activations."""


@dataclass(kw_only=True)
class InfoRun:
    """Settings of `info`."""

    device: Device = "auto"
    """The device whose backends are listed; auto: the GPU where there is one."""


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


def _prepared(settings: DataRun) -> Prepared:
    """The data that a command of `data` is about."""
    tokenizer = None
    if settings.from_ is not None:
        tokenizer = find_base(settings.from_).tokenizer()
    elif settings.tokenizer.path is not None:
        tokenizer = data.load_tokenizer(settings.tokenizer.path, settings.tokenizer)
    if settings.kind == "text":
        return prepare_data(settings.data, settings.tokenizer, tokenizer=tokenizer)
    if tokenizer is None:
        raise UserError(f"--kind {settings.kind} needs --from MODEL or --tokenizer.path: rows are "
                        "read by a tokenizer and its chat template")
    return prepare_data(settings.data, settings.tokenizer, tokenizer=tokenizer,
                        rows=Rows(settings.kind, tokenizer, settings.chat))


def data_prepare(settings: DataRun) -> None:
    """`data prepare`."""
    prepared = _prepared(settings)
    for line in prepared.summary():
        print(line)


def data_stats(settings: DataRun) -> None:
    """`data stats`."""
    prepared = _prepared(settings)
    Console().print(data.render_stats(data.stats(prepared, settings.train.seq_len,
                                                 seed=settings.train.seed)))


def data_preview(settings: DataRun) -> None:
    """`data preview`."""
    prepared = _prepared(settings)
    Console().print(data.render_preview(data.preview(
        prepared, settings.train.seq_len, seed=settings.train.seed, rows=settings.rows)))


def evaluate_model(path: str, settings: EvalRun) -> None:
    """`eval MODEL`."""
    device = pick_device(settings.device)
    dtype, _ = training_dtype(settings.dtype, device)
    model, tokenizer, base = open_model(path, device=device, dtype=dtype)
    if settings.task.path:
        encoder = ChatEncoder(tokenizer, settings.chat) if settings.task.chat else None
        with data_progress() as progress:
            answers = run_task(model, tokenizer, settings.task, encoder=encoder,
                               eos_token_ids={tokenizer.eos_id, *base.stop_ids()},
                               progress=progress)
        Console().print(answers.render())
        _results(settings.out, {"model": path, **answers.to_dict()})
        return
    seq_len = settings.seq_len or min(512, model.config.max_position_embeddings)
    rows = None if settings.kind == "text" else Rows(settings.kind, tokenizer, settings.chat)
    prepared = prepare_data(settings.data, TokenizerConfig(), tokenizer=tokenizer,
                            vocab_size=model.config.vocab_size, rows=rows)
    split = "heldout" if settings.data.holdout else "train"
    held = data.EvalSet(prepared, seq_len, settings.batch_size, split=split)
    result = evaluate(model, held, held.num_bytes, device=device, loss=pretrain.loss)
    result["perplexity"] = math.exp(min(result["val_loss"], 700.0))
    table = Table(title=path)
    for name, value in (("loss (nats a token)", f"{result['val_loss']:.4f}"),
                        ("perplexity", f"{result['perplexity']:.4g}"),
                        ("bits per byte", f"{result['val_bpb']:.4f}"),
                        ("tokens", f"{result['val_tokens']:,}"),
                        ("bytes", f"{held.num_bytes:,}")):
        table.add_row(name, value)
    Console().print(table)
    _results(settings.out, {"model": path, "seq_len": seq_len, "bytes": held.num_bytes, **result})


def _results(target: str | None, result: dict[str, Any]) -> None:
    """Write results as JSON where a file is named."""
    if target is not None:
        place = Path(target)
        place.parent.mkdir(parents=True, exist_ok=True)
        write_json(place, result)


def generate_from_model(path: str, settings: GenerateRun) -> None:
    """`generate MODEL`."""
    device = pick_device(settings.device)
    dtype, _ = training_dtype(settings.dtype, device)
    model, tokenizer, base = open_model(path, device=device, dtype=dtype)
    prompts = settings.prompt or [""]
    texts = generate.generate_text(model, tokenizer, prompts, settings,
                                   bos_token_id=tokenizer.bos_id,
                                   eos_token_ids={tokenizer.eos_id, *base.stop_ids()})
    for prompt, text in zip(prompts, texts, strict=True):
        print(prompt + text)


def export_model(path: str, settings: ExportRun) -> None:
    """`export MODEL`."""
    if settings.out is None:
        raise UserError("export needs --out DIR: where to write the model")
    device = torch.device("cpu")
    dtype = None if settings.dtype == "auto" else training_dtype(settings.dtype, device)[0]
    base = find_base(path)
    tokenizer, stop = base.tokenizer(), base.stop_ids()
    if base.adapter:
        raise UserError(f"{path} is an adapter: merge it (fastllm-train merge {path} --out "
                        f"{settings.out})")
    if base.checkpoint:
        target = export_checkpoint(base.checkpoint, base.config, settings.out, dtype=dtype,
                                   tokenizer=tokenizer, stop_ids=stop)
    else:
        target = export(base.build(None), settings.out, tokenizer=tokenizer, dtype=dtype,
                        stop_ids=stop)
    print(target)


def import_model(path: str, settings: ImportRun) -> None:
    """`import MODEL`."""
    if settings.out is None:
        raise UserError("import needs --out DIR: where to write the model")
    dtype = None if settings.dtype == "auto" else DTYPES[settings.dtype]
    print(importing.import_model(path, settings.out, dtype=dtype))


def merge_adapter(path: str, settings: MergeRun) -> None:
    """`merge ADAPTER`."""
    if settings.out is None:
        raise UserError("merge needs --out DIR: where to write the model")
    found = find_base(path)
    if found.adapter is None:
        raise UserError(f"{path} is not an adapter: it has no adapter_config.json")
    base = found if settings.base is None else find_base(settings.base)
    model = base.build(None if settings.dtype == "auto" else DTYPES[settings.dtype])
    adapter = adapters.load(model, found.adapter)
    tokenizer = base.tokenizer()
    ids = torch.tensor([tokenizer.encode(_PROBE)])
    difference, bound = adapters.merge_check(adapter, ids)
    bound = settings.bound or bound
    print(f"largest difference of a logit: {difference:.3g} (bound {bound:.3g})")
    if not difference <= bound:
        raise RunError(f"merging changes logits by {difference:.3g}, more than {bound:.3g}: "
                       "nothing is written; merge in --dtype fp32, or give --bound")
    print(export(model, settings.out, tokenizer=tokenizer, stop_ids=base.stop_ids()))


def chat_with_model(path: str, settings: ChatRun) -> None:
    """`chat MODEL`."""
    device = pick_device(settings.device)
    dtype, _ = training_dtype(settings.dtype, device)
    model, tokenizer, base = open_model(path, device=device, dtype=dtype)
    chat.chat(model, tokenizer, ChatEncoder(tokenizer, settings.chat), settings,
              system=settings.chat.system, eos_token_ids=base.stop_ids())


def info(settings: InfoRun) -> None:
    """`info`."""
    print(doctor.render_info(doctor.info(pick_device(settings.device))), end="")


