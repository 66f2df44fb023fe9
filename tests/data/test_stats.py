"""Stats and preview say what the arrays say."""

import io

import numpy as np
from rich.console import Console

from fastllm.data import Loader, preview, render_preview, render_stats, stats


def test_figures(prepared):
    figures = stats(prepared, 64, seed=3)
    lengths = np.array([len(prepared.train.document(i)) for i in range(len(prepared.train))])
    train = figures.splits["train"]
    assert (train.documents, train.tokens) == (len(lengths), lengths.sum())
    assert train.length_percentiles[50] == np.sort(lengths)[-(-len(lengths) // 2) - 1]
    assert train.length_percentiles[100] == lengths.max()
    assert train.longer_than_row == (lengths - 1 > 64).sum()
    single = sum(-(-(length - 1) // 64) for length in lengths.tolist())
    assert train.padding_efficiency == (lengths - 1).sum() / (single * 64)
    assert train.packing_efficiency == (lengths - 1).sum() / (train.rows * 64)
    assert train.packing_efficiency > 0.97 > train.padding_efficiency
    assert set(figures.splits) == {"train", "heldout"}


def test_preview_shows_the_trainers_rows(prepared, texts):
    shown = preview(prepared, 64, seed=3, rows=3)
    batch = next(Loader(prepared, batch_size=3, seq_len=64, seed=3, num_workers=0))
    trained = [sum(segment.trained) for row in shown for segment in row.segments]
    assert sum(trained) == batch.num_tokens
    for row in shown:
        assert row.padding + sum(len(segment.tokens) - 1 for segment in row.segments) == 64
        for segment in row.segments:
            assert segment.trained == [False] + [True] * (len(segment.tokens) - 1)
            text = "".join(segment.tokens).replace("<|bos|>", "").replace("<|eos|>", "")
            document = texts[int(segment.where.rsplit(":", 1)[1]) - 1]
            # A piece may begin or end inside a character.
            assert text.strip("\ufffd") in document
            assert (segment.first_token == 0) == (segment.tokens[0] == "<|bos|>")


def test_renders(prepared):
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(render_stats(stats(prepared, 64)))
    console.print(render_preview(preview(prepared, 64, rows=1)))
    text = console.export_text()
    assert "packing efficiency" in text
    assert "⟦<|bos|>⟧" in text
    assert "small.jsonl:" in text
