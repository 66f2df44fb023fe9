"""Which documents are trained on at a row length: nothing is left out in silence."""

import json

import numpy as np
import pytest

from fastllm.config import UserError
from fastllm.data import DataConfig, EvalSet, Loader, Rows, TokenizerConfig, prepare, preview
from fastllm.data.chat import ChatConfig
from fastllm.data.fitting import fit
from fastllm.data.packing import pack
from fastllm.data.tokenizer import train_bpe

WORDS = ["a", "good", "answer", "is", "short", "and", "says", "what", "was", "asked", "for", "in",
         "plain", "words"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([" ".join(WORDS)] * 3, TokenizerConfig(vocab_size=300))


def written(folder, rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def prepared_of(folder, tokenizer, kind, rows, **data):
    settings = DataConfig(**{"path": [str(written(folder, rows))], "holdout": 0.0,
                             "cache_dir": str(folder / "cache"), **data})
    return prepare(settings, rows=Rows(kind, tokenizer, ChatConfig()))


def chats(count, long=()):
    return [{"messages": [{"role": "user", "content": f"number {n}"},
                          {"role": "assistant", "content": " ".join(WORDS * (9 if n in long else 1))
                           }]} for n in range(count)]


def pairs(count, long=()):
    return [{"prompt": f"number {n}", "chosen": " ".join(WORDS),
             "rejected": " ".join(WORDS[:3] * (60 if n in long else 1))} for n in range(count)]


def test_only_answers_are_labels(tmp_path, tokenizer):
    prepared = prepared_of(tmp_path, tokenizer, "chat", chats(5))
    batch = next(Loader(prepared, batch_size=2, seq_len=128, num_workers=0, pin_memory=False))
    trained = batch.labels[batch.labels >= 0].tolist()
    answer = [*tokenizer.encode(" ".join(WORDS)), tokenizer.token_id("<|im_end|>")]
    assert trained == answer * 5
    assert batch.num_tokens == batch.count == len(trained) < batch.num_inputs


@pytest.mark.parametrize(("policy", "labels"), [("truncate", 5), ("drop", 4), ("split", 5)])
def test_policies(tmp_path, tokenizer, policy, labels):
    prepared = prepared_of(tmp_path, tokenizer, "chat", chats(5, long={2}), truncation=policy)
    fitted = fit(prepared.train, 64, prepared.truncation)
    assert len(fitted.starts) == labels
    if policy == "split":
        assert not fitted.notes and fitted.lengths.max() > 65
    else:
        assert fitted.lengths.max() <= 65
        assert "1 of 5 sequences are longer than train.seq-len 64" in fitted.notes[0]
    if policy == "drop":
        assert "rows.jsonl:3" in fitted.notes[0]
    if policy == "truncate":
        cut = int(prepared.train.lengths.max()) - 65
        assert f"{cut:,} tokens" in fitted.notes[0]


def test_error_names_the_place(tmp_path, tokenizer):
    prepared = prepared_of(tmp_path, tokenizer, "chat", chats(5, long={2}), truncation="error")
    with pytest.raises(UserError, match=r"longer than train\.seq-len 64: .*rows\.jsonl:3"):
        Loader(prepared, batch_size=1, seq_len=64, num_workers=0)


def test_a_sample_with_nothing_to_train_is_named_and_all_of_them_is_an_error(tmp_path, tokenizer):
    rows = chats(3)
    rows[1]["messages"][0]["content"] = " ".join(WORDS * 9)
    prepared = prepared_of(tmp_path, tokenizer, "chat", rows)
    fitted = fit(prepared.train, 64, prepared.truncation)
    assert fitted.documents.tolist() == [0, 2]
    assert any("1 of 3 sequences have no token to train" in note and "rows.jsonl:2" in note
               for note in fitted.notes)
    with pytest.raises(UserError, match=r"nothing is left to train on: .*no token to train"):
        fit(prepared.train, 4, prepared.truncation)


def test_a_pair_stays_whole(tmp_path, tokenizer):
    prepared = prepared_of(tmp_path, tokenizer, "preference", pairs(7, long={3}))
    assert prepared.truncation == "drop"
    fitted = fit(prepared.train, 64, "drop")
    assert fitted.documents.tolist() == [n for n in range(14) if n // 2 != 3]
    with pytest.raises(UserError, match="split does not go with preference pairs"):
        fit(prepared.train, 64, "split")


def test_batches_know_their_pairs(tmp_path, tokenizer):
    prepared = prepared_of(tmp_path, tokenizer, "preference", pairs(7))
    loader = Loader(prepared, batch_size=2, seq_len=64, num_workers=0, pin_memory=False)
    loader.packed.reference = np.arange(14, dtype=np.float32)
    seen, prompt = [], None
    for _ in range(loader.steps_per_epoch()):
        position = loader.position
        batch = next(loader)
        rows = loader.rows_at(position)
        assert batch.reference.flatten().tolist() == loader.packed.documents(rows).tolist()
        flat, bounds = batch.labels.flatten(), batch.cu_seqlens.tolist()
        for chosen, rejected in batch.pairs.tolist():
            texts = []
            for segment in (chosen, rejected):
                labels = flat[bounds[segment]:bounds[segment + 1]]
                texts.append(tokenizer.decode(labels[labels >= 0].tolist()))
            assert texts == [" ".join(WORDS), " ".join(WORDS[:3])]
            prompt = batch.input_ids.flatten()[bounds[chosen]:bounds[chosen + 1]].tolist()
        seen += batch.reference[:, 0].tolist()
    assert prompt is not None and set(seen) == set(range(0, 14, 2))


@pytest.mark.parametrize("kind", ["preference", "judged"])
def test_no_held_out_prompt_is_trained_on(tmp_path, tokenizer, kind):
    """Four rows a prompt, which share an answer: split by their own text, they would mix."""
    answers = [f"answer {n}" for n in range(4)]
    rows = [{"prompt": f"number {n}", "chosen": "right", "rejected": answer}
            if kind == "preference" else
            {"prompt": f"number {n}", "completion": answer, "label": True}
            for n in range(40) for answer in answers]
    prepared = prepared_of(tmp_path, tokenizer, kind, rows, holdout=0.25)

    def asked(split):
        dataset = prepared.split(split)
        return [tuple(dataset.tokens[start:start + length][dataset.trained[
            start:start + length] == 0].tolist())
            for start, length in zip(dataset.starts, dataset.lengths, strict=True)]

    held = asked("heldout")
    assert 2 <= len(set(held)) <= 20 and len(held) == 8 * len(set(held))
    assert not set(held) & set(asked("train"))


def test_pairs_of_one_prompt_are_split_by_their_answers(tmp_path, tokenizer):
    rows = [{"prompt": "the same", "chosen": "right", "rejected": f"answer {n}"} for n in range(40)]
    prepared = prepared_of(tmp_path, tokenizer, "preference", rows, holdout=0.25)
    assert len(prepared.heldout) and len(prepared.train)


def test_judged_rows_carry_their_judgement_and_another_answer(tmp_path, tokenizer):
    rows = [{"prompt": f"number {n}", "completion": f"answer {n}", "label": n % 2 == 0}
            for n in range(4)]
    prepared = prepared_of(tmp_path, tokenizer, "judged", rows)
    assert prepared.store.desirable.tolist() == [1, 0, 1, 0]
    dataset = prepared.train

    def answer(place):
        start, length = int(dataset.starts[place]), int(dataset.lengths[place])
        ids, flags = dataset.tokens[start:start + length], dataset.trained[start:start + length]
        return tokenizer.decode(ids[flags == 1].tolist())

    assert [answer(place) for place in range(8)] == [
        "answer 0", "answer 0", "answer 1", "answer 0", "answer 2", "answer 1", "answer 3",
        "answer 2"]
    loader = Loader(prepared, batch_size=4, seq_len=64, num_workers=0, pin_memory=False)
    batch = loader.packed.batch(np.arange(loader.rows_per_epoch))
    documents = loader.packed.documents(np.arange(loader.rows_per_epoch))[::2]
    assert batch.desirable.tolist() == [bool(1 - d // 2 % 2) for d in documents]


def test_bad_rows_are_named_and_the_counts_add_up(tmp_path, tokenizer):
    rows = [*chats(3), {"messages": []}, {"nothing": 1}, ["no", "object"],
            {"messages": [{"role": "user", "content": "only a question"}]}]
    prepared = prepared_of(tmp_path, tokenizer, "chat", rows)
    report = prepared.report
    assert (report.records, report.used, report.num_rejected) == (7, 3, 4)
    report.check()
    assert [reason.split(":")[1] for reason in report.reasons] == ["4", "5", "6", "7"]
    with pytest.raises(UserError, match=r"rows\.jsonl:4"):
        prepared_of(tmp_path, tokenizer, "chat", rows, on_bad="error")
    with pytest.raises(UserError, match="no usable document"):
        prepared_of(tmp_path, tokenizer, "chat", rows[3:])


def test_text_is_refused_where_rows_are_wanted(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("some text")
    with pytest.raises(UserError, match="conversations and pairs are rows"):
        prepared_of(tmp_path, tokenizer, "chat", chats(1), path=[str(tmp_path / "a.txt")])


def test_held_out_conversations_are_scored_to_their_ends(tmp_path, tokenizer):
    prepared = prepared_of(tmp_path, tokenizer, "chat", chats(40, long=set(range(40))),
                           holdout=0.2)
    held = EvalSet(prepared, 64, 4)
    assert sum(batch.num_tokens for batch in held) == held.dataset.num_trained
    assert held.num_bytes == len(held.dataset) * len(" ".join(WORDS * 9).encode())


def test_preview_shows_what_is_trained(tmp_path, tokenizer):
    prepared = prepared_of(tmp_path, tokenizer, "chat", chats(2))
    row, = preview(prepared, 128, rows=1)
    for segment in row.segments:
        shown = "".join(token for token, trained in zip(segment.tokens, segment.trained,
                                                        strict=True) if trained)
        assert shown == " ".join(WORDS) + "<|im_end|>"


@pytest.mark.parametrize("together", [True, False])
def test_groups_fill_rows_whole(together):
    lengths = np.random.default_rng(0).integers(2, 34, 200)
    starts = np.cumsum(lengths) - lengths
    packing = pack(starts, lengths, 32, together=together, group=2)
    assert packing.seq_len == 64 and sorted(packing.document.tolist()) == list(range(200))
    assert np.array_equal(packing.document[1::2], packing.document[::2] + 1)
    assert np.array_equal(packing.start, starts[packing.document])
    assert np.array_equal(packing.length, lengths[packing.document] - 1)
    for begin, end in zip(packing.row_start, packing.row_start[1:], strict=False):
        assert (end - begin) % 2 == 0 and packing.length[begin:end].sum() <= 64
    if together:
        assert packing.efficiency > 1.5 * pack(starts, lengths, 32, together=False,
                                               group=2).efficiency
