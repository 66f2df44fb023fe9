"""Where there is no GPU, the Triton kernels run in Triton's interpreter, on CPU tensors.

`job` and `ranks` start processes that have torch imported already: see tests/support/forge.py.
"""

import os
import tempfile

import pytest
import torch
from forge import Forge, Job

# Before anything imports triton: its own library functions are bound to the mode they are met in.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
else:  # what tests measure is not for the user's runs, nor what those measured for tests
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="fastllm-tests-")


@pytest.fixture(scope="session")
def forge():
    found = Forge()
    yield found
    found.close()


@pytest.fixture
def job(forge, tmp_path):
    """job(world, call, *args): ranks under way; those left at the end of the test are killed."""
    started = []

    def start(world, call, *args, **env):
        started.append(Job(forge, world, call, list(args), tmp_path / "ranks", **env))
        return started[-1]

    yield start
    for one in started:
        one.kill_all()


@pytest.fixture
def ranks(job):
    """ranks(world, call, *args): the values that the ranks return."""
    return lambda world, call, *args, **env: job(world, call, *args, **env).values()
