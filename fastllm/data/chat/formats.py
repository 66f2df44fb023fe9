"""Rows of the usual chat and preference formats, checked and put into one form.

One form: a list of messages `{"role", "content", ...}` as OpenAI and transformers write them, and
a list of tools or None. Everything that a template sees has passed `_checked`: plain JSON values,
strings without NUL, lone surrogates or noncharacters. A row that cannot be used raises BadRow.
"""

import json
from typing import Any, NamedTuple

from fastllm.data.chat.sandbox import NONCHARACTERS
from fastllm.data.readers import bad_text

Message = dict[str, Any]
MAX_NESTING = 40
ROLES = ("system", "developer", "user", "assistant", "tool")
_SPEAKERS = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
    "observation": "tool", "tool_response": "tool", "function_response": "tool",
    "function": "tool", **{role: role for role in ROLES},
}
_CALLS = ("function_call", "tool_call")
# Names under which reasoning is passed; templates read the first (and gpt-oss's the second).
_REASONING = ("reasoning_content", "thinking", "reasoning")


class BadRow(Exception):
    """A row that cannot be used: `kind` groups rows for counting, `reason` is for the reader."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason


class Chat(NamedTuple):
    """Messages, the number of them at the front that are only prompt, and tools."""

    messages: list[Message]
    prompt: int = 0
    tools: list[dict[str, Any]] | None = None


def type_name(value: Any) -> str:
    names: dict[type, str] = {dict: "an object", list: "a list", str: "a string",
                              bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def present(row: Any) -> dict[str, Any]:
    """The fields of a row that are not null, as every format reads them. BadRow for no object."""
    if not isinstance(row, dict):
        raise BadRow("wrong type", f"expected an object, found {type_name(row)}")
    return {name: value for name, value in row.items() if value is not None}


def checked_text(value: Any, name: str) -> str:
    """The string, or BadRow for another type and for characters that no text may have."""
    if not isinstance(value, str):
        raise BadRow("wrong type", f"{name} is {type_name(value)}, expected a string")
    if fault := bad_text(value):
        raise BadRow(fault[0], f"{name}: {fault[1]}")
    if match := NONCHARACTERS.search(value):
        raise BadRow("noncharacter", f"{name}: the text has the noncharacter "
                     f"U+{ord(match.group()):04X} at {match.start()}")
    return value


def _checked(value: Any, name: str, depth: int = 0) -> Any:
    """A JSON value rebuilt of plain types (numpy's and pyarrow's have methods that do things)."""
    if depth > MAX_NESTING:
        raise BadRow("nested too deeply", f"{name} nests more than {MAX_NESTING} deep")
    if isinstance(value, str):
        return str(checked_text(value, name))
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, list | tuple):
        return [_checked(part, name, depth + 1) for part in value]
    if isinstance(value, dict):
        return {checked_text(key, f"a key of {name}"): _checked(part, name, depth + 1)
                for key, part in value.items()}
    raise BadRow("wrong type", f"{name} holds a {type_name(value)}")


def _from_json(text: Any, name: str) -> Any:
    """What a JSON string holds; any other value as it is."""
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRow("bad JSON", f"{name} is not valid JSON: {error}") from None


# messages -------------------------------------------------------------------------------------


def _joined(content: Any, name: str) -> str:
    """Content as a string; a list of text parts is joined."""
    if not isinstance(content, list | tuple):
        return checked_text(content, name)
    texts = []
    for part in content:
        if not isinstance(part, dict):
            raise BadRow("wrong type", f"a part of {name} is {type_name(part)}, expected an object")
        if part.get("type") != "text":
            raise BadRow("not text", f"{name} has a part of type {part.get('type')!r}; only text "
                         "can be trained on")
        texts.append(checked_text(part.get("text"), f"a text part of {name}"))
    return "".join(texts)


def _calls(calls: Any, name: str) -> list[dict[str, Any]]:
    """Tool calls in OpenAI's form, their arguments as objects (what templates expect)."""
    if not isinstance(calls, list | tuple):
        raise BadRow("wrong type", f"{name} is {type_name(calls)}, expected a list")
    done = []
    for call in calls:
        inner = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise BadRow("bad tool call", f"{name} has a call without a function name")
        inner = {**inner, "arguments": _from_json(inner.get("arguments", {}) or {},
                                                  f"the arguments in {name}")}
        if not isinstance(inner["arguments"], dict):
            raise BadRow("bad tool call", f"the arguments in {name} are "
                         f"{type_name(inner['arguments'])}, expected an object")
        outer = present(call) if "function" in call else {}
        done.append(_checked({"type": "function", **outer, "function": inner}, name))
    return done


