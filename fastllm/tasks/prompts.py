"""Prompts, and the solved examples in them. See fastllm.tasks.config for what they look like."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence

from fastllm.config import UserError
from fastllm.tasks.config import TaskConfig
from fastllm.tasks.rows import LETTERS, Item


class Shots:
    """The solved examples of each question, the same in every run with the same seed.

    From a pool of their own: one draw for all questions, from the rows of it that ask nothing that
    the task asks. Else: a draw for each question from the other rows that ask something else.
    Raises UserError where there are not enough.
    """

    def __init__(self, items: Sequence[Item], config: TaskConfig,
                 pool: Sequence[Item] | None = None) -> None:
        self.items, self.count, self.seed = items, config.shots, config.seed
        self.fixed: list[Item] | None = None
        self.left_out = 0
        if pool is not None:
            asked = {item.key for item in items}
            fresh = [item for item in pool if item.key not in asked]
            self.left_out = len(pool) - len(fresh)
            self.fixed = self._take(fresh, "shots", "")
        elif self.count:
            same = Counter(item.key for item in items)
            if len(items) - max(same.values()) < self.count:
                raise UserError(f"task.shots {self.count} needs as many other questions, and the "
                                f"task has {len(same)} different ones: lower it, or give "
                                "task.shots-path")

    def of(self, index: int) -> list[Item]:
        """The examples before question `index`."""
        if self.fixed is not None or not self.count:
            return self.fixed or []
        return self._take(self.items, str(index), self.items[index].key)

    def _take(self, pool: Sequence[Item], name: str, key: str) -> list[Item]:
        taken: list[Item] = []
        for place in _shuffled(len(pool), f"{self.seed}/{name}"):
            if len(taken) == self.count:
                break
            if pool[place].key != key:
                taken.append(pool[place])
        if len(taken) < self.count:
            raise UserError(f"task.shots {self.count}: task.shots-path has {len(taken)} usable "
                            f"examples ({self.left_out} more ask what the task asks): lower "
                            "task.shots, or give it more rows")
        return taken


def _shuffled(count: int, name: str) -> Iterator[int]:
    """0..count-1 in an order that follows from the name; Fisher and Yates's, as far as it is read.

    By hashes, as `random` promises no order across versions of Python.
    """
    moved: dict[int, int] = {}
    for place in range(count):
        digest = hashlib.blake2b(f"{name}/{place}".encode(), digest_size=8).digest()
        other = place + int.from_bytes(digest, "little") % (count - place)
        moved[place], moved[other] = moved.get(other, other), moved.get(place, place)
        yield moved[place]


def choice_prompt(item: Item, shots: Sequence[Item], letters: bool) -> tuple[str, list[str]]:
    """(prompt, continuation of each choice). The prompt ends without a space, and the space that
    follows it begins every continuation, where tokenizers join it to the word."""
    parts = [_choice_question(shot, letters) + _choice_answer(shot, shot.right, letters)
             for shot in shots]
    prompt = "\n\n".join([*parts, _choice_question(item, letters)])
    return prompt, [_choice_answer(item, place, letters) for place in range(len(item.choices))]


def _choice_question(item: Item, letters: bool) -> str:
    lines = [item.question if item.plain else f"Question: {item.question}"]
    if letters:
        lines += [f"{letter}. {choice}" for letter, choice in zip(LETTERS, item.choices,
                                                                  strict=False)]
    return "\n".join(lines if item.plain and not letters else [*lines, "Answer:"])


def _choice_answer(item: Item, place: int, letters: bool) -> str:
    return f" {LETTERS[place]}" if letters else f" {item.choices[place]}"


def exact_prompt(item: Item, shots: Sequence[Item]) -> str:
    """The prompt of a question that the model answers in its own words. It ends without a space."""
    parts = [f"Question: {shot.question}\nAnswer: {shot.answers[0]}" for shot in shots]
    return "\n\n".join([*parts, f"Question: {item.question}\nAnswer:"])


def exact_messages(item: Item, shots: Sequence[Item], system: str | None) -> list[dict[str, str]]:
    """The same as a conversation: examples as turns before the question."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for shot in shots:
        messages += [{"role": "user", "content": shot.question},
                     {"role": "assistant", "content": shot.answers[0]}]
    return [*messages, {"role": "user", "content": item.question}]
