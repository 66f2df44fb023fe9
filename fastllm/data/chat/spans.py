"""Which characters of a rendered conversation are the assistant's own.

Where the template says so ({% generation %}), those. Otherwise two more renderings tell: the answer
begins where the text that the model is given at inference ends, and it ends where what follows it
in the text begins: that is found by putting something in its place that occurs nowhere else.
"""

import re
from typing import Any

from fastllm.data.chat.formats import BadRow, Message
from fastllm.data.chat.sandbox import CLOSE, OPEN
from fastllm.data.chat.template import ChatTemplate

Span = tuple[int, int]
STAND_IN = "\ufdd3answer\ufdd3"
"""In place of an answer. Its ends are a noncharacter, so what it shares with an answer is none."""


class Speech:
    """Finds the assistant's spans under one template.

    `controls` matches a control token's spelling; `ends` the same, but not bos, which begins.
    """

    def __init__(self, template: ChatTemplate, controls: re.Pattern[str],
                 ends: re.Pattern[str]) -> None:
        self.template, self.controls = template, controls
        self._end_here = re.compile(f" *(?:{ends.pattern})")
        self._end_soon = re.compile(rf"\s*(?:{ends.pattern})")
        self._stop_soon = re.compile("(?!)")
        self._end_before = re.compile(rf"(?:{ends.pattern})\s*\Z")

    def spans(self, messages: list[Message], tools: Any,
              wanted: list[int]) -> tuple[str, list[Span]]:
        """(the text of messages, the spans of the turns `wanted` in it with their end tokens).

        `wanted`: indices of assistant messages. Raises BadRow where the template refuses the
        messages or does not show a turn.
        """
        text, marked = unmark(self.template.render(messages, tools))
        everyone = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if self.template.marks and wanted == everyone:
            return text, marked
        spans = [self._span(text, messages, tools, i) for i in wanted]
        if self.template.marks:
            spans = [mark for mark in marked
                     if any(mark[0] < end and begin < mark[1] for begin, end in spans)]
        return text, spans

    def learn(self, stops: re.Pattern[str]) -> None:
        """From now on `stops` matches the tokens that are known to end a turn."""
        self._stop_soon = re.compile(rf"\s*(?:{stops.pattern})")

    def ended(self, text: str, end: int) -> bool:
        """Whether an end token is the last thing before `end` or the first one after."""
        return bool(self._end_soon.match(text, end)
                    or self._end_before.search(text, max(0, end - 200), end))

    def _render(self, messages: list[Message], tools: Any, generate: bool = False) -> str | None:
        """The text, None where the template refuses these messages; a limit is still a BadRow."""
        try:
            rendered = self.template.render(messages, tools, add_generation_prompt=generate)
        except BadRow as error:
            if error.kind == "template limit":
                raise
            return None
        return unmark(rendered)[0]

    def _span(self, text: str, messages: list[Message], tools: Any, i: int) -> Span:
        given = self._render(messages[:i], tools, generate=True)
        begin = len(given) if given is not None and text.startswith(given) else None
        message = messages[i]
        if begin is not None and not message.get("tool_calls"):
            # The usual case, which spares a rendering: the content as it is, then an end token.
            for content in (message["content"], message["content"].strip()):
                if text.startswith(content, begin):
                    found = self._end_here.match(text, begin + len(content))
                    if found:
                        return begin, found.end()
        if begin is not None and message.get("tool_calls"):
            # The stand-in is no call, and what comes after a call may be written otherwise.
            until = self._render(messages[: i + 1], tools)
            if until is not None and text.startswith(until) and len(until) > begin:
                return begin, self._end_of(until, text, begin, i + 1 == len(messages))
        other = self._render([*messages[:i], {"role": "assistant", "content": STAND_IN},
                              *messages[i + 1:]], tools)
        if other is None or STAND_IN not in other:
            raise BadRow("hidden answer", f"the chat template does not show message {i + 1}")
        common = _common(text, other)
        end = self._before_control(text, len(text) - _common(text[::-1], other[::-1]))
        if begin is None:
            begin = self._after_header(text, messages, tools, i, given,
                                       self._before_control(text, common))
        if end < begin:
            raise BadRow("hidden answer", f"the chat template does not show message {i + 1}")
        return begin, self._extended(text, end, i + 1 == len(messages))

    def _before_control(self, text: str, at: int) -> int:
        """`at`, or the beginning of the control token that it lies within: two of them may begin
        or end alike."""
        for found in self.controls.finditer(text, max(0, at - 200), at + 200):
            if found.start() < at < found.end():
                return found.start()
        return at

    def _extended(self, text: str, end: int, last: bool) -> int:
        """`end`, or that of the end token which follows. After more than spaces it must be a known
        one or close the whole text: it might be the header of the next turn."""
        found = self._end_here.match(text, end) or self._stop_soon.match(text, end)
        found = found or (self._end_soon.match(text, end) if last else None)
        return found.end() if found else end

    def _after_header(self, text: str, messages: list[Message], tools: Any, i: int,
                      given: str | None, common: int) -> int:
        """Where a turn begins whose past is told otherwise than it was at the time.

        After the last generation prompt before `common`, unless a control token lies between.
        """
        before = self._render(messages[:i], tools) if given is not None else None
        if given is None or before is None or not given.startswith(before) or given == before:
            return common
        header = given[len(before):]
        at = text.rfind(header, 0, common)
        after = at + len(header)
        return common if at < 0 or self.controls.search(text, after, common) else after

    def _end_of(self, until: str, text: str, begin: int, last: bool) -> int:
        """Where the turn ends that is the last one of `until`, which `text` begins with."""
        stripped = until.rstrip()
        if len(stripped) > begin and self._end_before.search(stripped):
            return len(stripped)
        return self._extended(text, len(until), last)


def _common(one: str, two: str) -> int:
    """Length of the common prefix, by halving: a comparison of slices runs at memory speed."""
    low, high = 0, min(len(one), len(two))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == two[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def unmark(text: str) -> tuple[str, list[Span]]:
    """The text without OPEN and CLOSE, and the spans that they enclosed (the outermost ones)."""
    parts, spans, at, depth, begin = [], [], 0, 0, 0
    for part in re.split(f"([{OPEN}{CLOSE}])", text):
        if part == OPEN:
            begin = at if depth == 0 else begin
            depth += 1
        elif part == CLOSE:
            depth -= 1
            if depth == 0 and at > begin:
                spans.append((begin, at))
        else:
            parts.append(part)
            at += len(part)
    return "".join(parts), spans
