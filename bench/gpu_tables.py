"""What the pages show of GPUs: tables made from bench/results/<GPU>/*.json, and predictions.

Every GPU that has a kernels.json has its tables, under its own name. Where there is none a section
says so; the predictions stand without one.
"""

import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

from tables import RESULTS, ROOT, load, table

sys.path[:0] = [str(ROOT)]

Row = dict[str, Any]
NOTHING = "No GPU has run `make gpu` yet.\n"
# Of an H100 SXM, as others have measured them (quack's notes on its hadamard kernel; a product of
# 8192 x 8192 x 8192 by torch 2.11): what predictions assume where no GPU was measured.
COPY, PRODUCT = 3.0e12, 800e12
SDPA = ("sdpa cudnn", "sdpa flash")
RIVALS = ("torch.compile", "liger", "torch fused", *SDPA, "flash-attn 3", "torch varlen",
          "flex attention")


def gpus(name: str) -> list[str]:
    """Folders of the GPUs that have this result file."""
    return sorted(path.parent.name for path in RESULTS.glob(f"*/{name}.json")
                  if "gpu" in load(f"{path.parent.name}/{name}")["machine"])


def by_gpu(name: str, section: Callable[[dict[str, Any]], str]) -> str:
    """A section for each GPU that has the file, headed by what it was measured on."""
    found = [load(f"{folder}/{name}") for folder in gpus(name)]
    return "\n".join(about(one) + "\n" + section(one) for one in found) or NOTHING


def about(result: dict[str, Any]) -> str:
    """The GPU, its own rates, versions and commit, in a line."""
    facts, rates = result["machine"], result.get("ceilings")
    packages = facts["packages"]
    words = [f"**{facts['gpu']}**", f"driver {facts['nvidia_driver']}",
             *(f"{name} {packages[name]}" for name in ("torch", "triton", "liger-kernel")),
             f"commit {facts['commit']['hash'][:10]}"
             + (" with changes" if facts["commit"]["modified"] else "")]
    if rates:
        words.append(f"it copies {rates['copy'] / 1e12:.2f} TB/s and multiplies "
                     f"{rates['bfloat16'] / 1e12:.0f} TFLOP/s in bfloat16")
    return ", ".join(words) + ".\n"


def shape_of(row: Row) -> str:
    return "x".join(map(str, row["shape"].values()))


def name_of(row: Row) -> str:
    return f"{row['kernel']} {row['options']}".strip()


def calls(rows: list[Row]) -> Iterator[tuple[str, dict[str, dict[str, Row]]]]:
    """(op, options and shape, {contender: {direction: row}}) in the order of the file."""
    found: dict[str, dict[str, dict[str, Row]]] = {}
    for row in rows:
        if row["dtype"] == "bfloat16":
            one = found.setdefault(f"{name_of(row)} {shape_of(row)}", {})
            if "direction" in row:
                one.setdefault(row["contender"], {})[row["direction"]] = row
    yield from ((name, one) for name, one in found.items() if "ours" in one)


def whole(rows: dict[str, Row]) -> Row:
    """Forward and backward together, or the forward where there is nothing else."""
    return rows.get("both", rows["forward"])


def best(found: dict[str, dict[str, Row]], direction: str) -> Row | None:
    """The fastest of the others that does this direction."""
    rows = [found[name][direction] for name in RIVALS if direction in found.get(name, {})]
    return min(rows, key=lambda row: row["milliseconds"], default=None)


def ms(row: Row | None) -> str:
    if row is None:
        return "-"
    return f"{row['milliseconds']:.{3 if row['milliseconds'] < 10 else 1}f}"


def summary(result: dict[str, Any]) -> str:
    """The plain call of each op at its largest shape."""
    first = {row["kernel"]: row["shape"] for row in reversed(result["results"])
             if not row["options"]}
    return kernels({"results": [row for row in result["results"] if not row["options"]
                                and row["shape"] == first[row["kernel"]]]})


def kernels(result: dict[str, Any]) -> str:
    """Ours beside the others, forward and backward together, one row a call."""
    rows = []
    for name, found in calls(result["results"]):
        ours = whole(found["ours"])
        direction = ours["direction"]
        other = best(found, direction)
        rows.append([
            name, ms(ours), f"{100 * ours['share_of_ceiling']:.0f} %", ours["bound"],
            *(ms(found.get(peer, {}).get(direction)) for peer in (
                "torch eager", "torch.compile", "liger")),
            f"{other['milliseconds'] / ours['milliseconds']:.2f}x {other['contender']}"
            if other else "-", f"{ours['peak_bytes'] / 1e6:,.0f} MB",
            f"{other['peak_bytes'] / 1e6:,.0f} MB" if other else "-"])
    return table(["bfloat16, milliseconds, forward + backward", "fastllm", "of its floor's rate",
                  "bound by", "torch eager", "torch.compile", "Liger", "speed over the best",
                  "peak memory", "of the best"], rows)


