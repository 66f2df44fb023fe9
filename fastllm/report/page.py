"""The page itself: headline numbers, curves, samples, then the tables that explain them.

Every value that comes from the run is escaped where it enters the page; a content security policy
names the one script that may run and forbids every request.
"""

import base64
import hashlib
import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from fastllm.callbacks import compact, data_size, duration, percent
from fastllm.report.charts import Chart, Series, inliers, rolling_median, smooth, x_extent
from fastllm.report.run_folder import RunFolder, read
from fastllm.report.style import SCRIPT, STYLE


def write_report(run_dir: str | Path) -> Path:
    """Write RUN/report.html from what the run folder holds and return its path.

    Reads config.yaml, environment.json, dispatch.json, metrics.jsonl, data.json and summary.json;
    each may be missing, and a running or failed run is reported as far as it came. Raises
    FileNotFoundError if the folder does not exist and OSError if it cannot be written to.
    """
    run = read(Path(run_dir))
    file = run.path / "report.html"
    temporary = file.with_name("report.html.tmp")
    temporary.write_text(_page(run), encoding="utf-8")
    temporary.replace(file)
    return file


def _page(run: RunFolder) -> str:
    name = run.path.resolve().name
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    body = "".join((_header(run, name), _tiles(run), _charts(run), _samples(run), _data(run),
                    _config(run), _environment(run), _dispatch(run)))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)} \u00b7 fastllm</title><style>{STYLE}</style></head>"
        f"<body><main>{body}<footer>Drawn by fastllm from the files of the run folder.</footer>"
        f"</main><script>{SCRIPT}</script></body></html>\n")


def _header(run: RunFolder, name: str) -> str:
    environment = run.environment if isinstance(run.environment, Mapping) else {}
    gpus = environment.get("gpus") or []
    cpu = environment.get("cpu") or {}
    machine = gpus[0].get("name") if gpus and str(environment.get("device")) != "cpu" \
        else cpu.get("model")
    steps = run.last("step")
    total = _number(run.summary.get("total_steps"))
    whole = f" of {total:,}" if total and steps is not None and steps < total else ""
    parameters = _number(run.summary.get("parameters"))
    facts = [
        f"{compact(parameters)} parameters" if parameters else None,
        "no step recorded yet" if steps is None else
        f"{steps:,}{whole} step{'s' if (total or steps) != 1 else ''}",
        machine,
        _moment(environment.get("recorded_at")),
    ]
    if run.summary.get("stopped_by"):
        facts.append(f"stopped by {run.summary['stopped_by']}")
    line = " \u00b7 ".join(escape(str(fact)) for fact in facts if fact)
    problems = "".join(f'<p class="problem">{escape(text)}</p>' for text in run.problems)
    return f'<header><h1>{escape(name)}</h1><p class="lede">{line}</p>{problems}</header>'


def _moment(text: Any) -> str:
    """An ISO 8601 time for a reader; anything else as it is."""
    try:
        moment = datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return str(text or "")
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def _tiles(run: RunFolder) -> str:
    rows = [[_tile(*tile, "first") for tile in _quality(run)], [_tile(*t) for t in _speed(run)]]
    filled = "".join(f'<div class="row">{"".join(row)}</div>' for row in rows if row)
    return f'<section class="tiles">{filled}</section>' if filled else ""


