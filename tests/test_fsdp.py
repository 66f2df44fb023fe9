"""Our ops and modules under torch's FSDP2 give the losses of one process."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from torch import distributed

SCRIPT = Path(__file__).parent / "support" / "sharded.py"


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def losses(world: int, backend: str) -> list[float]:
    port = free_port()
    ranks = [subprocess.Popen([sys.executable, str(SCRIPT), str(rank), str(world), port, backend],
                              cwd=SCRIPT.parents[2], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True) for rank in range(world)]
    ends = [rank.communicate(timeout=300) for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), "".join(error for _, error in ends)[-3000:]
    return [float(line) for line in ends[0][0].split()]


@pytest.mark.skipif(not distributed.is_available(), reason="this torch has no distributed package")
@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_two_ranks_give_the_losses_of_one(backend):
    one, two = losses(1, backend), losses(2, backend)
    assert one[0] > one[-1]
    assert two == pytest.approx(one, rel=1e-5)