def attention(result: dict[str, Any]) -> str:
    """TFLOP/s of every attention at each length, forward and backward."""
    found = dict(calls(result["results"]))
    names = list(dict.fromkeys(name for one in found.values() for name in one))
    rows = [[f"{name.removeprefix('attention ')} {direction}",
             *(f"{one[who][direction]['teraflops']:.0f}" if direction in one.get(who, {}) else "-"
               for who in names)]
            for name, one in found.items() for direction in ("forward", "backward")
            if direction in one["ours"]]
    return table(["bfloat16, TFLOP/s; batch, queries, keys, key heads, queries each, head width",
                  *("fastllm" if name == "ours" else name for name in names)], rows)


def spread(result: dict[str, Any]) -> str:
    """Our calls furthest from the floor, each direction apart, and what they could gain."""
    rows = [(row["milliseconds"] * (1 - row["share_of_ceiling"]), f"{name} {direction}", row)
            for name, found in calls(result["results"]) for direction, row in found["ours"].items()
            if direction != "both" or "backward" not in found["ours"]]
    rows.sort(key=lambda one: -one[0])
    return table(["furthest from the floor", "milliseconds", "floor", "share", "bound by",
                  "host, to launch it"], [
        [name, ms(row), f"{row['milliseconds'] * row['share_of_ceiling']:.3f}",
         f"{100 * row['share_of_ceiling']:.0f} %", row["bound"], f"{row['host_milliseconds']:.3f}"]
        for _, name, row in rows[:25]])


# ------------------------------------------------------------------------------------- targets


def targets(folder: str | None) -> list[tuple[str, str, str, bool | None]]:
    """(what, asked, measured, met) of every target; None where nothing was measured."""
    kernel_rows = dict(calls(load(f"{folder}/kernels")["results"])) if folder else {}
    attention_rows = dict(calls(load(f"{folder}/attention")["results"])) if (
        folder and folder in gpus("attention")) else {}

    def time(name: str, most: float) -> tuple[str, str, str, bool | None]:
        row = whole(kernel_rows[name]["ours"]) if name in kernel_rows else None
        return (f"{name}, forward + backward", f"<= {most:g} ms",
                f"{ms(row)} ms" if row else "-", row["milliseconds"] <= most if row else None)

    def rate(direction: str, least: float, stretch: float) -> tuple[str, str, str, bool | None]:
        name = "attention causal 2x8192x8192x16x1x128"
        row = attention_rows.get(name, {}).get("ours", {}).get(direction)
        return (f"{name} {direction}", f">= {least:g} TFLOP/s (stretch {stretch:g})",
                f"{row['teraflops']:.0f} TFLOP/s" if row else "-",
                row["teraflops"] >= least if row else None)

    bound = [(row["share_of_ceiling"], f"{name} {direction}")
             for name, found in kernel_rows.items() for direction, row in found["ours"].items()
             if row["bound"] == "bytes" and direction != "both"]
    slower = [(other["milliseconds"] / ours["milliseconds"], name)
              for name, found in kernel_rows.items() for ours in [whole(found["ours"])]
              for other in [best(found, ours["direction"])] if other]
    return [
        ("every op bound by bytes, forward and backward, of this GPU's copy rate", ">= 90 %",
         *_least(bound, 0.9, lambda share: f"{100 * share:.0f} %")),
        time("cross_entropy in place 8192x131072", 1.9),
        time("linear_cross_entropy 32768x4096x131072", 165),
        rate("forward", 520, 600), rate("backward", 400, 480),
        ("every op over the best of the others, forward + backward", ">= 1.00x",
         *_least(slower, 1.0, lambda ratio: f"{ratio:.2f}x")),
    ]


def _least(found: list[tuple[float, str]], asked: float,
           show: Callable[[float], str]) -> tuple[str, bool | None]:
    """How many reach what is asked, and the one that is furthest from it."""
    if not found:
        return "-", None
    reached = sum(value >= asked for value, _ in found)
    value, name = min(found)
    return f"{reached} of {len(found)}; least: {name}, {show(value)}", reached == len(found)


