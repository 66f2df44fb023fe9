"""Tokenizers out of GGUF metadata: the ids of transformers, each rule, and refusals by key."""

import itertools
import random

import gguf
import pytest
import transformers

from fastllm.config import UserError
from fastllm.data.tokenizer import load_tokenizer
from fastllm.importing import import_model
from fastllm.importing.gguf_reader import File
from fastllm.importing.gguf_tokenizer import PRE_TOKENIZERS, read_tokenizer

TEXTS = ["hello world", "  hello   hell\n\n\tword'll DON'T", "x = [i**2 for i in range(1212)]",
         "床前明月光", "naïve 👩‍👧 <|im_end|> 1212 ½", ""]
PIECES = {"▁": -3.0, "h": -20.0, "e": -21.0, "l": -22.0, "o": -23.0, "w": -24.0, "r": -25.0,
          "d": -26.0, "he": -4.0, "ll": -5.0, "hell": -6.0, "hello": -7.0, "▁hello": -8.0,
          "or": -9.0, "▁w": -10.0, "▁wor": -11.0, "ld": -12.0, "▁world": -13.0, "lo": -5.5}


def read(path, said=None):
    return read_tokenizer(File(path), (said if said is not None else []).append)


def alone(forge, add):
    """A file with a tokenizer and no model."""
    path = forge.folder / "words.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    add(writer)
    forge.finish(writer)
    return path


def add_sentencepiece(writer, **changes):
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 259 + list(PIECES.values()))
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * len(PIECES))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    if "prefix" in changes:
        writer.add_add_space_prefix(changes["prefix"])


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2"])
def test_byte_level_ids_are_those_of_transformers(pre, forge, tmp_path):
    path = forge.write(forge.scrambled(),
                       tokenizer=lambda writer: forge.add_byte_level(writer, pre))
    tokenizer = load_tokenizer(import_model(path, tmp_path / "out", say=lambda line: None))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    written = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in TEXTS:
        ids = tokenizer.encode(text)
        for other in (theirs, written):
            assert other(text, split_special_tokens=True,
                         add_special_tokens=False)["input_ids"] == ids
        assert tokenizer.decode(ids) == text
    for text in ("<|im_start|>hello<|im_end|>", "<think>hello"):
        assert (theirs(text, add_special_tokens=False)["input_ids"]
                == written(text, add_special_tokens=False)["input_ids"])


def test_digits_stand_alone_or_not_as_pre_says(forge):
    counts = {}
    for pre in PRE_TOKENIZERS:
        path = alone(forge, lambda writer, pre=pre: forge.add_byte_level(writer, pre))
        tokenizer, *_ = read(path)
        counts[pre] = len(tokenizer.encode("1212"))   # "1 2" is a merge
        assert tokenizer.decode(tokenizer.encode(TEXTS[1])) == TEXTS[1]
    assert (counts["smollm"], counts["qwen2"]) == (4, 4)
    assert (counts["gpt-2"], counts["default"], counts["llama-bpe"]) == (2, 2, 3)


def test_tokens_with_roles(forge):
    said = []
    tokenizer, template, stop_ids = read(alone(forge, forge.add_byte_level), said)
    assert (tokenizer.bos_token, tokenizer.eos_id, tokenizer.pad_id) == (None, 2, 0)
    assert (template, stop_ids) == (None, [])
    assert said == ["padding token: '<|endoftext|>' (id 0); the file's, '<|im_end|>', "
                    "ends documents"]

    def more(writer):
        forge.add_byte_level(writer, add_bos=True, eos=0)
        writer.add_eot_token_id(1)

    said.clear()
    tokenizer, _, stop_ids = read(alone(forge, more), said)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 0, 2)
    assert stop_ids == [1] and not said


def test_bos_stands_before_a_text_in_transformers(forge, tmp_path):
    path = forge.write(forge.scrambled(), tokenizer=lambda writer: forge.add_byte_level(
        writer, add_bos=True))
    folder = import_model(path, tmp_path / "out", say=lambda line: None)
    ids = load_tokenizer(folder).encode("hello")
    assert transformers.AutoTokenizer.from_pretrained(folder)("hello")["input_ids"] == [1, *ids]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_merges_by_score_and_falls_back_to_bytes(prefix, forge):
    tokenizer, *_ = read(alone(forge, lambda writer: add_sentencepiece(writer, prefix=prefix)))
    names = lambda text: [tokenizer._inner.id_to_token(i) for i in tokenizer.encode(text)]  # noqa: E731
    assert names("hello world") == (["▁hello", "▁world"] if prefix else ["hello", "▁world"])
    assert names("helo")[prefix:] == ["he", "lo"]   # he (-4) comes first
    assert names("床")[prefix:] == ["<0xE5>", "<0xBA>", "<0x8A>"]
    assert names(" hello") == (["▁", "▁hello"] if prefix else ["▁hello"])
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_token) == (1, 2, "<unk>")


