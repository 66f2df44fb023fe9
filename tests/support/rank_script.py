"""What a rank of tests/dist/test_launch.py does, by its arguments: `rank_script.py WHAT FOLDER`."""

import os
import signal
import sys
import time
from pathlib import Path

what, folder = sys.argv[1], Path(sys.argv[2])
rank = int(os.environ["RANK"])
print(f"out of {rank}", flush=True)
print(f"err of {rank}", file=sys.stderr, flush=True)


def last(line: str, code: int) -> None:
    with open(os.environ["FASTLLM_LAST_WORDS"], "a") as file:
        file.write(f"fastllm-train: {line}\n")
    sys.exit(code)


if what == "environment":
    (folder / f"{rank}").write_text("\n".join(f"{k}={v}" for k, v in os.environ.items()))
elif what == "words":  # all fail, for one reason
    time.sleep(0.3 * (1 - rank))
    last(f"error: too bad ({rank})", 2)
elif what == "crash" and rank == 1:
    raise ValueError("not foreseen")
elif what == "stop":
    received = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda n, _: received.append(n))
    (folder / f"{rank}.pid").write_text(str(os.getpid()))
    while not received:
        time.sleep(0.02)
    time.sleep(1.5)  # saving
    (folder / f"{rank}").write_text(" ".join(signal.Signals(n).name for n in received))
else:  # until killed
    (folder / f"{rank}.tmp").write_text(str(os.getpid()))
    (folder / f"{rank}.tmp").rename(folder / f"{rank}.pid")
    time.sleep(600)
