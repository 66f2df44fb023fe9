"""The order of the rows is one, whoever asks for it: workers, ranks, a resumed run."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastllm.config import UserError
from fastllm.data import EvalSet, Loader

SEQ_LEN = 64


def loader(prepared, **options):
    options = {"batch_size": 4, "seq_len": SEQ_LEN, "seed": 7, "num_workers": 0, **options}
    return Loader(prepared, **options)


def same(first, second):
    return (torch.equal(first.input_ids, second.input_ids)
            and torch.equal(first.labels, second.labels)
            and torch.equal(first.position_ids, second.position_ids)
            and torch.equal(first.cu_seqlens, second.cu_seqlens)
            and (first.max_seqlen, first.num_tokens) == (second.max_seqlen, second.num_tokens))


def test_shapes_and_types(prepared):
    batch = next(loader(prepared))
    assert batch.input_ids.shape == batch.labels.shape == batch.position_ids.shape == (4, SEQ_LEN)
    assert {batch.input_ids.dtype, batch.labels.dtype, batch.position_ids.dtype} == {torch.int64}
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.num_tokens == int((batch.labels != -100).sum())
    assert same(batch.to("cpu", non_blocking=True), batch)


@pytest.mark.parametrize("pack", [True, False])
def test_an_epoch_trains_every_label_once(prepared, pack):
    """Counted by the documents' own tokens: the labels of an epoch are all but each first token."""
    stream = loader(replace(prepared, pack=pack), batch_size=1)
    expected = np.concatenate([prepared.train.document(index)[1:]
                               for index in range(len(prepared.train))])
    for _ in range(2):
        labels = np.concatenate([next(stream).labels.numpy().ravel()
                                 for _ in range(stream.rows_per_epoch)])
        assert np.array_equal(np.sort(labels[labels != -100]), np.sort(expected))


def test_position_ids_restart_where_documents_do(prepared):
    batch = next(loader(prepared, batch_size=8))
    starts = torch.zeros(8 * SEQ_LEN, dtype=torch.bool)
    starts[batch.cu_seqlens[:-1].long()] = True
    assert torch.equal(batch.position_ids.flatten() == 0, starts)
    bos = (batch.input_ids == prepared.tokenizer.bos_id).flatten()
    assert bool(starts[bos].all())


def test_epochs_differ_and_follow_without_a_gap(prepared):
    stream = loader(prepared, batch_size=1)
    rows = stream.rows_per_epoch
    assert rows % 4, "the corpus must not divide into whole batches, or this shows nothing"
    order = [int(stream.rows_at(position)[0]) for position in range(2 * rows)]
    assert sorted(order[:rows]) == sorted(order[rows:]) == list(range(rows))
    assert order[:rows] != order[rows:]
    wide = loader(prepared, batch_size=4)
    joined = np.concatenate([wide.rows_at(position) for position in range(0, 2 * rows - 3, 4)])
    assert joined.tolist() == order[: len(joined)]


