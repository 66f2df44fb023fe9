"""What is rendered is what transformers renders, and the template in force is the right one."""

import datetime
from importlib.util import find_spec
from pathlib import Path

import pytest

from fastllm.config import UserError
from fastllm.data.chat import BadRow, ChatConfig, ChatEncoder
from fastllm.data.chat.sandbox import CLOSE, OPEN, TODAY
from fastllm.data.chat.template import CHATML as OURS
from fastllm.data.chat.template import ChatTemplate
from fastllm.data.tokenizer import TokenizerConfig, train_bpe

from . import templates

VARIABLES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
CALLS = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "é<&'"}}}]
TOOLS = [{"type": "function", "function": {
    "name": "add", "description": "adds <two>", "parameters": {
        "type": "object", "properties": {"a": {"type": "number", "description": "n"}},
        "required": ["a"]}}}]


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


CHATS = {
    "two turns": [user(" hi\n"), assistant(" hello \n"), user("春?"), assistant("yes <&> '\"")],
    "system": [{"role": "system", "content": "be"}, user("hi"), assistant("hello")],
    "thinking": [user("a"), assistant("<think>\nhm\n</think>\n\nb"), user("c"),
                 assistant("<think>\nhm\n</think>\n\nd")],
    "reasoning": [user("a"), {"thinking": "hm", **assistant("b", reasoning_content="hm")},
                  user("c"), {"thinking": "so", **assistant("d", reasoning_content="so")}],
    "tools": [user("hi"), assistant("", tool_calls=CALLS),
              {"role": "tool", "content": "3", "name": "add"}, assistant("it is 3")],
}
FOLDER = Path(find_spec("trl").origin).parent / "chat_templates" if find_spec("trl") else None
SOURCES = {**templates.ALL, "ours": OURS,
           "today": "{{ strftime_now('%d %b %Y') }}{{ messages|tojson(indent=2) }}",
           **({path.stem: path.read_text("utf-8") for path in sorted(FOLDER.glob("*.jinja"))}
              if FOLDER else {})}


@pytest.fixture
def theirs(monkeypatch):
    from transformers.utils import chat_template_utils

    class Day(datetime.datetime):
        @classmethod
        def now(cls):
            return TODAY

    monkeypatch.setattr(chat_template_utils, "datetime", Day)

    def render(source, messages, tools, generate):
        from jinja2 import TemplateError

        try:
            return chat_template_utils.render_jinja_template(
                [messages], tools=tools, chat_template=source, add_generation_prompt=generate,
                **VARIABLES)[0][0]
        except (TemplateError, TypeError):
            return None
    return render


@pytest.mark.parametrize("name", SOURCES)
def test_same_text_as_transformers(theirs, name):
    template = ChatTemplate(SOURCES[name], VARIABLES)
    shown = 0
    for chat, messages in CHATS.items():
        tools = TOOLS if chat == "tools" else None
        for generate in (False, True):
            expected = theirs(SOURCES[name], messages, tools, generate)
            try:
                ours = template.render(messages, tools, add_generation_prompt=generate)
            except BadRow:
                ours = None
            assert (ours and ours.replace(OPEN, "").replace(CLOSE, "")) == expected, chat
            shown += expected is not None
    # LLaVA's want their text in parts, whatever role speaks.
    assert shown or name.startswith("llava")


class TestChoice:
    def test_chatml_where_the_tokenizer_has_its_tokens(self, tokenizer):
        encoder = ChatEncoder(tokenizer, ChatConfig())
        assert encoder.template == OURS
        assert encoder.stop_ids == {tokenizer.eos_id, tokenizer.token_id("<|im_end|>")}

    def test_that_of_the_tokenizer(self, tmp_path, tokenizer):
        tokenizer.chat_template = templates.GEMMA
        try:
            encoder = ChatEncoder(tokenizer, ChatConfig())
            chatml = ChatEncoder(tokenizer, ChatConfig(template="chatml"))
        finally:
            tokenizer.chat_template = None
        assert encoder.template == templates.GEMMA
        assert encoder.stop_ids == {tokenizer.eos_id, tokenizer.token_id("<end_of_turn>")}
        assert chatml.template == OURS

    def test_of_a_file(self, encoder, tokenizer):
        made = encoder(templates.LLAMA3)
        assert made.template == templates.LLAMA3
        assert made.stop_ids == {tokenizer.eos_id, tokenizer.token_id("<|eot_id|>")}

    def test_none(self):
        tokenizers = pytest.importorskip("tokenizers")
        from fastllm.data import Tokenizer

        inner = tokenizers.Tokenizer.from_str(
            train_bpe(["a a"], TokenizerConfig(vocab_size=300))._inner.to_str()
            .replace("<|im_", "<|other_"))
        bare = Tokenizer(inner, bos=None, eos="<|eos|>", pad="<|pad|>")
        with pytest.raises(UserError, match=r"set chat\.template"):
            ChatEncoder(bare, ChatConfig())
        with pytest.raises(UserError, match=r"chat\.template is chatml"):
            ChatEncoder(bare, ChatConfig(template="chatml"))
        plain = ChatEncoder(bare, ChatConfig(plain=True))
        tokens = plain.chat({"prompt": "ab", "completion": "c"})
        assert bare.decode(tokens.ids, skip_special_tokens=False) == "abc<|eos|>"
        with pytest.raises(BadRow, match=r"set chat\.template"):
            plain.chat({"messages": [user("q"), assistant("a")]})

    @pytest.mark.parametrize("content", [None, b"\xff\xfe"])
    def test_bad_files(self, tmp_path, tokenizer, content):
        path = tmp_path / "x.jinja"
        if content:
            path.write_bytes(content)
        with pytest.raises(UserError, match=r"chat\.template.*x\.jinja"):
            ChatEncoder(tokenizer, ChatConfig(template=str(path)))

    def test_a_greedy_one_fails_at_once(self, encoder):
        with pytest.raises(UserError, match="too much work"):
            encoder("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
                    "{% endfor %}")


def test_fingerprint(encoder):
    prints = [encoder().fingerprint, encoder(templates.CHATML).fingerprint,
              encoder(system="x").fingerprint, encoder(train_on="last").fingerprint,
              encoder(plain=True).fingerprint]
    assert len(set(prints)) == 5
    assert encoder().fingerprint == prints[0]
