"""kill -9 at random moments, then --resume: the end is bitwise that of a run left alone."""

import random
import time

import pytest
import tiny

from fastllm import checkpoint

STEPS, KILLS = 150, 20


def arguments(folder, *more):
    return ["pretrain", *tiny.arguments(folder, **{
        "train.steps": STEPS, "checkpoint.every": 10, "eval.every": 50}), *more]


def final_hash(folder):
    newest = checkpoint.newest(folder / "run" / "checkpoints")
    assert newest.step == STEPS
    return newest.state["state_hash"]


@pytest.mark.battery
def test_twenty_kills(job, tmp_path):
    """Each trial is killed once, at a moment drawn over the process's life, then resumed."""
    (tmp_path / "alone").mkdir()
    start = time.monotonic()
    assert job(1, None, *arguments(tmp_path / "alone")).codes(120) == [0]
    life = time.monotonic() - start
    expected = final_hash(tmp_path / "alone")
    draw = random.Random(2)
    equal, killed_at = 0, []
    for trial in range(KILLS):
        folder = tmp_path / str(trial)
        folder.mkdir()
        # Half of the kills fall evenly over the process's life, half into its training part.
        moment = draw.uniform(0.05, life) if trial % 2 else draw.uniform(0.4 * life, life)
        first = job(1, None, *arguments(folder))
        time.sleep(moment)
        first.kill_all()
        assert first.codes() in ([-9], [0])  # 0: it was faster than the one left alone
        saved = [path.name for path in checkpoint.steps(folder / "run" / "checkpoints")]
        killed_at.append(saved[-1] if saved else "before the first checkpoint")
        done = job(1, None, *arguments(folder, "--resume"))
        assert done.codes(120) == [0], done.text()
        equal += final_hash(folder) == expected
    print(killed_at)
    assert equal == KILLS
    assert len(set(killed_at)) > 3, "the kills did not fall at different moments of training"
