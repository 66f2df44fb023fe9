"""Where text comes from: files, folders and globs of five formats, or the running Python's prose.

`read_documents` is the one way in: it yields the documents in a fixed order and accounts for every
record. `DataConfig` is what the user may set about it.
"""

import difflib
import glob
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import pydantic

from fastllm.config import UserError
from fastllm.data import python_docs, readers
from fastllm.data.accounting import Report
from fastllm.data.readers import Record

Progress = Callable[[str, int, int | None], None]
"""progress(stage, done, total): called often in long work; total is None where it is unknown."""

SUFFIXES = {
    "txt": (".txt", ".text", ".md", ".rst"),
    "jsonl": (".jsonl", ".ndjson"),
    "json": (".json",),
    "csv": (".csv", ".tsv"),
    "parquet": (".parquet", ".pq"),
}


@dataclass(kw_only=True)
class DataConfig:
    """What text is read, how it becomes documents, and where the prepared tokens are kept."""

    path: list[str] = field(default_factory=list)
    """Files, folders (read recursively, in sorted order) and globs."""
    format: Literal["auto", "txt", "jsonl", "json", "csv", "parquet", "python-docs"] = "auto"
    """auto goes by the file's ending; python-docs is the prose of the running Python's library."""
    text_fields: list[str] = field(default_factory=lambda: ["text"])
    """Fields (or columns) that make a document; several are joined by a newline."""
    txt_documents: Literal["auto", "blank-line", "line", "file"] = "auto"
    """What a document is in a text file. auto: the widest of three, two or one blank lines that
    separates at least 100 documents; failing that the whole file, cut at line ends every 64 KiB."""
    txt_separator: str | None = None
    """A line that ends a document in a text file, such as <|endoftext|>, instead of auto's rule."""
    holdout: Annotated[float, pydantic.Field(ge=0.0, le=0.5)] = 0.01
    """Fraction of the documents held out for evaluation, chosen by the hash of their text, so that
    copies of a document stay on one side; rows of compared or labelled answers by that of their
    prompt, so that no held-out prompt is trained on. At least 8 where there are 160 or more."""
    deduplicate: bool = False
    """Skip a document whose text was already read (exact copies)."""
    on_bad: Literal["skip", "error"] = "skip"
    """A record that cannot be read is counted and left out, or ends the run."""
    max_record_bytes: Annotated[int, pydantic.Field(gt=0)] = 64 << 20
    """A longer line (or csv field) is rejected."""
    cache_dir: str = "~/.cache/fastllm/data"
    """Where tokens are prepared, once for the same text, tokenizer and settings."""
    verify: bool = True
    """Hash the prepared files each time that they are opened."""
    pack: bool = True
    """Fill rows with several documents, which do not see one another; false: one a row, padded."""
    truncation: Literal["auto", "split", "truncate", "drop", "error"] = "auto"
    """What becomes of a document longer than train.seq_len: pieces that are all trained on, its
    beginning alone, nothing, or an error. auto: split a text, truncate a conversation, drop a
    preference pair (of which half an answer says little)."""
    num_workers: Annotated[int, pydantic.Field(ge=0)] = 1
    """Threads that make batches ahead of time; 0: each is made when it is asked for. The batches
    are the same."""


class SourceFile(NamedTuple):
    """A file to read. `name` is what messages call it."""

    path: Path
    format: str
    name: str


class Document(NamedTuple):
    """A text and where it came from: `file` indexes the source files, `line` is its first line.

    Of a row, what was made of it in place of the text.
    """

    text: str
    num_bytes: int
    hash: int
    file: int
    line: int
    encoded: Any = None


class Encoded(NamedTuple):
    """What a row became: its token sequences, and UTF-8 bytes of their trained text."""

    value: Any
    num_bytes: int


class Rejected(NamedTuple):
    """Why a row cannot be used: a group of reasons, and the reason."""

    kind: str
    reason: str


RowEncoder = Callable[[dict[str, Any]], Encoded | Rejected]


