"""What `patch` did to a model, and what it left alone and why."""

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Replaced:
    path: str
    """The module's dotted name; "" is the model itself."""
    what: str
    """Its class."""
    by: str
    """The op that now runs."""


@dataclass(frozen=True)
class Skipped:
    path: str
    what: str
    why: str


@dataclass
class Report:
    """`print` it: one line for each class and op, and one for each reason to leave something."""

    model: str
    replaced: list[Replaced] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    def __str__(self) -> str:
        done = _grouped((f"{entry.what} -> {entry.by}", entry.path) for entry in self.replaced)
        left = _grouped((f"{entry.what}: {entry.why}", entry.path) for entry in self.skipped)
        lines = [f"{self.model}: {len(self.replaced)} replaced, {len(self.skipped)} left"]
        return "\n".join([*lines, *(f"  {line}" for line in done),
                          *(f"  left: {line}" for line in left)])


def _grouped(entries: Iterable[tuple[str, str]]) -> list[str]:
    """'12 x what (first path, ...)' for entries that say the same of many modules."""
    groups: dict[str, list[str]] = {}
    for what, path in entries:
        groups.setdefault(what, []).append(path or "the model")
    return [f"{len(paths):>4} x {what} ({paths[0]}{', ...' if len(paths) > 1 else ''})"
            for what, paths in groups.items()]
