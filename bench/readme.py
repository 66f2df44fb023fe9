"""Writes the tables of the pages from the JSON files under bench/results; `--check` only compares.

A table stands between `<!-- bench:NAME -->` and `<!-- /bench -->`. No measured figure in README.md
or docs is typed by hand: tests/test_readme.py runs the check.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent)]

import gpu_tables  # noqa: E402
from tables import RESULTS, ROOT, load, table  # noqa: E402

PAGES = (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md"
                                 for name in ("kernels", "tuning", "distributed", "finetuning")))
SECTION = re.compile(r"(<!-- bench:(\w+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


def train() -> str:
    """Tokens a second and peak memory beside transformers."""
    result = load("cpu-2core/train")
    base = result["contestants"]["transformers fp32"]
    rows = []
    for name, one in result["contestants"].items():
        rows.append([name, f"{one['tokens_per_second']:,.0f}",
                     f"{one['tokens_per_second'] / base['tokens_per_second']:.2f}x",
                     f"{one['peak_memory_bytes'] / 1e9:.2f} GB"])
    ratio = result["ratios"]
    autocast = "bf16 over transformers bf16 autocast"
    note = (f"\nOver bf16 autocast: {ratio['speed: ' + autocast]:.2f}x the speed and "
            f"{ratio['memory: ' + autocast]:.2f}x the memory. "
            f"Over {len(base['losses'])} steps in fp32 the loss curves differ by "
            f"{ratio['loss: largest fp32 difference']:.1e} at most.\n")
    return table(["minimind-26m, batch 8 x 340", "tokens/s", "speed", "peak memory"], rows) + note


def optim() -> str:
    """The optimizer step beside torch's fused AdamW."""
    result = load("cpu-2core/optim")
    names = {"mixed": "bf16 gradients, fp32 masters, bf16 weights written back",
             "clipped": "the same, with the global norm and clipping", "fp32": "plain fp32"}
    rows = [[names[key], f"{one['torch_ms']:.0f} ms", f"{one['ours_ms']:.0f} ms",
             f"{one['ratio']:.2f}x"] for key, one in result["results"].items()]
    millions = f"{result['parameters'] / 1e6:.0f}M parameters"
    return table([f"optimizer step, {millions}", "torch fused", "fastllm", "speed"], rows)


def attention() -> str:
    """Attention on the CPU beside torch's, a row a contestant."""
    result = load("cpu-2core/attention")
    names = {"dense": "8 x 340 tokens, causal", "gqa": "the same, 2 key heads",
             "packed": "48 documents in 8 x 340 tokens", "window": "2,048 tokens, window of 128",
             "long": "2,048 tokens, causal"}
    peers = {"SDPA": "SDPA", "SDPA, float32": "SDPA by way of float32",
             "SDPA, repeated": "SDPA, heads repeated before", "SDPA, mask": "SDPA with a mask",
             "SDPA, mask, float32": "SDPA with a mask by way of float32",
             "SDPA, each": "SDPA once a document", "SDPA, causal": "SDPA without the window"}
    rows = []
    for case, name in names.items():
        narrow, wide = (result["results"][f"{case} {dtype}"] for dtype in ("bfloat16", "float32"))
        for peer in narrow["ratio"]:
            cells = [cell for one in (narrow, wide) for cell in _beside(one, peer)]
            rows.append([f"{name}: {peers[peer]}", *cells])
    head = [f"{kind}{what}" for kind in ("bf16: ", "fp32: ") for what in (
        "torch", "fastllm", "speed")]
    note = _machine(result)
    busy = max(one["others_share"] for one in result["results"].values())
    if busy > 0.03:
        note += (f"\nOther programs took up to {100 * busy:.0f}% of the processors meanwhile: the "
                 "ratios say more than the times.\n")
    return table([f"attention, forward + backward, {result['heads']} heads of "
                  f"{result['head_dim']}", *head], rows) + note


def _beside(result: dict, peer: str) -> list[str]:
    """A peer's time, ours, and the ratio; dashes where it did not take part."""
    if peer not in result["ratio"]:
        return ["-"] * 3
    times = result["milliseconds"]
    return [f"{times[peer]:.1f} ms", f"{times['fastllm']:.1f} ms", f"{result['ratio'][peer]:.2f}x"]


def _machine(result: dict) -> str:
    """A line where a table is not of the machine that the section speaks of."""
    if result["isa"] == load("cpu-2core/optim")["isa"]:
        return ""
    return f"\nThis table is of another machine: {result['machine']}, {result['isa']}.\n"


