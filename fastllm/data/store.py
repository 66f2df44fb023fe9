"""Prepared tokens on disk: a folder of memory-mapped arrays that knows its own hashes.

    tokens.bin      every document's tokens one after another, uint16 or uint32 by the vocabulary
    documents.bin   a DOCUMENT record each: where its tokens are, its bytes, hash, file and line
    heldout.bin     a byte each: 1 where the document is held out
    trained.bin     of rows: a byte a token, 1 where the model is trained to predict it
    desirable.bin   of judged rows: a byte each
    meta.json       counts, the account of the sources, size and SHA-256 of every file, its own hash
    tokenizer.json  what encoded it
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = "fastllm-tokens-1"
DOCUMENT = np.dtype([("start", "<i8"), ("tokens", "<i8"), ("bytes", "<i8"), ("hash", "<u8"),
                     ("line", "<i8"), ("file", "<i8")])
META, TOKENS, DOCUMENTS, HELDOUT = "meta.json", "tokens.bin", "documents.bin", "heldout.bin"
TRAINED, DESIRABLE = "trained.bin", "desirable.bin"
TOKENIZER = "tokenizer.json"
ABSENT = "absent"


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _meta_hash(meta: dict[str, Any]) -> str:
    rest = {key: value for key, value in meta.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def write_meta(folder: Path, values: dict[str, Any]) -> None:
    """Closes a folder: meta.json with `values`, the other files' sizes and hashes, and its own."""
    files = {path.name: {"size": path.stat().st_size, "sha256": sha256(path)}
             for path in sorted(folder.iterdir())}
    meta = {"format": FORMAT, **values, "files": files}
    meta["sha256"] = _meta_hash(meta)
    (folder / META).write_text(json.dumps(meta, indent=1, ensure_ascii=False) + "\n", "utf-8")


def fault_of(folder: Path, *, hashes: bool = True) -> str | None:
    """What is wrong with a prepared folder: None, ABSENT, or a phrase that names the file.

    hashes=False compares the sizes alone.
    """
    if not folder.exists():
        return ABSENT
    try:
        meta = json.loads((folder / META).read_text("utf-8"))
        if meta["format"] != FORMAT:
            return f"{META} is of format {meta['format']}, not {FORMAT}"
        if meta["sha256"] != _meta_hash(meta):
            return f"the hash of {META} differs"
        for name, expected in meta["files"].items():
            path = folder / name
            if path.stat().st_size != expected["size"]:
                return f"{name} has {path.stat().st_size} bytes, not {expected['size']}"
            if hashes and sha256(path) != expected["sha256"]:
                return f"the hash of {name} differs"
    except OSError as error:
        return f"{Path(str(error.filename)).name} cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{META} is not what was written"
    return None


class TokenStore:
    """An open prepared folder. The arrays are memory maps: opening costs nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta: dict[str, Any] = json.loads((folder / META).read_text("utf-8"))
        self.tokens = np.memmap(folder / TOKENS, dtype=self.meta["dtype"], mode="r")
        self.documents = np.memmap(folder / DOCUMENTS, dtype=DOCUMENT, mode="r")
        self.heldout = np.fromfile(folder / HELDOUT, dtype=np.uint8).astype(bool)
        self.kind: str = self.meta.get("kind", "text")
        self.group: int = self.meta.get("group", 1)
        """Documents of a row, one after another in the store: two of a pair."""
        self.trained = self._bytes(TRAINED)
        """Which tokens are trained; None: all of them."""
        self.desirable = self._bytes(DESIRABLE)
        """(documents / group,): the judgement of each pair; None: there is none."""

    def _bytes(self, name: str) -> np.ndarray | None:
        path = self.folder / name
        return np.memmap(path, dtype=np.uint8, mode="r") if path.exists() else None

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of tokens, documents, split and tokenizer, wherever they lie."""
        files = self.meta["files"]
        parts = [files[name]["sha256"] for name in (TOKENS, DOCUMENTS, HELDOUT, TRAINED, DESIRABLE)
                 if name in files]
        return hashlib.sha256(json.dumps([*parts, self.meta["tokenizer"]]).encode()).hexdigest()

    def where(self, document: int) -> str:
        """`file:line` of a document."""
        record = self.documents[document]
        return f"{self.meta['sources'][int(record['file'])]}:{int(record['line'])}"

    def first_at_least(self, token_id: int) -> tuple[int, int] | None:
        """(document, id) of the first token that is not below `token_id`, None if there is none."""
        if self.meta["max_token_id"] < token_id:
            return None
        for begin in range(0, len(self.tokens), 1 << 24):
            block = self.tokens[begin : begin + (1 << 24)]
            found = np.flatnonzero(block >= token_id)
            if len(found):
                at = begin + int(found[0])
                document = int(np.searchsorted(self.documents["start"], at, side="right")) - 1
                return document, int(self.tokens[at])
        return None


class TokenDataset:
    """Documents of a store: those held out ("heldout"), or the others ("train").

    starts, lengths, num_bytes_each: (N,) int64: a document's first token, its tokens (with bos and
    eos), the UTF-8 bytes of its text. indices: (N,) int64, its number in the store.
    """

    def __init__(self, store: TokenStore, split: str) -> None:
        if split not in ("train", "heldout"):
            raise ValueError(f"split must be 'train' or 'heldout', not {split!r}")
        self.store = store
        self.tokens = store.tokens
        self.indices = np.flatnonzero(store.heldout == (split == "heldout"))
        self.starts = store.documents["start"][self.indices]
        self.lengths = store.documents["tokens"][self.indices]
        self.num_bytes_each = store.documents["bytes"][self.indices]
        self.group, self.trained = store.group, store.trained

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def num_trained(self) -> int:
        """Labels that are trained: the first token of a document never is one."""
        return int(self.trained_in(self.lengths).sum())

    def trained_in(self, lengths: np.ndarray) -> np.ndarray:
        """Labels of each document that are trained in its first `lengths` (N,) tokens: (N,)."""
        if self.trained is None:
            return np.maximum(lengths - 1, 0)
        borders = np.stack([self.starts + 1, self.starts + np.maximum(lengths, 2)], 1).reshape(-1)
        if not len(borders):
            return np.zeros(0, dtype=np.int64)
        # reduceat wants every border inside: one more number, for a document that ends the file.
        sums = np.add.reduceat(np.append(self.trained, 0), borders, dtype=np.int64)[::2]
        return np.where(lengths < 2, 0, sums)

    @property
    def num_bytes(self) -> int:
        return int(self.num_bytes_each.sum())

    def document(self, index: int) -> np.ndarray:
        """The tokens of one document, bos and eos included."""
        start = int(self.starts[index])
        return self.tokens[start : start + int(self.lengths[index])]

    def where(self, index: int) -> str:
        return self.store.where(int(self.indices[index]))
