"""A conversation with a model in a terminal, or over a pipe.

Keys and values of the conversation stay in a cache over its turns, so that only new tokens run.
What of the cache still holds is found by comparing tokens: the template may write a turn otherwise
than the model did, and turns may be forgotten or loaded.
"""

import contextlib
import json
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from fastllm import files
from fastllm.config import UserError
from fastllm.data.chat import BadRow
from fastllm.data.readers import bad_text
from fastllm.data.tokenizer import Tokenizer
from fastllm.generate import GenerateConfig, stream
from fastllm.model import Decoder, KVCache

Message = dict[str, str]
ReadLine = Callable[[str], str]
"""read_line(prompt): the next line without its ending. EOFError ends the conversation."""

HELP = """\
/help         this list
/reset        forget the conversation; the system message stays
/system TEXT  another system message (none without TEXT)
/save FILE    write the conversation as JSON
/load FILE    go on with a saved one
/exit         end (as Ctrl-D does); Ctrl-C stops an answer
A line that begins with a space is sent as it is, a slash after it included."""
_CONTROL = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {
    0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


class Encoder(Protocol):
    """The chat template of a model."""

    @property
    def stop_ids(self) -> Collection[int]:
        """The tokens that end an answer."""

    def prompt(self, messages: list[dict[str, Any]]) -> list[int]:
        """The conversation's tokens, and the beginning of an answer."""


def chat(model: Decoder, tokenizer: Tokenizer, encoder: Encoder, config: GenerateConfig, *,
         system: str | None = None, eos_token_ids: Collection[int] = (),
         console: Console | None = None, read_line: ReadLine | None = None) -> list[Message]:
    """Talk until /exit or the end of the lines; returns the conversation's messages.

    The n-th answer of a conversation is what `generate` gives at place n of its prompts for the
    whole conversation so far: with one seed a conversation repeats. Where it grows longer than the
    model reads, its oldest turns are no longer shown to the model, and that is said.

    Args:
        system: the message that stands before the conversation.
        eos_token_ids: tokens that end an answer, beside the encoder's and the tokenizer's eos.
        console: where answers go; in a terminal, control characters in them are made visible.
        read_line: default `input` in a terminal, else the lines of standard input.
    """
    stop = frozenset([tokenizer.eos_id, *encoder.stop_ids, *eos_token_ids])
    session = _Session(model, tokenizer, encoder, config, system, console or Console(), stop)
    read_line = read_line or _standard_input()
    prompt = "> " if session.console.is_terminal else ""
    if session.console.is_terminal:
        session.say("/help lists the commands.")
    while not session.over:
        try:
            line = read_line(prompt)
        except EOFError:
            break
        except KeyboardInterrupt:
            session.say("\n(Ctrl-D or /exit ends the conversation)")
            continue
        with contextlib.suppress(KeyboardInterrupt):  # outside an answer there is nothing to stop
            session.take(line)
    return session.messages


def _standard_input() -> ReadLine:
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # editing and history, where Python has them
            import readline  # noqa: F401
        return input

    def next_line(prompt: str) -> str:
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n").removesuffix("\r")
    return next_line


class TextStream:
    """Tokens to text as it grows: only whole characters come out, and together they are the text.

    Text is decoded from the last place where a character ended, with the tokens before it for
    tokenizers that drop a space at a text's beginning.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decode = tokenizer.decode
        self._last: list[int] = []
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """The text that is whole with this token; empty while a character is cut."""
        self._held.append(token)
        new = self.end()
        if not new or new.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._last, self._held = self._held, []
        return new

    def end(self) -> str:
        """What is held back: a character that never became whole is U+FFFD."""
        return self._decode(self._last + self._held)[len(self._decode(self._last)):]


class _Session:
    """A conversation: messages, of which those from `first` on are shown to the model."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer, encoder: Encoder,
                 config: GenerateConfig, system: str | None, console: Console,
                 stop: frozenset[int]) -> None:
        self.model, self.tokenizer, self.encoder = model, tokenizer, encoder
        self.config, self.console, self.stop = config, console, stop
        self.room = model.config.max_position_embeddings - model.virtual_tokens
        self.system: str | None = system or None
        self.turns: list[Message] = []
        self.first = 0
        self.over = False
        self.cache: KVCache | None = None
        self.cached: list[int] = []

    @property
    def messages(self) -> list[Message]:
        """The whole conversation, the system message first."""
        return self._opening() + self.turns

    def _opening(self) -> list[Message]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def say(self, text: str) -> None:
        """A line of ours."""
        self.console.out(self._shown(text), style="dim", highlight=False)

    def take(self, line: str) -> None:
        """A line of the user: a command or a message."""
        if fault := bad_text(line):
            self.say(f"(not sent: {fault[1]})")
        elif line.startswith("/"):
            name, _, rest = line[1:].partition(" ")
            try:
                self._command(name, rest.strip())
            except UserError as error:
                self.say(f"({error})")
        elif line.strip():
            self._answer(line.strip())

    def _command(self, name: str, rest: str) -> None:
        if name in ("save", "load") and not rest:
            raise UserError(f"/{name} needs a file: /{name} talk.json")
        if name in ("help", "reset", "exit") and rest:
            raise UserError(f"/{name} takes nothing after it; begin a message with a space")
        if name == "help":
            self.say(HELP)
        elif name == "reset":
            self.turns, self.first = [], 0
            self.say("(the conversation is forgotten)")
        elif name == "system":
            self.system = rest or None
            self.say("(the system message is set)" if rest else "(no system message)")
        elif name == "save":
            save(self.messages, rest)
            self.say(f"({len(self.messages)} messages: {rest})")
        elif name == "load":
            messages = load(rest)
            opening = messages[:1] if messages[:1] and messages[0]["role"] == "system" else []
            self.system = opening[0]["content"] if opening else None
            self.turns, self.first = messages[len(opening):], 0
            self.say(f"({len(messages)} messages from {rest})")
        elif name == "exit":
            self.over = True
        else:
            raise UserError(f"no command /{name}: see /help, or begin the message with a space")

    def _answer(self, text: str) -> None:
        """A turn. What fails or says nothing leaves the conversation as it was before."""
        turns, first, answer = list(self.turns), self.first, ""
        try:
            self.turns.append({"role": "user", "content": text})
            ids = self._prompt()
            for piece in self._pieces(ids):
                answer += piece
                self._write(piece)
            self._write("\n")
        except UserError as error:
            self.say(f"({error})")
        except KeyboardInterrupt:
            self.say("\n(stopped)")
        if answer.strip():
            self.turns.append({"role": "assistant", "content": answer})
        else:
            self.turns, self.first = turns, first

    def _prompt(self) -> list[int]:
        """The tokens of the conversation, without its oldest turns where it is too long."""
        dropped = 0
        while True:
            try:
                ids = self.encoder.prompt(self._opening() + self.turns[self.first:])
            except BadRow as error:
                raise UserError(f"not sent: {error.reason}") from None
            if len(ids) + self.config.max_new_tokens <= self.room:
                break
            if self.first + 1 >= len(self.turns):
                raise UserError(f"not sent: the message has {len(ids)} tokens with its system "
                                f"message, and of the model's {self.room} the answer keeps "
                                f"{self.config.max_new_tokens}: shorten it, or lower "
                                "--max-new-tokens")
            self.first += 2
            dropped += 1
        if dropped:
            self.say(f"(the oldest {dropped} turns no longer fit and are not shown to the model)")
        return ids

    def _pieces(self, ids: list[int]) -> Iterator[str]:
        """The answer's text as it grows."""
        cache = self._cache_for(ids)
        text = TextStream(self.tokenizer)
        place = sum(message["role"] == "assistant" for message in self.turns)
        with contextlib.closing(stream(self.model, ids, self.config, eos_token_ids=self.stop,
                                       cache=cache, place=place)) as tokens:
            for token in tokens:
                self.cached.append(token)
                if token not in self.stop and (piece := text.push(token)):
                    yield piece
        if rest := text.end():
            yield rest

    def _cache_for(self, ids: list[int]) -> KVCache:
        """The cache, holding as much of the prompt's beginning as it had before."""
        virtual = self.model.virtual_tokens
        needed = virtual + len(ids) + self.config.max_new_tokens
        weight = self.model.lm_head_weight
        if self.cache is None or self.cache.capacity < needed:
            # Half as much again: a conversation grows, and its cache is not copied every turn.
            capacity = min(virtual + self.room, needed + needed // 2)
            grown = KVCache(self.model.config, 1, capacity, device=weight.device,
                            dtype=weight.dtype)
            if self.cache is not None:
                length = grown.length = self.cache.length
                grown.keys[:, :, :length] = self.cache.keys[:, :, :length]
                grown.values[:, :, :length] = self.cache.values[:, :, :length]
            self.cache = grown
        held = self.cached[:max(self.cache.length - virtual, 0)]
        # The last token always runs: the answer begins with what follows it.
        common = min(_common(held, ids), len(ids) - 1)
        # The length goes first: interrupted before the next line, the cache holds what it says.
        self.cache.length = virtual + common if common else 0
        self.cached = list(ids)
        return self.cache

    def _write(self, text: str) -> None:
        """What the model says, now and as it is: rich would take characters away."""
        self.console.file.write(self._shown(text))
        self.console.file.flush()

    def _shown(self, text: str) -> str:
        """Text that the console can take. A terminal must not obey what a model writes."""
        encoding = self.console.encoding
        text = text.encode(encoding, "replace").decode(encoding)
        return text.translate(_CONTROL) if self.console.is_terminal else text


def _common(one: list[int], other: list[int]) -> int:
    """Tokens that two lists begin with alike."""
    for place, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return place
    return min(len(one), len(other))


def save(messages: list[Message], path: str) -> None:
    """Write a conversation as one row of chat data, whole or not at all. Raises UserError."""
    target = Path(path).expanduser()
    temporary = target.with_name(target.name + ".partial")
    text = json.dumps({"messages": messages}, ensure_ascii=False, indent=1) + "\n"
    try:
        files.write_file(temporary, text.encode("utf-8"))
        files.rename(temporary, target)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def load(path: str) -> list[Message]:
    """A conversation as `save` wrote it, or a plain list of messages.

    Raises UserError where it is not one, or does not go system (if any), user, assistant, user...
    to an assistant's answer.
    """
    try:
        value = json.loads(Path(path).expanduser().read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"cannot read {path}: {why}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    messages = value.get("messages") if isinstance(value, dict) else value
    if not isinstance(messages, list):
        raise UserError(f"{path} holds no list of messages")
    found: list[Message] = []
    for place, message in enumerate(messages):
        if not isinstance(message, dict) or not all(
                isinstance(message.get(name), str) for name in ("role", "content")):
            raise UserError(f"{path}: message {place} needs a role and a content, both texts")
        if fault := bad_text(message["content"]):
            raise UserError(f"{path}: message {place}: {fault[1]}")
        found.append({name: message[name] for name in ("role", "content")})
    turns = found[1:] if found and found[0]["role"] == "system" else found
    for place, message in enumerate(turns):
        wanted = ("user", "assistant")[place % 2]
        if message["role"] != wanted:
            raise UserError(f"{path}: message {place + len(found) - len(turns)} is of "
                            f"{message['role']!r}, expected {wanted}")
    if len(turns) % 2:
        raise UserError(f"{path}: the last message has no answer")
    return found
