"""Metrics file and progress display: what is written is what happened, also across a crash."""

import io
import json
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from fastllm.callbacks import (
    EVAL_KEYS,
    STEP_KEYS,
    Callback,
    JsonlWriter,
    ProgressBar,
    compact,
    data_size,
    duration,
    percent,
    scientific,
)


def record(step, **changes):
    return {"step": step, "tokens": 4096 * step, "loss": 3.25, "lr": 3e-4, "grad_norm": 0.8125,
            "tokens_per_second": 12345.0, "mfu": 0.4123, "memory_bytes": 3 * 2**30,
            "seconds": 0.25, **changes}


def evaluation(step):
    return {"step": step, "val_loss": 3.5, "val_bpb": 1.25}


def lines_of(path):
    return [json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
            for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_step_is_one_line_with_the_keys_in_order_and_extras_after(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    writer = JsonlWriter(path)
    extra_first = {"skipped": True} | record(1)
    writer.on_step(extra_first)
    writer.on_eval({"note": "x", **evaluation(1)})
    # Read before the file is closed: a process that is killed now has lost nothing.
    step, held_out = lines_of(path)
    assert tuple(step) == (*STEP_KEYS, "skipped")
    assert step == record(1, skipped=True)
    assert tuple(held_out) == (*EVAL_KEYS, "note", "val_bpb")
    writer.close()


def test_numbers_that_are_not_finite_are_null_and_tensors_are_numbers(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path)
    writer.on_step(record(1, loss=math.nan, grad_norm=math.inf, mfu=-math.inf,
                          lr=torch.tensor(0.5), layers=[1.0, math.nan], by={"a": math.inf}))
    writer.close()
    (line,) = lines_of(path)
    assert [line[key] for key in ("loss", "grad_norm", "mfu")] == [None, None, None]
    assert line["lr"] == 0.5
    assert line["layers"] == [1.0, None]
    assert line["by"] == {"a": None}


def test_a_record_without_a_promised_key_is_refused_by_name(tmp_path):
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    incomplete = record(7)
    del incomplete["mfu"], incomplete["lr"]
    with pytest.raises(ValueError, match=r"step 7 lacks lr, mfu"):
        writer.on_step(incomplete)
    with pytest.raises(ValueError, match="lacks val_loss"):
        writer.on_eval({"step": 7, "val_bpb": 1.0})
    writer.close()
    writer.close()
    with pytest.raises(ValueError, match="is closed"):
        writer.on_step(record(8))


def test_resume_keeps_each_step_once_and_drops_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = JsonlWriter(path)
    for step in range(1, 8):
        first.on_step(record(step, loss=float(step)))
        if step % 2 == 0:
            first.on_eval(evaluation(step))
    first.close()
    with path.open("a") as torn:
        torn.write('{"step": 8, "tokens": 32768, "lo')
    second = JsonlWriter(path, resume_step=4)
    for step in range(5, 7):
        second.on_step(record(step, loss=-1.0))
    second.close()
    lines = lines_of(path)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "val_loss" in line] == [2, 4]
    assert [line["loss"] for line in lines if "loss" in line] == [1, 2, 3, 4, -1, -1]


@settings(max_examples=40, deadline=None)
@given(stops=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6), st.binary(max_size=12)),
                      max_size=5))
def test_after_any_crashes_and_resumes_the_file_is_as_if_nothing_had_stopped(
        tmp_path_factory, stops):
    path = tmp_path_factory.mktemp("runs") / "metrics.jsonl"
    writer, done = JsonlWriter(path), 0
    for further, back, garbage in stops:
        for step in range(done + 1, done + further + 1):
            writer.on_step(record(step))
        writer.close()
        with path.open("ab") as file:  # a torn write, without the newline that ends a record
            file.write(garbage.replace(b"\n", b""))
        done = max(0, done + further - back)
        writer = JsonlWriter(path, resume_step=done)
    writer.on_step(record(done + 1))
    writer.close()
    assert lines_of(path) == [record(step) for step in range(1, done + 2)]


def test_resume_without_a_file_and_a_fresh_start_over_an_old_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path, resume_step=10)
    writer.on_step(record(11))
    writer.close()
    assert [line["step"] for line in lines_of(path)] == [11]
    JsonlWriter(path).close()
    assert path.read_text() == ""


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def shown(total, steps, seconds=1.0, *, start=0, interval=10.0, terminal=False, width=120,
          events=()):
    """What the display of a run writes, as text."""
    clock, out = Clock(), io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=width, _environ={})
    bar = ProgressBar(total, interval=interval, console=console, clock=clock)
    bar.on_start({"step": start})
    for step in steps:
        clock.now += seconds
        bar.on_step(record(step))
        for at, name, arguments in events:
            if at == step:
                getattr(bar, name)(*arguments)
    bar.on_end({})
    bar.close()
    return out.getvalue()


