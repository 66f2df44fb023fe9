"""What the machine is, what it can do at most, and what it uses while it trains.

`Monitor` reads memory everywhere and utilisation, power, energy and clocks on NVIDIA GPUs (NVML);
`peak_flops` is the denominator of MFU; `pick_dtype` is what `dtype: auto` means; `environment` is
the run's environment.json. Nothing here changes a setting of torch or of the machine.
"""

import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from fastllm import __version__, ops

# NVML refreshes its readings about ten times a second; asking more often only costs time.
REFRESH_SECONDS = 0.1
_ROOT = Path(__file__).parents[1]

# Dense TFLOP/s by NVIDIA's data sheets and white papers: (name, fp16, bf16, tf32, fp32).
# Sheets that print the sparse rate are halved; GeForce rates are those with fp32 accumulation;
# fp32 is without tensor cores. None: no tensor-core path for it, so it is measured instead.
#   B200, GB200: Blackwell architecture brief, HGX/NVL72 rate over the number of GPUs.
#   H100, H200, H20, GH200: Hopper data sheets (1979 sparse bf16 on SXM, 1513 PCIe, 1671 NVL).
#   A100 .. A10, RTX A6000: Ampere data sheets, GA102 white paper.   V100, T4: their data sheets.
#   L4, L40, L40S, RTX 6000 Ada, RTX 40: Ada data sheets and white paper.   RTX 50: Blackwell RTX
#   white paper.
_DATA_SHEET: list[tuple[str, float | None, float | None, float | None, float]] = [
    (r"GB200", 2500, 2500, 1250, 80),
    (r"B200", 2250, 2250, 1125, 75),
    (r"GH200", 989.5, 989.5, 494.5, 67),
    (r"H200 NVL", 835.5, 835.5, 417.5, 60),
    (r"H200", 989.5, 989.5, 494.5, 67),
    (r"H100 NVL", 835.5, 835.5, 417.5, 60),
    (r"H100 PCIe", 756.5, 756.5, 378, 51),
    (r"H100", 989.5, 989.5, 494.5, 67),
    (r"H20", 148, 148, 74, 44),
    (r"A100|A800", 312, 312, 156, 19.5),
    (r"A40", 149.7, 149.7, 74.8, 37.4),
    (r"A30", 165, 165, 82, 10.3),
    (r"A10", 125, 125, 62.5, 31.2),
    (r"RTX A6000", 154.8, 154.8, 77.4, 38.7),
    (r"L40S", 362, 362, 183, 91.6),
    (r"L40", 181, 181, 90.5, 90.5),
    (r"L4", 121, 121, 60, 30.3),
    (r"RTX 6000 Ada", 364.2, 364.2, 182.1, 91.1),
    (r"RTX 5090(?! D)", 209.5, 209.5, 104.8, 104.8),
    (r"RTX 5080", 112.6, 112.6, 56.3, 56.3),
    (r"RTX 4090(?! D)", 165.2, 165.2, 82.6, 82.6),
    (r"RTX 4080(?! SUPER)", 97.5, 97.5, 48.7, 48.7),
    (r"RTX 3090 Ti", 80, 80, 40, 40),
    (r"RTX 3090", 71, 71, 35.6, 35.6),
    (r"T4", 65, None, None, 8.1),
    (r"V100S", 130, None, None, 16.4),
    (r"V100-PCIE", 112, None, None, 14),
    (r"V100-SXM2", 125, None, None, 15.7),
]
# The same chip under another power limit, or a slice of it, is not what the data sheet measured.
_OTHER_CHIP = re.compile(r"Laptop|Max-Q|MIG", re.IGNORECASE)

# Instruction sets that decide which matmul and which of our kernels run.
_ISA = ("avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni",
        "avx512_bf16", "avx512_fp16", "avx_vnni", "amx_tile", "amx_int8", "amx_bf16", "amx_fp16",
        "asimd", "asimdhp", "asimddp", "sve", "sve2", "sme", "i8mm", "bf16")


