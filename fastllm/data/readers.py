"""One generator a file format. Each yields a `Record` for everything it meets, the bad included.

Readers never raise for a bad record: they say what is wrong with it and go on with the next. What
is wrong with a whole file (it cannot be opened, it is UTF-16, a column is missing) is a UserError.
"""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from fastllm.config import UserError

AUTO_DOCUMENTS = 100
"""txt_documents=auto takes the strongest separator that makes at least this many documents."""
PIECE_BYTES = 64 << 10
"""txt_documents=auto cuts a text without separators at the first line end after this many bytes."""
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
UTF8_MARK = b"\xef\xbb\xbf"


Fields = list[str] | None
"""The fields (or columns) whose text makes a record; None: the record is the row, as it is."""


class Record(NamedTuple):
    """A text or a row, or the rule that skips it, or what is wrong. `records` of them, from `line`
    on."""

    line: int
    text: str = ""
    records: int = 1
    skipped: str = ""
    rejected: str = ""
    reason: str = ""
    row: dict[str, Any] | None = None


def bad_text(text: str) -> tuple[str, str] | None:
    """(kind, reason) when a decoded text cannot be a document, None when it can."""
    if (at := text.find("\0")) >= 0:
        return "NUL", f"the text has a NUL character at position {at}"
    if match := re.search("[\ud800-\udfff]", text):
        code = ord(match.group())
        return "lone surrogate", f"the text has a lone surrogate (U+{code:04X}) at {match.start()}"
    return None


def raw_lines(stream: IO[bytes], limit: int) -> Iterator[tuple[int, bytes | None]]:
    """(line number, line without its ending), or None for a line above `limit` bytes.

    Only a newline ends a line (str.splitlines would also cut at U+2028); a CR before it goes with
    it. Never holds more than `limit` bytes.
    """
    number = 0
    while raw := stream.readline(limit + 2):
        number += 1
        if not raw.endswith(b"\n") and len(raw) > limit:
            while raw and not raw.endswith(b"\n"):
                raw = stream.readline(limit)
            yield number, None
            continue
        raw = raw.removesuffix(b"\n").removesuffix(b"\r")
        if number == 1:
            raw = raw.removeprefix(UTF8_MARK)
        yield number, raw


def too_long(number: int, limit: int) -> Record:
    return Record(number, rejected="too long", reason=f"longer than {limit:,} bytes")


def bad_utf8(error: UnicodeDecodeError) -> str:
    return f"bad UTF-8 at byte {error.start + 1} (0x{error.object[error.start]:02x})"


def refuse_utf16(path: Path) -> None:
    """UserError for a file that begins with a UTF-16 mark: every line of it would be rejected."""
    with path.open("rb") as stream:
        if stream.read(2) in UTF16_MARKS:
            raise UserError(f"{path} is UTF-16; convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)")


# txt ------------------------------------------------------------------------------------------


def separator_runs(path: Path, limit: int) -> int:
    """The fewest blank lines between documents for txt_documents=auto; 0: no such separator."""
    made = {1: 1, 2: 1, 3: 1}
    blank = 0
    with path.open("rb") as stream:
        for _, raw in raw_lines(stream, limit):
            if raw is not None and not raw.strip():
                blank += 1
                continue
            for run in made:
                made[run] += blank >= run
            blank = 0
    return next((run for run in (3, 2, 1) if made[run] >= AUTO_DOCUMENTS), 0)


