"""What listens to a training run: the line-a-step metrics file and the progress display.

A callback is told of events in the order they happen, on the training thread. The keys of a step
and of an evaluation are listed in STEP_KEYS and EVAL_KEYS; a record may hold more.
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text

STEP_KEYS = ("step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "mfu",
             "memory_bytes", "seconds")
EVAL_KEYS = ("step", "val_loss")


class Callback:
    """Hears of a run's events; override the ones that matter.

    `on_end` comes once, at the end of a run that ended in order. `close` comes last in any case,
    also after a failure and more than once: it releases files and gives the terminal back.
    """

    def on_start(self, info: dict[str, Any]) -> None:
        """Before the first step. info["step"] (default 0): steps that are done already."""

    def on_step(self, record: dict[str, Any]) -> None:
        """After an optimizer step; record has STEP_KEYS, and `skipped` if no weight changed."""

    def on_eval(self, record: dict[str, Any]) -> None:
        """After an evaluation; record has EVAL_KEYS and what belongs to the objective: val_bpb
        (bits per byte), or of pairs val_accuracy."""

    def on_checkpoint(self, path: Path, step: int) -> None:
        """After a checkpoint is on disk and verified."""

    def on_message(self, text: str) -> None:
        """A line for the person who watches."""

    def on_end(self, summary: dict[str, Any]) -> None:
        """After the last step, evaluation and checkpoint."""

    def close(self) -> None:
        """Release what is held."""


class JsonlWriter(Callback):
    """metrics.jsonl: a JSON object a line, each handed to the system as it happens.

    resume_step: None starts the file anew. An integer keeps the lines of steps 1..resume_step and
    drops later ones and a line torn by a crash, so that after resuming from that checkpoint every
    step has exactly one line. A number that is not finite is written as null, as JSON has no other
    word for it. Raises ValueError if a record lacks one of the keys above.
    """

    def __init__(self, path: str | Path, resume_step: int | None = None) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if resume_step is not None and self.path.exists():
            _keep_lines(self.path, resume_step)
        self._file: IO[str] | None = self.path.open("w" if resume_step is None else "a",
                                                     encoding="utf-8")

    def on_step(self, record: dict[str, Any]) -> None:
        self._write(record, STEP_KEYS)

    def on_eval(self, record: dict[str, Any]) -> None:
        self._write(record, EVAL_KEYS)

    def on_checkpoint(self, path: Path, step: int) -> None:
        # A checkpoint outlives a power cut; so must the lines of the steps that led to it.
        if self._file:
            os.fsync(self._file.fileno())

    def on_end(self, summary: dict[str, Any]) -> None:
        self.close()

    def close(self) -> None:
        if self._file:
            self._file.close()
            self._file = None

    def _write(self, record: Mapping[str, Any], keys: tuple[str, ...]) -> None:
        missing = [key for key in keys if key not in record]
        if missing:
            raise ValueError(f"record of step {record.get('step')} lacks {', '.join(missing)}")
        if self._file is None:
            raise ValueError(f"{self.path} is closed")
        ordered = {key: record[key] for key in keys} | dict(record)
        self._file.write(json.dumps(plain(ordered), allow_nan=False, ensure_ascii=False) + "\n")
        self._file.flush()


class ProgressBar(Callback):
    """A live bar on a terminal; elsewhere a plain line at the first step, the last, and in between.

    interval: seconds between plain lines. The time left is the mean of this process's own steps,
    evaluations and checkpoints included, times the steps to go: smooth, and right after a resume.
    The first step (warm-up, compilation) is left out of the mean. No thread is started: data
    workers may fork safely, and the bar moves when a step ends.
    """

    def __init__(self, total_steps: int, *, interval: float = 10.0, console: Console | None = None,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self.total_steps = total_steps
        self.interval = interval
        self.console = console or Console()
        self.live = self.console.is_terminal and not self.console.is_dumb_terminal
        self._clock = clock
        self._first: tuple[float, int] | None = None  # (time, step) after this process's first step
        self._eta: float | None = None
        self._shown_at = -math.inf
        self._last: dict[str, Any] | None = None
        self._last_shown = True
        self._skipped = 0
        self._progress: _Display | None = None

    def on_start(self, info: dict[str, Any]) -> None:
        self._move(int(info.get("step", 0)), Text("preparing the first step", style="dim"))

    def on_step(self, record: dict[str, Any]) -> None:
        now, step = self._clock(), int(record["step"])
        if self._first is None:
            self._first = (now, step)
        elif step > self._first[1]:
            per_step = (now - self._first[0]) / (step - self._first[1])
            self._eta = per_step * (self.total_steps - step)
        self._skipped += bool(record.get("skipped"))
        self._last, self._last_shown = record, False
        due = 0.1 if self.live else self.interval
        if now - self._shown_at >= due or step == self.total_steps:
            self._shown_at = now
            self._show()

    def on_eval(self, record: dict[str, Any]) -> None:
        words = [f"held-out loss {_fixed(record['val_loss'], 4)}"]
        if "val_bpb" in record:
            words.append(f"{_fixed(record['val_bpb'], 4)} bits per byte")
        if "val_accuracy" in record:
            words.append(f"accuracy {percent(record['val_accuracy'])}")
        if "val_margin" in record:
            words.append(f"margin {_fixed(record['val_margin'], 4)}")
        self._say(f"step {record['step']}: {', '.join(words)}", "bold")

    def on_checkpoint(self, path: Path, step: int) -> None:
        self._say(f"step {step}: saved {path}", "dim")

    def on_message(self, text: str) -> None:
        self._say(text)

    def on_end(self, summary: dict[str, Any]) -> None:
        self.close()

    def close(self) -> None:
        if not self._last_shown:
            self._show()
        if self._progress:
            self._progress.stop()
            self._progress = None

    def _show(self) -> None:
        assert self._last is not None
        self._last_shown = True
        step = int(self._last["step"])
        metrics = describe_step(self._last)
        if self._skipped:
            metrics.append(f"{self._skipped} skipped")
        if self.live:
            self._move(step, Text("  ".join(metrics), style="dim"))
            return
        width = len(str(self.total_steps))
        place = f"step {step:>{width}}/{self.total_steps} {step / self.total_steps:4.0%}"
        left = [f"{duration(self._eta)} left"] if self._eta else []
        self._print("  ".join([place, *metrics, *left]))

    def _move(self, step: int, metrics: Text) -> None:
        if not self.live:
            return
        if self._progress is None:
            self._progress = _Display(self.console, self.total_steps)
            self._progress.start()
        left = "--:-- left" if self._eta is None else f"{duration(self._eta)} left"
        self._progress.show(step, left if step < self.total_steps else "done", metrics)

    def _say(self, text: str, style: str = "") -> None:
        self._print(text, style if self.live else "")

    def _print(self, text: str, style: str = "") -> None:
        self.console.print(Text(text, style=style), soft_wrap=True)


class _Display(Progress):
    """The bar, and under it a line of metrics (which may wrap on a narrow terminal)."""

    def __init__(self, console: Console, total: int) -> None:
        self.metrics = Text()
        super().__init__(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"), BarColumn(bar_width=None),
            TaskProgressColumn(), TextColumn("{task.fields[left]}"),
            console=console, auto_refresh=False, expand=True)
        self.bar = self.add_task("train", total=total, left="")

    def show(self, step: int, left: str, metrics: Text) -> None:
        self.metrics = metrics
        self.update(self.bar, completed=step, left=left)
        self.refresh()

    def get_renderable(self) -> RenderableType:
        return Group(self.make_tasks_table(self.tasks), self.metrics)


def describe_step(record: Mapping[str, Any]) -> list[str]:
    """The metrics of a step as short words with units, in reading order."""
    words = [
        f"loss {_fixed(record['loss'], 4)}",
        f"{compact(record['tokens_per_second'])} tok/s",
        f"MFU {percent(record['mfu'])}",
        f"grad {_fixed(record['grad_norm'], 3)}",
        f"lr {scientific(record['lr'])}",
        f"mem {data_size(record['memory_bytes'])}",
    ]
    if "accuracy" in record:
        words.insert(1, f"accuracy {percent(record['accuracy'])}")
    if record.get("power_watts") is not None:
        words.append(f"{record['power_watts']:.0f} W")
    return words


def plain(value: Any) -> Any:
    """`value` in JSON's types: tensors and numpy scalars as numbers, non-finite ones as None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return plain(value.item()) if hasattr(value, "item") else str(value)


