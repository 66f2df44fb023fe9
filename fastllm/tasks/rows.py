"""Rows of files to questions with known answers. A bad row is counted and named, never guessed at.

Sources of the field names: MMLU (question, choices, answer), ARC (choices.text, choices.label,
answerKey), HellaSwag (ctx, endings, label), GSM8K (question, answer).
"""

import json
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastllm.config import UserError
from fastllm.data.accounting import Report
from fastllm.data.readers import bad_text
from fastllm.data.sources import (
    DataConfig,
    Encoded,
    Progress,
    Rejected,
    find_files,
    read_documents,
)
from fastllm.tasks.config import Normalizer, TaskConfig
from fastllm.tasks.normalizers import normalize

LETTERS = string.ascii_uppercase


@dataclass(frozen=True)
class Item:
    """A question. where: `file:line`. answers: the right texts, the first for use as an example.

    Of multiple choice also: choices, the right one's index, and whether the question is plain text
    that the choices go on from.
    """

    where: str
    question: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    right: int = -1
    plain: bool = False

    @property
    def key(self) -> str:
        """What two rows that ask the same have in common: the question, spaces and case aside."""
        return " ".join(self.question.casefold().split())


class _Bad(Exception):
    """Why a row cannot be used: (kind, reason)."""


def read_items(config: TaskConfig, paths: list[str], option: str,
               progress: Progress | None = None) -> tuple[list[Item], Report]:
    """The questions of files in order, and the account of their rows.

    option: what the user calls `paths`, for messages. Raises UserError where a file cannot be read,
    where no row is usable, and with on_bad=error for the first row that is not.
    """
    parse = _choice_item if config.kind == "choice" else _exact_item(config.normalizer)

    def encode(row: dict[str, Any]) -> Encoded | Rejected:
        try:
            item = parse(row)
        except _Bad as error:
            return Rejected(*error.args)
        return Encoded(item, len(item.question.encode("utf-8")))

    source = DataConfig(path=paths, format=config.format, on_bad=config.on_bad,
                        max_record_bytes=config.max_record_bytes)
    report, items = Report(), []
    try:
        files = find_files(source, report)
        for document in read_documents(source, files, report, progress, f"reading {option}",
                                       encode):
            where = f"{files[document.file].name}:{document.line}"
            items.append(_placed(document.encoded, where))
    except UserError as error:  # the readers call their settings data.*
        said = str(error).replace("data.path", option).replace("data.format", "task.format")
        raise UserError(said) from None
    return items, report


def _placed(item: Item, where: str) -> Item:
    return Item(where, item.question, item.answers, item.choices, item.right, item.plain)


def _choice_item(row: dict[str, Any]) -> Item:
    plain = "question" not in row and "ctx" in row
    question = _text(row, "ctx" if plain else "question")
    name = "endings" if "choices" not in row and "endings" in row else "choices"
    choices, labels = _choices(row, name)
    right = _right(_field(row, ("answer", "answerKey", "label")), choices, labels)
    return Item("", question, (choices[right],), tuple(choices), right, plain)


def _exact_item(normalizer: Normalizer) -> Callable[[dict[str, Any]], Item]:
    def parse(row: dict[str, Any]) -> Item:
        question = _text(row, "question" if "question" in row else "prompt")
        value = _field(row, ("answer", "target"))
        answers = [_plain_answer(one) for one in (value if isinstance(value, list) else [value])]
        if not answers:
            raise _Bad("no answer", "the list of answers is empty")
        for answer in answers:
            if not normalize(answer, normalizer):
                raise _Bad("empty answer", f"nothing is left of the answer {answer[:40]!r} with "
                                           f"the normalizer {normalizer}")
        return Item("", question, tuple(answers))
    return parse


def _field(row: dict[str, Any], names: tuple[str, ...]) -> Any:
    """The first of the fields that the row has."""
    for name in names:
        if row.get(name) is not None and row[name] != "":
            return row[name]
    has = ", ".join(map(repr, list(row)[:8])) or "none"
    raise _Bad(f"no {names[0]}", f"no field {' or '.join(map(repr, names))} with a value "
                                 f"(it has {has})")


def _text(row: dict[str, Any], name: str) -> str:
    return _clean(_field(row, (name,)), f"field {name!r}")


def _clean(value: Any, what: str) -> str:
    """A string with something in it that a tokenizer can take, without the space around it."""
    if not isinstance(value, str):
        raise _Bad("wrong type", f"{what} is {type(value).__name__}, expected a string")
    if fault := bad_text(value):
        raise _Bad(fault[0], f"{what}: {fault[1]}")
    if not value.strip():
        raise _Bad("empty text", f"{what} is empty")
    return value.strip()


def _plain_answer(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return _clean(value, "the answer")


def _choices(row: dict[str, Any], name: str) -> tuple[list[str], list[str]]:
    """The texts of the choices, and their labels where the row gives them."""
    value = _field(row, (name,))
    if isinstance(value, str):  # a cell of a csv
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise _Bad("wrong type", f"field {name!r} is a text and not a JSON list of the "
                                     "choices") from None
    labels: Any = None
    if isinstance(value, dict):
        labels, value = value.get("label"), value.get("text")
    if not isinstance(value, list):
        raise _Bad("wrong type", f"field {name!r} is neither a list of texts nor an object with "
                                 "'text' (and 'label')")
    texts = [_clean(text, f"choice {place}") for place, text in enumerate(value)]
    if not 2 <= len(texts) <= len(LETTERS):
        raise _Bad("choices", f"{len(texts)} choices, expected 2 to {len(LETTERS)}")
    if labels is None:
        return texts, []
    if not isinstance(labels, list) or len({str(label) for label in labels}) != len(texts) or (
            len(labels) != len(texts)):
        raise _Bad("choices", f"{len(texts)} choices need as many labels, each of its own")
    return texts, [str(label) for label in labels]


def _right(answer: Any, choices: list[str], labels: list[str]) -> int:
    """Which choice the answer means; refused where it could mean two.

    A number is an index. A text is a label where the row has labels, else a letter, a choice's text
    or an index written out.
    """
    if isinstance(answer, bool) or not isinstance(answer, int | str):
        raise _Bad("wrong type", f"the answer is {type(answer).__name__}, expected an index, a "
                                 "letter or a text")
    said = str(answer).strip()
    named = labels or list(LETTERS[:len(choices)])
    index = {place for place in range(len(choices)) if said == str(place)}
    label = {place for place, one in enumerate(named) if said == one}
    # Of two choices with one text, the first: they cannot be told apart.
    text = {choices.index(said)} if said in choices else set()
    if isinstance(answer, int):
        found = index | (label if labels else set())
    else:
        found = label if labels and label else index | label | text
    if len(found) > 1:
        meant = " or ".join(repr(choices[place]) for place in sorted(found))
        raise _Bad("ambiguous answer", f"the answer {said!r} may mean {meant}: give another of "
                                       "the index as a JSON number, the letter, the text")
    if not found:
        raise _Bad("answer not a choice", f"the answer {said[:40]!r} is neither an index below "
                                          f"{len(choices)} nor one of {', '.join(named)[:80]} nor "
                                          "a choice's text")
    return found.pop()