def test_plain_lines_at_the_first_step_every_interval_and_the_last():
    lines = shown(100, range(1, 101)).splitlines()
    steps = [int(re.match(r"step +(\d+)/100", line)[1]) for line in lines]
    assert steps == [1, *range(11, 100, 10), 100]
    assert not any("\x1b" in line for line in lines)
    for word in ("loss 3.2500", "12.3k tok/s", "MFU 41.2%", "grad 0.812", "lr 3.00e-4",
                 "mem 3 GiB"):
        assert word in lines[0]


def test_a_run_that_stops_early_shows_its_last_step():
    lines = shown(100, range(1, 6)).splitlines()
    assert [line.split("/")[0] for line in lines] == ["step   1", "step   5"]


def test_time_left_is_steps_to_go_at_the_pace_of_this_process():
    lines = shown(100, range(1, 101), seconds=2.0).splitlines()
    assert "left" not in lines[0]
    for line in lines[1:-1]:
        step = int(re.match(r"step +(\d+)/", line)[1])
        assert f"{duration(2.0 * (100 - step))} left" in line
    # Resumed at step 90: the ninety steps before took this process no time and count for nothing.
    resumed = shown(100, range(91, 101), seconds=30.0, start=90).splitlines()
    assert "left" not in resumed[0]
    assert "4:00 left" in resumed[1]


def test_evaluations_checkpoints_and_messages_are_lines_of_their_own():
    out = shown(30, range(1, 31), events=[
        (5, "on_eval", (evaluation(5),)), (6, "on_checkpoint", ("runs/a/step-6", 6)),
        (7, "on_message", ("[bold]not markup[/nope]",))])
    assert "step 5: held-out loss 3.5000, 1.2500 bits per byte\n" in out
    assert "step 6: saved runs/a/step-6\n" in out
    assert "[bold]not markup[/nope]\n" in out


def test_skipped_steps_are_counted_and_missing_numbers_shown_as_such():
    out = io.StringIO()
    bar = ProgressBar(2, console=Console(file=out, width=200))
    bar.on_step(record(1, loss=math.nan, grad_norm=None, mfu=None, skipped=True))
    bar.close()
    assert "loss n/a" in out.getvalue()
    assert "MFU n/a  grad n/a" in out.getvalue()
    assert "1 skipped" in out.getvalue()


@pytest.mark.parametrize("width", [40, 80, 200])
def test_on_a_terminal_a_bar_moves_and_the_cursor_comes_back(width):
    out = shown(50, range(1, 51), terminal=True, width=width,
                events=[(20, "on_message", ("hello [there]",))])
    assert "\x1b[?25l" in out
    assert out.rindex("\x1b[?25h") > out.rindex("\x1b[?25l")
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", out)
    assert "hello [there]" in text
    assert "step 50/50" in text
    assert "100% done" in text
    assert "12.3k tok/s" in text


def test_close_gives_the_terminal_back_when_a_run_fails_before_its_first_step():
    out = io.StringIO()
    bar = ProgressBar(5, console=Console(file=out, force_terminal=True, width=80, _environ={}))
    bar.on_start({})
    bar.close()
    assert out.getvalue().rstrip().endswith("\x1b[?25h")


def test_the_base_callback_hears_everything_and_does_nothing():
    callback = Callback()
    callback.on_start({})
    callback.on_step(record(1))
    callback.on_eval(evaluation(1))
    callback.on_checkpoint("path", 1)
    callback.on_message("text")
    callback.on_end({})
    callback.close()


@pytest.mark.parametrize(("value", "text"), [
    (0, "0"), (7, "7"), (0.5, "0.50"), (12.345, "12.3"), (999, "999"), (999.9, "1.00k"),
    (12345, "12.3k"), (1234567, "1.23M"), (6.5e9, "6.50G"), (2e12, "2T"), (None, "n/a"),
    (math.nan, "n/a")])
def test_compact(value, text):
    assert compact(value) == text


@pytest.mark.parametrize(("value", "text"), [
    (0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (3 * 2**30, "3 GiB"),
    (2**20 - 1, "1.00 MiB"), (141 * 2**30 + 1, "141 GiB"), (2**50, "1024 TiB"), (None, "n/a")])
def test_data_size(value, text):
    assert data_size(value) == text


@pytest.mark.parametrize(("value", "text"), [
    (0, "0:00"), (59.6, "1:00"), (3600, "1:00:00"), (90061, "1d 1:01:01"), (86400, "1d 0:00:00"),
    (math.inf, "n/a"), (None, "n/a")])
def test_duration(value, text):
    assert duration(value) == text


def test_percent_and_scientific():
    assert percent(0.4213) == "42.1%"
    assert percent(math.nan) == "n/a"
    assert scientific(3e-4) == "3.00e-4"
    assert scientific(0.0) == "0"
    assert scientific(None) == "n/a"
