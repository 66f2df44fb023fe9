"""Ranks for the tests: `ranks(world, "module:function", *args)` returns what each rank returned."""

import pytest
from forge import Forge, Job


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