def text_hash(data: bytes) -> int:
    """64 bits that stand for a document's text: they place it in the split and find its copies."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def held_out(hashes: np.ndarray, holdout: float) -> np.ndarray:
    """Which documents are held out. hashes (N,) uint64 -> (N,) bool.

    A document is held out when its hash lies in the lowest `holdout` of the range, whatever else
    the sources hold, so it does not change sides when others are added. Where that leaves fewer
    than 8 (or than a twentieth of a small source, at least one), the next hashes in order fill up.
    """
    unique = np.unique(hashes)
    if holdout == 0 or len(unique) < 2:
        return np.zeros(len(hashes), dtype=bool)
    below = int(np.count_nonzero(unique < np.uint64(int(holdout * 2.0**64))))
    count = max(below, min(8, max(1, len(unique) // 20)))
    return hashes <= unique[count - 1]


def _format_of(path: Path, forced: str) -> str:
    if forced != "auto":
        return forced
    suffix = path.suffix.lower()
    return next((name for name, endings in SUFFIXES.items() if suffix in endings), "")


def _missing(entry: str) -> UserError:
    path = Path(entry)
    near: list[str] = []
    if path.parent.is_dir():
        near = difflib.get_close_matches(path.name, os.listdir(path.parent), n=1)
    hint = f"; did you mean {path.parent / near[0]}?" if near else ""
    return UserError(f"data.path: no such file or folder: {entry}{hint}")


def _in_folder(folder: Path, config: DataConfig, report: Report) -> list[Path]:
    """The folder's files of the wanted format, hidden ones left out, sorted by their path in it."""
    wanted = SUFFIXES.values() if config.format == "auto" else [SUFFIXES[config.format]]
    endings = {ending for group in wanted for ending in group}
    inside = [path for path in folder.rglob("*") if path.is_file()
              and not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    found = [path for path in inside if path.suffix.lower() in endings]
    if not found:
        raise UserError(f"data.path: no {' '.join(sorted(endings))} file in {folder}")
    if len(found) < len(inside):
        report.notes.append(f"{len(inside) - len(found)} other files in {folder} are not read")
    empty = [path for path in found if path.stat().st_size == 0]
    if empty:
        report.notes.append(f"{len(empty)} empty files in {folder} are not read")
    kept = [path for path in found if path not in set(empty)]
    return sorted(kept, key=lambda path: path.relative_to(folder).parts)


def find_files(config: DataConfig, report: Report) -> list[SourceFile]:
    """The source files in reading order. UserError for what is missing, empty or of no format."""
    if config.format == "python-docs":
        if config.path:
            raise UserError("data.path must be empty with data.format python-docs")
        return [SourceFile(path, "python-docs", name) for path, name in python_docs.source_files()]
    if not config.path:
        raise UserError("data.path is empty: name files, folders or globs to read")
    paths: list[Path] = []
    for entry in config.path:
        expanded = os.path.expanduser(entry)
        if os.path.lexists(expanded):
            here = Path(expanded)
            paths += _in_folder(here, config, report) if here.is_dir() else [here]
            continue
        matches = sorted(glob.glob(expanded, recursive=True))
        if not matches:
            raise _missing(entry)
        paths += [Path(match) for match in matches if not Path(match).is_dir()]
    files: dict[str, SourceFile] = {}
    for path in paths:
        form = _format_of(path, config.format)
        if not form:
            known = " ".join(ending for endings in SUFFIXES.values() for ending in endings)
            raise UserError(f"{path}: the format is not known from the ending {path.suffix!r} "
                            f"({known}); set data.format")
        if not path.is_file():
            raise UserError(f"{path} is not a file that can be read")
        if path.stat().st_size == 0:
            raise UserError(f"{path} is empty")
        real = os.path.realpath(path)
        if real in files:
            report.notes.append(f"{path} is named more than once and read once")
        files.setdefault(real, SourceFile(path, form, str(path)))
    return list(files.values())


def _records(file: SourceFile, config: DataConfig, docstrings: set[str], as_rows: bool
             ) -> Iterator[Record]:
    limit = config.max_record_bytes
    if as_rows and file.format in ("python-docs", "txt"):
        raise UserError(f"{file.name} is text, and conversations and pairs are rows: give jsonl, "
                        "json, csv or parquet (see data.format)")
    if file.format == "python-docs":
        return python_docs.read_module(file.path, file.name, docstrings)
    if file.format == "txt":
        return readers.read_txt(file.path, config.txt_documents, config.txt_separator, limit)
    read = {"jsonl": readers.read_jsonl, "json": readers.read_json, "csv": readers.read_csv,
            "parquet": readers.read_parquet}[file.format]
    return read(file.path, None if as_rows else config.text_fields, limit)


def read_documents(
    config: DataConfig,
    files: list[SourceFile],
    report: Report,
    progress: Progress | None = None,
    stage: str = "reading",
    encode: RowEncoder | None = None,
) -> Iterator[Document]:
    """Yields the documents in order, and accounts for every record in `report`.

    encode: takes each record as a row of fields, where a document is not simply a text.

    Raises UserError for a file that cannot be read, for the first bad record with on_bad=error,
    and at the end where there was no document at all.
    """
    report.files = len(files)
    seen: set[int] = set()
    docstrings: set[str] = set()
    done, total = 0, sum(file.path.stat().st_size for file in files)
    for index, file in enumerate(files):
        read, size = 0, file.path.stat().st_size
        try:
            for record in _records(file, config, docstrings, encode is not None):
                if document := _document(record, file, index, report, config.on_bad, encode):
                    if config.deduplicate and document.hash in seen:
                        report.skip("duplicate", record.records)
                        continue
                    if config.deduplicate:
                        seen.add(document.hash)
                    report.use(record.records, document.num_bytes)
                    yield document
                    read += document.num_bytes
                    if progress and report.documents % 256 == 0:
                        progress(stage, done + min(read, size), total)
        except OSError as error:
            raise UserError(f"cannot read {file.name}: {error.strerror or error}") from error
        done += size
        if progress:
            progress(stage, done, total)
    report.check()
    report.require_documents()


def _document(
    record: Record, file: SourceFile, index: int, report: Report, on_bad: str,
    encode: RowEncoder | None,
) -> Document | None:
    where = f"{file.name}:{record.line}"
    made = None
    if encode and record.row is not None:
        made = encode(record.row)
        if isinstance(made, Rejected):
            record = record._replace(rejected=made.kind, reason=made.reason)
    if record.rejected:
        report.reject(where, record.rejected, record.reason, record.records)
        if on_bad == "error":
            raise UserError(f"{where}: {record.reason}")
    elif record.skipped:
        report.skip(record.skipped, record.records)
    elif isinstance(made, Encoded):
        key = json.dumps(record.row, sort_keys=True, ensure_ascii=False, default=str)
        # A lone surrogate may stand in a field that nothing reads.
        return Document("", made.num_bytes, text_hash(key.encode("utf-8", "surrogatepass")), index,
                        record.line, made.value)
    elif not record.text.strip():
        report.skip("empty text", record.records)
    else:
        data = record.text.encode("utf-8")
        return Document(record.text, len(data), text_hash(data), index, record.line)
    return None


class FileHashes:
    """SHA-256 of files, remembered by path, size and time of change: a file is hashed once."""

    def __init__(self, remembered: Path) -> None:
        self.remembered = remembered
        try:
            self.known: dict[str, list] = json.loads(remembered.read_text("utf-8"))
        except (OSError, ValueError):  # nothing remembered yet, or half a file: hash again
            self.known = {}

    def of(self, path: Path, advance: Callable[[int], None]) -> str:
        """The file's SHA-256 in hex; `advance` is told the bytes that were hashed."""
        state = path.stat()
        key, stamp = os.path.realpath(path), [state.st_size, state.st_mtime_ns, state.st_ino]
        if key in self.known and self.known[key][:3] == stamp:
            advance(state.st_size)
            return self.known[key][3]
        digest = hashlib.sha256()
        with path.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
                advance(len(block))
        self.known[key] = [*stamp, digest.hexdigest()]
        return digest.hexdigest()

    def save(self) -> None:
        temporary = self.remembered.with_name(f"{self.remembered.name}.{os.getpid()}")
        temporary.write_text(json.dumps(self.known), "utf-8")
        os.replace(temporary, self.remembered)


def source_fingerprint(
    config: DataConfig, files: list[SourceFile], cache: Path, progress: Progress | None = None
) -> str:
    """Hex SHA-256 of the files' contents, names, order and of the settings that shape documents."""
    settings = {
        name: getattr(config, name)
        for name in ("text_fields", "txt_documents", "txt_separator", "holdout", "deduplicate",
                     "max_record_bytes")
    }
    hashes = FileHashes(cache / "files.json")
    total, done = sum(file.path.stat().st_size for file in files), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress("hashing the sources", done, total)

    described: list[object] = [settings]
    if config.format == "python-docs":
        described.append(sys.version)
    for file in files:
        try:
            described.append([file.path.name, file.format, hashes.of(file.path, advance)])
        except OSError as error:
            raise UserError(f"cannot read {file.name}: {error.strerror or error}") from error
    hashes.save()
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