def targets_table() -> str:
    """What is asked and what each GPU reached."""
    text = ""
    for folder in gpus("kernels") or [None]:
        text += (about(load(f"{folder}/kernels")) + "\n" if folder else "") + table(
            ["target", "asked", "measured", "met"],
            [[*words, {True: "yes", False: "no", None: "not measured"}[met]]
             for *words, met in targets(folder)])
    return text


# --------------------------------------------------------------------------------- predictions


def metered() -> dict[tuple[str, str, str], tuple[float, float]]:
    """(bytes, FLOPs) over their floors by op, options and direction, as the meter counted them at
    the largest shape that it ran. Together in the forward where the backward's work is done
    there."""
    found: dict[tuple[str, str, str], tuple[float, float]] = {}
    for row in load("interpreter/traffic")["rows"]:
        if row["contender"] == "ours":
            moved = row["unique"] + row["aten_bytes"]
            found[row["kernel"], row["options"], row["direction"]] = tuple(
                many / least if least else 0.0 for many, least in (
                    (moved, row["floor_bytes"]), (row["flops"], row["floor_flops"])))
    return found


def predicted(copy: float = COPY, product: float = PRODUCT) -> Iterator[Row]:
    """Milliseconds of the two floors and of what the meter counted, for each shape of the
    benchmark's, plain and with its options."""
    import torch

    from fastllm.kernels._spec import kernels

    ratios = metered()
    for kernel in kernels():
        for option in ("", *kernel.bench_options):
            options = kernel.bench_options.get(option, {})
            for shape in kernel.bench_shapes:
                for direction in ("forward", "backward"):
                    ratio = ratios.get((kernel.name, option, direction))
                    if ratio is None:
                        continue
                    moved, work = (floor(shape, torch.bfloat16, direction, **options)
                                   for floor in (kernel.floor_bytes, kernel.floor_flops))
                    times = [1e3 * one for one in (
                        moved / copy, work / product, moved * ratio[0] / copy,
                        work * ratio[1] / product)]
                    yield {"kernel": kernel.name, "options": option, "direction": direction,
                           "shape": dict(zip(kernel.axes, shape, strict=True)),
                           "bytes_floor": times[0], "flops_floor": times[1],
                           "predicted": max(times[2:])}


def predictions() -> str:
    """The floors and the predictions beside what each GPU measured; the largest shapes."""
    folders = gpus("kernels")
    if not folders:
        return _predictions(None)
    return "\n".join(about(load(f"{folder}/kernels")) + "\n" + _predictions(folder)
                     for folder in folders)


def _predictions(folder: str | None) -> str:
    result = load(f"{folder}/kernels") if folder else {"results": []}
    rates = result.get("ceilings", {})
    measured = {(name_of(row), shape_of(row), row["direction"]): row for row in result["results"]
                if row["contender"] == "ours" and "direction" in row}
    last = {}
    for row in predicted(rates.get("copy", COPY), rates.get("bfloat16", PRODUCT)):
        last[name_of(row), row["direction"]] = row
    lines = []
    for row in last.values():
        if not row["predicted"]:  # a backward whose work is done in the forward
            continue
        found = measured.get((name_of(row), shape_of(row), row["direction"]))
        lines.append([
            f"{name_of(row)} {shape_of(row)} {row['direction']}", f"{row['bytes_floor']:.3f}",
            f"{row['flops_floor']:.3f}", f"{row['predicted']:.3f}", ms(found),
            f"{found['milliseconds'] / row['predicted']:.2f}" if found else "-"])
    return table(["milliseconds", "floor of bytes", "floor of FLOPs", "predicted", "measured",
                  "over the prediction"], lines)


def counters(result: dict[str, Any]) -> str:
    """Bytes that the GPU's counters saw beside those that the meter counted, the furthest apart
    first."""
    rows = sorted((row for row in result["results"] if row["over_floor"]),
                  key=lambda row: -abs(math.log(row["measured_over_metered"] or 1)))
    return table(["bytes over the floor", "DRAM, by ncu", "by the meter", "ncu's over the meter's"],
                 [[f"{name_of(row)} {shape_of(row)} {row['direction']}",
                   *(f"{row[key]:.2f}" if row[key] else "-" for key in (
                       "over_floor", "metered_over_floor", "measured_over_metered"))]
                  for row in rows])


SECTIONS: dict[str, Callable[[], str]] = {
    "gpu_summary": lambda: by_gpu("kernels", summary),
    "gpu_kernels": lambda: by_gpu("kernels", kernels),
    "gpu_attention": lambda: by_gpu("attention", attention),
    "gpu_spread": lambda: by_gpu("kernels", spread),
    "gpu_counters": lambda: by_gpu("counters", counters),
    "gpu_targets": targets_table, "gpu_predictions": predictions}
