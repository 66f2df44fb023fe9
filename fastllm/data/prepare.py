"""From sources to tokens on disk, once: later runs on the same text and settings open them.

The folder's name is a hash of what decides its content. It is written under another name, synced,
and renamed; one process writes while others wait; a damaged one is made again, and that is said.
"""

import dataclasses
import hashlib
import itertools
import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastllm.config import UserError
from fastllm.data import store
from fastllm.data.accounting import Report
from fastllm.data.fitting import DEFAULTS, Truncation
from fastllm.data.once import made_once
from fastllm.data.rows import SEQUENCES, Rows
from fastllm.data.sources import (
    DataConfig,
    Document,
    Progress,
    SourceFile,
    find_files,
    held_out,
    read_documents,
    source_fingerprint,
    text_hash,
)
from fastllm.data.store import TokenDataset, TokenStore
from fastllm.data.tokenizer import (
    Tokenizer,
    TokenizerConfig,
    load_tokenizer,
    note_short_vocabulary,
    train_tokenizer,
)

_NOUNS = {"text": "documents", "chat": "conversations", "preference": "pairs",
          "judged": "judged answers"}
BATCH_BYTES = 1 << 20
"""Text that is encoded at a time: enough for every core, little in memory."""


@dataclass
class Prepared:
    """Tokens ready to train on, with what encoded them and the account of what they came from."""

    store: TokenStore
    tokenizer: Tokenizer
    report: Report
    pack: bool = True
    truncation: Truncation = "split"
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.train = TokenDataset(self.store, "train")
        self.heldout = TokenDataset(self.store, "heldout")

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of tokens, split and tokenizer."""
        return self.store.fingerprint

    def split(self, name: str) -> TokenDataset:
        """The documents of "train" or of "heldout"."""
        if name not in ("train", "heldout"):
            raise ValueError(f"split must be 'train' or 'heldout', not {name!r}")
        return self.train if name == "train" else self.heldout

    def check_vocab(self, vocab_size: int) -> None:
        """UserError naming the document and the id where a token is not in a model's vocabulary."""
        if found := self.store.first_at_least(vocab_size):
            document, token = found
            raise UserError(
                f"{self.store.where(document)} (document {document}) has token id {token}, and the "
                f"model's vocab_size is {vocab_size}: use the model's own tokenizer, or set "
                f"model.vocab_size to {self.tokenizer.vocab_size} or more")

    def summary(self) -> list[str]:
        """Lines for a terminal: the account of the records, tokens of both splits, the notes."""
        lines = self.report.summary()
        for name, part in (("train", self.train), ("held out", self.heldout)):
            rate = f", {part.num_bytes / part.num_tokens:.2f} bytes a token" if len(part) else ""
            what = f"{len(part):,} documents, {part.num_tokens:,} tokens, " \
                   f"{part.num_bytes:,} bytes{rate}"
            if part.trained is not None and len(part):
                trained = part.num_trained
                what = (f"{len(part) // part.group:,} {_NOUNS[self.store.kind]}, "
                        f"{part.num_tokens:,} tokens, {trained:,} of them trained "
                        f"({trained / part.num_tokens:.1%})")
            lines.append(f"{name}: {what}")
        lines.append(f"prepared: {self.store.folder}")
        return lines + [f"note: {note}" for note in self.notes]


def prepare(
    data: DataConfig,
    tokenizer_config: TokenizerConfig | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    vocab_size: int | None = None,
    progress: Progress | None = None,
    rows: Rows | None = None,
) -> Prepared:
    """Tokens of the sources, made now or found in the cache.

    rows: what the records are, where they are not texts; its encoder has the tokenizer.

    tokenizer: encodes the text; without it one is read from or trained by `tokenizer_config`, on
    the documents that are not held out. vocab_size: of the model; every id is checked against it.
    Raises UserError for sources that are missing, empty or unusable, for an id outside the model's
    vocabulary, and for a cache that cannot be written. Where `data.path` is one folder that was
    prepared before, that folder is opened, and is an error where it is damaged.
    """
    only = Path(data.path[0]).expanduser() if len(data.path) == 1 else None
    if only is not None and (only / store.META).is_file():
        prepared = open_prepared(only, verify=data.verify, pack=data.pack)
        wanted = rows.kind if rows else "text"
        if prepared.store.kind != wanted:
            raise UserError(f"{only} holds prepared {prepared.store.kind} data, and {wanted} data "
                            "are wanted: give the sources")
    else:
        prepared = _from_sources(data, tokenizer_config or TokenizerConfig(), tokenizer, progress,
                                 rows)
    prepared.truncation = DEFAULTS[prepared.store.kind] if data.truncation == "auto" \
        else data.truncation
    if data.on_bad == "error" and prepared.report.num_rejected:
        raise UserError(prepared.report.reasons[0])
    if data.holdout > 0 and not len(prepared.heldout):
        prepared.notes.append("one document: nothing can be held out (see data.txt_documents)")
    if vocab_size is not None:
        prepared.check_vocab(vocab_size)
    return prepared


