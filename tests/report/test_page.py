"""The report of whole runs: complete, self-contained, safe, and there for those that failed."""

import base64
import hashlib
import json
import math
import random
import re
from html.parser import HTMLParser

import pytest

from fastllm.report import write_report

VOID = {"meta", "br"}


class Page(HTMLParser):
    """Tags, attributes and visible text of a page; fails on tags that do not close."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.attributes, self.words, self.scripts, self._open = [], [], [], [], []
        self.feed(source)
        self.close()
        assert self._open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID and tag != "path":
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] == "script":
            self.scripts.append(data)
        elif self._open and self._open[-1] != "style":
            self.words.append(data)


def write_run(folder, steps, *, evals=5, seed=0, break_at=()):
    """A run folder as the trainer leaves it, with a plausible course."""
    drawn = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            bad = step in break_at
            line = {
                "step": step, "tokens": 4096 * step,
                "loss": None if bad else 3 + 5 * math.exp(-step / 50) + drawn.gauss(0, 0.1),
                "lr": 3e-4, "grad_norm": None if bad else drawn.lognormvariate(0, 0.2),
                "tokens_per_second": 20_000 + drawn.gauss(0, 100), "mfu": 0.4,
                "memory_bytes": 2**30, "seconds": 0.2} | ({"skipped": True} if bad else {})
            file.write(json.dumps(line) + "\n")
            if evals and step % max(1, steps // evals) == 0:
                file.write(json.dumps({"step": step, "val_loss": 3.5, "val_bpb": 1.25}) + "\n")
    (folder / "config.yaml").write_text("train: {steps: 100, seed: 42}\noptim: {lr: 0.0003}\n")
    (folder / "environment.json").write_text(json.dumps({
        "recorded_at": "2031-05-06T07:08:09+00:00", "device": "cpu", "python": "3.11.7",
        "memory_bytes": 2**34, "cpu": {"model": "A Processor", "isa": ["avx2", "fma"]},
        "gpus": []}))
    (folder / "dispatch.json").write_text(json.dumps({
        "rms_norm": {"backend": "cpp", "reason": "the extension is built"},
        "attention": ["reference", "torch SDPA"]}))
    (folder / "data.json").write_text(json.dumps({
        "records": 1250, "used": 1200, "skipped": {"empty": 30, "duplicate": 15},
        "rejected": {"json": 5}, "documents": 1200, "reasons": [
            "a.jsonl:17: not JSON: a very long reason that does not fit into a table's cell"]}))
    (folder / "summary.json").write_text(json.dumps({
        "val_bpb": 1.2345, "xz_bpb": 2.0471, "tokens": 4096 * steps, "seconds": 3725.0,
        "parameters": 6_300_000, "steps": steps, "total_steps": steps,
        "continuations": [{"prompt": "Once upon", "text": " a time\n\nthere was"}]}))
    return folder


def page_of(folder):
    path = write_report(folder)
    assert path == folder / "report.html"
    assert not list(folder.glob("*.tmp"))
    return Page(path.read_text(encoding="utf-8"))


def test_a_run_has_its_numbers_curves_samples_and_tables(tmp_path):
    page = page_of(write_run(tmp_path / "tiny-run", 300, break_at=(100, 200)))
    for words in (
            "tiny-run", "6.30M parameters", "300 steps", "A Processor", "2031-05-06 07:08 UTC",
            "1.234 bits/byte", "xz -9 takes 2.047", "3.500 nats/token", "1.23M tokens trained",
            "20.0k tok/s", "40.0%", "1 GiB", "1:02:05", "2 steps skipped",
            "Loss", "held out", "skipped step", "Learning rate", "× 10⁻⁴", "Gradient norm",
            "Throughput", "Model FLOPs utilisation", "Peak memory", "Once upon a time there was",
            "1,250 records = 1,200 used + 45 skipped + 5 rejected", "duplicate 15",
            "a.jsonl:17: not JSON", "seed 42", "lr 0.0003", "memory_bytes 16 GiB", "avx2 fma",
            "rms_norm cpp the extension is built", "attention reference torch SDPA"):
        assert words in page.text, words
    assert page.tags.count("svg") == 7


def test_the_page_asks_nothing_of_the_network_and_allows_one_script(tmp_path):
    source = write_report(write_run(tmp_path / "run", 50)).read_text(encoding="utf-8")
    page = Page(source)
    assert not {"link", "img", "iframe", "object", "base", "form"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name in ("src", "href", "action")]
    assert not re.search(r"url\(|@import|https?:", source)
    (script,) = page.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(value for name, value in page.attributes
                  if name == "content" and "default-src" in value)
    assert policy == ("default-src 'none'; style-src 'unsafe-inline'; "
                      f"script-src 'sha256-{digest}'")
    assert "prefers-color-scheme: dark" in source
    assert 'name="viewport"' in source


ATTACK = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"' onload='x"


def test_nothing_that_a_run_holds_becomes_markup(tmp_path):
    """An attack in every name and value that the page shows: all of it is text."""
    folder = write_run(tmp_path / "a<b onclick='x'>&\"", 60, break_at=(3,))
    (folder / "config.yaml").write_text(json.dumps(
        {ATTACK: ATTACK, "section": {ATTACK: [ATTACK, {ATTACK: ATTACK}], "n": ATTACK}}))
    (folder / "environment.json").write_text(json.dumps(
        {"recorded_at": ATTACK, "cpu": {"model": ATTACK, ATTACK: [ATTACK]}, "gpus": [
            {"name": ATTACK}], "device": ATTACK}))
    (folder / "dispatch.json").write_text(json.dumps(
        {ATTACK: {"backend": ATTACK, "reason": ATTACK}, "b": ATTACK, "c": [ATTACK, ATTACK]}))
    (folder / "data.json").write_text(json.dumps(
        {"reasons": [ATTACK, ATTACK], ATTACK: {ATTACK: ATTACK}, "one": ATTACK}))
    (folder / "summary.json").write_text(json.dumps(
        {"stopped_by": ATTACK, "val_bpb": ATTACK, "xz_bpb": ATTACK, "tokens": ATTACK,
         "continuations": [ATTACK, [ATTACK, ATTACK], {"prompt": ATTACK, "text": ATTACK}]}))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 61, "loss": ATTACK, "lr": ATTACK, ATTACK: ATTACK}) + "\n")
        file.write(json.dumps({"step": ATTACK, "loss": 1.0}) + "\n")
    source = write_report(folder).read_text(encoding="utf-8")
    page = Page(source)
    assert page.tags.count("script") == 1
    assert "img" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "alert(" not in "".join(page.scripts)
    assert page.text.count(ATTACK) >= 20
    assert ATTACK not in source


def test_one_step_and_no_evaluation(tmp_path):
    folder = write_run(tmp_path / "one", 1, evals=0)
    (folder / "summary.json").unlink()
    page = page_of(folder)
    assert "1 step ·" in page.text
    assert "training loss, last step" in page.text
    assert "held out" not in page.text
    assert "4.10k tokens trained" in page.text


def test_a_folder_with_nothing_in_it_and_one_that_is_not_there(tmp_path):
    page = page_of(tmp_path)
    assert "no step recorded yet" in page.text
    assert "svg" not in page.tags
    with pytest.raises(FileNotFoundError, match="not a run folder"):
        write_report(tmp_path / "nowhere")


def test_values_that_are_not_finite_and_lines_that_are_not_lines(tmp_path):
    folder = write_run(tmp_path / "run", 40)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "loss": NaN, "grad_norm": Infinity, "mfu": -Infinity}\n')
        file.write('{"step": 42, "loss": 1e999, "lr": null}\n')
        file.write('[1, 2]\n{"step": 43, "lo')
    (folder / "environment.json").write_text('{"torn": ')
    (folder / "summary.json").write_text('["not an object"]')
    source = write_report(folder).read_text(encoding="utf-8")
    page = Page(source)
    assert "42 steps" in page.text
    assert "2 unreadable lines left out" in page.text
    assert "environment.json cannot be read" in page.text
    assert "summary.json does not hold a JSON object" in page.text
    assert not re.search(r"\b(nan|inf|infinity)\b", source, re.IGNORECASE)


def test_every_value_missing_in_a_run_that_never_had_a_finite_step(tmp_path):
    folder = write_run(tmp_path / "run", 80, evals=0, break_at=range(1, 81))
    page = page_of(folder)
    assert "80 steps skipped" in page.text
    assert ("aria-label", "Loss: no values") in page.attributes


def test_a_stopped_run_says_so_and_how_far_it_came(tmp_path):
    folder = write_run(tmp_path / "run", 30)
    (folder / "summary.json").write_text(json.dumps(
        {"steps": 30, "total_steps": 100, "stopped_by": "SIGTERM", "joules_per_token": 0.0125}))
    page = page_of(folder)
    assert "30 of 100 steps" in page.text
    assert "stopped by SIGTERM" in page.text
    assert "12.5 mJ/token" in page.text
    assert "1.250 bits/byte on held-out text" in page.text  # from metrics.jsonl


def test_a_model_that_compresses_worse_than_xz_is_reported_as_such(tmp_path):
    folder = write_run(tmp_path / "run", 30)
    (folder / "summary.json").write_text(json.dumps({"val_bpb": 2.5, "xz_bpb": 2.0}))
    assert "xz -9 is ahead: 2.000" in page_of(folder).text


def test_a_long_run_stays_small_and_keeps_its_spike(tmp_path):
    folder = write_run(tmp_path / "run", 20_000, evals=40)
    path = write_report(folder)
    assert path.stat().st_size < 500_000
    assert "20,000 steps" in Page(path.read_text(encoding="utf-8")).text


def test_pairs_have_charts_of_their_own(tmp_path):
    write_run(tmp_path, 60)
    path = tmp_path / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if "loss" in line:
            line |= {"accuracy": 0.5 + line["step"] / 200, "margin": line["step"] / 100}
        else:
            line |= {"val_accuracy": 0.75, "val_margin": 0.5}
            line.pop("val_bpb", None)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = Page(write_report(tmp_path).read_text("utf-8"))
    for words in ("Pairs ranked rightly", "Margin", "75.0%", "nats per pair"):
        assert words in page.text
    assert "nats per token" not in page.text