def zero(result: dict | None = None) -> str:
    """Data-parallel steps beside DDP, FSDP2 and DeepSpeed, a row a peer, and the reduce-scatter."""
    result = result or load("cpu-2core/zero")
    rows, busy = [], 0.0
    for name, one in result["results"].items():
        what = f"{one['parameters'] / 1e6:.0f}M {'bf16' if 'bfloat16' in name else 'fp32'}: "
        busy = max([busy, *(group["others_share"] for group in one["groups"])])
        for peer, theirs in one["contestants"].items():
            ours = one["contestants"].get(theirs["against"])
            if ours is theirs or ours is None or peer == "alone":
                continue
            ratio = theirs["ms_ratio"]
            rows.append([
                what + peer, f"{theirs['ms']:,.0f} ms", f"{ours['ms']:,.0f} ms",
                f"{ratio['median']:.2f}x ({ratio['min']:.2f} to {ratio['max']:.2f})",
                f"{theirs['cpu_ms_ratio']['median']:.2f}x",
                *(f"{held / 1e6:,.0f} MB" for held in (theirs["state_bytes"], ours["state_bytes"],
                                                       theirs["state_formula"]))])
        rows += [[what + peer, reason.replace("|", "/"), *["-"] * 6]
                 for peer, reason in one["missing"].items()]
    head = [f"data-parallel step, {result['world']} ranks of one thread, "
            f"{result['batch'][0]} x {result['batch'][1]} tokens", "peer", "fastllm", "speed",
            "processor time", "states a rank: peer", "fastllm", "formula"]
    text = table(head, rows)
    if busy > 0.03:
        text += (f"\nOther programs took up to {100 * busy:.0f}% of the processors meanwhile: the "
                 "ratios say more than the times.\n")
    wires = [[name.replace(" bfloat16", ", bf16").replace(" float32", ", fp32"),
              *(f"{one['ms'][side]:.1f} ms" for side in ("gloo", "ours")),
              f"{one['ratio']['median']:.2f}x",
              *(f"{one['error'][side]:.1e}" for side in ("gloo", "ours"))]
             for name, one in result.get("reduce_scatter", {}).items() if "missing" not in one]
    if wires:
        text += "\n" + table(["reduce-scatter of 58 MB", "Gloo", "fastllm", "speed",
                              "largest error: Gloo", "fastllm"], wires)
    return text + _machine(result)


def wire() -> str:
    """What travels in stage 3 and what the held-out loss is then."""
    result = load("cpu-2core/wire")
    rows = [[name, f"{one['sent_bytes_a_step'] / 1e6:.1f} MB", f"{one['val_loss']:.4f}",
             "" if name == "fp32" else f"{one['loss_gap']:+.4f}"]
            for name, one in result["results"].items()]
    size = result["results"]["fp32"]["parameters"] / 1e6
    return table([f"stage 3, {result['world']} ranks, {size:.1f}M parameters in fp32, "
                  f"{result['steps']} steps", "sent by a rank a step", "held-out loss",
                  "from fp32's"], rows)


def demo() -> str:
    """What `make demo` reached."""
    result = load("cpu-2core/demo")
    return table(["held-out documents", "bits per byte"], [
        ["the model after `make demo`", f"{result['val_bpb']:.3f}"],
        ["`xz -9`", f"{result['xz_bpb']:.3f}"]])


def _traffic() -> dict[tuple[str, ...], dict[str, dict[str, dict]]]:
    """Rows of the last shape of each op and option: contender -> direction -> row."""
    last: dict[tuple[str, str], list[int]] = {}
    rows = load("interpreter/traffic")["rows"]
    for row in rows:
        last[row["kernel"], row["options"]] = row["shape"]
    found: dict[tuple[str, ...], dict[str, dict[str, dict]]] = {}
    for row in rows:
        if row["shape"] == last[row["kernel"], row["options"]]:
            key = f"{row['kernel']} {row['options']}".strip(), "x".join(map(str, row["shape"]))
            found.setdefault(key, {}).setdefault(row["contender"], {})[row["direction"]] = row
    return found


def _over(rows: list[dict], what: str, floor: str) -> str:
    """What these rows count together, over their floor."""
    least = sum(row[floor] for row in rows)
    counted = sum(row[what] + (row["aten_bytes"] if floor == "floor_bytes" else 0) for row in rows)
    return f"{counted / least:.2f}" if rows and least else "-"


def _elsewhere(rows: dict[str, dict]) -> bool:
    """Whether the backward's work is done in the forward: only the two together say something."""
    row = rows.get("backward")
    return row is not None and row["unique"] + row["aten_bytes"] < 0.97 * row["floor_bytes"]


