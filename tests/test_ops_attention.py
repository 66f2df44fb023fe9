"""Who runs attention on CUDA: the choice by time, with stand-ins and a set clock on any device."""

import json
import subprocess
import sys
import types
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch._dynamo.testing
import torch.fx.experimental.proxy_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fastllm import ops
from fastllm.kernels import _attention_tables
from fastllm.kernels import attention as _attention
from fastllm.ops import _contenders, _contest, _dispatch, _memory, _timing, _tune
from fastllm.ops._contenders import Contender

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = (2, 12, 4, 16)


def qkv(*shapes, dtype=torch.float32, grad=True):
    generator = torch.Generator(DEVICE).manual_seed(0)
    return [torch.randn(shape, generator=generator, device=DEVICE).to(dtype).requires_grad_(grad)
            for shape in shapes or [SHAPE] * 3]


def ends(*numbers):
    return torch.tensor(numbers, device=DEVICE)


HALF = partial(qkv, dtype=torch.bfloat16)


class Ring:
    """Contenders that compute by the definition, and a clock that reads what it is told to."""

    def __init__(self, monkeypatch, **milliseconds):
        self.milliseconds, self.calls, self.timed = milliseconds, [], []
        self.fails = {}
        monkeypatch.setattr(_contest, "CONTENDERS", tuple(
            Contender(name, partial(self.run, name)) for name in milliseconds))
        monkeypatch.setattr(_timing, "_time", self.clock)

    def run(self, name, q, k, v, **options):
        self.calls.append((name, (q, k, v, *options.values())))
        if name in self.fails:
            raise self.fails[name]
        return _attention.reference(q, k, v, **options)

    def clock(self, call, device):
        call()
        self.timed.append(self.calls[-1][0])
        return self.milliseconds[self.timed[-1]]

    def ran(self, *tensors, **options):
        """Who runs a call, and whether anything was timed for it."""
        before = len(self.timed)
        _contest.attention(*(tensors or qkv()), **options)
        return self.calls[-1][0], len(self.timed) > before


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    """Measurements in a folder of their own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget(monkeypatch)


@pytest.fixture
def cache(tmp_path):
    """The file of measurements."""
    pytest.importorskip("pydantic", reason="without it no folder for the file is known")
    return tmp_path / "fastllm" / "attention.json"


def forget(monkeypatch):
    """As in a new process."""
    monkeypatch.setattr(_memory, "_machines", None)
    monkeypatch.setattr(_contest, "_used", {})
    monkeypatch.setattr(_contest, "_settled", {})


@pytest.fixture
def ring(monkeypatch):
    return Ring(monkeypatch, triton=3.0, fast=1.0, slow=2.0)


# ------------------------------------------------------------------------------------ the choice


def test_the_fastest_runs_and_is_measured_once(ring, cache):
    assert ring.ran() == ("fast", True)
    assert ring.ran() == ("fast", False)
    # In turns, one sample each, so that a clock that drifts drifts for all.
    assert ring.timed[:6] == ["triton", "fast", "slow"] * 2
    (sections,) = json.loads(cache.read_text()).values()
    ((kind, entry),) = sections["choices"].items()
    assert entry == {"chosen": "fast", "out": {},
                     "milliseconds": {"triton": 3.0, "fast": 1.0, "slow": 2.0}}
    assert kind == ("float32 batch 2 queries 16 keys 16 heads 4/4 width 16 gradient deterministic"
                    ": triton, fast, slow")
    assert list(cache.parent.iterdir()) == [cache]


def test_ours_stays_where_none_is_clearly_faster(monkeypatch):
    assert Ring(monkeypatch, triton=1.0, other=0.98).ran() == ("triton", True)


@pytest.mark.parametrize(("change", "measured"), [
    ({}, False), ({"shape": (2, 9, 4, 16)}, False), ({"shape": (1, 12, 4, 16)}, True),
    ({"shape": (2, 17, 4, 16)}, True), ({"shape": (2, 12, 2, 16)}, True),
    ({"shape": (2, 12, 4, 8)}, True), ({"dtype": torch.bfloat16}, True), ({"grad": False}, True),
    ({"causal": True}, True), ({"window": (3, 0)}, True), ({"softcap": 2.0}, True),
    ({"softcap": 0.0}, False), ({"deterministic": False}, True), ({"scale": 0.1}, False)], ids=str)
def test_what_calls_share_a_choice(ring, change, measured):
    options = dict(change)
    made = {name: options.pop(name) for name in ("dtype", "grad") if name in options}
    shape = options.pop("shape", SHAPE)
    ring.ran()
    assert ring.ran(*qkv(shape, shape, shape, **made), **options) == ("fast", measured)


def test_packed_calls_share_a_choice_whatever_their_sequences(ring):
    tensors = [x.detach().flatten(0, 1) for x in qkv()]
    for bounds, timed in (((0, 9, 24), True), ((0, 4, 8, 11, 24), False)):
        assert ring.ran(*tensors, cu_seqlens_q=ends(*bounds), max_seqlen_q=15) == ("fast", timed)
    assert ring.ran(*tensors, cu_seqlens_q=ends(0, 24), max_seqlen_q=24) == ("fast", True)


def test_a_growing_cache_is_measured_at_powers_of_two(ring):
    with torch.no_grad():
        timed = [keys for keys in range(1, 70) if ring.ran(
            *qkv((1, 1, 4, 8), (1, keys, 2, 8), (1, keys, 2, 8)), causal=True)[1]]
    assert timed == [1, 2, 3, 5, 9, 17, 33, 65]


def test_gradients_come_through_whoever_runs(ring):
    tensors = qkv((2, 12, 4, 16), (2, 14, 2, 16), (2, 14, 2, 16))
    ours = _contest.attention(*tensors, causal=True)
    theirs = _attention.reference(*tensors, causal=True)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours.square().sum(), tensors),
                               torch.autograd.grad(theirs.square().sum(), tensors))


def test_arguments_are_checked_before_anyone_runs(ring):
    with pytest.raises(ValueError, match="query heads are not a multiple"):
        _contest.attention(*qkv((1, 3, 4, 8), (1, 3, 3, 8), (1, 3, 3, 8)))
    assert not ring.calls


def test_an_option_that_there_is_not_raises_whoever_would_run(ring):
    ring.ran()
    ring.calls.clear()
    with pytest.raises(TypeError, match="dropout"):
        _contest.attention(*qkv(), dropout=0.1)
    with pytest.raises(ValueError, match="takes up to 256"):
        _contenders.CONTENDERS[0].run(*qkv((1, 2, 1, 264), (1, 2, 1, 264), (1, 2, 1, 264)))
    _contest.attention(*qkv((1, 2, 1, 264), (1, 2, 1, 264), (1, 2, 1, 264)))
    assert {name for name, _ in ring.calls} == {"triton"}


def test_calls_that_were_settled_are_not_kept_without_end(ring, monkeypatch):
    monkeypatch.setattr(_contest, "MOST", 3)
    for scale in (0.1, 0.2, 0.3, 0.4, 0.1):
        assert ring.ran(scale=scale)[0] == "fast"
    assert len(_contest._settled) == 2


def test_autocast_decides_the_type(ring):
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert _contest.attention(*qkv()).dtype == torch.bfloat16
    assert all(kind.startswith("bfloat16") for _, kind in _contest._used)


# ------------------------------------------------------------------------------------- measuring


def test_nothing_of_the_callers_is_touched(ring):
    tensors, bounds = qkv((24, 4, 16), (24, 2, 16), (24, 2, 16)), ends(0, 10, 24)
    copies = [x.detach().clone() for x in (*tensors, bounds)]
    generator = torch.get_rng_state()

    def draws(*args, **options):
        torch.rand(3)
        return ring.run("slow", *args, **options)

    _contest.CONTENDERS = (*_contest.CONTENDERS[:2], Contender("slow", draws))
    _contest.attention(*tensors, cu_seqlens_q=bounds)
    given = {x.data_ptr() for x in (*tensors, bounds)}
    *timed, (_, last) = ring.calls
    assert {x.data_ptr() for x in last} == given
    for _, used in timed:
        assert not {x.data_ptr() for x in used} & given
    assert all(x.grad is None for x in tensors)
    assert all(torch.equal(a, b) for a, b in zip((*tensors, bounds), copies, strict=True))
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_checkpoint_around_it_counts_its_own_tensors_only(ring):
    def layer(*tensors):
        return _contest.attention(*tensors).square()

    tensors = qkv()
    out = checkpoint(layer, *tensors, use_reentrant=False)
    assert ring.timed
    torch.testing.assert_close(torch.autograd.grad(out.sum(), tensors),
                               torch.autograd.grad(layer(*tensors).sum(), tensors))


def test_one_that_raises_is_out_with_its_reason(ring, cache):
    ring.fails["fast"] = RuntimeError("no kernel\nsecond line")
    assert ring.ran() == ("slow", True)
    ((entry,),) = [part["choices"].values() for part in json.loads(cache.read_text()).values()]
    assert entry["out"] == {"fast": "RuntimeError: no kernel"}
    assert "fast" not in entry["milliseconds"]


def test_ours_runs_where_all_others_raise(ring):
    ring.fails = {"fast": RuntimeError(), "slow": TypeError("an older build")}
    assert ring.ran() == ("triton", True)


def test_short_memory_leaves_it_to_ours_and_nothing_is_kept(ring, cache):
    ring.fails["slow"] = torch.OutOfMemoryError("12 GiB")
    assert ring.ran() == ("triton", True)
    del ring.fails["slow"]
    # The same in this process: what is made again in a backward must be what was made.
    assert ring.ran() == ("triton", False)
    assert not cache.exists()


def test_one_that_was_chosen_and_raises_gives_way_with_a_warning(ring, cache, monkeypatch):
    ring.ran()
    ring.fails["fast"] = RuntimeError("no plan for 13 queries")
    with pytest.warns(UserWarning, match=r"fast failed and triton takes its place .* for 13"):
        assert ring.ran() == ("triton", False)
    del ring.fails["fast"]
    forget(monkeypatch)
    assert ring.ran() == ("triton", False)
    ring.fails["triton"] = RuntimeError("ours")
    with pytest.raises(RuntimeError, match="ours"):
        _contest.attention(*qkv())
    ring.fails = {"fast": torch.OutOfMemoryError("full")}
    _contest._used.update(dict.fromkeys(_contest._used, "fast"))
    _contest._settled.clear()
    with pytest.raises(torch.OutOfMemoryError):  # not a thing to hide
        _contest.attention(*qkv())


def test_sizes_that_are_symbols_take_what_is_remembered_or_ours(ring):
    graph = torch.fx.experimental.proxy_tensor.make_fx(
        partial(_contest.attention, causal=True), tracing_mode="symbolic")(*qkv())
    assert not ring.timed and {name for name, _ in ring.calls} == {"triton"}
    torch.testing.assert_close(graph(*qkv()), _attention.reference(*qkv(), causal=True))


class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_nothing_is_timed_under_fake_tensors_or_another_mode(ring):
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in qkv()]
        assert ring.ran(*fake) == ("triton", False)
    with Watch():
        assert ring.ran() == ("triton", False)
    assert ring.ran() == ("fast", True)
    with Watch():
        assert ring.ran() == ("fast", False)  # what is remembered serves


def test_nothing_is_timed_under_vmap(ring):
    _contest.CONTENDERS = tuple(replace(one, run=lambda q, k, v: q.clone())
                                for one in _contest.CONTENDERS)
    torch.vmap(_contest.attention)(*(x.detach()[None] for x in qkv()))
    assert not ring.timed


def test_nothing_is_timed_while_a_graph_is_captured(ring, monkeypatch):
    on_gpu = types.SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(_contest, "type", lambda x: torch.Tensor, raising=False)
    for capturing in (True, False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda c=capturing: c)
        assert _contest._may_measure(on_gpu) is not capturing


def compiled(**options):
    torch._dynamo.reset()
    return torch.compile(partial(_contest.attention, **options), fullgraph=True,
                         backend="aot_eager")


def test_compiled_calls_take_what_is_remembered_or_ours(ring):
    tensors = qkv()
    torch.testing.assert_close(compiled(causal=True)(*tensors),
                               _attention.reference(*tensors, causal=True))
    assert {name for name, _ in ring.calls} == {"triton"} and not ring.timed
    ring.ran(causal=True)
    ring.calls.clear()
    compiled(causal=True)(*tensors)
    assert {name for name, _ in ring.calls} == {"fast"}


def test_one_that_cannot_be_traced_gives_way_in_a_graph(ring):
    first, second, _ = _contest.CONTENDERS
    _contest.CONTENDERS = (first, replace(second, traced=False))
    ring.ran()
    ring.calls.clear()
    compiled()(*qkv())
    assert {name for name, _ in ring.calls} == {"triton"}


def test_an_export_of_any_length_is_ours(ring):
    class Layer(torch.nn.Module):
        def forward(self, q, k, v):
            return _contest.attention(q, k, v, causal=True)

    ring.ran(causal=True)
    _contest.CONTENDERS = _contenders.CONTENDERS
    length = torch.export.Dim("length", max=4096)
    program = torch.export.export(Layer(), tuple(HALF(grad=False)), dynamic_shapes=[
        {1: length}] * 3)
    ops_in_it = {str(node.target) for node in program.graph.nodes}
    assert "fastllm.attention.default" in ops_in_it


@pytest.mark.parametrize("chosen", ["sdpa flash", "triton", "flash-attn 3"])
def test_what_is_remembered_is_traced_if_it_can_be(flash3, monkeypatch, chosen):
    monkeypatch.setattr(_contest, "known", lambda device, kind: chosen)
    tensors = HALF(grad=False)
    (node,) = [node for node in make_graph(tensors) if "attention" in str(node.target)]
    assert (chosen == "sdpa flash") == ("scaled_dot_product" in str(node.target))


def make_graph(tensors):
    found = []

    def record(graph, inputs):
        found.extend(graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    torch.compile(_contest.attention, fullgraph=True, backend=record)(*tensors)
    return found


def test_kept_tiles_are_taken_while_a_graph_is_traced():
    def layer(x):
        _tune.use_kept("cpu")
        return x + 1

    _memory.remember(_memory.machine("cpu"), "tiles", {"forward 90 64 0": [32, 16, 4, 1]})
    _tune._use_kept.cache_clear()
    try:
        torch._dynamo.reset()
        torch.compile(layer, fullgraph=True, backend="eager")(torch.ones(2))
        assert _attention_tables.override({}) == {
            ("forward", 90, 64, 0): _attention_tables.Tiles(32, 16, 4, 1)}
    finally:
        _tune._use_kept.cache_clear()


@pytest.mark.parametrize("packed", [False, True])
def test_the_real_ones_can_be_traced_with_dynamic_lengths(packed, monkeypatch):
    monkeypatch.setattr(_timing, "_time", None)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    run = torch.compile(_contest.attention, fullgraph=True, backend=counter, dynamic=True)
    for length, graphs in ((40, 1), (60, 1), (70, 1 if packed else 2)):
        tensors = qkv(*[(1, length, 2, 16)] * 3, dtype=torch.bfloat16, grad=False)
        options = {"causal": True}
        if packed:
            tensors = [x[0] for x in tensors]
            options |= {"cu_seqlens_q": ends(0, 5, length), "max_seqlen_q": 64}
        torch.testing.assert_close(run(*tensors, **options),
                                   _attention.attention(*tensors, **options))
        assert counter.frame_count == graphs  # one for each kind, where there is a choice


# --------------------------------------------------------------------------------------- the file


def test_a_new_process_takes_what_was_chosen(ring, cache):
    ring.ran()
    again = """