def _message(value: Any, at: int) -> Message:
    name = f"message {at}"
    if not isinstance(value, dict):
        raise BadRow("bad message", f"{name} is {type_name(value)}, expected an object with role "
                     "and content")
    message = present(value)
    if "role" not in message:
        raise BadRow("missing role", f"{name} has no role (it has {_has(message)})")
    role = message["role"]
    if role not in ROLES:
        raise BadRow("unknown role", f"{name} has the role {str(role)[:40]!r}; known are "
                     f"{', '.join(ROLES)}")
    calls = _calls(message.pop("tool_calls", []), f"tool_calls of {name}")
    if calls and role != "assistant":
        raise BadRow("bad tool call", f"{name} calls tools, but its role is {role}")
    if "content" in message:
        message["content"] = _joined(message["content"], f"the content of {name}")
    elif not calls:
        raise BadRow("missing content", f"{name} ({role}) has no content")
    if message.get("weight", 1) not in (0, 1):
        raise BadRow("bad weight", f"{name} has the weight {message['weight']!r}; known are 0, 1")
    reasoning = next((message[key] for key in _REASONING if key in message), None)
    if reasoning is not None:
        message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
    message = _checked(message, name)
    return message | ({"tool_calls": calls} if calls else {})


def messages_of(value: Any, name: str) -> list[Message]:
    """The messages of a list of objects with role and content. Raises BadRow."""
    if not isinstance(value, list | tuple):
        raise BadRow("wrong type", f"{name} is {type_name(value)}, expected a list of messages")
    if not value:
        raise BadRow("no messages", f"{name} is empty")
    return [_message(message, at) for at, message in enumerate(value, 1)]


def _sharegpt(value: Any) -> list[Message]:
    if not isinstance(value, list | tuple):
        raise BadRow("wrong type",
                     f"conversations is {type_name(value)}, expected a list of messages")
    turns: list[Any] = []
    for at, turn in enumerate(value, 1):
        if not isinstance(turn, dict) or "from" not in turn:
            turns.append(turn)
            continue
        said = turn.get("value")
        if turn["from"] in _CALLS:
            calls = _from_json(said, f"message {at}")
            turns.append({"role": "assistant",
                          "tool_calls": calls if isinstance(calls, list) else [calls]})
            continue
        role = _SPEAKERS.get(turn["from"]) if isinstance(turn["from"], str) else None
        if role is None:
            raise BadRow("unknown role", f"message {at} is from {str(turn['from'])[:40]!r}; known "
                         f"are {', '.join([*_SPEAKERS, *_CALLS])}")
        rest = {key: part for key, part in turn.items() if key not in ("from", "value")}
        turns.append({**rest, "role": role, "content": said})
    return messages_of(turns, "conversations")


def _alpaca(row: dict[str, Any]) -> list[Message]:
    """instruction and input are joined by a newline, as LLaMA-Factory does."""
    asked = [checked_text(row["instruction"], "instruction"),
             checked_text(row.get("input", ""), "input")]
    messages = []
    for pair in _list(row.get("history", []), "history"):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadRow("bad history", "history is not a list of [question, answer] pairs")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            messages.append({"role": role, "content": checked_text(text, "history")})
    return [*messages, {"role": "user", "content": "\n".join(filter(None, asked))},
            {"role": "assistant", "content": checked_text(row["output"], "output")}]


def _list(value: Any, name: str) -> Any:
    if not isinstance(value, list | tuple):
        raise BadRow("wrong type", f"{name} is {type_name(value)}, expected a list")
    return value


def _has(row: dict[str, Any]) -> str:
    return ", ".join(map(repr, list(row)[:8])) or "none"


# rows -----------------------------------------------------------------------------------------


def _system(messages: list[Message], row: dict[str, Any]) -> list[Message]:
    """The row's own `system` field put first."""
    text = checked_text(row.get("system", ""), "system")
    first = messages[0] if messages else {}
    if not text or (first.get("role") == "system" and first.get("content") == text):
        return messages
    if first.get("role") == "system":
        raise BadRow("two systems", "the row has a system field and a different system message")
    return [{"role": "system", "content": text}, *messages]


