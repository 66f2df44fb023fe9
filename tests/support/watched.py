"""A rank of tests/dist/test_watchdog.py and test_two_hosts.py: steps of two all-gathers each, the
environment of torchrun. `watched.py FOLDER TIMEOUT STEPS [WHAT RANK STEP]`, with WHAT what that
rank does there before the second one: loop, fail, or sleep, which the others wait for patiently."""

import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from fastllm.config import RunError
from fastllm.dist import last_words
from fastllm.dist.mesh import World, all_gather
from fastllm.dist.watchdog import Watchdog

folder, timeout, steps = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
what, who, when = (sys.argv[4], *map(int, sys.argv[5:7])) if len(sys.argv) > 4 else ("", -1, -1)
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
torch.set_num_threads(1)
dist.init_process_group("gloo", timeout=timedelta(seconds=600))
world = World(rank, size, 0, dist.group.WORLD, dist.group.WORLD)
part, full = torch.full((1000,), float(rank)), torch.empty(1000 * size)
try:
    with Watchdog(world, distributed_c10d._get_default_store(), timeout) as watch:
        for step in range(1, steps + 1):
            watch.step = step
            for name in ("first", "second"):
                if name == "second" and (rank, step) == (who, when):
                    while what == "loop":
                        pass
                    if what == "fail":
                        raise ValueError("out of luck")
                    (folder / "asleep").touch()
                    time.sleep(timeout + 3)
                patient = what == "sleep" and step == when
                with watch.waiting(f"all-gather of the {name} part", patient=patient):
                    all_gather(full, part, world.host)
            if step == 3:
                (folder / f"{rank}.pid").write_text(str(os.getpid()))
            time.sleep(0.01)
except RunError as error:
    last_words.say(f"the run failed: {error}")
    os._exit(1)
except ValueError as error:
    last_words.say(f"the run failed: {error}")
    os._exit(1)
dist.destroy_process_group()
print(f"rank {rank} did {steps} steps", flush=True)
