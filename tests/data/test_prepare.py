"""Prepared once, opened again, never silently wrong; the split keeps copies of a text together."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastllm.config import UserError
from fastllm.data import DataConfig, TokenizerConfig, open_prepared, prepare
from fastllm.data.sources import held_out, text_hash

from .conftest import make_texts, write_jsonl


def test_tokens_are_the_documents(prepared, texts):
    """Both splits together decode to the texts, each between bos and eos, with its bytes."""
    tokenizer, found = prepared.tokenizer, {}
    for split in (prepared.train, prepared.heldout):
        for index in range(len(split)):
            ids = split.document(index).tolist()
            assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
            text = tokenizer.decode(ids[1:-1], skip_special_tokens=False)
            assert len(text.encode()) == split.num_bytes_each[index]
            found[int(split.where(index).rsplit(":", 1)[1])] = text
    assert [found[line] for line in sorted(found)] == texts


def test_summary_adds_up(prepared, texts):
    assert f"{len(texts)} records = {len(texts)} used + 0 skipped" in prepared.summary()[0]


def test_second_time_opens_what_is_there(corpus, prepared):
    stages = []
    again = prepare(*corpus, progress=lambda stage, done, total: stages.append(stage))
    assert again.store.folder == prepared.store.folder
    assert again.fingerprint == prepared.fingerprint
    assert set(stages) <= {"hashing the sources"}


def test_other_text_and_other_tokenizer_are_prepared_anew(corpus, prepared, tmp_path):
    data, config = corpus
    assert prepare(data, replace(config, vocab_size=300)).fingerprint != prepared.fingerprint
    path = write_jsonl(tmp_path / "small.jsonl", make_texts(240, seed=1))
    assert prepare(replace(data, path=[str(path)]), config).fingerprint != prepared.fingerprint
    assert prepare(replace(data, holdout=0.2), config).fingerprint != prepared.fingerprint


def test_a_moved_source_is_the_same(corpus, prepared, tmp_path):
    data, config = corpus
    copy = tmp_path / "small.jsonl"
    copy.write_bytes(Path(data.path[0]).read_bytes())
    assert prepare(replace(data, path=[str(copy)]), config).fingerprint == prepared.fingerprint


class TestSplit:
    def test_disjoint_and_of_the_asked_size(self, prepared):
        train, heldout = set(prepared.train.indices), set(prepared.heldout.indices)
        assert not train & heldout
        assert len(train) + len(heldout) == 240
        assert 8 <= len(heldout) <= 45

    def test_copies_stay_together(self):
        hashes = np.array([text_hash(str(n % 500).encode()) for n in range(2000)], dtype=np.uint64)
        mask = held_out(hashes, 0.1)
        assert not set(hashes[mask].tolist()) & set(hashes[~mask].tolist())
        assert 0.05 < mask.mean() < 0.15

    def test_more_documents_move_none(self):
        hashes = np.array([text_hash(str(n).encode()) for n in range(4000)], dtype=np.uint64)
        assert np.array_equal(held_out(hashes, 0.05)[:2000], held_out(hashes[:2000], 0.05))

    @pytest.mark.parametrize(("count", "least"), [(1, 0), (2, 1), (19, 1), (60, 3), (1000, 8)])
    def test_a_small_source_still_has_some(self, count, least):
        hashes = np.array([text_hash(str(n).encode()) for n in range(count)], dtype=np.uint64)
        assert held_out(hashes, 1e-9).sum() == least
        assert held_out(hashes, 0.0).sum() == 0

    def test_one_document_is_noted(self, corpus, tmp_path):
        data, config = corpus
        path = write_jsonl(tmp_path / "a.jsonl", ["a b c"])
        found = prepare(replace(data, path=[str(path)]), config)
        assert len(found.heldout) == 0
        assert any("nothing can be held out" in note for note in found.notes)
        assert any("the text supports" in note for note in found.notes)


class TestDamage:
    @pytest.fixture
    def own(self, corpus, tmp_path):
        data, config = corpus
        data = replace(data, cache_dir=str(tmp_path))
        return data, config, prepare(data, config)

    @pytest.mark.parametrize("name", ["tokens.bin", "documents.bin", "heldout.bin", "meta.json",
                                      "tokenizer.json"])
    @pytest.mark.parametrize("kind", ["bit", "cut", "gone"])
    def test_is_found_and_mended(self, own, name, kind):
        data, config, first = own
        folder = first.store.folder
        content = bytearray((folder / name).read_bytes())
        if kind == "bit":
            content[len(content) // 2] ^= 1
        elif kind == "cut":
            del content[len(content) // 2:]
        (folder / name).unlink()
        if kind != "gone":
            (folder / name).write_bytes(content)
        with pytest.raises(UserError, match="is not sound prepared data"):
            open_prepared(folder)
        if (folder / "meta.json").exists():
            with pytest.raises(UserError, match="is not sound prepared data"):
                prepare(replace(data, path=[str(folder)]), config)
        again = prepare(data, config)
        assert again.fingerprint == first.fingerprint
        assert any("was damaged" in note and "made again" in note for note in again.notes)
        assert prepare(data, config).notes == first.notes
        leftovers = [path for path in folder.parent.iterdir() if ".tmp-" in path.name]
        assert not leftovers

    def test_of_the_cached_tokenizer(self, own):
        data, config, first = own
        [folder] = [path for path in Path(data.cache_dir).glob("tokenizer-*") if path.is_dir()]
        path = folder / "tokenizer.json"
        path.write_text(path.read_text("utf-8").replace('"Ġthe"', '"Ġthx"'), "utf-8")
        again = prepare(data, config)
        assert again.tokenizer.fingerprint == first.tokenizer.fingerprint
        assert any("was damaged" in note for note in again.notes)

    def test_sizes_alone(self, own):
        data, config, first = own
        path = first.store.folder / "tokens.bin"
        content = bytearray(path.read_bytes())
        content[5] ^= 1
        path.write_bytes(content)
        assert not prepare(replace(data, verify=False), config).notes


def test_opens_a_prepared_folder(corpus, prepared):
    data, config = corpus
    again = prepare(replace(data, path=[str(prepared.store.folder)]), config)
    assert again.fingerprint == prepared.fingerprint
    assert again.report == prepared.report


def test_token_outside_the_model(corpus, prepared):
    largest = prepared.store.meta["max_token_id"]
    prepare(*corpus, vocab_size=largest + 1)
    with pytest.raises(UserError) as error:
        prepare(*corpus, vocab_size=largest)
    at = int(np.argmax(prepared.store.tokens >= largest))
    document = int(np.searchsorted(prepared.store.documents["start"], at, side="right")) - 1
    assert f"small.jsonl:{document + 1} (document {document}) has token id {largest}" in str(
        error.value)


def test_bad_records_end_a_strict_run_also_from_the_cache(corpus, tmp_path):
    data, config = corpus
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(20))
    with path.open("a") as stream:
        stream.write("{broken\n")
    data = replace(data, path=[str(path)])
    assert prepare(data, config).report.num_rejected == 1
    with pytest.raises(UserError, match=r"a\.jsonl:21: not valid JSON"):
        prepare(replace(data, on_bad="error"), config)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_nothing(corpus, tmp_path, monkeypatch, error):
    """A full disk is one line; whatever interrupts, no half-made folder stays, and the next run
    works."""
    data, config = corpus
    data = replace(data, cache_dir=str(tmp_path))

    def fail(*_):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr("fastllm.data.store.write_meta", fail)
        expected = UserError if isinstance(error, OSError) else KeyboardInterrupt
        with pytest.raises(expected, match="No space left" if expected is UserError else None):
            prepare(data, config)
    assert not [path for path in tmp_path.iterdir() if ".tmp-" in path.name]
    assert len(prepare(data, config).train)


def test_cache_that_cannot_be_made(corpus, tmp_path):
    (tmp_path / "file").write_text("")
    data, config = corpus
    with pytest.raises(UserError, match=r"data\.cache_dir .*file"):
        prepare(replace(data, cache_dir=str(tmp_path / "file")), config)


PROCESS = """
import sys
from fastllm.data import DataConfig, TokenizerConfig, prepare
stages = []
found = prepare(DataConfig(path=[sys.argv[1]], cache_dir=sys.argv[2]),
                TokenizerConfig(vocab_size=320), progress=lambda stage, *_: stages.append(stage))
