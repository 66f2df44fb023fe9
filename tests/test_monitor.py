"""The machine as it is seen: memory, NVML readings, peak rates, dtypes, environment.json."""

import json
import platform
import sys
import types

import pytest
import torch

from fastllm import monitor
from fastllm.monitor import Monitor, cpu_flags, dtype_name, environment, peak_flops, pick_dtype

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


class FakeNvml(types.ModuleType):
    """NVML with one card, whose readings a test sets; a reading that is an Exception is raised."""

    class NVMLError(Exception):
        pass

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self):
        super().__init__("pynvml")
        self.calls = []
        self.values = {
            "nvmlInit": None,
            "nvmlDeviceGetHandleByPciBusId": "card",
            "nvmlDeviceGetMemoryInfo": types.SimpleNamespace(used=7 * 2**30),
            "nvmlDeviceGetUtilizationRates": types.SimpleNamespace(gpu=93),
            "nvmlDeviceGetPowerUsage": 350_000,
            "nvmlDeviceGetTotalEnergyConsumption": 1_000_000,
            "nvmlDeviceGetClockInfo": 1755,
            "nvmlDeviceGetTemperature": 61,
        }

    def __getattr__(self, name):
        if not name.startswith("nvml"):
            raise AttributeError(name)

        def call(*arguments):
            self.calls.append((name, arguments))
            value = self.values[name]
            if isinstance(value, Exception):
                raise value
            return value
        return call


