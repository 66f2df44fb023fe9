"""Ranks on two hosts: network namespaces with a cable between them, which is then pulled."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import two_hosts

from fastllm import checkpoint

pytestmark = pytest.mark.battery

SUPPORT = Path(__file__).parents[1] / "support"
TIMEOUT = 6.0
RANKS = (2, 1)
"""On each host."""
MEET = ["--nnodes", "2", "--rdzv-endpoint", f"{two_hosts.FIRST}:29533"]


@pytest.fixture(scope="module")
def network():
    try:
        two_hosts.make().remove()
    except OSError as error:
        pytest.skip(f"no network namespaces: {error}")


@pytest.fixture
def hosts(network):
    hosts = two_hosts.make()
    yield hosts
    hosts.remove()


def launch_script(folder, host, steps, *options):
    """Our launcher, ranks of watched.py."""
    return [sys.executable, str(SUPPORT / "launcher.py"), "--nproc", str(RANKS[host]), *MEET,
            *options, str(SUPPORT / "watched.py"), str(folder), str(TIMEOUT), str(steps)]


def launch_script_by_number(folder, host, steps):
    return launch_script(folder, host, steps, "--node-rank", str(host))


def torchrun_script(folder, host, steps):
    """torch's own launcher; where a hostname's address is not the host's, it must be told by whom
    the endpoint is held, and Gloo which interface to use."""
    return ["env", f"GLOO_SOCKET_IFNAME=fl{'ab'[host]}{os.getpid() % 100_000}",
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(RANKS[host]),
            *MEET, "--rdzv-backend", "c10d", "--rdzv-id", "test",
            "--rdzv-conf", f"is_host={host == 0}",
            "--local-addr", (two_hosts.FIRST, two_hosts.SECOND)[host],
            str(SUPPORT / "watched.py"), str(folder), str(TIMEOUT), str(steps)]


def launch_pretrain(folder, host, steps):
    """The command itself. Both hosts see one file system."""
    return [sys.executable, "-m", "fastllm", "launch", "--nproc", str(RANKS[host]), *MEET,
            "pretrain", *tiny.arguments(folder, **{
                "train.steps": steps, "train.grad_accum": 1, "checkpoint.every": 1_000_000,
                "eval.every": 0, "dist.zero": 2, "dist.timeout": TIMEOUT})]


def start(hosts, folder, command, steps):
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    return [subprocess.Popen([*hosts.inside(host), *command(folder, host, steps)], env=variables,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for host in range(2)]


def results(processes, timeout=300):
    """(exit code, stderr) of each."""
    try:
        errors = [process.communicate(timeout=timeout)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, error)
            for process, error in zip(processes, errors, strict=True)]


@pytest.mark.parametrize("command", [launch_script, launch_script_by_number, torchrun_script])
def test_steps_over_two_hosts(command, hosts, tmp_path):
    for code, err in results(start(hosts, tmp_path, command, 50)):
        assert code == 0, err


def test_training_over_two_hosts(hosts, tmp_path):
    for code, err in results(start(hosts, tmp_path, launch_pretrain, 8)):
        assert code == 0, err
    assert checkpoint.newest(tmp_path / "run" / "checkpoints").step == 8


def running(command, folder):
    """Whether steps are being done."""
    if command is launch_pretrain:
        metrics = folder / "run" / "metrics.jsonl"
        return metrics.exists() and metrics.read_text().count("\n") > 3
    return all((folder / f"{rank}.pid").exists() for rank in range(sum(RANKS)))


@pytest.mark.parametrize("command", [launch_script, launch_script_by_number, launch_pretrain])
def test_the_cable_is_pulled(command, hosts, tmp_path):
    processes = start(hosts, tmp_path, command, 1_000_000)
    deadline = time.monotonic() + 240
    while not running(command, tmp_path):
        assert time.monotonic() < deadline and all(p.poll() is None for p in processes)
        time.sleep(0.05)
    hosts.cut()
    cut = time.monotonic()
    (near, near_said), (far, far_said) = results(processes)
    # The ranks end within the timeout and 2 s; the launchers try to tell each other for 4 more.
    assert time.monotonic() - cut < TIMEOUT + 2 + 4 + 2
    assert near == far == 1
    assert near_said.count("\n") == far_said.count("\n") == 1, (near_said, far_said)
    assert re.match("fastllm-train: the run failed: rank 2 did not come", near_said), near_said
    assert re.search(f"did not end within 6 s, and the store at {two_hosts.FIRST}:\\d+ has not "
                     "answered", far_said), far_said