def _to_stderr(text: str) -> None:
    print(f"fastllm: {text}", file=sys.stderr)


class Monitor:
    """Memory of this process, and what NVML knows of the GPU it runs on.

    note: receives one line, at most once, if NVML cannot be used. Readings are then absent, never
    zero. Under MIG the numbers are those of the whole card.
    """

    def __init__(self, device: torch.device, note: Callable[[str], None] = _to_stderr) -> None:
        self.device = device
        self._note = note
        self._nvml: Any = None
        self._handle: Any = None
        self._unsupported: set[str] = set()
        self._sample: dict[str, float] = {}
        self._sampled_at: float | None = None
        self._last_power: tuple[float, float] | None = None  # (seconds, watts)
        self._integrated = 0.0
        self._peak_resident = 0
        if device.type == "cuda":
            self._open()
        self._counter_start = self._read("nvmlDeviceGetTotalEnergyConsumption")
        self.sample()

    def memory_bytes(self) -> int:
        """Peak so far: allocated by torch on a GPU, resident in this process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        # The kernel's own peak can fall by a few pages: it adds up counters kept by each core.
        self._peak_resident = max(self._peak_resident, _peak_resident_bytes())
        return self._peak_resident

    def sample(self) -> dict[str, float]:
        """Readings now, under names with units; {} on a CPU or without NVML.

        gpu_memory_bytes (whole card), gpu_utilization_percent, power_watts, energy_joules (since
        this monitor was made), sm_clock_mhz, memory_clock_mhz, temperature_celsius; what this GPU
        does not report is left out. A reading younger than REFRESH_SECONDS is given again.
        """
        if self._handle is None:
            return {}
        now = time.monotonic()
        if self._sampled_at is None or now - self._sampled_at >= REFRESH_SECONDS:
            self._sampled_at = now
            self._sample = self._readings(now)
        return dict(self._sample)

    def energy_joules(self) -> float | None:
        """Joules since this monitor was made: the GPU's own counter, else power over time.

        The integral is a trapezoid between calls of `sample`, so call that every step. None where
        the GPU reports neither, and on a CPU.
        """
        counter = self._read("nvmlDeviceGetTotalEnergyConsumption")
        if counter is not None and self._counter_start is not None:
            return (counter - self._counter_start) / 1e3
        self.sample()
        return self._integrated if self._last_power else None

    def _open(self) -> None:
        try:
            import pynvml
        except ImportError:
            self._note("GPU utilisation, power and energy are not recorded: pynvml is missing "
                       "(pip install nvidia-ml-py)")
            return
        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
            # By PCI address: indices of NVML and of CUDA differ under CUDA_VISIBLE_DEVICES.
            card = torch.cuda.get_device_properties(self.device)
            address = f"{card.pci_domain_id:08x}:{card.pci_bus_id:02x}:{card.pci_device_id:02x}.0"
            self._handle = pynvml.nvmlDeviceGetHandleByPciBusId(address)
        except pynvml.NVMLError as error:
            self._note(f"GPU utilisation, power and energy are not recorded: NVML: {error}")

    def _read(self, function: str, *arguments: Any) -> Any:
        """One NVML reading, or None; what failed once is not asked again."""
        key = f"{function}{arguments}"
        if self._handle is None or key in self._unsupported:
            return None
        try:
            return getattr(self._nvml, function)(self._handle, *arguments)
        except self._nvml.NVMLError:
            self._unsupported.add(key)
            return None

    def _readings(self, now: float) -> dict[str, float]:
        nvml = self._nvml
        memory = self._read("nvmlDeviceGetMemoryInfo")
        utilization = self._read("nvmlDeviceGetUtilizationRates")
        milliwatts = self._read("nvmlDeviceGetPowerUsage")
        if milliwatts is not None:
            self._integrate(now, milliwatts / 1e3)
        readings = {
            "gpu_memory_bytes": None if memory is None else memory.used,
            "gpu_utilization_percent": None if utilization is None else utilization.gpu,
            "power_watts": None if milliwatts is None else milliwatts / 1e3,
            "energy_joules": self.energy_joules(),
            "sm_clock_mhz": self._read("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM),
            "memory_clock_mhz": self._read("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_MEM),
            "temperature_celsius": self._read("nvmlDeviceGetTemperature",
                                              nvml.NVML_TEMPERATURE_GPU),
        }
        return {name: value for name, value in readings.items() if value is not None}

    def _integrate(self, now: float, watts: float) -> None:
        if self._last_power:
            then, before = self._last_power
            self._integrated += (now - then) * (watts + before) / 2
        self._last_power = (now, watts)


def pick_dtype(device: torch.device) -> tuple[torch.dtype, str]:
    """What `dtype: auto` means on this device, and why in words.

    CUDA: bf16 where the GPU computes in it, else fp16. CPU: bf16 only where the CPU multiplies
    matrices in it (elsewhere it is slower than fp32). Any other device: fp32.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, f"{name} computes in bf16"
        return torch.float16, f"{name} has no bf16 units, so fp16 with loss scaling"
    if device.type != "cpu":
        return torch.float32, f"{device.type} devices train in fp32"
    found = [flag for flag in ("amx_bf16", "avx512_bf16", "bf16") if flag in cpu_flags()]
    if not found:
        return torch.float32, "this CPU has no bf16 matrix instructions (avx512_bf16, amx_bf16)"
    if not torch.backends.mkldnn.is_available():
        return torch.float32, f"the CPU has {found[0]}, but this torch was built without oneDNN"
    return torch.bfloat16, f"the CPU has {found[0]}"


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """(FLOP/s at most in a dense matmul, where the number comes from): the denominator of MFU.

    NVIDIA GPUs that are known by name: the data sheet (fp32 counts as TF32 where the user has
    allowed it). Everything else, CPUs always: the best matmul measured in about 0.3 s. On a CPU
    that is busy with other work, where threads wait for one another, one thread's rate times their
    number if that is more, and the source says so. Torch's random state is left as it was.
    """
    if device.type == "cuda":
        listed = _listed_flops(torch.cuda.get_device_name(device), dtype)
        if listed is not None:
            return listed
    rate, size = _measured_flops(device, dtype)
    doubt = ""
    if device.type == "cpu" and _busy():
        alone, alone_size = _one_thread_flops(device, dtype)
        if alone > rate:
            rate, size, doubt = alone, alone_size, ", from one thread because it was busy"
    where = "this CPU" if device.type == "cpu" else torch.cuda.get_device_name(device) \
        if device.type == "cuda" else f"this {device.type} device"
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return rate, f"measured matmul on {where} ({dtype_name(dtype)}, {size}\u00b3{threads}{doubt})"


