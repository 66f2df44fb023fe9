"""Every label exactly once, nothing across a document's end, close to full rows, quickly."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllm.data.collate import collate
from fastllm.data.packing import best_fit_decreasing, epoch_order, pack, pieces_of


def best_fit_by_hand(lengths, seq_len):
    """The room left in each row after plain best-fit decreasing, one piece at a time."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [index for index, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda index: rooms[index])] -= length
        else:
            rooms.append(seq_len - length)
    return sorted(rooms)


@settings(max_examples=150, deadline=None)
@given(lengths=st.lists(st.integers(1, 24), max_size=60), seq_len=st.integers(24, 60))
def test_is_best_fit_decreasing(lengths, seq_len):
    row_of, rows = best_fit_decreasing(np.array(lengths, dtype=np.int32), seq_len)
    filled = np.bincount(row_of, weights=lengths, minlength=rows) if lengths else np.zeros(0)
    assert sorted((seq_len - filled).astype(int).tolist()) == best_fit_by_hand(lengths, seq_len)


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(0, 90), min_size=1, max_size=40), seq_len=st.integers(1, 32),
       together=st.booleans())
def test_every_label_once(lengths, seq_len, together):
    """Over all rows, the set of (token, next token) places is that of the documents."""
    lengths = np.array(lengths)
    starts = np.cumsum(lengths) - lengths
    tokens = np.arange(lengths.sum() + 1, dtype=np.uint32)
    packing = pack(starts, lengths, seq_len, together=together)
    expected = [place for start, length in zip(starts, lengths, strict=True)
                for place in range(start + 1, start + length)]
    if not packing.num_rows:
        assert not expected
        return
    batch = collate(tokens, packing, np.arange(packing.num_rows), pad_id=0)
    labels, inputs = batch.labels.numpy(), batch.input_ids.numpy()
    trained = labels != -100
    assert sorted(labels[trained].tolist()) == expected
    assert np.array_equal(labels[trained], inputs[trained] + 1)
    assert batch.num_tokens == len(expected) == packing.num_labels
    check_segments(batch, starts, lengths)


def check_segments(batch, starts, lengths):
    """cu_seqlens, positions and padding agree, and no segment has tokens of two documents."""
    size, seq_len = batch.input_ids.shape
    bounds = batch.cu_seqlens.tolist()
    assert batch.cu_seqlens.dtype.is_signed
    assert bounds[0] == 0
    assert bounds[-1] == size * seq_len
    assert set(range(0, size * seq_len, seq_len)) <= set(bounds)
    assert batch.max_seqlen == max(b - a for a, b in itertools.pairwise(bounds))
    inputs, labels = batch.input_ids.flatten().tolist(), batch.labels.flatten().tolist()
    positions = batch.position_ids.flatten().tolist()
    for begin, end in itertools.pairwise(bounds):
        assert begin < end
        assert positions[begin:end] == list(range(end - begin))
        trained = {label != -100 for label in labels[begin:end]}
        assert len(trained) == 1
        if trained == {True}:
            document = int(np.searchsorted(starts, inputs[begin], side="right")) - 1
            assert labels[end - 1] < starts[document] + lengths[document]
            assert inputs[begin:end] == list(range(inputs[begin], inputs[begin] + end - begin))
        else:
            assert set(inputs[begin:end]) == {0}
            assert end % seq_len == 0


def test_pieces_of_a_long_document():
    """11 tokens have 10 labels: pieces of 4, 4 and 2, each from the label before it on."""
    start, length = pieces_of(np.array([100]), np.array([11]), 4)
    assert start.tolist() == [100, 104, 108]
    assert length.tolist() == [4, 4, 2]


def test_an_empty_row():
    packing = pack(np.array([0]), np.array([5]), 4)
    batch = collate(np.arange(9), packing, np.array([0, -1]), pad_id=7)
    assert batch.input_ids.tolist() == [[0, 1, 2, 3], [7, 7, 7, 7]]
    assert batch.labels.tolist() == [[1, 2, 3, 4], [-100] * 4]
    assert batch.cu_seqlens.tolist() == [0, 4, 8]
    assert batch.num_tokens == 4


def test_a_million_documents():
    lengths = np.minimum(np.random.default_rng(0).lognormal(5.5, 1.2, 1_000_000), 50_000)
    lengths = lengths.astype(np.int64) + 2
    began = time.perf_counter()
    packing = pack(np.cumsum(lengths) - lengths, lengths, 2048)
    assert time.perf_counter() - began < 10
    assert packing.num_labels == lengths.sum() - len(lengths)
    assert packing.efficiency > 0.999
    assert np.add.reduceat(packing.length, packing.row_start[:-1]).max() <= 2048


@pytest.mark.parametrize("rows", [1, 2, 1000])
def test_order_is_a_pure_permutation(rows):
    order = epoch_order(rows, seed=3, epoch=5)
    assert sorted(order.tolist()) == list(range(rows))
    assert np.array_equal(order, epoch_order(rows, seed=3, epoch=5))
    if rows == 1000:
        assert not np.array_equal(order, epoch_order(rows, seed=3, epoch=6))
        assert not np.array_equal(order, epoch_order(rows, seed=4, epoch=5))


def test_order_stays_what_it_was():
    """A checkpoint from another version resumes in the same order."""
    assert epoch_order(8, seed=42, epoch=1).tolist() == [4, 5, 3, 0, 2, 7, 1, 6]
