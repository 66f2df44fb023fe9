"""Every format becomes the same messages, and each kind of bad row is named."""

import json

import pytest

from fastllm.data.chat import BadRow, ChatConfig, ChatEncoder, formats
from fastllm.data.chat.formats import chat_of, pair_of

U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
S = {"role": "system", "content": "s"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}


@pytest.mark.parametrize(("row", "messages"), [
    ({"messages": [U, A]}, [U, A]),
    ({"messages": [U, A], "system": "s"}, [S, U, A]),
    ({"messages": [S, U, A], "system": "s"}, [S, U, A]),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, A]}, [U, A]),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, [U, A]),
    ({"conversations": [U, A], "system": "s"}, [S, U, A]),
    ({"conversations": [{"from": "system", "value": "s"}, {"from": "user", "value": "q"},
                        {"from": "assistant", "value": "a"}]}, [S, U, A]),
    ({"conversations": [{"from": "human", "value": "q"},
                        {"from": "function_call",
                         "value": '{"name": "add", "arguments": {"x": 1}}'},
                        {"from": "observation", "value": "1"}, {"from": "gpt", "value": "a"}]},
     [U, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "1"}, A]),
    ({"instruction": "q", "output": "a"}, [U, A]),
    ({"instruction": "q", "input": "", "output": "a", "system": "s"}, [S, U, A]),
    ({"instruction": "q", "input": "i", "output": "a", "history": [["q", "a"]]},
     [U, A, {"role": "user", "content": "q\ni"}, A]),
    ({"prompt": "q", "completion": "a"}, [U, A]),
    ({"prompt": [S, U], "completion": [A]}, [S, U, A]),
    ({"prompt": "q", "completion": "a", "system": "s"}, [S, U, A]),
    ({"messages": [{**U, "name": None, "tool_calls": None}, A], "tools": None}, [U, A]),
])
def test_formats(row, messages):
    assert chat_of(formats.present(row)).messages == messages


@pytest.mark.parametrize("arguments", [{"x": 1}, '{"x": 1}'])
@pytest.mark.parametrize("as_text", [False, True])
def test_tools_and_calls(arguments, as_text):
    tools = [{"type": "function", "function": {"name": "add"}}]
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": arguments}}
    row = {"messages": [U, {"role": "assistant", "content": None, "tool_calls": [call]}],
           "tools": json.dumps(tools) if as_text else tools}
    chat = chat_of(row)
    assert chat.tools == tools
    assert chat.messages[1] == {"role": "assistant", "tool_calls": [{**CALL, "id": "1"}]}


def test_reasoning_has_the_name_that_templates_read():
    row = {"messages": [U, {**A, "thinking": "hm"}]}
    assert chat_of(row).messages[1] == {**A, "thinking": "hm", "reasoning_content": "hm"}


B = {"role": "assistant", "content": "b"}


@pytest.mark.parametrize("row", [
    {"prompt": "q", "chosen": "a", "rejected": "b"},
    {"prompt": [U], "chosen": [A], "rejected": [B]},
    {"chosen": [U, A], "rejected": [U, B]},
    {"prompt": "q", "chosen": [U, A], "rejected": [U, B]},
    {"prompt": "q", "chosen": [A], "rejected": [B]},
])
def test_pairs(row):
    chosen, rejected = pair_of(row)
    assert (chosen.messages, rejected.messages) == ([U, A], [U, B])
    assert chosen.prompt == rejected.prompt == 1


def deep(levels):
    return [deep(levels - 1)] if levels else 1


def said(content):
    return {"messages": [U, {"role": "assistant", "content": content}]}


def called(calls):
    return {"messages": [U, {"role": "assistant", "tool_calls": calls}]}