@pytest.fixture
def nvml(monkeypatch):
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    card = types.SimpleNamespace(pci_domain_id=0, pci_bus_id=0x1B, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    return fake


@pytest.fixture
def clock(monkeypatch):
    now = types.SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(monitor.time, "monotonic", lambda: now.seconds)
    return now


def test_on_a_cpu_there_are_no_gpu_readings_and_memory_is_the_peak_of_the_process():
    watched = Monitor(CPU, note=pytest.fail)
    assert watched.sample() == {}
    assert watched.energy_joules() is None
    before = watched.memory_bytes()
    assert before > 50 * 2**20  # torch alone is more than this
    size = before + 64 * 2**20
    block = bytearray(size)
    block[::4096] = b"x" * len(block[::4096])
    peak = watched.memory_bytes()
    del block
    assert peak >= size
    assert watched.memory_bytes() >= peak


def test_readings_carry_units_and_the_card_is_found_by_its_pci_address(nvml, clock):
    watched = Monitor(CUDA, note=pytest.fail)
    assert ("nvmlDeviceGetHandleByPciBusId", ("00000000:1b:00.0",)) in nvml.calls
    clock.seconds += 2
    nvml.values["nvmlDeviceGetTotalEnergyConsumption"] = 1_700_000  # mJ
    assert watched.sample() == {
        "gpu_memory_bytes": 7 * 2**30, "gpu_utilization_percent": 93, "power_watts": 350.0,
        "energy_joules": 700.0, "sm_clock_mhz": 1755, "memory_clock_mhz": 1755,
        "temperature_celsius": 61}
    assert watched.energy_joules() == 700.0


def test_nvml_is_asked_again_only_after_its_own_refresh(nvml, clock):
    watched = Monitor(CUDA)
    clock.seconds += 1
    first = watched.sample()
    asked = len(nvml.calls)
    nvml.values["nvmlDeviceGetPowerUsage"] = 100_000
    clock.seconds += monitor.REFRESH_SECONDS / 2
    assert watched.sample() == first
    assert len(nvml.calls) == asked
    clock.seconds += monitor.REFRESH_SECONDS
    assert watched.sample()["power_watts"] == 100.0


def test_without_an_energy_counter_power_is_integrated(nvml, clock):
    nvml.values["nvmlDeviceGetTotalEnergyConsumption"] = nvml.NVMLError("Not Supported")
    watched = Monitor(CUDA, note=pytest.fail)  # at 350 W
    clock.seconds += 10
    watched.sample()
    nvml.values["nvmlDeviceGetPowerUsage"] = 150_000
    clock.seconds += 4
    assert watched.energy_joules() == pytest.approx(350 * 10 + (350 + 150) / 2 * 4)
    assert watched.sample()["energy_joules"] == watched.energy_joules()


def test_what_the_gpu_does_not_report_is_absent_and_asked_once(nvml, clock):
    for name in ("nvmlDeviceGetPowerUsage", "nvmlDeviceGetTotalEnergyConsumption",
                 "nvmlDeviceGetUtilizationRates"):
        nvml.values[name] = nvml.NVMLError("Not Supported")
    watched = Monitor(CUDA, note=pytest.fail)
    clock.seconds += 5
    assert set(watched.sample()) == {"gpu_memory_bytes", "sm_clock_mhz", "memory_clock_mhz",
                                     "temperature_celsius"}
    assert watched.energy_joules() is None
    assert sum(name == "nvmlDeviceGetUtilizationRates" for name, _ in nvml.calls) == 1


@pytest.mark.parametrize("broken", ["nvmlInit", "nvmlDeviceGetHandleByPciBusId"])
def test_an_nvml_that_cannot_be_used_is_said_once(nvml, broken):
    nvml.values[broken] = nvml.NVMLError("Driver Not Loaded")
    notes = []
    watched = Monitor(CUDA, note=notes.append)
    assert watched.sample() == {}
    assert watched.energy_joules() is None
    assert len(notes) == 1
    assert "Driver Not Loaded" in notes[0]


def test_a_missing_pynvml_is_said_once_on_stderr_with_the_line_that_mends_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    watched = Monitor(CUDA)
    assert watched.sample() == {}
    assert watched.sample() == {}
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "pip install nvidia-ml-py" in error


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(("name", "dtype", "tflops"), [
    ("NVIDIA H100 80GB HBM3", BF16, 989.5),
    ("NVIDIA H100 PCIe", BF16, 756.5),
    ("NVIDIA H100 NVL", BF16, 835.5),
    ("NVIDIA H200", BF16, 989.5),
    ("NVIDIA H20", BF16, 148),
    ("NVIDIA GH200 480GB", FP16, 989.5),
    ("NVIDIA B200", BF16, 2250),
    ("NVIDIA GB200", BF16, 2500),
    ("NVIDIA A100-SXM4-80GB", BF16, 312),
    ("NVIDIA A100 80GB PCIe", FP32, 19.5),
    ("NVIDIA A10", BF16, 125),
    ("NVIDIA L4", BF16, 121),
    ("NVIDIA L40S", BF16, 362),
    ("NVIDIA L40", BF16, 181),
    ("NVIDIA GeForce RTX 3090", BF16, 71),
    ("NVIDIA GeForce RTX 3090 Ti", BF16, 80),
    ("NVIDIA GeForce RTX 4090", BF16, 165.2),
    ("NVIDIA GeForce RTX 5090", BF16, 209.5),
    ("Tesla T4", FP16, 65),
    ("Tesla V100-SXM2-16GB", FP16, 125),
    ("Tesla V100-PCIE-32GB", FP16, 112),
])
def test_known_gpus_have_their_data_sheets_dense_rate(monkeypatch, name, dtype, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    flops, source = peak_flops(CUDA, dtype)
    assert flops == tflops * 1e12
    assert "NVIDIA data sheet" in source
    assert name in source


@pytest.mark.parametrize(("name", "dtype"), [
    ("NVIDIA A10G", BF16), ("NVIDIA GeForce RTX 4090 Laptop GPU", BF16),
    ("NVIDIA GeForce RTX 4090 D", BF16), ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", BF16),
    ("Tesla T4", BF16), ("NVIDIA H100 80GB HBM3", torch.float64), ("AMD Instinct MI300X", BF16)])
def test_other_chips_are_measured_not_taken_for_their_namesakes(monkeypatch, name, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(monitor, "_measured_flops", lambda *arguments: (3e13, 4096))
    flops, source = peak_flops(CUDA, dtype)
    assert flops == 3e13
    assert source.startswith(f"measured matmul on {name}")


def test_fp32_counts_as_tf32_only_where_the_user_allowed_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert peak_flops(CUDA, FP32)[0] == 67e12
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        flops, source = peak_flops(CUDA, FP32)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert flops == 494.5e12
    assert "tf32" in source


def test_every_row_of_the_table_has_its_rates_in_the_order_the_hardware_has():
    for name, fp16, bf16, tf32, fp32 in monitor._DATA_SHEET:
        rates = [rate for rate in (fp16, bf16, tf32, fp32) if rate is not None]
        assert rates == sorted(rates, reverse=True), name
        assert fp16 is None or fp32 < fp16 < 3000, name


def test_the_cpu_is_measured_within_reach_of_a_matmul_and_leaves_the_random_state():
    state = torch.get_rng_state()
    flops, source = peak_flops(CPU, FP32)
    assert torch.equal(state, torch.get_rng_state())
    assert source.startswith("measured matmul on this CPU (fp32, ")
    assert f"{torch.get_num_threads()} threads" in source
    # No CPU thread does less than 10 MFLOP/s or more than 5 TFLOP/s.
    assert 1e7 < flops < 5e12 * torch.get_num_threads()


@pytest.mark.parametrize(("load", "alone", "flops", "said"), [
    (0.1, 9e11, 1e11, False), (500.0, 2e10, 1e11, False), (500.0, 9e11, 1.8e12, True)])
def test_on_a_busy_cpu_a_faster_single_thread_sets_the_peak(monkeypatch, load, alone, flops, said):
    """Two threads that wait for each other reach 1e11; one alone reaches `alone`."""
    threads = [2]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(monitor.os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(monitor, "_measured_flops",
                        lambda *_: (alone if threads[-1] == 1 else 1e11, 512))
    measured, source = peak_flops(CPU, FP32)
    assert measured == flops
    assert ("busy" in source) == said
    assert threads[-1] == 2


def test_measuring_takes_the_faster_of_the_two_linear_layers(monkeypatch):
    def slow(x, weight):
        for _ in range(20):
            torch.mm(x, weight)
        return torch.mm(x, weight)

    quick, _ = monitor._measured_flops(CPU, FP32, seconds=0.05)
    monkeypatch.setattr(monitor.ops, "linear", slow)
    with_slow, _ = monitor._measured_flops(CPU, FP32, seconds=0.05)
    monkeypatch.setattr(monitor.functional, "linear", slow)
    only_slow, _ = monitor._measured_flops(CPU, FP32, seconds=0.05)
    assert only_slow < min(quick, with_slow) / 2


@pytest.mark.parametrize(("flags", "onednn", "dtype", "word"), [
    ({"avx2", "avx512_bf16"}, True, BF16, "avx512_bf16"),
    ({"amx_tile", "amx_bf16", "avx512_bf16"}, True, BF16, "amx_bf16"),
    ({"asimd", "bf16"}, True, BF16, "bf16"),
    ({"avx2", "avx512f"}, True, FP32, "no bf16 matrix instructions"),
    (set(), True, FP32, "no bf16 matrix instructions"),
    ({"avx512_bf16"}, False, FP32, "without oneDNN"),
])
def test_auto_is_bf16_on_a_cpu_only_where_it_multiplies_in_it(
        monkeypatch, flags, onednn, dtype, word):
    monkeypatch.setattr(monitor, "cpu_flags", lambda: frozenset(flags))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
    picked, reason = pick_dtype(CPU)
    assert picked == dtype
    assert word in reason


@pytest.mark.parametrize(("native", "dtype"), [(True, BF16), (False, FP16)])
def test_auto_on_a_gpu_goes_by_its_bf16_units_not_by_emulation(monkeypatch, native, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: including_emulation or native)
    picked, reason = pick_dtype(CUDA)
    assert picked == dtype
    assert "Tesla T4" in reason


def test_auto_elsewhere_is_fp32():
    assert pick_dtype(torch.device("mps")) == (FP32, "mps devices train in fp32")


def test_cpu_flags_on_linux_are_those_of_torch():
    if platform.system() != "Linux":
        assert cpu_flags() == frozenset()
    elif platform.machine() == "x86_64":
        assert ("avx512f" in cpu_flags()) == ("AVX512" in torch.backends.cpu.get_cpu_capability())


def test_the_environment_names_versions_and_machine_but_no_secret(monkeypatch):
    monkeypatch.setenv("FASTLLM_TEST_TOKEN", "hunter2-secret")
    found = environment(CPU)
    text = json.dumps(found)
    assert found["packages"]["torch"] == torch.__version__
    assert found["python"] == platform.python_version()
    assert found["cpu"]["torch_threads"] == torch.get_num_threads()
    assert found["memory_bytes"] > 2**28
    assert found["packages"]["safetensors"]
    assert "hunter2" not in text
    assert platform.node() == "" or platform.node() not in text


def test_the_commit_is_that_of_the_checkout_and_none_outside_of_one(monkeypatch, tmp_path):
    monkeypatch.setattr(monitor, "_ROOT", tmp_path)
    assert monitor._commit() is None

    def git(*arguments):
        monitor.subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=n", "-c",
                                "user.email=e@x", *arguments], check=True, capture_output=True)

    git("init")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "first")
    clean = monitor._commit()
    assert len(clean["hash"]) == 40
    assert clean["modified"] is False
    (tmp_path / "a").write_text("2")
    assert monitor._commit() == {**clean, "modified": True}


def test_dtype_names_are_those_of_the_config():
    names = [dtype_name(dtype) for dtype in (BF16, FP16, FP32, torch.float64)]
    assert names == ["bf16", "fp16", "fp32", "float64"]