def dtype_name(dtype: torch.dtype) -> str:
    """The short name that config files use: bf16, fp16, fp32, else torch's own."""
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    return names.get(dtype, str(dtype).removeprefix("torch."))


def cpu_flags() -> frozenset[str]:
    """Instruction-set flags as Linux names them; empty where the system does not list them."""
    fields = _cpuinfo()
    return frozenset((fields.get("flags") or fields.get("Features") or "").split())


def environment(device: torch.device) -> dict[str, Any]:
    """What a reader needs to repeat or explain a run: versions, machine, GPUs, commit.

    No environment variables, host or user names.
    """
    return {
        "recorded_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": str(device),
        "fastllm": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in (
            "torch", "triton", "numpy", "safetensors", "tokenizers", "pydantic")},
        "os": f"{platform.system()} {platform.release()}",
        "cpu": _cpu(),
        "memory_bytes": _memory_bytes(),
        "gpus": _gpus(),
        "nvidia_driver": _driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
    }


def _listed_flops(name: str, dtype: torch.dtype) -> tuple[float, str] | None:
    """The data sheet's rate for the GPU of this name, or None if it lists none."""
    if _OTHER_CHIP.search(name):
        return None
    for pattern, fp16, bf16, tf32, fp32 in _DATA_SHEET:
        if not re.search(rf"\b(?:{pattern})(?![A-Za-z0-9])", name):
            continue
        use_tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32" and tf32 is not None
        rates = {torch.float16: fp16, torch.bfloat16: bf16,
                 torch.float32: tf32 if use_tf32 else fp32}
        rate = rates.get(dtype)
        unit = "tf32" if use_tf32 and dtype == torch.float32 else dtype_name(dtype)
        return (rate * 1e12, f"NVIDIA data sheet ({name}, dense {unit})") if rate else None
    return None


