"""A rank that hangs, dies or fails is named by all others, with the step and what they wait in."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

RANKS, TIMEOUT = 3, 4.0
SCRIPT = Path(__file__).parents[1] / "support" / "watched.py"


@pytest.fixture
def job(tmp_path):
    """Start RANKS ranks that meet without torchrun: rank 0 holds the store."""
    processes = []

    def start(*more, timeout=TIMEOUT, steps=100_000):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(RANKS):
            environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(RANKS),
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                           "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1",
                           "TORCH_CPP_LOG_LEVEL": "ERROR"}
            processes.append(subprocess.Popen(
                [sys.executable, SCRIPT, tmp_path, str(timeout), str(steps), *more],
                env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
        deadline = time.monotonic() + 60
        while not all((tmp_path / f"{rank}.pid").exists() for rank in range(RANKS)):
            assert time.monotonic() < deadline and all(p.poll() is None for p in processes)
            time.sleep(0.02)
        return processes

    yield start
    for process in processes:
        process.kill()
        process.wait()


def ends(processes, victim, within):
    """The lines of all but the victim, each of which must end with exit code 1 in time."""
    start = time.monotonic()
    lines = []
    for rank, process in enumerate(processes):
        if rank != victim:
            _, err = process.communicate(timeout=60)
            assert process.returncode == 1, err
            assert err.count("\n") == 1, err
            lines.append(err)
    assert time.monotonic() - start < within
    return lines


PLACE = r"all-gather of the (first|second) part of step \d+"


def stopped(job, victim):
    processes = job()
    time.sleep(0.5)
    processes[victim].send_signal(signal.SIGSTOP)
    for line in ends(processes, victim, TIMEOUT + 2):
        assert re.match(f"fastllm-train: the run failed: rank {victim} did not come through "
                        f"{PLACE} within 4 s \\(", line), line
        sign = "the store that it holds" if victim == 0 else "its last sign of life was [345] s ago"
        assert re.search(sign, line), line


def test_a_stopped_rank(job):
    stopped(job, 1)


@pytest.mark.battery
@pytest.mark.parametrize("trial", range(5))
@pytest.mark.parametrize("victim", range(RANKS))
def test_stopped_ranks(victim, trial, job):
    stopped(job, victim)


def killed(job, victim):
    processes = job()
    processes[victim].kill()
    for line in ends(processes, victim, 4.5):
        assert re.match(f"fastllm-train: the run failed: rank {victim} is gone", line), line
        assert re.search(PLACE, line), line


def test_a_killed_rank(job):
    killed(job, 2)


@pytest.mark.battery
@pytest.mark.parametrize("victim", range(RANKS))
def test_killed_ranks(victim, job):
    killed(job, victim)


@pytest.mark.battery
@pytest.mark.parametrize("victim", range(RANKS))
def test_a_rank_in_an_endless_loop(victim, job):
    """Its heartbeat goes on; it is behind."""
    processes = job("loop", str(victim), "5")
    for line in ends(processes, victim, TIMEOUT + 2):
        assert re.match(f"fastllm-train: the run failed: rank {victim} did not come to all-gather "
                        r"of the second part of step 5 within 4 s \(its last sign of life was "
                        "[01] s ago, after all-gather of the first part of step 5", line), line


@pytest.mark.battery
def test_a_rank_that_fails_alone_is_quoted(job):
    for line in ends(job("fail", "1", "50"), 1, 10):
        assert line == "fastllm-train: the run failed: rank 1: out of luck\n"


@pytest.mark.battery
def test_patience_for_a_rank_that_lives(job):
    for process in job("sleep", "1", "5", steps=10):
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err


@pytest.mark.battery
@pytest.mark.parametrize("victim", [0, 1])
def test_no_patience_for_a_silent_rank(victim, job, tmp_path):
    processes = job("sleep", str(victim), "5")
    while not (tmp_path / "asleep").exists():
        time.sleep(0.02)
    processes[victim].send_signal(signal.SIGSTOP)
    for line in ends(processes, victim, TIMEOUT + 2):
        assert f"rank {victim} did not come through all-gather of the second part" in line
