"""What the JSON of a GPU benchmark says of its machine, and where and how it is written.

One file a benchmark, bench/results/<GPU>/<NAME>.json: the machine, what the benchmark adds, and its
rows, one a line. A copy of the tree without .git says its commit by COMMIT in the environment.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch

from fastllm.monitor import environment

Item = TypeVar("Item")
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
PACKAGES = ("liger-kernel", "flash-attn", "flash-attn-3", "transformers")
SMI = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem",
       "power.limit", "temperature.gpu")


def commit() -> dict[str, Any] | None:
    """`named` of this checkout."""
    return named(environment(torch.device("cpu"))["commit"])


def named(found: dict[str, Any] | None) -> dict[str, Any] | None:
    """The commit measured and whether the tree was changed since (None: not known), from what git
    found, if anything.

    Raises ValueError where COMMIT is no commit's name.
    """
    told = os.environ.get("COMMIT", "")
    if told and not re.fullmatch(r"[0-9a-f]{40}", told):
        raise ValueError(f"COMMIT is {told!r}, not the 40 digits that `git rev-parse HEAD` prints")
    return found or ({"hash": told, "modified": None} if told else None)


def machine() -> dict[str, Any]:
    """GPU, driver, clocks as found, versions, commit."""
    facts = environment(torch.device("cuda", torch.cuda.current_device()))
    facts["commit"] = named(facts["commit"])
    facts["packages"] |= {name: _version(name) for name in PACKAGES}
    return facts | {"gpu": torch.cuda.get_device_name(), "nvidia_smi": _smi()}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _smi() -> dict[str, str] | str:
    """What nvidia-smi says of the GPU now, or why nothing."""
    if shutil.which("nvidia-smi") is None:
        return "nvidia-smi is not on the PATH"
    done = subprocess.run(
        ["nvidia-smi", f"--query-gpu={','.join(SMI)}", "--format=csv,noheader"],
        capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return (done.stderr or done.stdout).strip() or f"nvidia-smi ended with {done.returncode}"
    return dict(zip(SMI, map(str.strip, lines[0].split(",")), strict=True))


def slug(gpu: str) -> str:
    """A GPU's folder: "h100" of "NVIDIA H100 80GB HBM3", "geforce-rtx-4090" of that."""
    if chip := re.search(r"\b([ABHLV]\d{2,3}[A-Z]?)\b", gpu):
        return chip[1].lower()
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower().replace("nvidia", "")).strip("-")


def place(name: str) -> Path:
    """Where the results of a benchmark on this GPU belong."""
    return RESULTS / slug(torch.cuda.get_device_name()) / f"{name}.json"


def write(path: Path, record: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """All of it in place of what was there, whole or not at all."""
    head = "".join(f"{json.dumps(key)}: {json.dumps(value, indent=1)},\n"
                   for key, value in record.items())
    lines = ",\n".join(map(json.dumps, rows))
    path.parent.mkdir(parents=True, exist_ok=True)
    made = path.with_suffix(".part")
    made.write_text(f"{{\n{head}\"results\": [\n{lines}\n]\n}}\n", encoding="utf-8")
    made.replace(path)


def in_processes(script: str, number: int) -> int:
    """Begin this command anew in so many processes, each told its share (`shared`); the worst exit
    code."""
    running = [subprocess.Popen([sys.executable, script, *sys.argv[1:], f"--share={mine}/{number}"])
               for mine in range(number)]
    return max(process.wait() for process in running)


def shared(items: Sequence[Item], share: str) -> list[Item]:
    """The items of a process that was told "MINE/NUMBER"."""
    mine, number = map(int, share.split("/"))
    return list(items[mine::number])
