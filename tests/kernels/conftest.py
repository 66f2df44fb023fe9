"""`pytest -m gpu` selects what a GPU is to run of this folder; without one it runs interpreted."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Of the interpreter itself, and of the suite in it.
LEFT_OUT = ("test_bounds.py", "test_planted.py")


@pytest.hookimpl(tryfirst=True)  # before items are selected by their markers
def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent == HERE and item.path.name not in LEFT_OUT:
            item.add_marker(pytest.mark.gpu)
