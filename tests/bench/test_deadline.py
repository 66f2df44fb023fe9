"""bench/deadline.py: a sample of the tests, and what is not reached is said."""

import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench"


def run(folder, *options):
    (folder / "test_some.py").write_text(
        "import pytest, time\n"
        "@pytest.mark.parametrize('n', range(6))\n"
        "def test_one(n):\n    time.sleep(0.3)\n")
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "deadline", "-p", "no:cacheprovider", "-v", *options,
         str(folder)], cwd=folder, env={"PYTHONPATH": str(BENCH), "PATH": ""}, capture_output=True,
        text=True).stdout


def order(text):
    return [line.split("[")[1][0] for line in text.splitlines() if "test_one[" in line]


def test_without_a_deadline_nothing_changes(tmp_path):
    text = run(tmp_path)
    assert "6 passed" in text and order(text) == list("012345")


def test_what_is_not_reached_is_skipped_and_the_order_is_the_same_each_time(tmp_path):
    text = run(tmp_path, "--deadline", "0", "-rs")
    assert "6 skipped" in text and "not reached in 0 s" in text
    again = run(tmp_path, "--deadline", "100")
    assert "6 passed" in again
    assert order(again) == order(text)[:6] != list("012345")
