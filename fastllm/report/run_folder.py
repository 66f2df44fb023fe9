"""What a run left in its folder, read for the report: the metrics as columns, the rest as it is.

A file that is missing is left out. One that cannot be read is named in `problems`, and the report
is written all the same: it matters most for the runs that went wrong.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml


@dataclass
class RunFolder:
    """Columns hold one value per step (or evaluation); None where it was not a finite number."""

    path: Path
    steps: dict[str, list[Any]] = field(default_factory=dict)
    evals: dict[str, list[Any]] = field(default_factory=dict)
    skipped: list[float] = field(default_factory=list)
    config: Any = None
    environment: Any = None
    dispatch: Any = None
    data: Any = None
    summary: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def last(self, key: str) -> Any:
        """The last finite value of a step's key, or None."""
        return next((v for v in reversed(self.steps.get(key, [])) if v is not None), None)


def read(path: Path) -> RunFolder:
    """Read a run folder. Raises FileNotFoundError if there is none."""
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a run folder")
    run = RunFolder(path)
    run.config = _load(run, "config.yaml", yaml.safe_load)
    run.environment = _load(run, "environment.json", json.loads)
    run.dispatch = _load(run, "dispatch.json", json.loads)
    summary = _load(run, "summary.json", json.loads)
    if isinstance(summary, dict):
        run.summary = summary
    elif summary is not None:
        run.problems.append("summary.json does not hold a JSON object")
    run.data = _load(run, "data.json", json.loads) or run.summary.get("data")
    _read_metrics(run)
    return run


def _load(run: RunFolder, name: str, parse: Callable[[str], Any]) -> Any:
    file = run.path / name
    if not file.exists():
        return None
    try:
        return parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        run.problems.append(f"{name} cannot be read: {error}")
        return None


def _read_metrics(run: RunFolder) -> None:
    """A line is a step if it has a loss, an evaluation if it has a val_loss or a val_bpb."""
    file = run.path / "metrics.jsonl"
    if not file.exists():
        return
    bad = 0
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            record = _record(line)
            if record is None:
                bad += 1
            elif "loss" in record:
                _append(run.steps, record)
                if record.get("skipped"):
                    run.skipped.append(record["step"])
            elif "val_loss" in record or "val_bpb" in record:
                _append(run.evals, record)
    for columns in (run.steps, run.evals):
        length = len(columns.get("step", []))
        for column in columns.values():  # keys that the last lines did not have
            column.extend([None] * (length - len(column)))
    if bad:
        count = "1 unreadable line" if bad == 1 else f"{bad:,} unreadable lines"
        run.problems.append(f"metrics.jsonl: {count} left out")


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or _number(record.get("step")) is None:
        return None
    return record


def _append(columns: dict[str, list[Any]], record: dict[str, Any]) -> None:
    row = len(columns.get("step", []))
    for key, value in record.items():
        column = columns.setdefault(key, [])
        column.extend([None] * (row - len(column)))
        column.append(_number(value))


def _number(value: Any) -> float | int | None:
    """`value` if it is a finite number; None for null, NaN, text, true and false."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) else None