def sentencepiece_by_definition(text):
    """Merge the best-scored neighbours, the leftmost first, until none is left."""
    pieces = list("▁" + text.replace(" ", "▁"))
    while True:
        best = max(((PIECES[a + b], -i) for i, (a, b) in enumerate(itertools.pairwise(pieces))
                    if a + b in PIECES), default=None)
        if best is None:
            return pieces
        i = -best[1]
        pieces[i:i + 2] = [pieces[i] + pieces[i + 1]]


def test_sentencepiece_ids_are_those_of_its_definition(forge):
    tokenizer, *_ = read(alone(forge, add_sentencepiece))
    draw = random.Random(0)
    for _ in range(300):
        text = "".join(draw.choice("helo wrd") for _ in range(draw.randrange(1, 30)))
        names = [tokenizer._inner.id_to_token(i) for i in tokenizer.encode(text)]
        assert names == sentencepiece_by_definition(text), text


def test_sentencepiece_in_a_folder_is_what_transformers_reads(forge, tmp_path):
    path = forge.write(forge.scrambled(), tokenizer=add_sentencepiece)
    tokenizer = load_tokenizer(import_model(path, tmp_path / "out", say=lambda line: None))
    written = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert written(text, split_special_tokens=True)["input_ids"] == [1, *ids]
        if not text.startswith(" "):  # there transformers' Metaspace adds no space of its own
            assert theirs(text, add_special_tokens=False,
                          split_special_tokens=True)["input_ids"] == ids


def test_gemma_merges_by_place_and_runs_of_spaces_are_pieces(forge):
    """Its scores say nothing, and a run of spaces is stored as spaces, marked user-defined."""
    path = forge.folder / "words.gguf"
    writer = gguf.GGUFWriter(path, "gemma2")
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<b>", "  ",
              *(f"<0x{byte:02X}>" for byte in range(256)), "lo", "he", "el", "▁h",
              "▁", "h", "e", "l", "o"]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([3, 3, 3, 2, 4, 4] + [6] * 256 + [1] * 9)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)
    writer.add_add_space_prefix(False)
    forge.finish(writer)
    tokenizer, *_ = read(path)
    names = [tokenizer._inner.id_to_token(i) for i in tokenizer.encode("helo  <b> hel")]
    assert names == ["he", "lo", "▁▁", "<b>", "▁", "he", "l"]
    assert tokenizer.decode(tokenizer.encode("  helo   x ")) == "  helo   x "
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (2, 1, 0)


@pytest.mark.parametrize(("changes", "words"), [
    ({"pre": "deepseek-v9"}, r"pre 'deepseek-v9' is not supported.*there are: default, gpt-2"),
    ({"pre": None}, "pre None is not supported"),
    ({"merges": ["h", "e"]}, "merges holds 'h', which is not two tokens"),
    ({"merges": ["h zz"]}, "merges holds 'h zz'"),
    ({"tokens": ["a", "a", "b"], "types": [1, 1, 1]}, "tokens holds 'a' twice"),
    ({"types": [1, 1]}, "token_type is not an array of 300 numbers"),
    ({"eos": 5000}, "eos_token_id is 5000, outside the 300 tokens"),
])
def test_contradictions_are_refused_by_key(changes, words, forge):
    path = alone(forge, lambda writer: forge.add_byte_level(writer, **changes))
    with pytest.raises(UserError, match=rf"tokenizer\.ggml\.{words}"):
        read(path)


def test_other_kinds_and_missing_tokenizers_are_refused(forge):
    with pytest.raises(UserError, match=r"tokenizer\.ggml\.model 't5' is not supported"):
        read(alone(forge, lambda writer: writer.add_tokenizer_model("t5")))
    with pytest.raises(UserError, match=r"tokenizer\.ggml\.tokens is missing"):
        read(alone(forge, lambda writer: writer.add_tokenizer_model("gpt2")))