import sys, torch
sys.path[:0] = ["tests/support"]
from fastllm.kernels import attention as _attention
from fastllm.ops import _contest, _memory, _timing
from fastllm.ops._contenders import Contender
assert _memory._machines is None, "read at import"
ran = []
def run(name, *tensors, **options):
    ran.append(name)
    return _attention.reference(*tensors, **options)
_contest.CONTENDERS = tuple(Contender(n, lambda *t, n=n, **o: run(n, *t, **o))
                            for n in ("triton", "fast", "slow"))
_timing._time = None
x = torch.zeros(2, 12, 4, 16, device=sys.argv[1], requires_grad=True)
_contest.attention(x, x.clone(), x.clone())
print(*ran)
"""
    done = subprocess.run([sys.executable, "-c", again, DEVICE], capture_output=True, text=True,
                          check=False, timeout=120)
    assert done.stdout.split() == ["fast"], done.stderr
    assert cache.exists()


@pytest.mark.parametrize("text", ["{", "", "[]", '{"a": 1}', '{"a": {"choices": 3}}', "\0\1"])
def test_a_damaged_file_is_named_once_and_written_again(ring, cache, text):
    cache.parent.mkdir()
    cache.write_text(text)
    with pytest.warns(UserWarning, match="attention.json is damaged"):
        assert ring.ran() == ("fast", True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ring.ran(causal=True)
    (sections,) = json.loads(cache.read_text()).values()
    assert len(sections["choices"]) == 2


@pytest.mark.parametrize("entry", [3, None, {}, {"chosen": 7}, {"chosen": "nobody"}])
def test_an_entry_that_says_nothing_is_no_choice(ring, cache, monkeypatch, entry):
    ring.ran()
    place, sections = json.loads(cache.read_text()).popitem()
    sections["choices"] = dict.fromkeys(sections["choices"], entry)
    cache.write_text(json.dumps({place: sections}))
    forget(monkeypatch)
    known = entry == {"chosen": "nobody"}  # one that has gone: ours
    assert ring.ran() == (("triton", False) if known else ("fast", True))
    assert _contest.summary(torch.device(DEVICE, 0) if DEVICE == "cuda" else "cpu")


def test_what_another_process_wrote_meanwhile_stays(ring, cache, monkeypatch):
    ring.ran()
    mine = _memory._machines
    monkeypatch.setattr(_memory, "_machines", {})  # another, which has read an empty file
    ring.ran(causal=True)
    monkeypatch.setattr(_memory, "_machines", mine)
    ring.ran(softcap=2.0)
    (sections,) = json.loads(cache.read_text()).values()
    assert len(sections["choices"]) == 3


def test_a_disk_that_cannot_be_written_is_no_error(ring, cache, monkeypatch):
    cache.parent.write_text("a file where the folder would be")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ring.ran() == ("fast", True)
        assert ring.ran() == ("fast", False)
        forget(monkeypatch)
        monkeypatch.setattr(_memory, "_path", lambda: None)  # a user without a home
        assert ring.ran() == ("fast", True)


def test_a_write_that_fails_leaves_the_old_file(ring, cache, monkeypatch):
    ring.ran()
    before = cache.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_memory.os, "replace", full)
    assert ring.ran(causal=True) == ("fast", True)
    assert cache.read_bytes() == before
    assert list(cache.parent.iterdir()) == [cache]


# -------------------------------------------------------------------------------- what it is told


def test_auto_on_cuda_is_the_contest_and_triton_is_ours():
    op, cuda = _dispatch.TABLE["attention"], torch.device("cuda")
    assert op.measured is _contest.attention
    assert op.backends["triton"] is _contenders.triton
    tensor = torch.empty(1, 1, 1, 8, device="meta")
    for kind, dtype, chosen in (("cuda", torch.bfloat16, op.measured),
                                ("cuda", torch.float64, op.backends["reference"])):
        like = _Like(tensor.to(dtype), torch.device(kind))
        assert _dispatch.pick(op, (like,), {}) is chosen
        if dtype == torch.bfloat16:
            with ops.use_backend("triton", "attention"):
                assert _dispatch.pick(op, (like,), {}) is op.backends["triton"]
                assert ops.dispatch(cuda)["attention"] == ("triton", "asked for")


class _Like(torch.Tensor):
    """A tensor that says it is elsewhere."""

    def __new__(cls, tensor, where):
        self = tensor.as_subclass(cls)
        self.where = where
        return self

    @property
    def device(self):
        return self.where

    __torch_function__ = torch._C._disabled_torch_function_impl


def test_dispatch_says_what_was_chosen(ring, cache, monkeypatch):
    monkeypatch.setattr(_memory, "machine", lambda device: "this GPU")
    assert ops.dispatch("cuda")["attention"] == ("triton", "CUDA tensors; measured per shape")
    ring.ran()
    assert ops.dispatch("cuda")["attention"][1].endswith("measured per shape: fast 1 shape")
    ring.ran(causal=True)
    ring.milliseconds["triton"] = 0.1
    ring.ran(softcap=2.0)
    words = "CUDA tensors; measured per shape: fast 2 shapes, triton 1"
    assert ops.dispatch("cuda")["attention"] == ("triton", words)
    forget(monkeypatch)
    assert ops.dispatch("cuda")["attention"] == ("triton", words)  # by the process before


def test_a_run_writes_what_was_chosen(ring, tmp_path, monkeypatch):
    pytest.importorskip("pydantic")
    from fastllm import run

    monkeypatch.setattr(_memory, "machine", lambda device: "this GPU")
    part_of_a_run = types.SimpleNamespace(folder=tmp_path, device=torch.device("cuda"))
    run.Run.write_dispatch(part_of_a_run)
    before = json.loads((tmp_path / "dispatch.json").read_text())
    ring.ran()
    run.Run.write_dispatch(part_of_a_run)
    after = json.loads((tmp_path / "dispatch.json").read_text())
    assert after.pop("attention") == {
        "backend": "triton", "reason": "CUDA tensors; measured per shape: fast 1 shape"}
    assert before.pop("attention")["reason"] == "CUDA tensors; measured per shape"
    assert before == after


# ---------------------------------------------------------------------------- the real contenders


@pytest.mark.parametrize("backend", [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION])
@pytest.mark.parametrize(("options", "why"), [
    ({"cu_seqlens_q": torch.tensor([0, 4])}, "packed"), ({"window": (3, -1)}, "window"),
    ({"softcap": 1.0}, "softcap"), ({"sinks": torch.zeros(4)}, "sinks"),
    ({"return_lse": True}, "return_lse"), ({"differentiated": True}, "not deterministic"),
    ({"differentiated": True, "deterministic": False}, ""), ({"causal": True}, ""),
    ({"window": (-1, -1), "softcap": 0.0, "scale": 0.5}, "")], ids=str)
def test_what_sdpa_cannot_take(backend, options, why):
    reason = _contenders.sdpa_lacks(backend, *HALF(), **options)
    assert (why in reason) if why else not reason


@pytest.mark.parametrize(("queries", "keys", "width", "dtype", "causal", "why"), [
    (12, 12, 64, torch.float32, False, "bfloat16 and float16"), (12, 12, 20, None, False, "of 8"),
    (12, 12, 16, torch.float16, True, ""), (12, 14, 16, None, True, "starts at the first key"),
    (12, 14, 16, None, False, ""), (1, 14, 16, None, True, ""), (4, 0, 16, None, False, "number")])
def test_what_shapes_sdpa_cannot_take(queries, keys, width, dtype, causal, why):
    tensors = qkv((2, queries, 4, width), (2, keys, 2, width), (2, keys, 2, width),
                  dtype=dtype or torch.bfloat16)
    reason = _contenders.sdpa_lacks(SDPBackend.FLASH_ATTENTION, *tensors, causal=causal)
    assert (why in reason) if why else not reason
    single = _contenders.sdpa_lacks(SDPBackend.CUDNN_ATTENTION, *tensors, causal=causal)
    assert bool(single) == bool(reason or queries == 1)


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize(("queries", "keys", "causal"), [
    (12, 12, False), (12, 12, True), (7, 14, False), (1, 9, True), (1, 1, True)])
def test_sdpa_computes_what_ours_does(backend, scale, queries, keys, causal):
    # On a GPU the flash kernels take 16 bits only.
    half = DEVICE == "cuda" and backend == SDPBackend.FLASH_ATTENTION
    tensors = qkv((2, queries, 4, 16), (2, keys, 2, 16), (2, keys, 2, 16),
                  dtype=torch.float16 if half else torch.float32)
    results, off = [], 1e-2 if half else 1e-5
    for function in (partial(_contenders.sdpa, backend), _attention.reference):
        out = function(*tensors, causal=causal, scale=scale)
        results.append((out, *torch.autograd.grad(out.square().sum(), tensors)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=off, atol=off)


class _Flash3(torch.autograd.Function):
    """flash-attn 3's functions by the definition: tokens of no sequence are not written."""

    @staticmethod
    def forward(ctx, options, used, *tensors):
        ctx.options, ctx.used = options, used
        ctx.save_for_backward(*tensors)
        out = _attention.reference(*tensors, **options)
        out[used[0]:] = torch.nan
        return out

    @staticmethod
    def backward(ctx, grad):
        tensors = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            out = _attention.reference(*tensors, **ctx.options)
        grads = torch.autograd.grad(out, tensors, grad)
        for given, used in zip(grads, (ctx.used[0], ctx.used[1], ctx.used[1]), strict=True):
            given[used:] = torch.nan
        return None, None, *grads


