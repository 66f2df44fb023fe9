"""Chat: every answer is that of a fresh model on the whole conversation; commands; Ctrl-C."""

import io
import json
import sys

import pytest
import torch
from rich.console import Console
from task_models import make_model, train_on

from fastllm import chat as room
from fastllm.adapters import AdapterConfig, apply
from fastllm.chat import TextStream, chat, load, save
from fastllm.config import UserError
from fastllm.data.chat import BadRow
from fastllm.data.tokenizer import TokenizerConfig, train_bpe
from fastllm.generate import GenerateConfig, generate
from fastllm.model import KVCache


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["the user and the assistant: a b c\n春眠不覺曉 😀 étude\n"] * 3,
                     TokenizerConfig(vocab_size=290))


class FakeEncoder:
    """Roles as words, a turn's end as the tokenizer's <|im_end|>."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.stop_ids = frozenset([tokenizer.token_id("<|im_end|>")])
        self.asked = []

    def prompt(self, messages, tools=None):
        self.asked.append([dict(message) for message in messages])
        if any("refused" in message["content"] for message in messages):
            raise BadRow("refused", "the template refuses this")
        return [token for message in messages for token in [
            *self.tokenizer.encode(f"{message['role']}:{message['content']}"),
            *self.stop_ids]] + self.tokenizer.encode("assistant:")


@pytest.fixture(scope="module")
def model(tokenizer):
    """It has learnt to say words, so that what it says comes out as it is made."""
    encoder = FakeEncoder(tokenizer)
    return taught(make_model(tokenizer, max_position_embeddings=256, dropout=0.0), encoder)


def taught(model, encoder):
    sequences = []
    for question, answer in (("the a", " the user and b c"), ("b b c", " the assistant a b"),
                             ("c", " a b c and the a b c"), ("the étude", " b the user b a a")):
        prompt = encoder.prompt([{"role": "user", "content": question}])
        sequences.append(prompt + encoder.tokenizer.encode(answer * 3))
    train_on(model, sequences, 25)
    return model.eval()


class Talk:
    """A conversation from a list of lines; an exception among them is raised."""

    def __init__(self, model, tokenizer, lines, *, system=None, terminal=False, **settings):
        self.encoder = FakeEncoder(tokenizer)
        self.config = GenerateConfig(**{"max_new_tokens": 12, "temperature": 0, **settings})
        self.prompts = []
        out, script = io.StringIO(), iter(lines)
        console = Console(file=out, force_terminal=terminal, width=80, no_color=True)

        def read_line(prompt):
            self.prompts.append(prompt)
            line = next(script, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line() if callable(line) else line

        self.messages = chat(model, tokenizer, self.encoder, self.config, system=system,
                             console=console, read_line=read_line)
        self.out = out.getvalue()


def said(messages):
    return [message["content"] for message in messages if message["role"] == "assistant"]


def fresh(model, tokenizer, encoder, config, asked, place):
    """The answer's text to a conversation, made anew with no cache of before."""
    prompt = encoder.prompt(asked)
    row = generate(model, [prompt] * (place + 1), config,
                   eos_token_ids=[*encoder.stop_ids, tokenizer.eos_id])[place]
    return tokenizer.decode([token for token in row
                             if token not in encoder.stop_ids | {tokenizer.eos_id}])


LINES = ["the a", "b b c", "and the étude", "春眠"]


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.2, "seed": 7},
                                      {"temperature": 0.8, "top_p": 0.9, "seed": 1}])
@pytest.mark.parametrize("system", [None, "be the assistant"])
def test_every_turn_equals_a_fresh_generation(model, tokenizer, settings, system):
    talk = Talk(model, tokenizer, LINES, system=system, **settings)
    roles = [message["role"] for message in talk.messages]
    assert roles == ["system"] * (system is not None) + ["user", "assistant"] * 4
    asked, answers = list(talk.encoder.asked), said(talk.messages)
    assert len(asked) == 4
    texts = [fresh(model, tokenizer, talk.encoder, talk.config, messages, place)
             for place, messages in enumerate(asked)]
    assert texts == answers
    assert talk.out == "".join(text + "\n" for text in texts)
    assert talk.prompts == [""] * 5
    again = Talk(model, tokenizer, LINES, system=system, **settings)
    assert again.messages == talk.messages