def compact(value: float | None) -> str:
    """Three digits and a suffix: 12345 -> 12.3k."""
    if value is None or not math.isfinite(value):
        return "n/a"
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit * 0.9995:
            return f"{_three(value / limit)}{suffix}"
    return _three(value)


def data_size(count: float | None) -> str:
    """Bytes in powers of 1024: 1536 -> 1.50 KiB."""
    if count is None or not math.isfinite(count):
        return "n/a"
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while abs(count) >= 1023.5 and len(units) > 1:
        count, units = count / 1024, units[1:]
    return f"{_three(count) if units[0] != 'B' else f'{count:.0f}'} {units[0]}"


def duration(seconds: float | None) -> str:
    """59 -> 0:59, 3600 -> 1:00:00, 90000 -> 1d 1:00:00."""
    if seconds is None or not math.isfinite(seconds):
        return "n/a"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    clock = f"{hour}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
    return f"{days}d {clock}" if days else clock


def percent(fraction: float | None) -> str:
    """0.4213 -> 42.1%."""
    return "n/a" if fraction is None or not math.isfinite(fraction) else f"{fraction:.1%}"


def scientific(value: float | None) -> str:
    """0.0003 -> 3.00e-4."""
    if value is None or not math.isfinite(value):
        return "n/a"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa}e{int(exponent)}" if value else "0"


def _three(value: float) -> str:
    """Three significant digits without an exponent; whole numbers below 1000 as they are."""
    if value == int(value) and abs(value) < 1000:
        return str(int(value))
    return f"{value:.{2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0}f}"


def _fixed(value: float | None, digits: int) -> str:
    return "n/a" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def _keep_lines(path: Path, last_step: int) -> None:
    """Rewrite a metrics file without the lines after `last_step` and without unreadable ones."""
    temporary = path.with_name(path.name + ".tmp")
    with path.open("rb") as lines, temporary.open("wb") as kept:
        for line in lines:
            if line.endswith(b"\n") and _step_of(line) <= last_step:
                kept.write(line)
        kept.flush()
        os.fsync(kept.fileno())
    temporary.replace(path)


def _step_of(line: bytes) -> float:
    """The step of a line of metrics; infinity where the line is not one."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