print(found.fingerprint, "tokenising" in stages, len(found.notes))
"""


def test_processes_prepare_once(corpus, tmp_path):
    """Two at the same time: one makes the tokens, the other waits for them."""
    command = [sys.executable, "-c", PROCESS, corpus[0].path[0], str(tmp_path)]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    found = [worker.communicate(timeout=120)[0].split() for worker in workers]
    assert found[0][0] == found[1][0]
    assert sorted(made for _, made, _ in found) == ["False", "True"]
    assert {notes for _, _, notes in found} == {"0"}


def test_wide_vocabulary_takes_four_bytes(corpus, tmp_path):
    """Ids above 65,535 are stored as they are."""
    from fastllm.data import Tokenizer

    class Shifted(Tokenizer):
        vocab_size = 70_320
        fingerprint = "shifted"

        def encode_batch(self, texts):
            return [[token + 70_000 for token in ids] for ids in super().encode_batch(texts)]

    data, config = corpus
    plain = prepare(data, config)
    inner = plain.tokenizer
    shifted = Shifted(inner._inner, bos=inner.bos_token, eos=inner.eos_token, pad=inner.pad_token)
    wide = prepare(replace(data, cache_dir=str(tmp_path)), config, tokenizer=shifted)
    assert (plain.store.tokens.dtype, wide.store.tokens.dtype) == (np.uint16, np.uint32)
    assert np.array_equal(wide.train.document(3)[1:-1],
                          plain.train.document(3)[1:-1].astype(np.int64) + 70_000)


def test_no_data():
    with pytest.raises(UserError, match=r"data\.path is empty"):
        prepare(DataConfig(), TokenizerConfig())