def _quality(run: RunFolder) -> list[tuple[str, str, str]]:
    """(value, unit, name) of what was reached."""
    tiles = []
    bpb = _number(run.summary.get("val_bpb"))
    if bpb is None:
        bpb = next((v for v in reversed(run.evals.get("val_bpb", [])) if v is not None), None)
    xz = _number(run.summary.get("xz_bpb"))
    if bpb is not None:
        beside = "on held-out text"
        if xz:
            beside = f"xz -9 takes {xz:.3f}" if bpb < xz else f"xz -9 is ahead: {xz:.3f}"
        tiles.append((f"{bpb:.3f}", "bits/byte", beside))
    ranked = [v for v in run.evals.get("val_accuracy", []) if v is not None]
    if ranked:
        tiles.append((f"{ranked[-1]:.1%}", "", "held-out pairs ranked rightly"))
    losses = [v for v in run.evals.get("val_loss", []) if v is not None]
    if losses:
        best = min(losses)
        at = run.evals["step"][run.evals["val_loss"].index(best)]
        tiles.append((f"{best:.3f}", f"nats/{_pair_unit(run)}",
                           f"best held-out loss, step {at:,}"))
    train = [v for v in run.steps.get("loss", []) if v is not None]
    if train:
        count = max(1, len(train) // 50)
        tail = train[-count:]
        over = f"training loss, mean of last {count:,} steps" if count > 1 else \
            "training loss, last step"
        tiles.append((f"{sum(tail) / count:.3f}", f"nats/{_pair_unit(run)}", over))
    return tiles


def _speed(run: RunFolder) -> list[tuple[str, str, str]]:
    """(value, unit, name) of what it took."""
    tiles = []
    tokens, seconds = run.summary.get("tokens", run.last("tokens")), _seconds(run)
    if _number(tokens):
        tiles.append((compact(tokens), "", "tokens trained"))
    rate = _median(run.steps.get("tokens_per_second"))
    if rate is not None:
        tiles.append((compact(rate), "tok/s", "median of steps"))
    mfu = _median(run.steps.get("mfu"))
    if mfu is not None:
        tiles.append((percent(mfu), "", "model FLOPs utilisation"))
    if run.steps.get("memory_bytes"):
        peak = max((v for v in run.steps["memory_bytes"] if v is not None), default=None)
        value, _, unit = data_size(peak).partition(" ")
        tiles.append((value, unit, "peak memory"))
    if run.steps:
        tiles.append((duration(seconds), "", "training time"))
    joules = _number(run.summary.get("joules_per_token"))
    if joules is not None:
        tiles.append((f"{joules * 1e3:.3g}", "mJ/token", "energy of the GPU"))
    if run.skipped:
        tiles.append((f"{len(run.skipped):,}", "",
                           "steps skipped: gradient not finite"))
    return tiles


def _tile(value: str, unit: str, name: str, rank: str = "") -> str:
    small = f"<small>{escape(unit)}</small>" if unit else ""
    return (f'<div class="tile {rank}"><b>{escape(value)}{small}</b>'
            f"<span>{escape(name)}</span></div>")


def _charts(run: RunFolder) -> str:
    if not run.steps:
        return ""
    x = run.steps["step"]
    x_range = x_extent([Series("", x, [])])
    charts = [_loss_chart(run), _bpb_chart(run),
              _pairs_chart(run, "accuracy", "Pairs ranked rightly", "%", 100.0),
              _pairs_chart(run, "margin", "Margin", "reward", 1.0)]
    charts += [_metric_chart(run, *look) for look in (
        ("Learning rate", "lr", "", "blue", False),
        ("Gradient norm", "grad_norm", "", "blue", True),
        ("Throughput", "tokens_per_second", "tok/s", "green", True),
        ("Model FLOPs utilisation", "mfu", "%", "green", True),
        ("Peak memory", "memory_bytes", "B", "green", False),
        ("Power", "power_watts", "W", "green", True),
        ("GPU utilisation", "gpu_utilization_percent", "%", "green", True))]
    drawn = [chart for chart in charts if chart is not None]
    for chart in drawn:
        chart.x_range = x_range
    return (f'<section class="charts">{"".join(chart.html() for chart in drawn)}</section>'
            '<p class="note">Horizontal axes: optimizer step.</p>')


def _half_window(count: int) -> int:
    """Of the smoothed lines: about 2 % of the run to each side, nothing on a very short one."""
    return count // 50 if count >= 50 else 0


def _kind(half: int, x: list[Any]) -> str:
    """How the values of each step are drawn: thin beside a smooth line, as dots where few."""
    return "thin" if half else "dots" if len(x) <= 20 else "line"


def _loss_chart(run: RunFolder) -> Chart:
    x, loss = run.steps["step"], run.steps["loss"]
    half = _half_window(len(x))
    smoothed = smooth(loss, half)
    series = [Series("each step", x, loss, "blue", _kind(half, x))]
    if half:
        series.append(Series(f"mean of {2 * half + 1:,} steps", x, smoothed, "blue"))
    if any(v is not None for v in run.evals.get("val_loss", [])):
        series.append(Series("held out", run.evals["step"], run.evals["val_loss"], "orange",
                             "dots"))
    return Chart("Loss", f"nats per {_pair_unit(run)}", series, wide=True, top=_loss_top(smoothed),
                 marks=run.skipped, mark_name="skipped step")


def _loss_top(smoothed: list[float | None]) -> float | None:
    """Where the axis of a long run ends: its first steps would flatten all that comes after."""
    finite = [value for value in smoothed if value is not None]
    if len(finite) < 500:
        return None
    low, settled = min(finite), finite[len(finite) // 50]
    return low + 1.6 * (settled - low) if settled > low else None


def _bpb_chart(run: RunFolder) -> Chart | None:
    values = run.evals.get("val_bpb", [])
    if sum(v is not None for v in values) < 2:
        return None
    xz = _number(run.summary.get("xz_bpb"))
    return Chart("Held-out text", "bits per byte",
                 [Series("model", run.evals["step"], values, "orange", "dots")],
                 reference=("xz -9 on the same bytes", xz) if xz else None)


def _pairs_chart(run: RunFolder, key: str, title: str, unit: str, scale: float) -> Chart | None:
    """What pairs say beside their loss, in training and held out; None where there are no pairs."""
    held = [None if v is None else v * scale for v in run.evals.get(f"val_{key}", [])]
    each = [None if v is None else v * scale for v in run.steps.get(key, [])]
    if all(v is None for v in held):
        return None
    x, half = run.steps["step"], _half_window(len(each))
    return Chart(title, unit, [
        Series(f"mean of {2 * half + 1:,} steps" if half else "each step", x, smooth(each, half),
               "blue", "line" if half else _kind(half, x)),
        Series("held out", run.evals["step"], held, "orange", "dots")])


def _pair_unit(run: RunFolder) -> str:
    """What a loss is counted in."""
    return "pair" if any(v is not None for v in run.evals.get("val_accuracy", [])) else "token"


def _metric_chart(run: RunFolder, title: str, key: str, unit: str, tone: str,
                  noisy: bool) -> Chart | None:
    """A small chart of one column, scaled to a readable unit; None where nothing was recorded."""
    values = run.steps.get(key, [])
    finite = [v for v in values if v is not None]
    if not finite:
        return None
    divisor, unit = _scale(key, max(inliers(finite)), unit)
    x, y = run.steps["step"], [None if v is None else v / divisor for v in values]
    half = _half_window(len(x)) if noisy else 0
    series = [Series("each step" if half else title.lower(), x, y, tone, _kind(half, x))]
    if half:
        series.append(Series("median", x, rolling_median(y, half), tone))
    log = key == "grad_norm" and min(finite) > 0 and max(inliers(finite)) > 30 * median(finite)
    return Chart(title, unit, series, zero=not log, log=log,
                 marks=run.skipped if key == "grad_norm" else (), mark_name="skipped")


def _scale(key: str, largest: float, unit: str) -> tuple[float, str]:
    """(divisor, unit) that bring a column's largest value between 1 and a few hundred."""
    if key == "mfu":
        return 0.01, unit
    if key == "memory_bytes":
        steps = [(1024.0**3, "GiB"), (1024.0**2, "MiB"), (1024.0, "KiB")]
        return next((step for step in steps if largest >= step[0]), (1.0, "B"))
    if key == "tokens_per_second":
        steps = [(1e6, "million tok/s"), (1e3, "thousand tok/s")]
        return next((step for step in steps if largest >= step[0]), (1.0, unit))
    if key == "lr" and largest > 0:
        power = math.floor(math.log10(largest))
        raised = str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        return 10.0**power, f"× 10{raised}"
    return 1.0, unit


def _samples(run: RunFolder) -> str:
    samples = run.summary.get("continuations") or run.summary.get("samples")
    if not isinstance(samples, list) or not samples:
        return ""
    cards = []
    for sample in samples:
        prompt, text = "", sample
        if isinstance(sample, Mapping):
            prompt = sample.get("prompt", "")
            text = sample.get("continuation", sample.get("text", ""))
        elif isinstance(sample, list) and len(sample) == 2:
            prompt, text = sample
        cards.append(f'<div class="card"><p class="sample"><b>{escape(str(prompt))}</b>'
                     f"{escape(str(text))}</p></div>")
    return f'<section><h2>Continuations</h2><div class="stack">{"".join(cards)}</div></section>'


def _data(run: RunFolder) -> str:
    return _section("Data", _account(run.data) + _tables(run.data, "totals"))


def _account(data: Any) -> str:
    """The sentence that must add up: records read = used + skipped + rejected."""
    if not isinstance(data, Mapping) or _number(data.get("records")) is None:
        return ""
    skipped, rejected = (sum(group.values()) if isinstance(group := data.get(key), Mapping) else 0
                         for key in ("skipped", "rejected"))
    return (f"<p>{data['records']:,} records = {data.get('used', 0):,} used + {skipped:,} skipped "
            f"+ {rejected:,} rejected</p>")


def _config(run: RunFolder) -> str:
    return _section("Configuration in force", _tables(run.config, "run"))


def _environment(run: RunFolder) -> str:
    return _section("Environment", _tables(run.environment, "versions and machine"))


def _dispatch(run: RunFolder) -> str:
    if not isinstance(run.dispatch, Mapping):
        return _section("Backends", _tables(run.dispatch, "all"))
    rows = []
    for op, how in run.dispatch.items():
        if isinstance(how, Mapping):
            how = [how.get("backend", ""), how.get("reason", "")]
        backend, reason = [*(how if isinstance(how, list) else [how]), "", ""][:2]
        rows.append("".join(f"<td>{escape(str(cell))}</td>" for cell in (op, backend, reason)))
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return _section("Backends", '<div class="card scroll"><table class="ops"><thead><tr><th>op</th>'
                    f"<th>backend</th><th>why</th></tr></thead><tbody>{body}</tbody></table></div>")


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def _tables(value: Any, top: str) -> str:
    """A nested mapping as cards: one of its plain values (headed `top`), one per nested mapping.

    Lists of texts, such as the reasons of rejected lines, get the whole width.
    """
    if not isinstance(value, Mapping):
        return "" if value in (None, [], "") else f'<div class="card">{_cell("", value)}</div>'
    lists = {k: v for k, v in value.items() if isinstance(v, list) and v
             and all(isinstance(item, str) for item in v) and len(" ".join(v)) > 60}
    nested = {k: v for k, v in value.items() if isinstance(v, Mapping) and v}
    plain = {k: v for k, v in value.items() if k not in lists and k not in nested}
    groups = ([(top, plain)] if plain else []) + list(nested.items())
    cards = "".join(f'<div class="card"><h3>{escape(str(name))}</h3>{_table(group)}</div>'
                    for name, group in groups)
    wide = "".join(f'<div class="card"><h3>{escape(str(name))}</h3><p class="lines">'
                   f'{"<br>".join(escape(text) for text in lines)}</p></div>'
                   for name, lines in lists.items())
    return (f'<div class="cards">{cards}</div>' if cards else "") + wide


def _table(group: Mapping[Any, Any]) -> str:
    rows = "".join(f"<tr><th>{escape(str(key))}</th><td>{_cell(str(key), value)}</td></tr>"
                   for key, value in group.items())
    return f"<table><tbody>{rows}</tbody></table>"


def _cell(key: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return _table(value) if value else "none"
    if isinstance(value, list | tuple):
        parts = [_cell("", item) for item in value]
        separator = "" if any(isinstance(item, Mapping) for item in value) else \
            "<br>" if any(len(part) > 24 for part in parts) else " "
        return separator.join(parts) or "none"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"  # as in the file
    if isinstance(value, int) and key.endswith("_bytes"):
        return escape(data_size(value))
    if isinstance(value, int) and not key.endswith("seed"):
        return f"{value:,}"
    return escape(value if isinstance(value, str) else json.dumps(value, default=str))


def _seconds(run: RunFolder) -> float:
    """Of training: the summary's, else the sum of the steps'."""
    given = _number(run.summary.get("seconds"))
    return given if given is not None else sum(v or 0.0 for v in run.steps.get("seconds", []))


def _median(values: list[float | None] | None) -> float | None:
    finite = [value for value in values or [] if value is not None]
    return median(finite) if finite else None


def _number(value: Any) -> float | None:
    """`value` if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) else None