def _traffic_rows(bound: str) -> list[tuple[str, list[dict], list[dict]]]:
    """A line of the table each: its name, our rows, Liger's."""
    lines = []
    for (name, shape), contenders in _traffic().items():
        ours, liger = contenders["ours"], contenders.get("liger", {})
        if next(iter(ours.values()))["bound"] != bound:
            continue
        lone = [] if _elsewhere(ours) else [[part] for part in ours]
        both = [["forward", "backward"]] if _elsewhere(ours) or _elsewhere(liger) else []
        for parts in lone + both:
            title = f"{name} {shape} {' + '.join(parts)}"
            lines.append((title, [ours[p] for p in parts],
                          [liger[p] for p in parts if p in liger]))
    return lines


def traffic() -> str:
    """Bytes over the floor, ours and Liger's, of the ops that are bound by bytes."""
    rows = [[title, str(sum(r["launches"] for r in ours)),
             *(_over(part, what, "floor_bytes") for what in ("unique", "requested")
               for part in (ours, liger))]
            for title, ours, liger in _traffic_rows("bytes")]
    head = ["bytes over the floor", "launches", "moved", "moved, Liger", "requested",
            "requested, Liger"]
    return table(head, rows)


def products() -> str:
    """The same of the ops bound by products, whose FLOPs count first."""
    rows = [[title, str(sum(r["launches"] for r in ours)),
             *(_over(part, "flops", "floor_flops") for part in (ours, liger)),
             *(_over(part, "unique", "floor_bytes") for part in (ours, liger))]
            for title, ours, liger in _traffic_rows("flops")]
    return table(["ops made of products", "launches", "FLOPs", "FLOPs, Liger", "bytes",
                  "bytes, Liger"], rows)


def above_floor() -> str:
    """The directions that the gate lets through above their floor, and why."""
    reasons = [[f"{name} {direction}", row["above_floor"]]
               for (name, _), contenders in _traffic().items()
               for direction, row in contenders["ours"].items() if row["above_floor"]]
    if not reasons:
        return "None.\n"
    return "".join(f"- {name}: {reason}\n" for name, reason in reasons)


def memory() -> str:
    """Peak memory of the linear loss, forward and backward, beyond its arguments."""
    rows = load("interpreter/memory")["worked_out"]
    names = list(rows[0]["bytes"])
    return table(["MiB, T x H x V", *names], [
        [" x ".join(map(str, row["shape"])),
         *(f"{row['bytes'][name] / 2**20:,.0f}" for name in names)] for row in rows])


LAUNCH = re.compile(r"(liger )?(\S+) (.*?) ?(\d+(?:x\d+)*) (\S+)(?: #\d+)? sm_(\d+)")


def _launches() -> tuple[str, dict[tuple[str, ...], dict]]:
    """(the newest Triton that was audited, {parts of a launch's name: facts})."""
    path = max((RESULTS / "audit").glob("triton-*.json"),
               key=lambda path: tuple(map(int, re.findall(r"\d+", path.stem))))
    return path.stem.replace("-", " ").title(), {
        LAUNCH.fullmatch(key).groups(): facts
        for key, facts in json.loads(path.read_text(encoding="utf-8")).items()}


def attention_code() -> str:
    """Machine code of attention's three kernels by head width and architecture."""
    rows: dict[tuple[str, str, str], list[list[str]]] = {}
    for (_, kernel, options, shape, function, _), facts in sorted(
            _launches()[1].items(), key=lambda item: int(item[0][-1])):
        name = function.strip("_").removesuffix("_kernel")
        if kernel == "attention" and name in ("forward", "queries", "keys"):
            rows.setdefault((name, shape.rpartition("x")[2], options or "plain"), []).append(
                [str(facts["registers"]), f"{facts['shared'] // 1024}",
                 str(facts["native"] or facts["tensor_core"]), str(facts["tma"] or "-")])
    return table(
        ["kernel", "head width", "options", "registers sm_80 / 90 / 100", "shared KiB",
         "HMMA / HGMMA / UTCMMA", "TMA"],
        [[*names, *map(" / ".join, zip(*by_arch, strict=True))] for names, by_arch in sorted(
            rows.items(), key=lambda item: (item[0][0], int(item[0][1])))])