def tools_of(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The row's tools (a list, or a JSON string of one), None where it has none. Raises BadRow."""
    tools = _from_json(row.get("tools") or None, "tools")
    if not tools:
        return None
    if any(not isinstance(tool, dict) for tool in _list(tools, "tools")):
        raise BadRow("wrong type", "tools holds something that is not an object")
    return _checked(tools, "tools")


def _prompt(value: Any) -> list[Message]:
    """A prompt's messages; a string is one message of the user."""
    if isinstance(value, str):
        return [{"role": "user", "content": checked_text(value, "prompt")}]
    return messages_of(value, "prompt")


def _answer(value: Any, name: str) -> list[Message]:
    """An answer's messages: the assistant speaks first, and only tools speak between."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": checked_text(value, name)}]
    messages = messages_of(value, name)
    for at, message in enumerate(messages, 1):
        if message["role"] not in (("assistant",) if at == 1 else ("assistant", "tool")):
            raise BadRow("bad answer", f"message {at} of {name} has the role {message['role']}; an "
                         "answer is the assistant's, with what tools said between")
    return messages


def chat_of(row: dict[str, Any]) -> Chat:
    """The conversation of an SFT row, whichever format it has. Raises BadRow."""
    if "messages" in row:
        messages = messages_of(row["messages"], "messages")
    elif "conversations" in row:
        messages = _sharegpt(row["conversations"])
    elif "prompt" in row and "completion" in row:
        return answered(row, "completion")
    elif "instruction" in row and "output" in row:
        messages = _alpaca(row)
    else:
        raise BadRow("unknown format", "the row has no fields of a known format: messages, "
                     "conversations, prompt and completion, instruction and output, or text (it "
                     f"has {_has(row)})")
    return Chat(_system(messages, row), 0, tools_of(row))


def answered(row: dict[str, Any], name: str) -> Chat:
    """The prompt of a row and the answer in its field `name`. Raises BadRow."""
    prompt, answer = _system(_prompt(row["prompt"]), row), _answer(row[name], name)
    return Chat([*prompt, *answer], len(prompt), tools_of(row))


def pair_of(row: dict[str, Any]) -> tuple[Chat, Chat]:
    """(chosen, rejected) of a preference row, with one prompt. Raises BadRow."""
    missing = [name for name in ("chosen", "rejected") if name not in row]
    if missing:
        raise BadRow("unknown format", f"the row has no {' and no '.join(missing)}; a pair has "
                     f"chosen, rejected and mostly prompt (it has {_has(row)})")
    if row["chosen"] == row["rejected"]:
        raise BadRow("chosen is rejected", "chosen and rejected are the same")
    whole = _whole(row)
    if whole is None and "prompt" not in row:
        raise BadRow("no prompt", "chosen and rejected are answers alone, and the row has no "
                     "prompt")
    if whole is None:
        return answered(row, "chosen"), answered(row, "rejected")
    chosen, rejected = whole
    common = 0
    while common < min(len(chosen), len(rejected)) and chosen[common] == rejected[common]:
        common += 1
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if common == len(messages):
            raise BadRow("no answer", f"{name} is the beginning of the other, so it has no answer")
        _answer(messages[common:], f"the answer in {name}")
    tools = tools_of(row)
    prompt = _system(chosen[:common], row)
    if not prompt:
        raise BadRow("no prompt", "chosen and rejected begin with different messages, and the row "
                     "has no prompt")
    return (Chat([*prompt, *chosen[common:]], len(prompt), tools),
            Chat([*prompt, *rejected[common:]], len(prompt), tools))


def _whole(row: dict[str, Any]) -> tuple[list[Message], list[Message]] | None:
    """Chosen and rejected where they are whole conversations, with or beside the prompt."""
    if isinstance(row["chosen"], str) or isinstance(row["rejected"], str):
        return None
    chosen, rejected = (messages_of(row[name], name) for name in ("chosen", "rejected"))
    if chosen[0]["role"] == "assistant" or rejected[0]["role"] == "assistant":
        return None
    return chosen, rejected


def label_of(value: Any) -> bool:
    """KTO's label: a boolean, 0 or 1, or one of their spellings in a csv. Raises BadRow."""
    known = {"true": True, "false": False, "1": True, "0": False}
    if isinstance(value, bool | int) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.strip().lower() in known:
        return known[value.strip().lower()]
    raise BadRow("bad label", f"label is {str(value)[:40]!r}, expected true or false")


def judged_of(row: dict[str, Any]) -> tuple[Chat, bool]:
    """(prompt and completion, label) of a KTO row. Raises BadRow."""
    missing = [name for name in ("prompt", "completion", "label") if name not in row]
    if missing:
        raise BadRow("unknown format", f"the row has no {' and no '.join(missing)}; a judged row "
                     f"has prompt, completion and label (it has {_has(row)})")
    return answered(row, "completion"), label_of(row["label"])