class _Lines:
    """The lines of the document being gathered."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.first = 0
        self.size = 0

    def add(self, number: int, line: str, size: int) -> None:
        self.first = self.first or number
        self.lines.append(line)
        self.size += size + 1

    def take(self) -> Record:
        record = Record(self.first, "\n".join(self.lines), len(self.lines))
        self.lines, self.first, self.size = [], 0, 0
        return record


def _decoded(number: int, raw: bytes | None, limit: int) -> str | Record:
    if raw is None:
        return too_long(number, limit)
    try:
        line = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return Record(number, rejected="bad UTF-8", reason=bad_utf8(error))
    if fault := bad_text(line):
        return Record(number, rejected=fault[0], reason=fault[1])
    return line


def read_txt(path: Path, documents: str, separator: str | None, limit: int) -> Iterator[Record]:
    """Documents of a text file; see DataConfig.txt_documents for what ends one.

    A rejected line is left out of its document. Blank lines inside a document belong to it.
    """
    refuse_utf16(path)
    runs = {"blank-line": 1, "file": 0, "line": 0}.get(documents, 0)
    cut = 0
    if documents == "auto" and separator is None:
        runs = separator_runs(path, limit)
        cut = 0 if runs else PIECE_BYTES
    cut = 1 if documents == "line" else cut
    gathered = _Lines()
    blanks: list[tuple[int, str, int]] = []
    with path.open("rb") as stream:
        for number, raw in raw_lines(stream, limit):
            line = _decoded(number, raw, limit)
            if isinstance(line, Record):
                yield line
                continue
            ends = separator is not None and line.strip() == separator
            if not ends and not line.strip():
                blanks.append((number, line, len(raw or b"")))
                continue
            full = bool(cut) and gathered.size >= cut
            if gathered.lines and (ends or full or (runs and len(blanks) >= runs)):
                yield gathered.take()
            if blanks and (ends or not gathered.lines):
                yield Record(blanks[0][0], records=len(blanks), skipped="blank line")
            elif blanks:
                for blank in blanks:
                    gathered.add(*blank)
            blanks = []
            if ends:
                yield Record(number, skipped="separator")
            else:
                gathered.add(number, line, len(raw or b""))
    if gathered.lines:
        yield gathered.take()
    if blanks:
        yield Record(blanks[0][0], records=len(blanks), skipped="blank line")


# jsonl, json ----------------------------------------------------------------------------------


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def _json_fault(error: Exception) -> tuple[str, str]:
    """(kind, reason) of what `json` raised."""
    if isinstance(error, RecursionError):
        return "nested too deeply", "nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        return "not JSON", f"not valid JSON at column {error.colno}: {error.msg}"
    return "not JSON", f"not valid JSON: {error}"


def _type_name(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number",
             float: "a number", type(None): "null", bytes: "bytes"}
    return names.get(type(value), type(value).__name__)


def from_fields(line: int, value: Any, fields: Fields) -> Record:
    """The record's text: its `fields`, joined by a newline. With None, the record's row."""
    if not isinstance(value, dict):
        reason = f"expected an object, found {_type_name(value)}"
        return Record(line, rejected="wrong type", reason=reason)
    if fields is None:
        return Record(line, row=value)
    texts = []
    for name in fields:
        if name not in value:
            has = ", ".join(map(repr, list(value)[:8])) or "none"
            reason = f"no field {name!r} (it has {has})"
            return Record(line, rejected="missing field", reason=reason)
        if not isinstance(value[name], str):
            reason = f"field {name!r} is {_type_name(value[name])}, expected a string"
            return Record(line, rejected="wrong type", reason=reason)
        texts.append(value[name])
    text = "\n".join(texts)
    if fault := bad_text(text):
        return Record(line, rejected=fault[0], reason=fault[1])
    return Record(line, text)


def read_jsonl(path: Path, fields: Fields, limit: int) -> Iterator[Record]:
    """One JSON object a line."""
    refuse_utf16(path)
    with path.open("rb") as stream:
        for number, raw in raw_lines(stream, limit):
            # Files put together with cat keep the mark of each part.
            line = _decoded(number, raw.removeprefix(UTF8_MARK) if raw else raw, limit)
            if isinstance(line, Record):
                yield line
            elif not line.strip():
                yield Record(number, skipped="blank line")
            else:
                try:
                    value = _DECODER.decode(line)
                except (ValueError, RecursionError) as error:
                    kind, reason = _json_fault(error)
                    yield Record(number, rejected=kind, reason=reason)
                else:
                    yield from_fields(number, value, fields)


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def read_json(path: Path, fields: Fields, limit: int) -> Iterator[Record]:
    """A JSON list of objects, one object, or objects one a line. The file is held in memory.

    Where a list stops being JSON the rest of it cannot be told apart: that is one rejection.
    """
    refuse_utf16(path)
    # A bad byte becomes a lone surrogate, and rejects the element that it is in, not the file.
    text = path.read_bytes().removeprefix(UTF8_MARK).decode("utf-8", errors="surrogateescape")
    at = _skip_space(text, 0)
    if text[at : at + 1] != "[":
        try:
            value, end = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError):
            value, end = None, at
        if value is not None and _skip_space(text, end) == len(text):
            yield from_fields(1 + text.count("\n", 0, at), value, fields)
        else:
            yield from read_jsonl(path, fields, limit)
        return
    yield from _json_list(text, _skip_space(text, at + 1), fields)


def _json_list(text: str, at: int, fields: Fields) -> Iterator[Record]:
    """The elements of the list whose `[` ends before `at`, each with the line that it begins on."""
    line, counted = 1, 0
    closed = text[at : at + 1] == "]"
    while not closed:
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, end = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            kind, reason = _json_fault(error)
            yield Record(line, rejected=kind, reason=f"{reason}; nothing after it is read")
            return
        yield from_fields(line, value, fields)
        at = _skip_space(text, end)
        closed = text[at : at + 1] == "]"
        if not closed and text[at : at + 1] != ",":
            reason = "expected ',' or ']' after this element; nothing after it is read"
            yield Record(line, rejected="not JSON", reason=reason)
            return
        at = _skip_space(text, at + 1)
    if closed and text[_skip_space(text, at):].strip("]").strip():
        reason = "text after the list's end is not read"
        yield Record(line + text.count("\n", counted, at), rejected="not JSON", reason=reason)


# csv, parquet ---------------------------------------------------------------------------------


# What errors="surrogateescape" makes of a byte that is not UTF-8.
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")


def _csv_record(line: int, row: list[str], header: list[str], fields: Fields) -> Record:
    if not row:
        return Record(line, skipped="blank line")
    if len(row) != len(header):
        reason = f"{len(row)} columns, the header has {len(header)}"
        return Record(line, rejected="wrong number of columns", reason=reason)
    if any(_ESCAPED_BYTE.search(cell) for cell in row):
        return Record(line, rejected="bad UTF-8", reason="bad UTF-8")
    return from_fields(line, dict(zip(header, row, strict=True)), fields)


def _require_columns(path: Path, columns: list[str], fields: Fields) -> None:
    for name in fields or []:
        if name not in columns:
            raise UserError(f"{path} has no column {name!r} (it has {', '.join(columns)}); "
                            "set data.text_fields")


def read_csv(path: Path, fields: Fields, limit: int) -> Iterator[Record]:
    """Rows of a csv (tab-separated for .tsv) with a header line. The header is not a record."""
    refuse_utf16(path)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    before = csv.field_size_limit(limit)
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
            rows = csv.reader(stream, delimiter=delimiter, strict=True)
            header = next(rows, [])
            _require_columns(path, header, fields)
            while True:
                line = rows.line_num + 1
                try:
                    row = next(rows)
                except StopIteration:
                    return
                except csv.Error as error:
                    yield Record(line, rejected="not csv", reason=f"not valid csv: {error}")
                else:
                    yield _csv_record(line, row, header, fields)
    except csv.Error as error:
        raise UserError(f"{path}: the header is not valid csv: {error}") from error
    finally:
        csv.field_size_limit(before)


def read_parquet(path: Path, fields: Fields, limit: int) -> Iterator[Record]:
    """Rows of a parquet file, counted from 1; only the named columns are read, in batches."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UserError(f"{path} needs pyarrow: pip install 'fastllm-train[data]'") from error
    try:
        file = pq.ParquetFile(path)
        _require_columns(path, file.schema_arrow.names, fields)
        row = 0
        for batch in file.iter_batches(batch_size=1024, columns=fields):
            columns = {name: batch.column(name) for name in batch.schema.names}
            for index in range(batch.num_rows):
                row += 1
                try:
                    value = {name: columns[name][index].as_py() for name in columns}
                except UnicodeDecodeError as error:
                    yield Record(row, rejected="bad UTF-8", reason=bad_utf8(error))
                else:
                    yield from_fields(row, value, fields)
    except pa.ArrowException as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is not a readable parquet file: {first}") from error
