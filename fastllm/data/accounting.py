"""Where every record of the sources went: used, skipped by a named rule, or rejected with a reason.

A record is a line of txt and jsonl, a row of csv and parquet, an element of a json list, a
docstring of python-docs. The three counts add up to the records read; `Report.check` holds them
to it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from fastllm.config import UserError

MAX_REASONS = 20


@dataclass
class Report:
    """The account of one reading of the sources. JSON-able by `to_dict`, back by `from_dict`."""

    files: int = 0
    records: int = 0
    used: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    rejected: dict[str, int] = field(default_factory=dict)
    documents: int = 0
    text_bytes: int = 0
    reasons: list[str] = field(default_factory=list)
    """The first rejections, as `file:line: reason`."""
    notes: list[str] = field(default_factory=list)

    @property
    def num_skipped(self) -> int:
        return sum(self.skipped.values())

    @property
    def num_rejected(self) -> int:
        return sum(self.rejected.values())

    def use(self, records: int, text_bytes: int) -> None:
        """Counts one document that was made of `records` records."""
        self.records += records
        self.used += records
        self.documents += 1
        self.text_bytes += text_bytes

    def skip(self, rule: str, records: int = 1) -> None:
        """Counts records that the named rule leaves out on purpose."""
        self.records += records
        self.skipped[rule] = self.skipped.get(rule, 0) + records

    def reject(self, where: str, kind: str, reason: str, records: int = 1) -> None:
        """Counts records that cannot be read; `kind` groups them, `reason` is for the reader."""
        self.records += records
        self.rejected[kind] = self.rejected.get(kind, 0) + records
        if len(self.reasons) < MAX_REASONS:
            self.reasons.append(f"{where}: {reason}")

    def check(self) -> None:
        """Raises AssertionError when a record is unaccounted for: that is a bug of ours."""
        total = self.used + self.num_skipped + self.num_rejected
        if total != self.records:
            raise AssertionError(f"{self.records} records were read, {total} accounted for")

    def require_documents(self) -> None:
        """Raises UserError when the sources hold no document at all."""
        if self.documents:
            return
        first = f"; first: {self.reasons[0]}" if self.reasons else ""
        if "missing field" in self.rejected:
            first += "; set data.text_fields"
        raise UserError(
            f"no usable document in {self.files} file(s): {self.num_rejected} records rejected, "
            f"{self.num_skipped} skipped{first}"
        )

    def summary(self) -> list[str]:
        """Lines for a terminal: the three counts, why, the first reasons, the notes."""
        lines = [
            f"{self.records:,} records = {self.used:,} used + {self.num_skipped:,} skipped + "
            f"{self.num_rejected:,} rejected; {self.documents:,} documents, "
            f"{self.text_bytes:,} bytes of text"
        ]
        for title, counts in (("skipped", self.skipped), ("rejected", self.rejected)):
            if counts:
                parts = ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items()))
                lines.append(f"{title}: {parts}")
        lines += [f"  {reason}" for reason in self.reasons]
        if self.num_rejected > len(self.reasons):
            lines.append(f"  (the first {len(self.reasons)} of {self.num_rejected:,})")
        return lines + [f"note: {note}" for note in self.notes]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Report":
        return cls(**{f.name: values[f.name] for f in fields(cls)})