def test_order_depends_on_the_seed(prepared):
    assert loader(prepared).rows_at(0).tolist() == loader(prepared).rows_at(0).tolist()
    assert loader(prepared).rows_at(0).tolist() != loader(prepared, seed=8).rows_at(0).tolist()


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(prepared, workers):
    plain, threaded = loader(prepared), loader(prepared, num_workers=workers)
    for _ in range(2 * plain.rows_per_epoch // 4):
        assert same(next(plain), next(threaded))
    assert threaded.wait_seconds > 0
    threaded.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_resumes_at_every_step(prepared, workers):
    whole = loader(prepared)
    batches, states = [], []
    for _ in range(24):
        states.append(whole.state_dict())
        batches.append(next(whole))
    resumed = loader(prepared, num_workers=workers)
    next(resumed)
    for step, state in enumerate(states):
        resumed.load_state_dict(state)
        for batch in batches[step : step + 3]:
            assert same(next(resumed), batch)
    resumed.close()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_one_order(prepared, world):
    """Four rows a step, on 1, 2 or 4 ranks: the same rows in the same order."""
    whole = loader(prepared)
    ranks = [loader(prepared, batch_size=4 // world, rank=rank, world_size=world)
             for rank in range(world)]
    for _ in range(whole.rows_per_epoch // 2):
        expected = next(whole)
        parts = [next(rank) for rank in ranks]
        assert torch.equal(torch.cat([part.input_ids for part in parts]), expected.input_ids)
        assert torch.equal(torch.cat([part.labels for part in parts]), expected.labels)
    assert {rank.position for rank in ranks} == {whole.position}


def test_ranks_change_in_the_middle(prepared):
    """1 -> 2 -> 4 -> 1 ranks: every row of the uninterrupted run once and in its place."""
    expected = [int(row) for position in range(0, 48, 4)
                for row in loader(prepared).rows_at(position)]
    found, state = [], loader(prepared).state_dict()
    for world in (1, 2, 4, 1):
        ranks = [loader(prepared, batch_size=4 // world, rank=rank, world_size=world)
                 for rank in range(world)]
        for rank in ranks:
            rank.load_state_dict(state)
        for _ in range(3):
            for rank in ranks:
                found += rank.rows_at(rank.position).tolist()
                next(rank)
        state = ranks[-1].state_dict()
    assert found == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_total_rows_ends_the_stream(prepared, workers):
    """The last batch keeps its shape: rows past the end are empty."""
    stream = loader(prepared, total_rows=10, num_workers=workers)
    batches = list(stream)
    stream.close()
    assert len(batches) == 3
    assert torch.equal((batches[-1].labels != -100).any(1), torch.tensor([1, 1, 0, 0]).bool())
    whole = loader(prepared)
    assert sum(batch.num_tokens for batch in batches) == sum(
        whole.batch_at(position).num_tokens for position in (0, 4)) + loader(
        prepared, batch_size=2).batch_at(8).num_tokens


def test_resume_with_other_data_is_refused(prepared):
    state = loader(prepared).state_dict()
    with pytest.raises(UserError, match="seed 7, here it is 8"):
        loader(prepared, seed=8).load_state_dict(state)
    with pytest.raises(UserError, match="seq_len"):
        loader(prepared, seq_len=32).load_state_dict(state)
    with pytest.raises(UserError, match="fingerprint"):
        loader(prepared).load_state_dict({**state, "fingerprint": "other"})


def test_steps_of_an_epoch(prepared):
    stream = loader(prepared)
    rows = stream.rows_per_epoch
    assert stream.steps_per_epoch() == -(-rows // 4)
    assert stream.steps_per_epoch(grad_accum=3) == -(-rows // 12)
    next(stream)
    assert stream.epoch == 4 / rows


def test_rank_outside_the_world(prepared):
    with pytest.raises(ValueError, match="rank 2"):
        loader(prepared, rank=2, world_size=2)


def test_an_error_in_a_worker_reaches_the_caller(prepared):
    stream = loader(prepared, num_workers=1)
    stream.packed.dataset = copy.copy(stream.packed.dataset)  # others read the one it is of
    stream.packed.dataset.tokens = stream.packed.dataset.tokens[:3]
    with pytest.raises(IndexError):
        next(stream)
    stream.close()


class TestEvalSet:
    def test_every_held_out_label_once_with_its_bytes(self, prepared):
        held = EvalSet(prepared, SEQ_LEN, 3)
        batches = list(held)
        assert len(batches) == len(held)
        expected = np.concatenate([prepared.heldout.document(index)[1:]
                                   for index in range(len(prepared.heldout))])
        labels = np.concatenate([batch.labels.numpy().ravel() for batch in batches])
        assert np.array_equal(np.sort(labels[labels != -100]), np.sort(expected))
        assert held.num_tokens == len(expected) == sum(batch.num_tokens for batch in batches)
        assert held.num_bytes == sum(map(len, held.texts())) > 0
        assert held.num_documents == len(list(held.texts())) == len(prepared.heldout)
        assert len(list(held.texts(2))) == 2

    def test_is_the_same_each_time(self, prepared):
        held = EvalSet(prepared, SEQ_LEN, 3)
        assert all(same(a, b) for a, b in zip(held, held, strict=True))

    @pytest.mark.parametrize("world", [2, 4])
    def test_ranks_divide_it(self, prepared, world):
        whole = EvalSet(prepared, SEQ_LEN, 4)
        ranks = [EvalSet(prepared, SEQ_LEN, 4 // world, rank=rank, world_size=world)
                 for rank in range(world)]
        assert {len(rank) for rank in ranks} == {len(whole)}
        for expected, *parts in zip(whole, *ranks, strict=True):
            assert torch.equal(torch.cat([part.labels for part in parts]), expected.labels)

    def test_of_nothing(self, prepared, corpus):
        from fastllm.data import prepare

        data, config = corpus
        none = prepare(replace(data, holdout=0.0), config)
        held = EvalSet(none, SEQ_LEN, 3)
        assert (len(held), held.num_bytes, list(held)) == (0, 0, [])
        with pytest.raises(UserError, match="no document in the heldout split"):
            loader(none, split="heldout")
