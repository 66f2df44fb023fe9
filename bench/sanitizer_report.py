"""What compute-sanitizer writes, read: findings, each with its kernel, place and kind.

The wording is that of 2025.3, and of those before it where a place is written in another way.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from under_tool import Heard

# "at NAME+0x70 in FILE:LINE" as of 2024; "at 0x70 in FILE:LINE:NAME" or "at 0x70 in NAME" before.
PLACE = re.compile(r"\bat (?P<name>\S.*?)\+0x(?P<offset>[0-9a-f]+)"
                   r"(?: in (?P<file>[^\s:]+)(?::(?P<line>\d+))?)?|"
                   r"\bat 0x(?P<old_offset>[0-9a-f]+) in "
                   r"(?:(?P<old_file>[^\s:]+):(?P<old_line>\d+):)?(?P<old_name>.+)")
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")
# Titles that are no finding; and those by which the tool says that it could not work.
CHATTER = re.compile(r"COMPUTE-SANITIZER|(?:ERROR|RACECHECK|LEAK) SUMMARY|Target application|"
                     r"Tracking kernels|WARNING: \d+ errors were not|$")
TROUBLE = re.compile(r"Internal Sanitizer|Internal error|Error: (?!Race|Potential|\(Warp)|"
                     r"Device not supported|Target application terminated before|"
                     r"Maximum number of hazards")


@dataclass
class Finding:
    """One report: its title and lines, and where it is of; under_way is the call it came in."""

    title: str
    text: list[str] = field(default_factory=list)
    function: str = ""
    file: str = ""
    line: int = 0
    under_way: str = ""

    def add(self, line: str) -> None:
        self.text.append(line)
        if not self.function and (found := PLACE.search(line)):
            self.function = (found["name"] or found["old_name"]).strip()
            self.file = Path(found["file"] or found["old_file"] or "").name
            self.line = int(found["line"] or found["old_line"] or 0)

    @property
    def name(self) -> str:
        """The function without its arguments, which CUDA C++ adds."""
        return self.function.split("(")[0]

    @property
    def kind(self) -> str:
        """The title without its numbers, so that reports of one fault are counted together.

        A race of one instruction with itself is a kind of its own: Triton's reductions let several
        threads write what should be the same number.
        """
        kind = re.sub(r"0x[0-9a-f]+|\d+", "N", PLACE.sub("", self.title)).strip(" :.")
        places = [(m["name"], m["offset"] or m["old_offset"])
                  for line in self.text for m in PLACE.finditer(line)]
        if "Race reported" in self.title and len(set(places)) == 1 < len(places):
            kind += ", by one instruction"
        return kind


@dataclass
class Reader(Heard):
    """Hears the process of calls, and reads the reports between what it says."""

    cases: list[Any] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    summary: int | None = None
    """Errors by the tool's own count."""
    trouble: list[str] = field(default_factory=list)
    not_understood: list[str] = field(default_factory=list)
    _open: Finding | None = None

    def printed(self, line: str) -> None:
        if line.startswith("====="):
            self._report(line.lstrip("="))
        else:
            self._open = None

    def _report(self, text: str) -> None:
        if found := SUMMARY.search(text):
            self.summary = (self.summary or 0) + int(found[1])
        if text.startswith("  ") and self._open is not None:
            # Host frames tell how Python came there, at length.
            if len(self._open.text) < 20 and "Host Frame" not in text:
                self._open.add(text.strip())
            return
        self._open, text = None, text.strip()
        if TROUBLE.match(text):
            self.trouble.append(text)
        elif not CHATTER.match(text):
            self._open = Finding(text)
            self._open.add(text)
            if self.under_way is not None:
                number, part = self.under_way
                self._open.under_way = f"{self.cases[number]} {part}"
            self.findings.append(self._open)


def grouped(findings: list[Finding]) -> list[dict[str, Any]]:
    """Findings of one function, file and kind together: how many, when, and the first report."""
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for one in findings:
        groups.setdefault((one.function, one.file, one.kind), []).append(one)
    return [{"function": function, "file": file, "kind": kind, "reports": len(them),
             "lines": sorted({one.line for one in them if one.line}),
             "under_way": sorted({one.under_way for one in them if one.under_way}),
             "report": them[0].text} for (function, file, kind), them in groups.items()]
