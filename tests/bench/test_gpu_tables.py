"""The pages' tables of GPUs, from files as `make gpu` writes them."""

import json

import gpu_tables
import pytest
import record
import tables

SHAPES = {"rms_norm": {"rows": 4, "hidden_size": 8}, "adamw": {"tensors": 1, "elements": 9}}
MACHINE = {"gpu": "NVIDIA H100 80GB HBM3", "nvidia_driver": "580.1",
           "packages": {"torch": "2.11.0", "triton": "3.6.0", "liger-kernel": "not installed"},
           "commit": {"hash": "0123456789abcdef", "modified": False}}


def row(contender, direction, milliseconds, kernel="rms_norm", share=0.5, **others):
    return {"kernel": kernel, "options": "", "dtype": "bfloat16", "shape": SHAPES[kernel],
            "contender": contender, "direction": direction, "milliseconds": milliseconds,
            "share_of_ceiling": share, "bound": "bytes", "peak_bytes": 2_000_000,
            "teraflops": 100.0, "host_milliseconds": 0.05, **others}


@pytest.fixture
def results(monkeypatch, tmp_path):
    """Writes kernels.json of an H100; the other results are this checkout's."""
    for name in ("interpreter", "audit"):
        (tmp_path / name).symlink_to(tables.RESULTS / name)
    for module in (tables, gpu_tables):
        monkeypatch.setattr(module, "RESULTS", tmp_path)

    def write(name, rows):
        record.write(tmp_path / "h100" / f"{name}.json", {
            "machine": MACHINE, "ceilings": {"copy": 3.0e12, "bfloat16": 8e14}}, rows)

    return write


def test_without_a_gpu_a_section_says_so_and_the_predictions_stand(results):
    assert gpu_tables.SECTIONS["gpu_kernels"]() == gpu_tables.NOTHING
    assert "| rms_norm 16384x4096 forward |" in gpu_tables.SECTIONS["gpu_predictions"]()
    assert gpu_tables.SECTIONS["gpu_targets"]().count("not measured") == 6


def test_a_gpu_is_named_with_its_rates_and_the_best_of_the_others(results):
    results("kernels", [
        row("ours", "forward", 1.0), row("ours", "backward", 2.0), row("ours", "both", 3.0),
        row("torch eager", "both", 12.0), row("torch.compile", "both", 4.5),
        row("liger", "forward", 1.0), row("liger", "both", 6.0),
        {"kernel": "adamw", "options": "", "dtype": "bfloat16", "shape": SHAPES["adamw"],
         "contender": "liger", "left_out": "it has none"},
        row("ours", "forward", 2.0, "adamw"), row("torch fused", "forward", 1.0, "adamw")])
    text = gpu_tables.SECTIONS["gpu_kernels"]()
    assert "**NVIDIA H100 80GB HBM3**, driver 580.1" in text and "commit 0123456789, it" in text
    assert "copies 3.00 TB/s and multiplies 800 TFLOP/s" in text
    assert ("| rms_norm 4x8 | 3.000 | 50 % | bytes | 12.0 | 4.500 | 6.000 | 1.50x torch.compile | "
            "2 MB | 2 MB |") in text
    assert "| adamw 1x9 | 2.000 | 50 % | bytes | - | - | - | 0.50x torch fused |" in text
    spread = gpu_tables.SECTIONS["gpu_spread"]().splitlines()
    assert [line.split(" |")[0] for line in spread if line.startswith("| a") or "rms" in line] == [
        "| rms_norm 4x8 backward", "| adamw 1x9 forward", "| rms_norm 4x8 forward"]


def test_the_targets_count_who_reaches_them(results):
    results("kernels", [row("ours", "forward", 1.0, share=0.95), row("liger", "forward", 1.1),
                        row("ours", "forward", 1.0, "adamw", share=0.7),
                        row("torch fused", "forward", 0.5, "adamw")])
    text = gpu_tables.SECTIONS["gpu_targets"]()
    assert "| 1 of 2; least: adamw 1x9 forward, 70 % | no |" in text
    assert "| 1 of 2; least: adamw 1x9, 0.50x | no |" in text
    assert text.count("not measured") == 4


@pytest.mark.parametrize(("took", "met"), [(1.8, "yes"), (2.0, "no")])
def test_the_target_of_cross_entropy(results, took, met):
    results("kernels", [row("ours", "both", took) | {
        "kernel": "cross_entropy", "options": "in place",
        "shape": {"tokens": 8192, "vocab_size": 131072}},
        row("ours", "forward", took) | {
        "kernel": "cross_entropy", "options": "in place",
        "shape": {"tokens": 8192, "vocab_size": 131072}}])
    assert f"| <= 1.9 ms | {took:.3f} ms | {met} |" in gpu_tables.SECTIONS["gpu_targets"]()


def test_attention_in_teraflops_by_contender(results):
    shape = dict(zip(("batch", "queries", "keys", "kv", "each", "width"),
                     (2, 8192, 8192, 16, 1, 128), strict=True))
    both = {"kernel": "attention", "options": "causal", "shape": shape, "bound": "flops"}
    results("kernels", [row("ours", "forward", 1.0)])
    results("attention", [row("ours", "forward", 1.0, teraflops=530.0) | both,
                          row("ours", "backward", 1.0, teraflops=390.0) | both,
                          row("sdpa cudnn", "forward", 1.0, teraflops=560.0) | both])
    text = gpu_tables.SECTIONS["gpu_attention"]()
    assert "| causal 2x8192x8192x16x1x128 forward | 530 | 560 |" in text
    assert "| causal 2x8192x8192x16x1x128 backward | 390 | - |" in text
    targets = gpu_tables.SECTIONS["gpu_targets"]()
    assert "530 TFLOP/s | yes |" in targets and "390 TFLOP/s | no |" in targets


def test_what_was_predicted_stands_beside_what_was_measured(results):
    shape = {"rows": 16384, "hidden_size": 4096}
    results("kernels", [row("ours", "forward", 0.18) | {"shape": shape}])
    line = next(line for line in gpu_tables.SECTIONS["gpu_predictions"]().splitlines()
                if line.startswith("| rms_norm 16384x4096 forward"))
    floor, _, predicted, measured, ratio = line.split(" | ")[1:]
    assert float(floor) == pytest.approx(2 * 16384 * 4096 * 2 / 3e12 * 1e3, rel=0.01)
    assert measured == "0.180"
    assert float(ratio.strip(" |")) == pytest.approx(0.18 / float(predicted), rel=0.01)


def test_results_of_a_cpu_are_no_gpus(results):
    folder = tables.RESULTS / "cpu-2core"
    folder.mkdir()
    (folder / "kernels.json").write_text(json.dumps({"machine": {"device": "cpu"}}))
    assert gpu_tables.gpus("kernels") == []


def test_counters_beside_the_meter_the_furthest_apart_first(results):
    def counted(kernel, over, metered):
        return row("ours", "forward", 1.0, kernel) | {
            "over_floor": over, "metered_over_floor": metered,
            "measured_over_metered": over and metered and over / metered}

    results("counters", [counted("rms_norm", 1.02, 1.0), counted("adamw", 2.0, 1.0),
                         counted("rms_norm", None, 1.0), counted("adamw", 1.1, None)])
    lines = gpu_tables.SECTIONS["gpu_counters"]().splitlines()
    assert lines[-3:] == ["| adamw 1x9 forward | 2.00 | 1.00 | 2.00 |",
                          "| rms_norm 4x8 forward | 1.02 | 1.00 | 1.02 |",
                          "| adamw 1x9 forward | 1.10 | - | - |"]