def test_only_new_tokens_run(model, tokenizer, monkeypatch):
    seen = []
    forward = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, ids, **kwargs: (
        seen.append(ids.shape[1]), forward(self, ids, **kwargs))[1])
    talk = Talk(model, tokenizer, LINES)
    prompts = [len(talk.encoder.prompt(messages)) for messages in list(talk.encoder.asked)]
    first = [size for size in seen if size > 1]
    assert first[0] == prompts[0] and len(first) == 4
    assert all(run < whole / 2 for run, whole in zip(first[1:], prompts[1:], strict=True))


def test_the_cache_grows_with_the_conversation(model, tokenizer, monkeypatch):
    made = []

    class Counted(KVCache):
        def __init__(self, config, rows, capacity, **kwargs):
            super().__init__(config, rows, capacity, **kwargs)
            made.append(capacity)

    monkeypatch.setattr(room, "KVCache", Counted)
    talk = Talk(model, tokenizer, LINES)
    assert made == sorted(set(made)) and len(made) < 4 and made[-1] <= 256
    monkeypatch.undo()
    assert talk.messages == Talk(model, tokenizer, LINES).messages


def test_the_oldest_turns_give_way_and_that_is_said(tokenizer):
    model = make_model(tokenizer, max_position_embeddings=96, dropout=0.0)
    model = taught(model, FakeEncoder(tokenizer))
    talk = Talk(model, tokenizer, LINES, system="the")
    assert talk.out.count("no longer fit and are not shown to the model") >= 1
    kept = talk.encoder.asked[-1]
    assert kept[0]["role"] == "system" and kept[1]["role"] == "user" and len(kept) < 8
    for asked in talk.encoder.asked:    # turns go whole
        assert [message["role"] for message in asked[1:]] == [
            ("user", "assistant")[place % 2] for place in range(len(asked) - 1)]
    assert len(talk.messages) == 9      # nothing is lost of what /save writes
    text = fresh(model, tokenizer, talk.encoder, talk.config, kept, 3)
    assert text == said(talk.messages)[-1]


def test_a_message_that_is_too_long_is_not_sent(model, tokenizer):
    talk = Talk(model, tokenizer, ["the a", "b " * 300, "c"])
    assert "not sent: the message has" in talk.out and "--max-new-tokens" in talk.out
    assert [message["content"] for message in talk.messages[::2]] == ["the a", "c"]
    assert talk.encoder.asked[-1][0]["content"] == "the a"
    assert Talk(model, tokenizer, ["the a", "c"]).messages == talk.messages


def test_a_message_that_the_template_refuses_is_not_sent(model, tokenizer):
    talk = Talk(model, tokenizer, ["refused", "the a", "x\0y", "\ud800"])
    assert "(not sent: the template refuses this)" in talk.out
    assert "NUL" in talk.out and "lone surrogate" in talk.out
    assert len(talk.messages) == 2


def test_commands(model, tokenizer, tmp_path):
    file = tmp_path / "a talk.json"
    talk = Talk(model, tokenizer, [
        "the a", "", "  ", f"/save {file}", "/reset", "/system b c", "c c", "/nonsense", "/save",
        "/help me", "/help", f"/load {file}", "b b c", "/load nowhere.json", "/exit", "never"])
    plain = Talk(model, tokenizer, ["the a", "b b c"])
    assert talk.messages == plain.messages
    assert talk.encoder.asked[1] == [{"role": "system", "content": "b c"},
                                     {"role": "user", "content": "c c"}]
    saved = json.loads(file.read_text("utf-8"))
    assert saved == {"messages": plain.messages[:2]} and load(str(file)) == plain.messages[:2]
    for words in ("no command /nonsense", "/save needs a file", "/help takes nothing after it",
                  "/system TEXT", "cannot read nowhere.json: No such file", "2 messages: "):
        assert words in talk.out
    assert not list(tmp_path.glob("*.partial"))


def test_a_system_message_is_kept_taken_away_and_saved(model, tokenizer, tmp_path):
    file = str(tmp_path / "a.json")
    talk = Talk(model, tokenizer, ["the a", f"/save {file}", "/system", "b", f"/load {file}"],
                system="be")
    assert [messages[0]["role"] for messages in talk.encoder.asked] == ["system", "user"]
    assert talk.messages == load(file) and talk.messages[0]["content"] == "be"


