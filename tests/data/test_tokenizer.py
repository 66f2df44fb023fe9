"""Text survives the tokenizer exactly, cannot spell a special token, and training is repeatable."""

import random

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllm.config import UserError
from fastllm.data import DataConfig, TokenizerConfig, load_tokenizer, train_tokenizer
from fastllm.data.sources import held_out, text_hash
from fastllm.data.tokenizer import SPECIAL_TOKENS, train_bpe

TEXTS = ["帝京篇十首 一\n太宗皇帝\n秦川雄帝宅，函谷壯皇居。",
         "He didn't: 12345 + 67 = 12412!\n\n\tdone",
         "naïve café — “quoted” 😀👩‍👩‍👧 \u200b\u0301 \x00\x7f\r\n  end  ", "", " ", "\n\n\n"]


@pytest.fixture(scope="module")
def tokenizer(texts):
    return train_bpe(texts, TokenizerConfig(vocab_size=320))


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60))
def test_round_trip_of_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def test_batch_is_the_same(tokenizer):
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]


@pytest.mark.parametrize("special", SPECIAL_TOKENS)
def test_text_cannot_spell_a_special_token(tokenizer, special):
    ids = tokenizer.encode(f"a{special}b {special}")
    assert not set(ids) & set(range(len(SPECIAL_TOKENS)))
    assert tokenizer.decode(ids, skip_special_tokens=False) == f"a{special}b {special}"


def test_special_tokens(tokenizer):
    assert [tokenizer.token_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2, 3, 4]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)
    ids = [tokenizer.bos_id, *tokenizer.encode("x"), tokenizer.eos_id]
    assert tokenizer.decode(ids) == "x"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|bos|>x<|eos|>"


@pytest.mark.parametrize("digits", [1, 2, 3])
def test_digits(digits):
    config = TokenizerConfig(vocab_size=300, max_digits=digits)
    tokenizer = train_bpe(["1234567890 " * 50] * 5, config)
    tokens = [tokenizer.decode([token]) for token in tokenizer.encode("1234567890")]
    assert max(map(len, tokens)) == digits


def test_training_is_repeatable_and_follows_the_text(texts):
    config = TokenizerConfig(vocab_size=320)
    first, again = train_bpe(texts, config), train_bpe(texts, config)
    other = train_bpe(texts[:100], config)
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_a_small_text_supports_fewer_tokens():
    tokenizer = train_bpe(["ab ab"], TokenizerConfig(vocab_size=1000))
    assert tokenizer.vocab_size == 256 + 5 + 1
    assert tokenizer.notes == ["the text supports 262 tokens, not the 1,000 asked for "
                               "(no pair of tokens is left that occurs twice)"]


def test_vocab_size_below_the_bytes():
    with pytest.raises(UserError, match="needs at least 262"):
        train_bpe(["x"], TokenizerConfig(vocab_size=200, special_tokens=["<|tool|>"]))


def test_save_and_load(tmp_path, tokenizer):
    tokenizer.save(tmp_path / "folder")
    tokenizer.save(tmp_path / "own.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "own.json"]
    for name in ("folder", "folder/tokenizer.json", "own.json"):
        path = tmp_path / name
        loaded = load_tokenizer(path)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert loaded.encode("<|eos|> x") == tokenizer.encode("<|eos|> x")


def test_transformers_reads_it(tmp_path, tokenizer):
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "He didn't 123 春眠"
    assert theirs(text).input_ids == tokenizer.encode(text)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)