def open_prepared(folder: Path, *, verify: bool = True, pack: bool = True) -> Prepared:
    """Opens a prepared folder. UserError where it is not one, or is damaged."""
    if fault := store.fault_of(folder, hashes=verify):
        raise UserError(f"{folder} is not sound prepared data: {fault}; prepare it again")
    opened = TokenStore(folder)
    names = opened.meta["special"]
    config = TokenizerConfig(bos_token=names["bos"], eos_token=names["eos"], pad_token=names["pad"])
    return Prepared(opened, load_tokenizer(folder, config), Report.from_dict(opened.meta["report"]),
                    pack=pack)


def _from_sources(
    data: DataConfig, config: TokenizerConfig, tokenizer: Tokenizer | None,
    progress: Progress | None, rows: Rows | None,
) -> Prepared:
    report = Report()
    files = find_files(data, report)
    cache = Path(data.cache_dir).expanduser()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        source = source_fingerprint(data, files, cache, progress)
    except OSError as error:
        raise UserError(f"data.cache_dir {cache} cannot be written: {error.strerror}") from error
    notes: list[str] = []
    if rows:
        tokenizer = rows.tokenizer
    if tokenizer is None:
        tokenizer = _tokenizer(data, config, source, cache, notes, progress)
    what = [store.FORMAT, source, tokenizer.fingerprint, *([rows.fingerprint] if rows else [])]
    key = hashlib.sha256(json.dumps(what).encode())
    folder = cache / key.hexdigest()[:24]

    def build(temporary: Path) -> None:
        _write(temporary, data, files, tokenizer, report, progress, rows)

    def fault(place: Path) -> str | None:
        return store.fault_of(place, hashes=data.verify)

    notes += made_once(folder, fault, build, progress)
    opened = TokenStore(folder)
    account = Report.from_dict(opened.meta["report"])
    return Prepared(opened, tokenizer, account, pack=data.pack, notes=notes + tokenizer.notes)


def _tokenizer(
    data: DataConfig, config: TokenizerConfig, source: str, cache: Path, notes: list[str],
    progress: Progress | None,
) -> Tokenizer:
    """The configured tokenizer: read from its path, or trained once and kept in the cache."""
    if config.path is not None:
        return load_tokenizer(config.path, config)
    import tokenizers

    what = [store.FORMAT, source, dataclasses.asdict(config), tokenizers.__version__]
    key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:24]
    folder = cache / f"tokenizer-{key}"

    def build(temporary: Path) -> None:
        trained, _ = train_tokenizer(data, config, progress)
        trained.save(temporary / store.TOKENIZER)
        (temporary / "fingerprint").write_text(trained.fingerprint, "utf-8")

    def fault(place: Path) -> str | None:
        if not place.exists():
            return store.ABSENT
        try:
            expected = (place / "fingerprint").read_text("utf-8")
            return None if load_tokenizer(place).fingerprint == expected else "its hash differs"
        except (OSError, UserError, UnicodeDecodeError):
            return "it cannot be read"

    notes += made_once(folder, fault, build, progress)
    tokenizer = load_tokenizer(folder)
    note_short_vocabulary(tokenizer, config)
    return tokenizer