def test_a_slash_after_a_space_is_a_message(model, tokenizer):
    talk = Talk(model, tokenizer, [" /exit the a"])
    assert talk.messages[0]["content"] == "/exit the a"


class Interrupting:
    """A tokenizer that Ctrl-C meets while the n-th token is decoded."""

    def __init__(self, tokenizer, at):
        self.tokenizer, self.left = tokenizer, at

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def decode(self, ids, **kwargs):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return self.tokenizer.decode(ids, **kwargs)


@pytest.mark.parametrize("at", [1, 3, 10, 15])
def test_an_interrupted_answer_is_kept_as_far_as_it_came(model, tokenizer, at):
    stopped = Interrupting(tokenizer, at)
    talk = Talk(model, stopped, ["the a", "b b c"])
    whole = said(Talk(model, tokenizer, ["the a"]).messages)[0]
    answers = said(talk.messages)
    assert "(stopped)" in talk.out
    if at == 1:     # nothing was said: the message is taken back
        assert len(answers) == 1 and answers[0] == said(
            Talk(model, tokenizer, ["b b c"]).messages)[0]
        return
    assert len(answers) == 2 and whole.startswith(answers[0]) and answers[0] != whole
    asked = talk.encoder.asked[-1]
    text = fresh(model, tokenizer, talk.encoder, talk.config, asked, 1)
    assert text == answers[1]


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interruption_inside_the_model_leaves_a_good_cache(model, tokenizer, monkeypatch, when):
    forward, count = type(model).forward, [0]

    def interrupted(self, ids, **kwargs):
        count[0] += 1
        if count[0] == 5 and when == "before":
            raise KeyboardInterrupt
        out = forward(self, ids, **kwargs)
        if count[0] == 5:
            raise KeyboardInterrupt
        return out

    monkeypatch.setattr(type(model), "forward", interrupted)
    talk = Talk(model, tokenizer, ["the a", "b b c", "c"])
    monkeypatch.undo()
    for place, messages in list(enumerate(talk.encoder.asked))[1:]:
        text = fresh(model, tokenizer, talk.encoder, talk.config, messages, place)
        assert text == said(talk.messages)[place]


def test_ctrl_c_at_the_prompt_does_not_end_and_ctrl_d_does(model, tokenizer):
    talk = Talk(model, tokenizer, [KeyboardInterrupt(), "the a", EOFError(), "b"])
    assert "Ctrl-D or /exit" in talk.out and len(talk.messages) == 2


def test_the_mode_of_the_model_is_put_back(model, tokenizer):
    model.train()
    try:
        stopped = Talk(model, Interrupting(tokenizer, 3), ["the a"])
        assert model.training and "(stopped)" in stopped.out
    finally:
        model.eval()


def test_a_terminal_has_a_prompt_and_does_not_obey_the_model(model, tokenizer, monkeypatch):
    monkeypatch.setattr(TextStream, "push", lambda self, token: "\x1b[2J\x07é\n")
    talk = Talk(model, tokenizer, ["the a"], terminal=True)
    assert set(talk.prompts) == {"> "} and "/help lists" in talk.out
    assert "\x1b[2J" not in talk.out and "\x07" not in talk.out and "␛[2J␇é\n" in talk.out
    assert "\x1b[2J" in Talk(model, tokenizer, ["the a"]).out     # a pipe gets what was said


@pytest.mark.parametrize("text", ["plain", "春眠不覺曉 😀😀 étude", "👩\u200d👩 e\u0301",
                                  "� real"])
def test_a_stream_of_text_shows_whole_characters_only(tokenizer, text):
    stream, pieces = TextStream(tokenizer), []
    for token in tokenizer.encode(text):
        pieces.append(stream.push(token))
        assert "�" not in pieces[-1] or "�" in text
    pieces.append(stream.end())
    assert "".join(pieces) == text
    assert len([piece for piece in pieces if piece]) > 1