class TestChatTemplate:
    TEMPLATE = "{{ messages[0].content }} é\n"

    def test_saved_and_loaded(self, tmp_path, texts):
        tokenizer = train_bpe(texts, TokenizerConfig(vocab_size=320))
        before = tokenizer.fingerprint
        tokenizer.chat_template = self.TEMPLATE
        tokenizer.save(tmp_path)
        loaded = load_tokenizer(tmp_path)
        assert loaded.chat_template == self.TEMPLATE
        assert loaded.fingerprint == tokenizer.fingerprint == before

    def test_transformers_reads_it(self, tmp_path, texts):
        from transformers import AutoTokenizer

        tokenizer = train_bpe(texts, TokenizerConfig(vocab_size=320))
        tokenizer.chat_template = self.TEMPLATE
        tokenizer.save(tmp_path)
        assert AutoTokenizer.from_pretrained(tmp_path).chat_template == self.TEMPLATE

    def test_none(self, tmp_path):
        assert load_tokenizer(foreign(tmp_path, ["</s>", "<pad>"])).chat_template is None

    @pytest.mark.parametrize("value", [
        '"one"', '[{"name": "tool_use", "template": "x"}, {"name": "default", "template": "one"}]'])
    def test_in_the_config(self, tmp_path, value):
        folder = foreign(tmp_path, ["</s>", "<pad>"])
        (folder / "tokenizer_config.json").write_text(f'{{"chat_template": {value}}}')
        assert load_tokenizer(folder).chat_template == "one"
        (folder / "chat_template.jinja").write_text("of the file")
        assert load_tokenizer(folder).chat_template == "of the file"

    @pytest.mark.parametrize("config", ['{"chat_template": 3}', "[]", "{"])
    def test_broken(self, tmp_path, config):
        folder = foreign(tmp_path, ["</s>", "<pad>"])
        (folder / "tokenizer_config.json").write_text(config)
        with pytest.raises(UserError, match=r"tokenizer_config\.json"):
            load_tokenizer(folder)

    def test_not_text(self, tmp_path):
        folder = foreign(tmp_path, ["</s>", "<pad>"])
        (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
        with pytest.raises(UserError, match=r"chat_template\.jinja is not UTF-8"):
            load_tokenizer(folder)


def test_controls(tmp_path):
    inner = tokenizers.Tokenizer.from_file(str(foreign(tmp_path, ["</s>", "<pad>"])
                                               / "tokenizer.json"))
    inner.add_tokens(["<think>", "<｜User｜>"])
    inner.add_special_tokens([tokenizers.AddedToken("<|end|>", rstrip=True), "@"])
    inner.save(str(tmp_path / "tokenizer.json"))
    controls = load_tokenizer(tmp_path).controls
    assert {name: (control.special, control.rstrip) for name, control in controls.items()} == {
        "</s>": (True, False), "<pad>": (True, False), "<｜User｜>": (False, False),
        "<|end|>": (True, True)}
    assert controls["<｜User｜>"].id == inner.token_to_id("<｜User｜>")


def spaced(folder, rule):
    """A tokenizer that puts a space before text, by one of the rules that do so."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>"))
    pre, norm = tokenizers.pre_tokenizers, tokenizers.normalizers
    if rule == "bytes":
        inner.pre_tokenizer = pre.Sequence([pre.ByteLevel(add_prefix_space=True)])
    else:
        scheme = "always" if rule == "prepend" else rule
        inner.pre_tokenizer = pre.Metaspace(prepend_scheme=scheme)
    tokens = ["<unk>", "<s>", "</s>", "<pad>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=tokens, show_progress=False,
        initial_alphabet=pre.ByteLevel.alphabet())
    inner.train_from_iterator(["hello what is this [INST] [/INST] yes"] * 9, trainer)
    if rule == "prepend":
        inner.normalizer = norm.Sequence([norm.Prepend("▁"), norm.Replace(" ", "▁")])
        inner.pre_tokenizer = None
    inner.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


@pytest.mark.parametrize(("rule", "prefix"), [
    ("prepend", "always"), ("always", "always"), ("first", "first"), ("never", None),
    ("bytes", "always")])
def test_space_before_text(tmp_path, rule, prefix):
    tokenizer = spaced(tmp_path, rule)
    assert tokenizer.prefix == prefix
    whole = tokenizer.encode("hello what is")
    assert [*tokenizer.encode("hello"), *tokenizer.encode_rest(" what is")] == whole
    assert (tokenizer.encode("what") == tokenizer.encode_rest("what")) == (prefix is None)
    # Only Llama 2's normalizer puts a space before a space.
    twice = tokenizer.encode(" what") != tokenizer.encode_rest(" what")
    assert twice == (rule == "prepend")


def foreign(tmp_path, tokens):
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280, special_tokens=tokens, show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    inner.train_from_iterator(["hello hello"], trainer)
    inner.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


class TestForeign:
    def test_without_bos(self, tmp_path):
        tokenizer = load_tokenizer(foreign(tmp_path, ["<|endoftext|>", "<pad>"]))
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (None, 0, 1)

    def test_named_in_its_config(self, tmp_path):
        folder = foreign(tmp_path, ["<start>", "<stop>", "<pad>"])
        (folder / "tokenizer_config.json").write_text(
            '{"bos_token": "<start>", "eos_token": {"content": "<stop>"}, "pad_token": "<stop>"}')
        tokenizer = load_tokenizer(folder)
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)

    def test_named_by_the_user(self, tmp_path):
        config = TokenizerConfig(bos_token="<A>", eos_token="<B>", pad_token="<A>")
        tokenizer = load_tokenizer(foreign(tmp_path, ["<A>", "<B>"]), config)
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 0)

    def test_pad_must_not_be_eos(self, tmp_path):
        folder = foreign(tmp_path, ["</s>"])
        with pytest.raises(UserError, match=r"set tokenizer\.pad_token"):
            load_tokenizer(folder)
        with pytest.raises(UserError, match="pad and eos tokens are the same"):
            load_tokenizer(folder, TokenizerConfig(pad_token="</s>"))

    def test_no_end(self, tmp_path):
        with pytest.raises(UserError, match=r"set tokenizer\.eos_token"):
            load_tokenizer(foreign(tmp_path, ["<x>"]))

    def test_no_such_token(self, tmp_path):
        with pytest.raises(UserError, match="no token '<nope>'"):
            load_tokenizer(foreign(tmp_path, ["</s>"]), TokenizerConfig(pad_token="<nope>"))


@pytest.mark.parametrize("content", ["", "{}", "[1, 2", '{"model": 3}'])
def test_broken_file(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"is not a tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_tokenizer(tmp_path / "none.json")


def test_held_out_documents_do_not_train_it(tmp_path):
    """Each document has a word of its own: those of held-out documents are not learned."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=8)) for _ in range(40)]
    lines = [f" {word} {word} {word}" for word in words]
    path = tmp_path / "a.txt"
    path.write_text("\n".join(lines) + "\n")
    data = DataConfig(path=[str(path)], holdout=0.3, txt_documents="line")
    tokenizer, report = train_tokenizer(data, TokenizerConfig(vocab_size=2000))
    hashes = np.array([text_hash(line.encode()) for line in lines], dtype=np.uint64)
    held = held_out(hashes, 0.3)
    assert report.documents == 40
    assert 0 < held.sum() < 40
    learned = [len(tokenizer.encode(f" {word}")) == 1 for word in words]
    assert learned == (~held).tolist()
