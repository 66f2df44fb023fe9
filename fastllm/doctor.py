"""`fastllm-train info`: this machine, the versions, and which backend each op gets and why."""

import io
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastllm import cpu, ops
from fastllm.callbacks import data_size
from fastllm.monitor import Monitor, dtype_name, environment, peak_flops, pick_dtype

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def info(device: torch.device | None = None) -> dict[str, Any]:
    """Everything that `render_info` shows, JSON-able. device: default the GPU where there is one.

    Takes about a second: the matmul rate of a CPU (and of a GPU that no data sheet is known for)
    is measured, in the dtype that `auto` picks and in fp32.
    """
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    notes: list[str] = []
    dtype, why = pick_dtype(device)
    readings = Monitor(device, note=notes.append).sample()
    free = shutil.disk_usage(Path.cwd())
    return {
        **environment(device),
        "gpu_readings": readings,
        "dtypes": {dtype_name(one): _dtype_support(device, one) for one in _DTYPES},
        "auto_dtype": {"dtype": dtype_name(dtype), "reason": why},
        "matmul": {
            "backend": _matmul_backend(device),
            "peak": {dtype_name(one): dict(zip(("flops", "source"), peak_flops(device, one),
                                               strict=True))
                     for one in dict.fromkeys((dtype, torch.float32))}},
        "cpp_extension": {"built": cpu.available(), "why_not": cpu.why_not()},
        "ops": {op: {"backend": backend, "reason": reason}
                for op, (backend, reason) in ops.dispatch(device).items()},
        "disk": {"path": str(Path.cwd()), "free_bytes": free.free, "total_bytes": free.total},
        "notes": notes,
    }


def render_info(report: Mapping[str, Any], console: Console | None = None) -> str:
    """The report of `info` as text: coloured if standard output is a terminal, plain otherwise.

    console: sets width and colour instead of standard output (its own output is not written to).
    """
    seen = console or Console()
    colour = seen.is_terminal and not seen.is_dumb_terminal and not seen.no_color
    paper = Console(file=io.StringIO(), width=max(seen.width, 60) if colour else 100,
                    force_terminal=colour, color_system="auto" if colour else None,
                    legacy_windows=False)
    for title, rows in (("Machine", _machine(report)), ("Versions", _versions(report)),
                        ("Arithmetic", _arithmetic(report))):
        table = _table(title)
        for name, value in rows:
            table.add_row(name, Text(value))
        paper.print(table, "")
    table = _table(f"Ops on {report['device']}")
    for op, how in report["ops"].items():
        table.add_row(op, how["backend"], Text(how["reason"]))
    paper.print(table)
    for note in report["notes"]:
        paper.print(Text(f"note: {note}"))
    text: str = paper.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.rstrip().splitlines())


def _machine(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    processor = report["cpu"]
    cores = f"{processor['usable_cores']} of {processor['logical_cores']} cores usable, " \
            f"{processor['torch_threads']} torch threads"
    rows = [
        ("system", f"{report['os']} {processor['architecture']}"),
        ("CPU", f"{processor['model']}: {cores}"),
        ("instructions", " ".join(processor["isa"]) or "not listed by this system"),
        ("memory", data_size(report["memory_bytes"])),
    ]
    for index, gpu in enumerate(report["gpus"]):
        rows.append((f"GPU {index}", f"{gpu['name']}, {data_size(gpu['memory_bytes'])}, "
                                     f"compute capability {gpu['compute_capability']}"))
    if not report["gpus"]:
        rows.append(("GPU", _no_gpu()))
    readings = report["gpu_readings"]
    if readings:
        words = [f"{data_size(readings['gpu_memory_bytes'])} in use"] \
            if "gpu_memory_bytes" in readings else []
        for key, unit in (("gpu_utilization_percent", "% busy"), ("power_watts", " W"),
                          ("sm_clock_mhz", " MHz"), ("temperature_celsius", " °C")):
            words += [f"{readings[key]:.0f}{unit}"] if key in readings else []
        rows.append(("GPU now", ", ".join(words)))
    disk = report["disk"]
    rows.append(("disk", f"{data_size(disk['free_bytes'])} free of "
                         f"{data_size(disk['total_bytes'])} at {disk['path']}"))
    return rows


def _versions(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    commit = report["commit"]
    checkout = f" (commit {commit['hash'][:10]}{', modified' if commit['modified'] else ''})" \
        if commit else ""
    rows = [("fastllm", report["fastllm"] + checkout), ("python", report["python"])]
    rows += [(name, version or "not installed") for name, version in report["packages"].items()]
    for key, name in (("nvidia_driver", "NVIDIA driver"), ("cuda", "CUDA"), ("cudnn", "cuDNN")):
        if report[key]:
            rows.append((name, str(report[key])))
    extension = report["cpp_extension"]
    rows.append(("C++ extension", "built" if extension["built"] else extension["why_not"]))
    return rows


def _arithmetic(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    auto = report["auto_dtype"]
    rows = [("dtype: auto", f"{auto['dtype']}: {auto['reason']}")]
    rows += [(name, reason) for name, reason in report["dtypes"].items()]
    rows.append(("torch matmul", report["matmul"]["backend"]))
    rows += [(f"{name} matmul", f"{_rate(peak['flops'])}: {peak['source']}")
             for name, peak in report["matmul"]["peak"].items()]
    return rows


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False,
                  box=None, padding=(0, 0, 0, 2))
    table.add_column(style="cyan", no_wrap=True, min_width=16)
    return table


def _rate(flops: float) -> str:
    return f"{flops / 1e12:.3g} TFLOP/s" if flops >= 1e12 else f"{flops / 1e9:.0f} GFLOP/s"


def _no_gpu() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return "none used: this build of torch is for CPUs"
    return "none: torch sees no GPU here"


def _dtype_support(device: torch.device, dtype: torch.dtype) -> str:
    """How training in this dtype goes here, in words."""
    if dtype == torch.float32:
        return "supported"
    if dtype == torch.float16:
        return "supported, with loss scaling" if device.type == "cuda" else \
            "runs with loss scaling, for tests: slow on most CPUs"
    auto, why = pick_dtype(device)
    return "supported" if auto == dtype else f"runs, but slower than fp32: {why}" \
        if device.type == "cpu" else f"not used: {why}"


def _matmul_backend(device: torch.device) -> str:
    """Which libraries multiply matrices on this device."""
    if device.type == "cuda":
        tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
        return f"cuBLAS; fp32 {'as TF32' if tf32 else 'exact, TF32 off'}"
    if device.type != "cpu":
        return f"torch's own for {device.type}"
    show = torch.__config__.show()
    blas = re.search(r"BLAS_INFO=(\w+)", show)
    onednn = re.search(r"MKL-DNN (v[\d.]+)", show)
    first = f"fp32: {blas[1] if blas else 'unknown BLAS'}"
    if torch.backends.mkldnn.is_available():
        return f"{first}, bf16 and fp16: oneDNN {onednn[1] if onednn else ''}".rstrip()
    return f"{first}; this torch was built without oneDNN"
