"""Generators of ranks, and signals that stop a run."""

import os
import signal
import subprocess
import sys

import torch

from fastllm import process
from fastllm.dist.mesh import World

SCRIPT = """
import os, signal, sys, time
from fastllm import process
process.ECHO = float(sys.argv[1])
with process.stop_signals() as stopped:
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    print(stopped())
"""


def drawn(rank, size, step=0):
    process.seed_generators(7, World(rank, size), step)
    return torch.rand(4).tolist()


def test_every_rank_draws_its_own_numbers():
    torch.manual_seed(7)
    alone = torch.rand(4).tolist()
    assert drawn(0, 1) == drawn(0, 2) == alone
    others = [drawn(1, 2), drawn(1, 4), drawn(2, 4), drawn(0, 2, 9), drawn(1, 2, 9)]
    assert len({tuple(one) for one in [alone, *others]}) == 6


def test_the_state_is_put_back():
    cpu = torch.device("cpu")
    for rank in (0, 3):
        state = process.rng_state(cpu, rank)
        assert list(state) == ["cpu" if rank == 0 else "cpu.3"]
        expected = torch.rand(3)
        process.set_rng_state(state, cpu)
        assert torch.equal(torch.rand(3), expected)


def test_a_second_signal_ends_the_process_unless_it_is_an_echo():
    for echo, code in (("60", 0), ("0", -signal.SIGTERM)):
        done = subprocess.run([sys.executable, "-c", SCRIPT, echo], capture_output=True, text=True,
                              check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == code, done.stderr
        assert done.stdout.strip() == ("SIGTERM" if code == 0 else "")
