"""Conversations to token ids, each flagged as trained or not.

The rendered text is cut where the assistant begins and ends, and each piece is encoded apart: the
prompt's tokens are then those that the model is given at inference, and the flags are exact.
Control tokens that the template writes become their ids. The same spelling inside a message stays
the characters that it is: a private noncharacter is put into it before rendering and taken out
after the control tokens have been found, so no message can end its turn or begin another's.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from fastllm.config import UserError
from fastllm.data.chat import formats
from fastllm.data.chat.formats import BadRow, Chat, Message
from fastllm.data.chat.sandbox import CUT, GUARD
from fastllm.data.chat.spans import Span, Speech, unmark
from fastllm.data.chat.template import ChatTemplate, template_source
from fastllm.data.tokenizer import Tokenizer

FORMAT = 1
"""Raised whenever the same row comes to give other tokens: prepared files then do not match."""


@dataclass(kw_only=True)
class ChatConfig:
    """How conversations become text, and which of it is trained."""

    template: str | None = None
    """A .jinja file, or "chatml". None: the one that came with the tokenizer, else ChatML where the
    tokenizer has <|im_start|> and <|im_end|>."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Every turn of the assistant, only the last one, or every token. Of pairs and judged rows
    always the answer alone, or the last turn of it."""
    system: str | None = None
    """Put before conversations that have no system (or developer) message."""
    plain: bool = False
    """Strings of prompt, completion, chosen and rejected are joined as they are, without the
    template, and eos ends the answer. Otherwise the prompt is a user's turn, the answer one of the
    assistant. Lists of messages always go through the template."""


class Tokens(NamedTuple):
    """A sequence. trained[i]: token i is a label. text_bytes: UTF-8 bytes of the trained text,
    without control tokens."""

    ids: list[int]
    trained: list[bool]
    text_bytes: int


class ChatEncoder:
    """Rows to tokens under one template; every method raises BadRow for a row that cannot be used.

    template: the jinja text in force ("" with plain=True where there is none).
    stop_ids: the tokens that end a turn of the assistant under this template, and eos.
    fingerprint: hex SHA-256 of all that decides the output, beside the tokenizer.

    Raises UserError for a template that is missing, broken or too greedy.
    """

    def __init__(self, tokenizer: Tokenizer, config: ChatConfig) -> None:
        self._tokenizer, self._config = tokenizer, config
        try:
            self.template = template_source(config.template, tokenizer)
        except UserError:
            if not config.plain or config.template is not None:
                raise
            self.template = ""
        if config.system is not None:
            try:
                formats.checked_text(config.system, "chat.system")
            except BadRow as error:
                raise UserError(error.reason) from None
        named = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token,
                 "pad_token": tokenizer.pad_token}
        variables = {name: token for name, token in named.items() if token is not None}
        controls = tokenizer.controls
        self._controls = _any_of(list(controls))
        ends = [token for token in controls if token != tokenizer.bos_token
                or tokenizer.bos_id == tokenizer.eos_id]
        # At every place where a spelling begins, for spellings may overlap.
        cut = _any_of([token for token, control in controls.items() if not control.special]).pattern
        self._spelled = re.compile(f"(?=(?P<cut>{cut})|(?:{self._controls.pattern}))(?P<first>.)",
                                   re.DOTALL)
        self._speech = Speech(ChatTemplate(self.template, variables), self._controls, _any_of(ends))
        values = {**asdict(config), "template": self.template}
        parts = [FORMAT, values, named]
        self.fingerprint = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        self.stop_ids = self._find_stops()

    # rows -----------------------------------------------------------------------------------------

    def chat(self, row: dict[str, Any]) -> Tokens:
        """The tokens of an SFT row, in any of the formats that `formats.chat_of` knows, or `text`.

        What follows the assistant's last turn is left out, unless every token is trained.
        """
        row = formats.present(row)
        if "text" in row and not {"messages", "conversations"} & row.keys() \
                and not ("prompt" in row and "completion" in row) \
                and not ("instruction" in row and "output" in row):
            return self._plain("", formats.checked_text(row["text"], "text"))
        if plain := self._plain_answer(row, "completion"):
            return plain
        return self._encode(formats.chat_of(row), self._config.train_on)

    def pair(self, row: dict[str, Any]) -> tuple[Tokens, Tokens]:
        """(chosen, rejected) of a preference row: prompt and answer, only the answer trained."""
        row = formats.present(row)
        if row.get("chosen") != row.get("rejected"):
            chosen = self._plain_answer(row, "chosen")
            rejected = self._plain_answer(row, "rejected")
            if chosen and rejected:
                return chosen, rejected
        first, second = formats.pair_of(row)
        return self._encode(first, self._answers), self._encode(second, self._answers)

    def judged(self, row: dict[str, Any]) -> tuple[Tokens, bool]:
        """(prompt and completion, whether it is a good one) of a KTO row."""
        row = formats.present(row)
        chat, label = formats.judged_of(row)
        return self._plain_answer(row, "completion") or self._encode(chat, self._answers), label

    def prompt(self, messages: list[dict[str, Any]], tools: Any = None) -> list[int]:
        """Ids of messages up to and including the generation prompt: what a model is asked with."""
        checked = formats.messages_of(messages, "messages")
        checked, tools = self._ready(checked, formats.tools_of({"tools": tools}))
        text = self._speech.template.render(checked, tools, add_generation_prompt=True)
        return self._tokens(unmark(text)[0], []).ids

    # one conversation -----------------------------------------------------------------------------

    @property
    def _answers(self) -> Literal["assistant", "last"]:
        return "last" if self._config.train_on == "last" else "assistant"

    def _ready(self, messages: list[Message], tools: Any) -> tuple[list[Message], Any]:
        """Messages and tools with the system prompt and the guards in them."""
        if not self.template:
            raise BadRow("no template", "a list of messages needs a chat template; set "
                         "chat.template")
        system = self._config.system
        if system and not any(message["role"] in ("system", "developer") for message in messages):
            messages = [{"role": "system", "content": system}, *messages]
        return self._guarded(messages), self._guarded(tools)

    def _encode(self, chat: Chat, train_on: str) -> Tokens:
        messages, (ready, tools) = chat.messages, self._ready(chat.messages, chat.tools)
        front = chat.prompt + len(ready) - len(messages)
        said = [i for i, message in enumerate(ready) if message["role"] == "assistant"]
        if not said:
            raise BadRow("no assistant", "the conversation has no message of the assistant")
        if train_on != "all":
            ready = ready[: said[-1] + 1]
        wanted = [i for i in said if i >= front]
        wanted = wanted[-1:] if train_on == "last" else wanted
        wanted = [i for i in wanted if ready[i].get("weight", 1)
                  and (ready[i].get("content", "").strip() or ready[i].get("tool_calls"))]
        if not wanted:
            raise BadRow("nothing trained", "every answer of the assistant is empty or has the "
                         "weight 0")
        shown = [{key: value for key, value in message.items() if key != "weight"}
                 for message in ready]
        if train_on == "all":
            text = self._speech.spans(shown, tools, [])[0]
            spans = [(0, len(text))]
        else:
            text, spans = self._speech.spans(shown, tools, wanted)
        if not spans:
            raise BadRow("nothing trained", "the chat template marks no text as the assistant's")
        _check_shown(text, shown, tools)
        end = spans[-1][1]
        if self._speech.ended(text, end):
            return self._tokens(text, spans)
        # The answer needs an end, and right after it: what the template puts there goes.
        tokens = self._tokens(text[:end], spans)
        return Tokens([*tokens.ids, self._tokenizer.eos_id], [*tokens.trained, True],
                      tokens.text_bytes)

    def _find_stops(self) -> frozenset[int]:
        stops = {self._tokenizer.eos_id}
        controls = {control.id for control in self._tokenizer.controls.values()}
        asked = {"role": "user", "content": "a"}
        answer = {"role": "assistant", "content": "b"}
        call = {"type": "function", "function": {"name": "f", "arguments": {}}}
        probes: list[list[Message]] = [
            [asked, answer], [{"role": "system", "content": "s"}, asked, answer],
            [asked, {"role": "assistant", "tool_calls": [call]}]]
        for messages in probes:
            try:
                tokens = self._encode(Chat(messages, 0, None), "last")
            except BadRow as error:
                # Many templates refuse a system message or calls, and are told so row by row.
                if error.kind == "template limit":
                    raise UserError(error.reason) from None
            else:
                last = max(i for i, flag in enumerate(tokens.trained) if flag)
                stops |= {tokens.ids[last]} & controls
        spelled = [token for token, control in self._tokenizer.controls.items()
                   if control.id in stops]
        self._speech.learn(_any_of(spelled))
        return frozenset(stops)

    # text -----------------------------------------------------------------------------------------

    def _plain_answer(self, row: dict[str, Any], name: str) -> Tokens | None:
        """Prompt and answer joined as they are; None where that is not asked for."""
        prompt, answer = row.get("prompt"), row.get(name)
        if not self._config.plain or not isinstance(prompt, str) or not isinstance(answer, str):
            return None
        return self._plain(formats.checked_text(prompt, "prompt"),
                           formats.checked_text(answer, name))

    def _plain(self, prompt: str, text: str) -> Tokens:
        if not text:
            raise BadRow("nothing trained", "the text is empty")
        tokenizer = self._tokenizer
        front = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        front += tokenizer.encode(prompt) if prompt else []
        ids = tokenizer.encode_rest(text) if prompt else tokenizer.encode(text)
        # Without a prompt every token is trained, and so bos is; it is no label where it is first.
        return Tokens([*front, *ids, tokenizer.eos_id],
                      [not prompt] * len(front) + [True] * (len(ids) + 1),
                      tokenizer.count_bytes(text))

    def _guarded(self, value: Any) -> Any:
        if isinstance(value, str):
            # An empty `cut` is none: no control token is an empty string.
            return self._spelled.sub(
                lambda found: found["first"] + (CUT if found["cut"] else GUARD), value)
        if isinstance(value, list):
            return [self._guarded(part) for part in value]
        if isinstance(value, dict):
            return {self._guarded(key): self._guarded(part) for key, part in value.items()}
        return value

    def _tokens(self, text: str, spans: list[Span]) -> Tokens:
        """Tokens of a rendered text, trained in the spans."""
        done = _Pieces(self._tokenizer)
        at = 0
        for begin, end in [*spans, (len(text), len(text))]:
            for trained, piece in ((False, text[at:begin]), (True, text[begin:end])):
                last = 0
                for found in self._controls.finditer(piece):
                    control = self._tokenizer.controls[found[0]]
                    before = piece[last : found.start()]
                    done.add(before.rstrip() if control.lstrip else before, trained)
                    done.add_control(control.id, control.rstrip, trained)
                    last = found.end()
                done.add(piece[last:], trained)
            at = end
        return Tokens(done.ids, done.trained, done.text_bytes)


class _Pieces:
    """Tokens put together piece by piece, with the rule for spaces before text kept."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.ids: list[int] = []
        self.trained: list[bool] = []
        self.text_bytes = 0
        self._fresh, self._strip = True, False

    def add(self, text: str, trained: bool) -> None:
        text = text.lstrip() if self._strip else text
        for part in text.replace(GUARD, "").split(CUT):
            if not part:
                continue
            prefixed = self._fresh and (self._tokenizer.prefix != "first" or not self.ids)
            encode = self._tokenizer.encode if prefixed else self._tokenizer.encode_rest
            ids = encode(part)
            self.ids += ids
            self.trained += [trained] * len(ids)
            self.text_bytes += self._tokenizer.count_bytes(part) if trained else 0
            self._fresh, self._strip = False, False

    def add_control(self, token: int, strips: bool, trained: bool) -> None:
        self.ids.append(token)
        self.trained.append(trained)
        self._fresh, self._strip = True, strips


def _any_of(spellings: list[str]) -> re.Pattern[str]:
    """Matches the longest of some spellings, nothing where there are none."""
    longest_first = sorted(spellings, key=lambda spelling: (-len(spelling), spelling))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _check_shown(text: str, messages: list[Message], tools: Any) -> None:
    """BadRow where the template leaves out tools or calls: most of them know nothing of either."""
    for kind, wanted in (("tools", tools or []),
                         ("tool calls", [call for message in messages
                                         for call in message.get("tool_calls", [])])):
        for tool in wanted:
            name = tool.get("function", tool)
            name = name.get("name") if isinstance(name, dict) else None
            # A name of other characters may be written with escapes.
            if isinstance(name, str) and re.fullmatch(r"[\w.-]+", name, re.ASCII) \
                    and name not in text:
                raise BadRow(f"{kind} not shown", f"the chat template leaves out {kind} (here "
                             f"{name!r}); give chat.template one that knows them")
