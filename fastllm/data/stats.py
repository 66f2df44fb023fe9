"""What `data stats` and `data preview` show: figures of the prepared tokens, and rows as a model
sees them."""

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fastllm.data.collate import IGNORE_INDEX
from fastllm.data.fitting import fit
from fastllm.data.loader import Loader
from fastllm.data.packing import pack
from fastllm.data.prepare import Prepared
from fastllm.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from rich.console import Group
    from rich.text import Text

PERCENTILES = (0, 1, 5, 10, 25, 50, 75, 90, 95, 99, 100)


@dataclass
class SplitStats:
    """Figures of a split at a row length. Lengths are in tokens, bos and eos included."""

    documents: int
    tokens: int
    bytes: int
    bytes_per_token: float
    length_percentiles: dict[int, int]
    """Percentile -> the length that as many percent of the documents do not exceed."""
    longer_than_row: int
    """Documents that are split into several pieces."""
    rows: int
    packing_efficiency: float
    """Trained positions over all positions of the packed rows."""
    padding_efficiency: float
    """The same with a document (or a piece of one) a row."""


@dataclass
class Stats:
    """Figures of prepared data at a row length."""

    seq_len: int
    vocab_size: int
    splits: dict[str, SplitStats]
    summary: list[str]


def stats(prepared: Prepared, seq_len: int, *, seed: int = 0) -> Stats:
    """Figures of the train and held-out splits in rows of seq_len. The seed changes none of them:
    it orders the rows and does not fill them."""
    splits: dict[str, SplitStats] = {}
    notes: list[str] = []
    for name in ("train", "heldout"):
        part = prepared.split(name)
        if not len(part):
            continue
        fitted = fit(part, seq_len, prepared.truncation)
        packed, single = (pack(fitted.starts, fitted.lengths, seq_len, together=together,
                               group=part.group) for together in (True, False))
        notes += [f"{name}: {note}" for note in fitted.notes]
        shown = np.percentile(part.lengths, PERCENTILES, method="inverted_cdf")
        splits[name] = SplitStats(
            documents=len(part), tokens=part.num_tokens, bytes=part.num_bytes,
            bytes_per_token=part.num_bytes / part.num_tokens,
            length_percentiles=dict(zip(PERCENTILES, shown.astype(int).tolist(), strict=True)),
            longer_than_row=int(np.count_nonzero(part.lengths - 1 > seq_len)), rows=packed.num_rows,
            packing_efficiency=packed.efficiency, padding_efficiency=single.efficiency,
        )
    return Stats(seq_len, prepared.tokenizer.vocab_size, splits, [*prepared.summary(), *notes])


def render_stats(stats: Stats) -> "Group":
    """The account of the records and a table, to print with rich."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table()
    table.add_column("")
    for name in stats.splits:
        table.add_column(name, justify="right")
    parts = list(stats.splits.values())

    def row(label: str, values: list[str]) -> None:
        table.add_row(label, *values)

    row("documents", [f"{part.documents:,}" for part in parts])
    row("tokens (bos and eos included)", [f"{part.tokens:,}" for part in parts])
    row("bytes of text", [f"{part.bytes:,}" for part in parts])
    row("bytes a token", [f"{part.bytes_per_token:.3f}" for part in parts])
    for percentile in PERCENTILES:
        label = {0: "shortest document (tokens)", 50: "half are at most", 100: "longest"}.get(
            percentile, f"{percentile}% are at most")
        row(label, [f"{part.length_percentiles[percentile]:,}" for part in parts])
    row(f"longer than a row of {stats.seq_len:,}", [f"{part.longer_than_row:,}" for part in parts])
    row("packed rows", [f"{part.rows:,}" for part in parts])
    row("packing efficiency", [f"{part.packing_efficiency:.2%}" for part in parts])
    row("without packing", [f"{part.padding_efficiency:.2%}" for part in parts])
    return Group(*map(Text, stats.summary), table)


@dataclass
class PreviewSegment:
    """A piece of a document in a row. tokens: the text of each token (a character of several tokens
    stands at its last one). trained: whether the model is trained to predict the token; the first
    of a piece never is, since nothing comes before it."""

    document: int
    where: str
    first_token: int
    """Place of the piece in its document: 0, or more where a long document was split."""
    tokens: list[str]
    trained: list[bool]


@dataclass
class PreviewRow:
    """A row of the first batch: its segments and the padding after them. notes: on documents that
    are cut or left out, at the first row."""

    number: int
    segments: list[PreviewSegment]
    padding: int
    notes: tuple[str, ...] = ()


def preview(
    prepared: Prepared, seq_len: int, *, seed: int = 0, rows: int = 2, split: str = "train"
) -> list[PreviewRow]:
    """The first rows of the first epoch, as the trainer gets them."""
    loader = Loader(prepared, batch_size=rows, seq_len=seq_len, seed=seed, num_workers=0,
                    split=split, pin_memory=False)
    store, shown = prepared.store, []
    for number, row in enumerate(loader.rows_at(0).tolist()):
        batch = loader.packed.batch(np.array([row]))
        labels = batch.labels[0].tolist()
        segments, at = [], 0
        begin, end = loader.packing.row_start[row : row + 2].tolist()
        for piece in range(begin, end):
            start, length = int(loader.packing.start[piece]), int(loader.packing.length[piece])
            document = int(np.searchsorted(store.documents["start"], start, side="right")) - 1
            ids = store.tokens[start : start + length + 1].tolist()
            trained = [False, *(label != IGNORE_INDEX for label in labels[at : at + length])]
            segments.append(PreviewSegment(
                document, store.where(document), start - int(store.documents["start"][document]),
                _token_texts(prepared.tokenizer, ids), trained))
            at += length
        shown.append(PreviewRow(number, segments, loader.packing.seq_len - at,
                                () if number else loader.packed.notes))
    return shown


def _token_texts(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """The text of each token; "" where a character goes on in the next one."""
    texts: list[str] = []
    waiting: list[int] = []
    for token in ids:
        waiting.append(token)
        text = tokenizer.decode(waiting, skip_special_tokens=False)
        whole = not text.endswith("\ufffd") or len(waiting) == 4
        texts.append(text if whole else "")
        waiting = [] if whole else waiting
    return texts


def render_preview(rows: list[PreviewRow]) -> "Text":
    """The rows as text: runs of untrained tokens in ⟦ ⟧, the others plain; colours tell tokens
    apart."""
    from rich.text import Text

    text = Text()
    for row in rows:
        for note in row.notes:
            text.append(f"{note}\n", "bold red")
        trained = sum(sum(segment.trained) for segment in row.segments)
        text.append(f"row {row.number}: {len(row.segments)} segments, {trained} trained tokens, "
                    f"{row.padding} padding\n", "bold")
        for segment in row.segments:
            part = f", from token {segment.first_token}" if segment.first_token else ""
            text.append(f"── document {segment.document} ({segment.where}){part} ──\n", "bold cyan")
            tokens = enumerate(zip(segment.trained, segment.tokens, strict=True))
            for is_trained, run in itertools.groupby(tokens, key=lambda one: one[1][0]):
                colours = ("yellow", "green") if is_trained else ("dim", "dim blue")
                text.append("" if is_trained else "⟦", "dim")
                for index, (_, token) in run:
                    text.append(token, colours[index % 2])
                text.append("" if is_trained else "⟧", "dim")
            text.append("\n")
    return text
