"""`fastllm-train launch`: the ranks' environment, their signals, their ends and their words."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny

from fastllm import checkpoint, cli
from fastllm.dist import launch as launching

SUPPORT = Path(__file__).parents[1] / "support"


def start(folder, what, *options):
    return subprocess.Popen(
        [sys.executable, SUPPORT / "launcher.py", "--nproc", "2", *options,
         str(SUPPORT / "rank_script.py"), what, str(folder)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for(*paths):
    deadline = time.monotonic() + 60
    while not all(path.exists() and path.read_text() for path in paths):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def pids(folder):
    paths = [folder / f"{rank}.pid" for rank in range(2)]
    wait_for(*paths)
    return [int(path.read_text()) for path in paths]


def gone(pid):
    """Whether a process has ended (one that nobody has waited for yet is a zombie)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_environment_and_output(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    process = start(tmp_path, "environment")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out == "out of 0\n" and err == "err of 0\n"
    for rank in range(2):
        found = dict(line.split("=", 1) for line in (tmp_path / str(rank)).read_text().splitlines()
                     if "=" in line)
        assert found["RANK"] == found["LOCAL_RANK"] == str(rank)
        assert found["WORLD_SIZE"] == found["LOCAL_WORLD_SIZE"] == "2"
        assert found["MASTER_ADDR"] == "127.0.0.1" and int(found["MASTER_PORT"]) > 0
        assert found["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 2))


def test_many_that_fail_say_one_line(tmp_path):
    """Rank 1 is the first; what rank 0 says of the same thing later is not shown."""
    process = start(tmp_path, "words")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert err == "err of 0\nfastllm-train: error: too bad (1)\n"


def test_a_crash_shows_that_ranks_stderr(tmp_path):
    process = start(tmp_path, "crash")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "rank 1: ValueError: not foreseen\n" in err
    assert err.endswith("fastllm-train: the run failed: rank 1 ended with exit code 1\n")
    assert "elastic" not in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_once_and_waited_for(number, tmp_path):
    process = start(tmp_path, "stop")
    pids(tmp_path)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    for rank in range(2):
        assert (tmp_path / str(rank)).read_text() == number.name


def test_ctrl_c_reaches_the_ranks_once(tmp_path):
    """A terminal sends it to the launcher's whole process group."""
    process = start(tmp_path, "stop")
    pids(tmp_path)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 0
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["SIGINT"] * 2


def test_a_signal_before_there_is_anything_to_save(tmp_path):
    process = start(tmp_path, "wait")
    pids(tmp_path)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and err == "err of 0\n"


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_is_named(victim, tmp_path):
    process = start(tmp_path, "wait")
    ranks = pids(tmp_path)
    os.kill(ranks[victim], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.splitlines()[1:] == [f"fastllm-train: the run failed: rank {victim} was killed by "
                                    "SIGKILL (the kernel does that where memory runs out)"]
    assert all(map(gone, ranks))


def test_no_rank_outlives_a_launcher_that_is_killed(tmp_path):
    process = start(tmp_path, "wait")
    ranks = pids(tmp_path)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while not all(map(gone, ranks)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(("arguments", "words"), [
    (["--nproc", "2", "pretain"], ["pretain", "pretrain"]), (["--nproc", "2"], ["--nproc 2"]),
    (["--nproc", "0", "demo"], ["nproc", "'0'"]), (["--nprox", "2", "demo"], ["nprox", "nproc"]),
    (["--nproc"], ["--nproc needs a value"]), (["--nproc", "--nnodes"], ["--nproc needs a value"]),
    (["--nproc", "2", "--nnodes", "2", "demo"], ["--rdzv-endpoint"]),
    (["--nnodes", "2", "--node-rank", "2", "--rdzv-endpoint", "x:1", "demo"], ["--node-rank 2"]),
    (["--nproc", "2", "--nnodes", "2", "--rdzv-endpoint", "x:y", "demo"], ["x:y", "HOST:PORT"]),
    (["--nproc", "2", "launch", "demo"], ["launch"]),
])
def test_mistakes(arguments, words, capsys):
    assert cli.main(["launch", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and all(word in err for word in words), err


def test_ranks_are_the_gpus_unless_told(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert cli.main(["launch", "demo"]) == 2
    assert "--nproc" in capsys.readouterr().err
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert launching._gpus() == 3


def test_the_other_nodes_do_not_come(tmp_path):
    process = start(tmp_path, "wait", "--nnodes", "2", "--rdzv-timeout", "2", "--rdzv-endpoint",
                    "127.0.0.1:29511")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.count("\n") == 1 and "did not all meet at 127.0.0.1:29511 within 2 s" in err


@pytest.mark.battery
@pytest.mark.parametrize("first", ["launch", "torchrun"])
def test_a_run_is_stopped_and_goes_on_under_the_other_launcher(first, tmp_path):
    """Ours ends a stopped run with 0, torch's with its own words; both save the same checkpoint."""
    launchers = {
        "launch": [sys.executable, "-m", "fastllm", "launch", "--nproc", "2"],
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
                     "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "fastllm"]}
    second = "torchrun" if first == "launch" else "launch"

    def command(steps, *more):
        return ["pretrain", *tiny.arguments(tmp_path, **{
            "train.steps": steps, "train.grad_accum": 1, "checkpoint.every": 1000,
            "eval.every": 0}), *more]

    metrics = tmp_path / "run" / "metrics.jsonl"
    process = subprocess.Popen([*launchers[first], *command(400)], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    wait_for(metrics)
    process.terminate()
    out, err = process.communicate(timeout=120)
    if first == "launch":
        assert process.returncode == 0 and "stopped by SIGTERM" in out, (out, err)
    stopped = checkpoint.newest(tmp_path / "run" / "checkpoints").step
    assert 0 < stopped < 400
    done = subprocess.run([*launchers[second], *command(stopped + 3, "--resume")],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert checkpoint.newest(tmp_path / "run" / "checkpoints").step == stopped + 3


@pytest.mark.battery
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_rank_of_a_training_run_hangs_or_is_killed(number, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "fastllm", "launch", "--nproc", "2", "pretrain",
         *tiny.arguments(tmp_path, **{"train.steps": 100_000, "checkpoint.every": 100_000,
                                      "eval.every": 0, "dist.zero": 2, "dist.timeout": 5})],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "run" / "metrics.jsonl")
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    victim = next(int(pid) for pid in ranks
                  if "RANK=1" in Path(f"/proc/{pid}/environ").read_text().split("\0"))
    os.kill(victim, number)
    start = time.monotonic()
    _, err = process.communicate(timeout=60)
    # A stopped rank can only be killed, after the others have ended and a little grace.
    assert time.monotonic() - start < 5 + 2 + launching.GRACE + 1
    assert process.returncode == 1 and err.count("\n") == 1, err
    if number == signal.SIGKILL:
        assert "rank 1 was killed by SIGKILL" in err
    else:
        assert "rank 1 did not come" in err and " of step " in err, err
    assert gone(victim)
