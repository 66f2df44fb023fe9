"""What every atomic write of this package needs."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """fsync a file or a folder, so that the rename that follows never names unwritten data."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