def audit() -> str:
    """Machine code: each Triton function at the launch that takes the most registers."""
    version, launches = _launches()
    worst: dict[tuple[str, str], dict[int, dict]] = {}
    spilt = {"": [0, 0], "liger ": [0, 0]}
    for (liger, kernel, _, shape, function, arch), facts in launches.items():
        by_arch = worst.setdefault((f"{liger or ''}{kernel}", function), {})
        if facts["registers"] >= by_arch.get(int(arch), facts)["registers"]:
            by_arch[int(arch)] = facts | {"shape": shape}
        spilt[liger or ""][0] += 1
        spilt[liger or ""][1] += bool(facts["spills"])
    rows = []
    for (kernel, function), by_arch in sorted(
            worst.items(), key=lambda item: item[0][0].removeprefix("liger ").split()[0]):
        facts = by_arch[90]
        widest = [max(map(int, facts[name]), default=0) for name in ("loads", "stores")]
        rows.append([f"{kernel.replace('liger', 'Liger')} `{function.lstrip('_')}`", facts["shape"],
                     str(facts["warps"]), " / ".join(str(f["registers"]) for f in by_arch.values()),
                     str(max(f["spills"] for f in by_arch.values())), f"{facts['occupancy']:.2f}",
                     f"{facts['shared']:,}", str(facts["tensor_core"] or "-"),
                     " / ".join(str(bits or "-") for bits in widest)])
    note = (f"\n{version}. Launches that spill: {spilt[''][1]} of "
            f"{spilt[''][0]}; of Liger's {spilt['liger '][1]} of {spilt['liger '][0]}.\n")
    return table(["launch", "shape", "warps", "registers sm_80 / 90 / 100", "spills", "occupancy",
                  "shared bytes", "tensor-core", "widest load / store"], rows) + note


def real() -> str:
    """A real model from a GGUF file, and beside transformers."""
    result = load("cpu-2core/real")
    theirs = result["transformers"]
    answer = result["answer"].strip().splitlines()[0]
    rows = [
        [f"parameters of {result['model']}", f"{result['parameters']:,}"],
        [f"\"{result['question']}\"", f"\"{answer}\""],
        ["nats a token on English prose", f"{result['nats_a_token']:.2f}"],
        ["the same words shuffled", f"{result['nats_a_token_shuffled']:.2f}"],
        ["largest difference of a logit from transformers, fp32",
         f"{theirs['largest_logit_difference']:.1e}"],
        ["texts with other token ids", str(theirs["texts_with_other_token_ids"])]]
    return table(["what `make real` prints", ""], rows)


def finetune() -> str:
    """LoRA and DPO of that model: before, after, and what they took."""
    result = load("cpu-2core/finetune")
    sft, dpo = result["sft"], result["dpo"]

    def row(part: dict, name: str, key: str, show: Callable[[float], str]) -> list[str]:
        first, last = (part["evaluations"][place][key] for place in (0, -1))
        return [name, str(part["steps"][-1]["step"]), show(first), show(last)]

    rows = [row(sft, "LoRA SFT: loss of held-out answers, nats a token", "val_loss",
                lambda value: f"{value:.3f}"),
            row(dpo, "DPO: held-out pairs ranked rightly", "val_accuracy",
                lambda value: f"{value:.1%}"),
            row(dpo, "DPO: loss of those", "val_loss", lambda value: f"{value:.4f}")]
    last = dpo["evaluations"][-1]
    share = last["val_accuracy"]
    error = (share * (1 - share) / last["val_pairs"])**0.5
    largest = max(part["transformers_logit_difference"] for part in (sft, dpo))
    note = (f"\nThe {last['val_pairs']} held-out pairs are of questions that no trained pair asks; "
            f"one standard error is {100 * error:.1f} points. Before the first step every pair is "
            "tied, which counts half. Logits of the merged folders in transformers differ by at "
            f"most {largest:.1e}.\n")
    return table(["", "steps", "before", "after"], rows) + note


SECTIONS: dict[str, Callable[[], str]] = {
    "train": train, "optim": optim, "attention": attention, "zero": zero, "wire": wire,
    "demo": demo, "traffic": traffic, "products": products, "above_floor": above_floor,
    "memory": memory, "audit": audit, "attention_code": attention_code, "real": real,
    "finetune": finetune, **gpu_tables.SECTIONS}


def render(text: str) -> str:
    """A page with every section made anew. Raises KeyError for a section that nobody makes."""
    return SECTION.sub(lambda m: m[1] + SECTIONS[m[2]]() + m[3], text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit 1 if a page is stale")
    options = parser.parse_args()
    for path in PAGES:
        before = path.read_text(encoding="utf-8")
        after = render(before)
        if options.check and after != before:
            sys.exit(f"{path.relative_to(ROOT)} does not match bench/results: "
                     "run python bench/readme.py")
        if not options.check:
            path.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