def _write(
    folder: Path, data: DataConfig, files: list[SourceFile], tokenizer: Tokenizer, report: Report,
    progress: Progress | None, rows: Rows | None,
) -> None:
    """Encodes the documents into `folder`, batch by batch; memory does not grow with the source."""
    if rows:
        _write_rows(folder, data, files, report, progress, rows)
        return
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    front = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    position, largest = 0, 0
    documents = read_documents(data, files, report, progress, "tokenising")
    with (folder / store.TOKENS).open("wb") as tokens, \
            (folder / store.DOCUMENTS).open("wb") as records:
        for batch in _batches(documents):
            encoded = tokenizer.encode_batch([document.text for document in batch])
            ended = [[*front, *ids, tokenizer.eos_id] for ids in encoded]
            flat = np.fromiter(itertools.chain.from_iterable(ended), dtype=np.int64)
            largest = max(largest, int(flat.max()))
            flat.astype(dtype).tofile(tokens)
            table = np.empty(len(batch), dtype=store.DOCUMENT)
            for at, (document, row) in enumerate(zip(batch, ended, strict=True)):
                table[at] = (position, len(row), document.num_bytes, document.hash,
                             document.line, document.file)
                position += len(row)
            table.tofile(records)
    _close(folder, data, files, tokenizer, report, dtype, position, largest)


def _write_rows(
    folder: Path, data: DataConfig, files: list[SourceFile], report: Report,
    progress: Progress | None, rows: Rows,
) -> None:
    """Encodes rows into `folder`, each a document or two, with what is trained of them."""
    tokenizer, group = rows.tokenizer, SEQUENCES[rows.kind]
    asked = array("Q")
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    position, largest = 0, 0
    documents = read_documents(data, files, report, progress, "tokenising", rows.reader())
    with (folder / store.TOKENS).open("wb") as tokens, \
            (folder / store.TRAINED).open("wb") as trained, \
            (folder / store.DESIRABLE).open("wb") as desirable, \
            (folder / store.DOCUMENTS).open("wb") as records:
        for document in documents:
            asked.extend([_prompt_hash(document)] * group)
            for ids, flags, text_bytes in document.encoded.sequences:
                largest = max(largest, *ids)
                np.array(ids, dtype=dtype).tofile(tokens)
                np.array(flags, dtype=np.uint8).tofile(trained)
                np.array([(position, len(ids), text_bytes, document.hash, document.line,
                           document.file)], dtype=store.DOCUMENT).tofile(records)
                position += len(ids)
            desirable.write(bytes([document.encoded.desirable]))
    if rows.kind != "judged":
        (folder / store.DESIRABLE).unlink()
    prompts = np.asarray(asked, dtype=np.uint64)
    _close(folder, data, files, tokenizer, report, dtype, position, largest,
           split=prompts if len(np.unique(prompts)) > 1 else None, kind=rows.kind, group=group)


def _prompt_hash(document: Document) -> int:
    """What places a row in the split: the tokens before the answer where answers are compared.

    Several pairs often share a prompt, and even one of the answers: a held-out pair whose prompt
    was trained on would say little of other prompts.
    """
    sequences = document.encoded.sequences
    if len(sequences) == 1:
        return document.hash
    ids, trained, _ = sequences[0]
    return text_hash(np.array(ids[: trained.index(True)], dtype="<u4").tobytes())


def _close(folder: Path, data: DataConfig, files: list[SourceFile], tokenizer: Tokenizer,
           report: Report, dtype: np.dtype, num_tokens: int, largest: int, *,
           split: np.ndarray | None = None, **more: Any) -> None:
    """The split, the tokenizer and meta.json of a folder that is written otherwise.

    split (N,) uint64: hashes that place the documents on a side; none: those of their text.
    """
    if split is None:
        split = np.fromfile(folder / store.DOCUMENTS, dtype=store.DOCUMENT)["hash"]
    held_out(split, data.holdout).astype(np.uint8).tofile(folder / store.HELDOUT)
    tokenizer.save(folder / store.TOKENIZER)
    store.write_meta(folder, {
        "dtype": dtype.str, "vocab_size": tokenizer.vocab_size, "max_token_id": largest,
        "tokenizer": tokenizer.fingerprint, "sources": [file.name for file in files],
        "special": {"bos": tokenizer.bos_token, "eos": tokenizer.eos_token,
                    "pad": tokenizer.pad_token},
        "num_documents": report.documents, "num_tokens": num_tokens, "report": report.to_dict(),
        **more,
    })


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += document.num_bytes
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
