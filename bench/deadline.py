"""A pytest plugin: as many tests as a time holds, drawn evenly from all of them.

    PYTHONPATH=bench pytest -p deadline --deadline 120 tests/kernels

The order is that of a hash of the names, so that what runs is a sample of everything whatever the
time. A test that would begin later is skipped and says so.
"""

import hashlib
import time

import pytest

BEGAN = time.monotonic()


def pytest_addoption(parser):
    parser.addoption("--deadline", type=float, metavar="SECONDS",
                     help="begin no test after so long")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    if config.getoption("--deadline") is not None:
        items.sort(key=lambda item: hashlib.sha256(item.nodeid.encode()).digest())


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    deadline = item.config.getoption("--deadline")
    if deadline is not None and time.monotonic() - BEGAN > deadline:
        pytest.skip(f"not reached in {deadline:.0f} s")