# (kind, row, what the reason must say)
BAD = [
    ("unknown format", {"dialog": [], "id": 3}, "it has 'dialog', 'id'"),
    ("unknown format", {"prompt": "q"}, "it has 'prompt'"),
    ("wrong type", {"messages": "hello"}, "messages is a string"),
    ("wrong type", {"conversations": {}}, "conversations is an object"),
    ("no messages", {"messages": []}, "messages is empty"),
    ("bad message", {"messages": ["hello"]}, "message 1 is a string"),
    ("missing role", {"messages": [{"content": "q"}]}, "it has 'content'"),
    ("unknown role", {"messages": [{"role": "bot", "content": "q"}]}, "'bot'"),
    ("unknown role", {"messages": [{"role": ["user"], "content": "q"}]}, "message 1"),
    ("unknown role", {"conversations": [{"from": "alien", "value": "q"}]}, "'alien'"),
    ("missing content", {"messages": [{"role": "user"}, A]}, r"message 1 \(user\)"),
    ("missing content", said(None), "message 2"),
    ("wrong type", said(3), "content of message 2 is a number"),
    ("wrong type", said(["a"]), "a part of the content of message 2 is a string"),
    ("not text", said([{"type": "image", "url": "x"}]), "type 'image'"),
    ("NUL", said("a\0b"), "position 1"),
    ("lone surrogate", said("a\ud800"), r"U\+D800"),
    ("noncharacter", said("a\ufdd0"), r"U\+FDD0 at 1"),
    ("noncharacter", {"messages": [{**U, "na\ufdd1me": "x"}, A]}, "a key of message 1"),
    ("no assistant", {"messages": [U]}, "no message of the assistant"),
    ("nothing trained", said(" \n"), "empty"),
    ("nothing trained", {"messages": [U, {**A, "weight": 0}]}, "weight 0"),
    ("bad weight", {"messages": [U, {**A, "weight": 0.5}]}, "weight 0.5"),
    ("bad tool call", called([{"type": "function"}]), "without a function name"),
    ("bad tool call", called([{"function": {"name": "f", "arguments": "[1]"}}]), "are a list"),
    ("bad tool call", {"messages": [{**U, "tool_calls": [CALL]}, A]}, "role is user"),
    ("bad JSON", called([{"function": {"name": "f", "arguments": "{x"}}]), "tool_calls of message"),
    ("bad JSON", {"messages": [U, A], "tools": "[{"}, "tools is not valid JSON"),
    ("wrong type", {"messages": [U, A], "tools": ["f"]}, "not an object"),
    ("bad JSON", {"conversations": [{"from": "function_call", "value": "f(x)"}]}, "message 1"),
    ("two systems", {"messages": [S, U, A], "system": "other"}, "different system message"),
    ("bad history", {"instruction": "q", "output": "a", "history": [["q"]]}, "pairs"),
    ("wrong type", {"instruction": 3, "output": "a"}, "instruction is a number"),
    ("nested too deeply", {"messages": [{**U, "x": deep(60)}, A]}, "message 1"),
    ("wrong type", {"messages": [{**U, "x": {1, 2}}, A]}, "holds a set"),
    ("bad answer", {"prompt": "q", "completion": [U]}, "message 1 of completion"),
    ("wrong type", {"text": 5}, "text is a number"),
    ("nothing trained", {"text": ""}, "empty"),
]


@pytest.mark.parametrize(("kind", "row", "reason"), BAD, ids=[f"{b[0]}-{i}" for i, b in
                                                              enumerate(BAD)])
def test_bad_rows(tokenizer, kind, row, reason):
    with pytest.raises(BadRow, match=reason) as caught:
        ChatEncoder(tokenizer, ChatConfig()).chat(row)
    assert caught.value.kind == kind
    assert "\n" not in caught.value.reason and len(caught.value.reason) < 300


@pytest.mark.parametrize(("kind", "row"), [
    ("unknown format", {"prompt": "q", "chosen": "a"}),
    ("chosen is rejected", {"prompt": "q", "chosen": "a", "rejected": "a"}),
    ("no prompt", {"chosen": "a", "rejected": "b"}),
    ("no prompt", {"chosen": [A], "rejected": [B]}),
    ("no answer", {"chosen": [U, A], "rejected": [U, A, A]}),
    ("bad answer", {"chosen": [U, A, U, A], "rejected": [U, B, U, A]}),
    ("nothing trained", {"prompt": "q", "chosen": "", "rejected": "b"}),
    ("wrong type", {"prompt": "q", "chosen": 3, "rejected": "b"}),
])
def test_bad_pairs(tokenizer, kind, row):
    with pytest.raises(BadRow) as caught:
        ChatEncoder(tokenizer, ChatConfig()).pair(row)
    assert caught.value.kind == kind


@pytest.mark.parametrize(("label", "known"), [
    (True, True), (False, False), (1, True), (0, False), ("true", True), ("False", False),
    ("1", True), (" 0 ", False)])
def test_labels(tokenizer, label, known):
    row = {"prompt": "q", "completion": "a", "label": label}
    assert ChatEncoder(tokenizer, ChatConfig()).judged(row)[1] is known


@pytest.mark.parametrize("label", ["yes", 2, 0.5, [], "", None])
def test_bad_labels(tokenizer, label):
    with pytest.raises(BadRow, match="label"):
        ChatEncoder(tokenizer, ChatConfig()).judged(
            {"prompt": "q", "completion": "a", "label": label})