def flash_attn_func(q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None,
                    k_descale=None, v_descale=None, window_size=(-1, -1), attention_chunk=0,
                    softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0,
                    return_attn_probs=False):
    options = {"scale": softmax_scale, "causal": causal, "window": window_size, "softcap": softcap}
    return _Flash3.apply(options, (len(q), len(k)), q, k, v), "lse, as of older builds"


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                           seqused_q=None, seqused_k=None, softmax_scale=None, causal=False,
                           qv=None, q_descale=None, k_descale=None, v_descale=None,
                           window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1,
                           pack_gqa=None, deterministic=False, sm_margin=0,
                           return_attn_probs=False):
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert max_seqlen_q >= cu_seqlens_q.diff().max() and max_seqlen_k >= cu_seqlens_k.diff().max()
    options = {"scale": softmax_scale, "causal": causal, "window": window_size,
               "softcap": softcap, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    return _Flash3.apply(options, (int(cu_seqlens_q[-1]), int(cu_seqlens_k[-1])), q, k, v)


@pytest.fixture
def flash3(monkeypatch):
    module = types.ModuleType("flash_attn_interface")
    module.flash_attn_func = flash_attn_func
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    _contenders._flash3.cache_clear()
    yield
    _contenders._flash3.cache_clear()


OPTIONS = [{}, {"causal": True}, {"window": (3, 1)}, {"causal": True, "softcap": 2.0},
           {"scale": 0.3, "deterministic": False}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("packed", [None, "one", "both"])
def test_flash_attn_3_is_called_right(flash3, options, packed):
    tensors = qkv((2, 12, 4, 16), (2, 12, 2, 16), (2, 12, 2, 16))
    given = dict(options)
    if packed:
        tensors = [x.detach().flatten(0, 1).requires_grad_() for x in tensors]
        given |= {"cu_seqlens_q": ends(0, 5, 12, 20), "max_seqlen_q": 8}
    if packed == "both":
        given |= {"cu_seqlens_k": ends(0, 9, 13, 21), "max_seqlen_k": 9}
    results = []
    for function in (_contenders.flash3, _attention.reference):
        out = function(*tensors, **given)
        results.append((out, *torch.autograd.grad(out.square().sum(), tensors)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("options", "why"), [
    ({"sinks": torch.zeros(4)}, "sinks"), ({"return_lse": True}, "lse"),
    ({"window": (3, 0), "softcap": 2.0, "differentiated": True}, ""),
    ({"cu_seqlens_q": torch.tensor([0, 24])}, "longest"),
    ({"cu_seqlens_q": torch.tensor([0, 24]), "max_seqlen_q": 24}, ""),
    ({"cu_seqlens_q": torch.tensor([0, 24]), "cu_seqlens_k": torch.tensor([0, 24]),
      "max_seqlen_q": 24}, "longest")], ids=str)
def test_what_flash_attn_3_cannot_take(flash3, options, why):
    reason = _contenders.flash3_lacks(*HALF(), **options)
    assert (why in reason) if why else not reason


def test_what_shapes_flash_attn_3_cannot_take(flash3):
    lacks = _contenders.flash3_lacks
    assert "bfloat16" in lacks(*qkv())
    assert "multiple of 8" in lacks(*HALF((1, 2, 1, 12), (1, 2, 1, 12), (1, 2, 1, 12)))
    assert "nothing" in lacks(*HALF((1, 2, 1, 8), (1, 0, 1, 8), (1, 0, 1, 8)))
    wide = HALF(*[(1, 2, 1, 256)] * 3)
    assert "up to 192" in lacks(*wide, differentiated=True)
    assert not lacks(*wide, differentiated=True, deterministic=False)
    assert not lacks(*wide)


def test_flash_attn_3_that_is_not_there_says_so(monkeypatch):
    _contenders._flash3.cache_clear()
    assert _contenders.flash3_missing("cpu") == "it is not installed"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert _contenders.flash3_missing("cuda") == "it is made for compute capability 9, not 10.0"

    def broken(name):
        raise OSError("undefined symbol\nmore")

    monkeypatch.setattr(_contenders.importlib, "import_module", broken)
    _contenders._flash3.cache_clear()
    assert _contenders.flash3_missing("cpu") == "it cannot be imported: undefined symbol"
    _contenders._flash3.cache_clear()


def test_training_by_default_is_between_deterministic_ones(flash3):
    def able(**options):
        return [one.name for one in _contenders.CONTENDERS if not one.lacks(*HALF(), **options)]

    everyone = ["triton", "sdpa cudnn", "sdpa flash", "flash-attn 3"]
    assert able(differentiated=True, deterministic=True) == ["triton", "flash-attn 3"]
    assert able(differentiated=True, deterministic=False) == able() == everyone


def test_the_clock_of_a_cpu_counts_milliseconds():
    times, out = _timing.measure({"a": lambda: sum(range(20_000)), "b": lambda: None},
                                 torch.device("cpu"))
    assert 0.01 < times["a"] < 1000 and times["b"] < times["a"] and not out
    assert _timing.fastest(times, "b") == "b" and _timing.fastest({}, "triton") == "triton"
