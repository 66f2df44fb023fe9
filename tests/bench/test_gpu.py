"""bench/gpu.py and bench/record.py: what runs, in which time, and what is said where it cannot."""

import json
import sys
import time

import gpu
import pytest
import record
import torch

COUNT = """
import pathlib, sys
path = pathlib.Path(sys.argv[1])
runs = int(path.read_text()) + 1 if path.exists() else 1
path.write_text(str(runs))
print("run", runs, *sys.argv[2:])
sys.exit(3 if runs < 3 else 0)
"""


def python(code, *arguments):
    return gpu.Part(1, lambda run, seconds: [sys.executable, "-c", code, *arguments])


@pytest.fixture
def run(tmp_path):
    return gpu.Run(tmp_path, 9, False, 16)


def parts(monkeypatch, **found):
    monkeypatch.setattr(gpu, "PARTS", found)


def test_every_part_is_a_command_of_files_that_exist(run):
    for name, part in gpu.PARTS.items():
        for command in (part.command(run, 60), *([part.compiles(run)] if part.compiles else [])):
            scripts = [word for word in command if word.endswith(".py")]
            assert name == "tests" or gpu.Path(scripts[0]).exists(), command
            assert command[0] == sys.executable


def test_a_part_that_is_done_early_leaves_its_time(monkeypatch, run):
    parts(monkeypatch, a=python("pass"), b=python("pass"), c=python("pass"))
    first, second, third = gpu.run_parts(["a", "b", "c"], run)
    assert [one["ended"] for one in (first, second, third)] == ["ok"] * 3
    assert first["limit_seconds"] == pytest.approx(540 / 3 - gpu.GRACE, abs=1)
    assert second["limit_seconds"] == pytest.approx(540 / 2 - gpu.GRACE, abs=5)
    assert third["limit_seconds"] == pytest.approx(540 - gpu.GRACE, abs=10)


def test_a_part_that_overruns_is_stopped_with_its_children_and_the_next_begins(monkeypatch, run):
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    slow = gpu.Part(1, lambda run, seconds: ["sh", "-c", "echo begun; sleep 60 & sleep 60"])
    parts(monkeypatch, slow=slow, next=gpu.Part(1, lambda run, seconds: ["echo", "next"]))
    began = time.monotonic()
    first, after = gpu.run_parts(["slow", "next"], gpu.Run(run.out, 0.1, False, 2))
    assert (first["exit_code"], first["ended"]) == (gpu.STOPPED, "stopped at its limit")
    assert after["ended"] == "ok" and time.monotonic() - began < 20
    assert {"begun\n", "next\n"} <= set((run.out / "gpu.log").open())


def test_a_lost_context_goes_on_with_the_case_after(monkeypatch, run, capsys):
    parts(monkeypatch, a=python(COUNT, str(run.out / "count")))
    (found,) = gpu.run_parts(["a"], run)
    assert (found["exit_code"], found["contexts_lost"]) == (0, 2)
    assert "run 1\nrun 2 --resume\nrun 3 --resume\n" in capsys.readouterr().out


def test_what_will_be_compiled_is_compiled_meanwhile(monkeypatch, run):
    done = run.out / "compiled"
    compiles = lambda run: [sys.executable, "-c", f"open({str(done)!r}, 'w')"]  # noqa: E731
    checks = python(f"import os, sys; sys.exit(not os.path.exists({str(done)!r}))")
    parts(monkeypatch, a=gpu.Part(1, checks.command, compiles))
    (found,) = gpu.run_parts(["a"], run)
    assert (found["ended"], found["compiling"]) == ("ok", "compiled beforehand")
    slow = lambda run: [sys.executable, "-c", "import time; time.sleep(60)"]  # noqa: E731
    parts(monkeypatch, a=gpu.Part(1, python("pass").command, slow))
    monkeypatch.setattr(gpu, "COMPILING", 0.001)
    (found,) = gpu.run_parts(["a"], run)
    assert found["compiling"] == "not all of it was compiled beforehand"


def test_a_failed_part_fails_the_command(monkeypatch, tmp_path, capsys):
    parts(monkeypatch, a=python("import sys; sys.exit(7)"), b=python("pass"))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry-run", "--out", str(tmp_path / "new")])
    assert gpu.main() == 1
    assert "failed, exit code 7" in capsys.readouterr().out
    written = json.loads((tmp_path / "new" / "gpu.json").read_text())
    assert [one["part"] for one in written["results"]] == ["a", "b"]


@pytest.mark.parametrize(("there", "commit", "said"), [
    (False, None, "finds no NVIDIA GPU"), (True, None, "COMMIT=$(git rev-parse HEAD)"),
    (True, "HEAD", "40 digits"), (True, "a" * 40, None)])
def test_what_is_missing_is_said_in_one_line(monkeypatch, capsys, tmp_path, there, commit, said):
    parts(monkeypatch, a=python("pass"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(record, "environment", lambda device: {"commit": None})
    monkeypatch.setattr(record, "machine", lambda: {"commit": record.commit()})
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path)])
    monkeypatch.delenv("COMMIT", raising=False)
    if commit:
        monkeypatch.setenv("COMMIT", commit)
    assert gpu.main() == (2 if said else 0)
    error = capsys.readouterr().err
    assert error.count("\n") == bool(said) and (said or "") in error
    if not said:
        assert json.loads((tmp_path / "gpu.json").read_text())["machine"]["commit"] == {
            "hash": "a" * 40, "modified": None}


def test_a_dry_run_keeps_away_from_the_results(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry-run"])
    assert gpu.main() == 2
    assert "away from the results" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "folder"), [
    ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"), ("NVIDIA A100-SXM4-80GB", "a100"),
    ("NVIDIA L40S", "l40s"), ("Tesla V100-SXM2-16GB", "v100"), ("NVIDIA B200", "b200"),
    ("NVIDIA GeForce RTX 4090", "geforce-rtx-4090")])
def test_the_folder_of_a_gpu(name, folder):
    assert record.slug(name) == folder


def test_a_row_is_a_line_and_a_failed_write_leaves_what_was(tmp_path):
    path = tmp_path / "new" / "kernels.json"
    rows = [{"kernel": "a", "samples": [1.0, 2.0]}, {"kernel": "b"}]
    record.write(path, {"machine": {"gpu": "x"}}, rows)
    assert json.loads(path.read_text()) == {"machine": {"gpu": "x"}, "results": rows}
    assert sum(line.startswith('{"kernel"') for line in path.open()) == 2
    with pytest.raises(TypeError):
        record.write(path, {}, [{"kernel": object()}])
    assert json.loads(path.read_text())["results"] == rows
    record.write(path, {}, [])
    assert json.loads(path.read_text()) == {"results": []}


def test_shares_are_everything_once():
    assert sorted(one for mine in range(3) for one in record.shared(range(10), f"{mine}/3")) == (
        list(range(10)))
