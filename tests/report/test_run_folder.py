"""Metrics as columns: every value stays with its step."""

import json

from fastllm.report.run_folder import read


def test_a_key_that_comes_late_or_stops_coming_keeps_its_steps(tmp_path):
    lines = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0, "power_watts": 300.0},
             {"step": 3, "loss": 3.0, "skipped": True}, {"step": 2, "val_loss": 1.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = read(tmp_path)
    assert {key: run.steps[key] for key in ("step", "loss", "power_watts")} == {
        "step": [1, 2, 3], "loss": [1.0, 2.0, 3.0], "power_watts": [None, 300.0, None]}
    assert run.evals == {"step": [2], "val_loss": [1.5]}
    assert run.skipped == [3]
    assert run.last("power_watts") == 300.0
    assert run.last("mfu") is None
    assert run.problems == []


def test_files_that_are_missing_are_left_out_and_torn_ones_named(tmp_path):
    (tmp_path / "config.yaml").write_text("a: [1, 2\n")
    (tmp_path / "data.json").write_bytes(b"\xff\xfe")
    run = read(tmp_path)
    assert run.config is None
    assert run.steps == {}
    assert [problem.split(" ")[0] for problem in run.problems] == ["config.yaml", "data.json"]