def test_a_stream_of_any_tokens_adds_up_to_their_text(tokenizer):
    draw = torch.Generator().manual_seed(0)
    for _ in range(50):
        ids = torch.randint(tokenizer.vocab_size, (40,), generator=draw).tolist()
        stream = TextStream(tokenizer)
        assert "".join([*map(stream.push, ids), stream.end()]) == tokenizer.decode(ids)


def test_standard_input_that_is_no_terminal(model, tokenizer, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the a\r\nb b c"))
    out = io.StringIO()
    config = GenerateConfig(max_new_tokens=12, temperature=0)
    messages = chat(model, tokenizer, FakeEncoder(tokenizer), config, console=Console(file=out))
    assert messages == Talk(model, tokenizer, ["the a", "b b c"]).messages
    assert out.getvalue() == "".join(answer + "\n" for answer in said(messages))


def test_eos_given_by_the_caller_ends_an_answer(model, tokenizer):
    encoder = FakeEncoder(tokenizer)
    config = GenerateConfig(max_new_tokens=12, temperature=0)
    prompt = encoder.prompt([{"role": "user", "content": "the a"}])
    row = generate(model, [prompt], config)[0]
    lines = iter(["the a"])

    def read_line(_):
        for line in lines:
            return line
        raise EOFError

    messages = chat(model, tokenizer, encoder, config, eos_token_ids=[row[4]],
                    console=Console(file=io.StringIO()), read_line=read_line)
    end = row.index(row[4])
    assert said(messages) == [tokenizer.decode(row[:end])]


@pytest.mark.parametrize(("text", "words"), [
    ("{", "not valid JSON"), ("5", "no list of messages"), ('{"a": 1}', "no list of messages"),
    ('["x"]', "message 0 needs a role and a content"),
    ('[{"role": "user", "content": 5}]', "message 0 needs a role and a content"),
    ('[{"role": "user", "content": "x"}]', "the last message has no answer"),
    ('[{"role": "assistant", "content": "x"}]', "message 0 is of 'assistant', expected user"),
    ('[{"role": "system", "content": "x"}, {"role": "tool", "content": "x"}]',
     "message 1 is of 'tool', expected user"),
    ('[{"role": "user", "content": "\\ud800"}]', "lone surrogate"),
    ("[" * 100_000, "not valid JSON")])
def test_files_that_are_no_conversation(tmp_path, text, words):
    file = tmp_path / "a.json"
    file.write_text(text, "utf-8")
    with pytest.raises(UserError, match=words):
        load(str(file))


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="cannot write"):
        save([], str(tmp_path / "no" / "a.json"))
    file = tmp_path / "a.json"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        load(str(file))


def test_a_console_that_cannot_write_a_character_gets_a_question_mark(
        model, tokenizer, monkeypatch):
    monkeypatch.setattr(TextStream, "push", lambda self, token: "é")
    raw = io.BytesIO()
    plain = io.TextIOWrapper(raw, encoding="ascii")
    lines = iter(["the a"])
    config = GenerateConfig(max_new_tokens=2, temperature=0)
    with pytest.raises(StopIteration):
        chat(model, tokenizer, FakeEncoder(tokenizer), config, read_line=lambda _: next(lines),
             console=Console(file=plain))
    assert raw.getvalue() == b"??\n"


@pytest.mark.parametrize("name", ["prompt", "prefix", "lora"])
def test_a_model_with_an_adapter_keeps_its_cache_too(tokenizer, name):
    longest = 72 if name == "lora" else 72 + 20     # the virtual tokens take their part
    model = make_model(tokenizer, max_position_embeddings=longest, dropout=0.0)
    taught(model, FakeEncoder(tokenizer))
    adapter = apply(model, AdapterConfig(name=name), seed=1)
    with torch.no_grad():
        for _, parameter in adapter.named_parameters():
            parameter.add_(torch.randn(parameter.shape,
                                       generator=torch.Generator().manual_seed(2)) / 10)
    talk = Talk(model, tokenizer, LINES)
    assert "not shown to the model" in talk.out
    # Of a turn that did not fit, the last try is the one that was sent.
    sent = {messages[-1]["content"]: messages for messages in talk.encoder.asked}
    texts = [fresh(model, tokenizer, talk.encoder, talk.config, sent[line], place)
             for place, line in enumerate(LINES)]
    assert said(talk.messages) == texts
