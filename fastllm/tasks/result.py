"""What came out of a task: figures with standard errors, and the account of the rows."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table
from rich.text import Text

from fastllm.data.accounting import Report


@dataclass(frozen=True)
class Metric:
    """A mean over questions, and its standard error (None for a single question)."""

    value: float
    stderr: float | None

    @classmethod
    def of(cls, scores: Sequence[float]) -> "Metric":
        """The mean of the scores, and the deviation of the sample (n - 1) over the root of n."""
        count = len(scores)
        mean = math.fsum(scores) / count
        if count < 2:
            return cls(mean, None)
        variance = math.fsum((score - mean) ** 2 for score in scores) / (count - 1)
        return cls(mean, math.sqrt(variance / count))


@dataclass
class TaskResult:
    """A task's result.

    questions: those asked; the metrics are means over them. metrics: by name, acc (and acc_norm:
    by likelihood a byte of the choice) or exact_match. truncated: prompts that lost their beginning
    as they are longer than the model reads. report, shots_report: where every row went. samples: a
    record a question, empty unless they were asked for.
    """

    name: str
    kind: str
    shots: int
    questions: int
    metrics: dict[str, Metric]
    truncated: int
    report: Report
    shots_report: Report | None = None
    notes: list[str] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return asdict(self)

    def render(self) -> Table:
        """The metrics as a table, and below it what was left out or cut."""
        table = Table(title=Text(f"{self.name} ({self.shots}-shot)"), caption_justify="left")
        for name in ("metric", "value", "standard error"):
            table.add_column(name, justify="left" if name == "metric" else "right")
        for name, metric in self.metrics.items():
            table.add_row(name, f"{metric.value:.4f}",
                          "-" if metric.stderr is None else f"{metric.stderr:.4f}")
        table.add_row("questions", f"{self.questions:,}", "")
        # Texts of the user's files are no markup.
        table.caption = Text("\n".join(self._lines()))
        return table

    def _lines(self) -> list[str]:
        lines = self.report.summary() if self.report.num_rejected else []
        if self.shots_report is not None and self.shots_report.num_rejected:
            lines += ["examples:", *self.shots_report.summary()]
        return lines + [f"note: {note}" for note in self.notes]