@torch.no_grad()
def _measured_flops(device: torch.device, dtype: torch.dtype,
                    seconds: float = 0.3) -> tuple[float, int]:
    """(best FLOP/s, edge of the square matrices) over a few sizes and both linear layers."""
    # Small sizes count too: on a busy machine a long matmul seldom runs undisturbed.
    sizes = (256, 512, 1024) if device.type == "cpu" else (1024, 2048, 4096, 8192)
    share = seconds / (2 * len(sizes))
    # A generator of our own: the training run's random stream must not depend on this.
    generator = torch.Generator(device).manual_seed(0)
    best, best_size = 0.0, 0
    for size in sizes:
        x = torch.randn(size, size, generator=generator, device=device).to(dtype)
        # The CPU may have a faster exact fp32 matmul than F.linear; MFU is against the faster one.
        for linear in (functional.linear, ops.linear):
            took = _third_best_time(partial(linear, x, x), device, share)
            if 2 * size**3 / took > best:
                best, best_size = 2 * size**3 / took, size
        if took > share:
            break
    return best, best_size


def _one_thread_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, int]:
    """What the threads would reach if each were as fast as one alone; their number is restored."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rate, size = _measured_flops(device, dtype)
    finally:
        torch.set_num_threads(threads)
    return threads * rate, size


def _busy() -> bool:
    """Whether other work keeps the cores busy, so that threads of a matmul wait for one another."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > 0.75 * (os.cpu_count() or 1)


def _third_best_time(work: Callable[[], Any], device: torch.device, budget: float) -> float:
    """Seconds of one call. Not the very best: one odd reading must not set the peak of a run."""
    times = [_time(work, device)]
    while len(times) < 4 or sum(times) < budget:
        times.append(_time(work, device))
        if sum(times) > 4 * budget:
            break
    return sorted(times)[min(2, len(times) - 1)]


def _time(work: Callable[[], Any], device: torch.device) -> float:
    def wait() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    wait()
    start = time.perf_counter()
    work()
    wait()
    return max(time.perf_counter() - start, 1e-9)


def _peak_resident_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # VmHWM is this program's own; getrusage keeps the peak from before exec
        line = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)
        if line:
            return int(line[1]) * 1024
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _cpuinfo() -> dict[str, str]:
    """The first processor's fields of /proc/cpuinfo; {} on other systems."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text().split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _cpu() -> dict[str, Any]:
    fields, flags = _cpuinfo(), cpu_flags()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": fields.get("model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "isa": [flag for flag in _ISA if flag in flags],
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "logical_cores": os.cpu_count(),
        "usable_cores": usable,
        "torch_threads": torch.get_num_threads(),
    }


def _memory_bytes() -> int | None:
    """RAM, or less where a container's limit is lower; None where the system does not say."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return total if text == "max" else min(total, int(text))


def _gpus() -> list[dict[str, Any]]:
    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [{"name": card.name, "memory_bytes": card.total_memory,
             "compute_capability": f"{card.major}.{card.minor}"} for card in cards]


def _driver() -> str | None:
    if not torch.cuda.is_available():
        return None
    try:
        import pynvml
    except ImportError:  # Monitor says so; a report of the machine goes on without it
        return None
    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> dict[str, Any] | None:
    """The commit of the checkout that this code runs from; None where it is installed."""
    if not (_ROOT / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(_ROOT), *arguments], check=True, timeout=10,
                              capture_output=True, text=True).stdout.strip()

    try:
        return {"hash": git("rev-parse", "HEAD"), "modified": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):  # git missing, or it distrusts the folder
        return None
