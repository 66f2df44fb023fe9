"""Attention in C++ against its definition in fp64, with every option, and what holds for all."""

import random

import pytest
import torch
from cpu_check import DTYPES, check, plain_attention, run, seeded
from torch import Tensor

from fastllm import cpu

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the C++ extension was not built")


def bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)


def dense(b, sq, sk, hq, hkv, d, *, dtype=torch.float32, seed=0):
    """q, k, v; of one length as the model gives them: views of one projection."""
    if sq == sk:
        fused = seeded(b, sq, (hq + 2 * hkv) * d, dtype=dtype, seed=seed)
        return list(fused.unflatten(-1, (-1, d)).split([hq, hkv, hkv], 2))
    return [seeded(b, n, h, d, dtype=dtype, seed=seed + i)
            for i, (n, h) in enumerate([(sq, hq), (sk, hkv), (sk, hkv)])]


def compare(inputs, options, dtype, sinks=None, unit=False):
    """Output, lse and every gradient, through both, by the rule; where nothing is seen, exactly."""
    inputs = inputs if sinks is None else [*inputs, sinks]
    nothing = []

    def both(function):
        def inner(q, k, v, sinks=None):
            out, lse = function(q, k, v, sinks)
            nothing.append(lse == -torch.inf)
            return out, lse.where(lse != -torch.inf, 0)
        return inner

    check(both(lambda q, k, v, s: cpu.attention(q, k, v, sinks=s, return_lse=True, **options)),
          both(lambda q, k, v, s: plain_attention(q, k, v, s, **options)), inputs, dtype, unit=unit)
    assert torch.equal(nothing[0], nothing[1])
    assert torch.equal(nothing[0], nothing[2])


CASES = {  # B, Sq, Sk, Hq, Hkv, D, options
    "causal": (2, 70, 70, 4, 2, 64, {"causal": True}),
    "one key head": (1, 130, 130, 3, 1, 80, {"causal": True}),
    "full": (1, 129, 129, 2, 2, 96, {}),
    "short": (2, 33, 33, 2, 2, 16, {}),
    "cache": (1, 5, 200, 4, 1, 64, {"causal": True}),
    "one query": (1, 1, 65, 2, 1, 128, {"causal": True}),
    "odd width": (1, 40, 90, 2, 1, 17, {}),
    "width 1": (2, 40, 70, 2, 1, 1, {"causal": True}),
    "wide": (1, 70, 70, 1, 1, 256, {"causal": True}),
    "left": (1, 200, 200, 2, 1, 64, {"window": (70, -1)}),
    "right": (1, 200, 200, 2, 1, 64, {"window": (-1, 70)}),
    "both": (1, 200, 200, 2, 1, 64, {"window": (70, 3)}),
    "narrow": (1, 200, 200, 2, 1, 16, {"window": (5, 0)}),
    "own key": (1, 150, 150, 2, 1, 16, {"window": (0, 0)}),
    "wider than all": (1, 90, 90, 2, 1, 16, {"window": (1000, 1000)}),
    "causal window": (1, 300, 300, 2, 1, 64, {"causal": True, "window": (100, -1)}),
    "causal over window": (1, 100, 100, 2, 1, 16, {"causal": True, "window": (30, 30)}),
    "cache window": (1, 40, 260, 2, 1, 64, {"window": (60, 10)}),
    "more queries": (1, 200, 70, 2, 1, 64, {"causal": True}),
    "more queries, full": (1, 200, 70, 2, 1, 64, {}),
    "more queries, window": (1, 260, 90, 2, 1, 16, {"window": (40, 30)}),
    "more queries, right": (1, 260, 90, 2, 1, 16, {"window": (-1, 30)}),
    "softcap": (1, 140, 140, 2, 1, 64, {"softcap": 2.0, "causal": True}),
    "tight softcap": (1, 70, 70, 2, 1, 96, {"softcap": 0.25, "scale": 1.0}),
    "loose softcap": (1, 70, 70, 2, 1, 80, {"softcap": 50.0}),
    "softcap, window": (1, 200, 200, 2, 1, 64, {"softcap": 1.0, "window": (40, 20)}),
    "scale": (1, 80, 80, 2, 1, 64, {"scale": 0.3, "causal": True}),
    "no keys": (2, 70, 0, 2, 1, 16, {}),
    "no queries": (2, 0, 70, 2, 1, 16, {}),
}
PACKED = {  # lengths of queries, of keys, tokens after them, Hq, Hkv, D, options
    "one length": ([40, 0, 1, 109, 150, 0], None, (0, 0), 4, 2, 32, {"causal": True}),
    "full": ([3, 97, 64, 36], None, (0, 0), 2, 1, 64, {}),
    "tail": ([20, 70, 65], None, (33, 33), 2, 1, 64, {"causal": True, "window": (30, 0)}),
    "two lengths": ([20, 70, 3, 130], [50, 70, 90, 40], (0, 0), 2, 1, 64, {"causal": True}),
    "two lengths, tails": ([20, 70, 3], [50, 7, 90], (9, 70), 2, 1, 17, {"window": (20, 5)}),
    "nothing on a side": ([20, 0, 30, 0], [0, 40, 10, 0], (1, 2), 2, 1, 16, {}),
    "softcap": ([90, 33], [100, 66], (0, 3), 4, 1, 80, {"softcap": 3.0, "causal": True}),
    "no documents": ([], [], (5, 6), 2, 1, 16, {}),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_dense(dtype, name):
    *shape, options = CASES[name]
    inputs = dense(*shape, dtype=dtype)
    compare(inputs, options, dtype)
    compare(inputs, options, dtype, seeded(shape[3], dtype=dtype, seed=9) * 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PACKED)
def test_packed(dtype, name):
    queries, keys, tails, hq, hkv, d, options = PACKED[name]
    keys = queries if keys is None else keys
    inputs = [x[0] for x in dense(1, sum(queries) + tails[0], sum(keys) + tails[1], hq, hkv, d,
                                  dtype=dtype)]
    options = {**options, "cu_seqlens_q": bounds(queries), "cu_seqlens_k": bounds(keys)}
    compare(inputs, options, dtype)
    compare(inputs, options, dtype, seeded(hq, dtype=dtype, seed=9) * 2)


@pytest.mark.parametrize("options", [
    {"causal": True, "scale": 0.3}, {}, {"window": (200, 0)}, {"window": (1500, 50)},
    {"window": (-1, 40)}, {"window": (30, -1)}, {"causal": True, "window": (600, 0)}], ids=str)
def test_several_tasks_of_keys(options):
    compare(dense(1, 300, 2500, 2, 1, 16), options, torch.float32)
    compare(dense(1, 1300, 1100, 1, 1, 16, seed=3), options, torch.float32)
    packed = [x[0] for x in dense(1, 1500, 1500, 1, 1, 16, seed=6)]
    cu = bounds([100, 1200, 150])
    compare(packed, {**options, "cu_seqlens_q": cu, "cu_seqlens_k": cu}, torch.float32)


def drawn(seed: int):
    """Inputs, options and sinks of one random combination on small shapes."""
    pick = random.Random(seed)
    hkv, group = pick.choice([1, 1, 2, 3]), pick.choice([1, 2, 4])
    d = pick.choice([1, 2, 7, 16, 17, 32, 33, 64, 80])
    lengths = (0, 1, 2, 15, 16, 17, 31, 63, 64, 65, 100)
    side = [-1, -1, 0, 1, 3, 15, 16, 17, 40, 63, 64, 65, 500]
    options = {"causal": pick.random() < 0.4, "softcap": pick.choice([None, None, 0.5, 20.0]),
               "window": pick.choice([None, (pick.choice(side), pick.choice(side))]),
               "scale": pick.choice([None, 0.2])}
    same = pick.random() < 0.4
    if pick.random() < 0.5:
        count = pick.randint(1, 4)
        queries = [pick.choice(lengths) for _ in range(count)]
        keys = queries if same else [pick.choice(lengths) for _ in range(count)]
        tails = [pick.choice([0, 0, 1, 20]) for _ in range(2)]
        tails[1] = tails[0] if same else tails[1]
        inputs = [x[0] for x in dense(1, sum(queries) + tails[0], sum(keys) + tails[1],
                                      hkv * group, hkv, d, seed=seed)]
        options |= {"cu_seqlens_q": bounds(queries), "cu_seqlens_k": bounds(keys)}
    else:
        sq = pick.choice(lengths)
        sk = sq if same else pick.choice(lengths)
        inputs = dense(pick.choice([1, 2]), sq, sk, hkv * group, hkv, d, seed=seed)
    sinks = pick.choice([None, seeded(hkv * group, seed=seed) * pick.choice([1, 10])])
    return inputs, options, sinks


@pytest.mark.parametrize("tens", range(20))
def test_random_combinations(tens):
    for seed in range(10 * tens, 10 * tens + 10):
        inputs, options, sinks = drawn(seed)
        dtype = DTYPES[seed % 3]
        try:
            compare([x.to(dtype) for x in inputs], options, dtype,
                    None if sinks is None else sinks.to(dtype), unit=True)
        except AssertionError as error:
            shapes = [tuple(x.shape) for x in inputs]
            raise AssertionError(f"seed {seed}: {shapes}, {options}, {sinks}: {error}") from error


PACKED_OPTIONS = [{"causal": True}, {}, {"window": (40, 20)}, {"causal": True, "softcap": 2.0}]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", PACKED_OPTIONS, ids=str)
def test_packed_documents_equal_each_alone(dtype, options):
    queries, keys = [30, 70, 1, 99, 64, 36], [40, 66, 5, 99, 64, 90]
    cu_q, cu_k = bounds(queries), bounds(keys)
    options = {**options, "sinks": seeded(4, seed=5), "return_lse": True}
    q, k, v = (x[0] for x in dense(1, 310, 370, 4, 2, 64, dtype=dtype))
    packed, grads, upstream = run(
        lambda *x: cpu.attention(*x, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **options), [q, k, v])
    for i in range(len(queries)):
        own, of = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        alone, alone_grads, _ = run(
            lambda *x: cpu.attention(*x, **options), [q[None, own], k[None, of], v[None, of]],
            [upstream[0][None, own], upstream[1][None, :, own]])
        parts = [packed[0][own], packed[1][:, own], grads[0][own], grads[1][of], grads[2][of]]
        for part, whole in zip(parts, (*alone, *alone_grads), strict=True):
            assert torch.equal(part, whole[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_document_does_not_reach_another(dtype, bad):
    cu = bounds([50, 30, 17, 70])
    mine = torch.ones(187, dtype=torch.bool)
    mine[80:97] = mine[167:] = False  # the third document, and the tail
    options = {"cu_seqlens_q": cu, "causal": True, "window": (33, 0), "sinks": seeded(4, seed=5),
               "softcap": 4.0, "return_lse": True}
    inputs = [x[0] for x in dense(1, 187, 187, 4, 2, 24, dtype=dtype)]
    clean, clean_grads, upstream = run(lambda *x: cpu.attention(*x, **options), inputs)
    broken = [x.clone() for x in inputs]
    for x in broken:
        x[~mine] = bad
    upstream[0][~mine] = bad
    upstream[1][:, ~mine] = bad
    got, grads, _ = run(lambda *x: cpu.attention(*x, **options), broken, upstream)
    for a, b in zip((clean[0], clean[1].t(), *clean_grads), (got[0], got[1].t(), *grads),
                    strict=True):
        assert torch.equal(a[mine], b[mine])
    for x in (got[0], *grads):
        assert not x[167:].any()
    assert torch.equal(got[1][:, 167:], clean[1][:, 167:])


def test_blocks_outside_the_window_are_not_visited():
    inputs = dense(1, 600, 600, 2, 1, 16)
    options = {"window": (20, 30)}
    clean, clean_grads, upstream = run(lambda *x: cpu.attention(*x, **options), inputs)
    inputs[1][:, 256:320] = torch.nan  # one block of keys
    got, grads, _ = run(lambda *x: cpu.attention(*x, **options), inputs, upstream)
    for a, b in zip((*clean, *clean_grads), (*got, *grads), strict=True):
        for far in (slice(0, 128), slice(448, 600)):
            assert torch.equal(a[:, far], b[:, far])
    assert got[0].isnan().any()


def test_a_query_that_sees_nothing():
    q, k, v = (x.requires_grad_() for x in dense(1, 90, 50, 2, 1, 16))
    out, lse = cpu.attention(q, k, v, causal=True, return_lse=True)
    assert not out[:, :40].any()
    assert (lse[..., :40] == -torch.inf).all()
    # What a sum of such terms sends back: gradients that are no numbers.
    weight = torch.ones_like(lse)
    weight[..., :40] = torch.nan
    grads = torch.autograd.grad((out, lse), (q, k, v), (torch.ones_like(out), weight))
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[0][:, :40].any()
    sinks = torch.tensor([0.5, -3.0])
    out, lse = cpu.attention(q, k, v, causal=True, sinks=sinks, return_lse=True)
    assert not out[:, :40].any()
    assert torch.equal(lse[0, :, :40], sinks[:, None].expand(2, 40))


def test_sinks_at_the_ends():
    inputs = dense(1, 70, 70, 2, 1, 16)
    plain = run(lambda *x: cpu.attention(*x, causal=True, return_lse=True), inputs)
    none = torch.full((2,), -torch.inf)
    got = run(lambda *x: cpu.attention(*x[:3], causal=True, return_lse=True, sinks=x[3]),
              [*inputs, none])
    assert all(torch.equal(a, b) for a, b in zip(plain[0] + plain[1], got[0] + got[1][:3],
                                                 strict=True))
    assert not got[1][3].any()
    out, lse = cpu.attention(*inputs, sinks=torch.full((2,), 1e4), return_lse=True)
    assert not out.any()
    assert (lse == 1e4).all()


def test_gradients_that_are_views():
    """Expanded, and strided: as sums and slices give them."""
    leaves = [x.requires_grad_() for x in dense(2, 40, 40, 2, 1, 16)]
    out, lse = cpu.attention(*leaves, causal=True, return_lse=True)
    ones = torch.autograd.grad((out, lse), leaves, (torch.ones_like(out), torch.ones_like(lse)),
                               retain_graph=True)
    for a, b in zip(torch.autograd.grad(out.sum() + lse.sum(), leaves, retain_graph=True), ones,
                    strict=True):
        assert torch.equal(a, b)
    wide = seeded(2, 40, 2, 32)
    strided, packed = (torch.autograd.grad(out, leaves, g, retain_graph=True)
                       for g in (wide[..., ::2], wide[..., ::2].contiguous()))
    assert all(torch.equal(a, b) for a, b in zip(strided, packed, strict=True))
    (only,) = torch.autograd.grad(lse, leaves[:1], torch.ones_like(lse))
    assert only.isfinite().all()


def test_other_spellings_of_the_same():
    q, k, v = (x[0] for x in dense(1, 90, 90, 2, 1, 16))
    cu = bounds([30, 60])
    expected = cpu.attention(q, k, v, causal=True, cu_seqlens_q=cu, cu_seqlens_k=cu)
    for options in ({"cu_seqlens_q": cu}, {"cu_seqlens_q": cu.long(), "softcap": 0.0},
                    {"cu_seqlens_q": cu.short(), "window": (-1, 5), "scale": 0.25},
                    {"cu_seqlens_q": cu, "max_seqlen_q": 60, "max_seqlen_k": 60,
                     "deterministic": False, "window": (90, -1)}):
        assert torch.equal(cpu.attention(q, k, v, causal=True, **options), expected)
    doubles = torch.zeros(2, dtype=torch.float64).requires_grad_()
    out = cpu.attention(q, k, v, cu_seqlens_q=cu, sinks=doubles)
    (grad,) = torch.autograd.grad(out.sum(), doubles)
    assert grad.dtype == torch.float64


def test_tanh_of_the_softcap():
    """The lse of one key is its score: tanh itself, within a few ulp."""
    x = torch.cat([torch.logspace(-30, 1.5, 20000), torch.linspace(0.001, 10, 20000)])
    x = torch.cat([x, -x, torch.tensor([0.0, torch.inf, -torch.inf])]).view(-1, 1, 1)
    ones, cu = torch.ones_like(x), torch.arange(len(x) + 1)
    _, lse = cpu.attention(x, ones, ones, softcap=1.0, scale=1.0, cu_seqlens_q=cu, return_lse=True)
    truth = x.flatten().double().tanh()
    ulp = torch.exp2(truth.abs().clamp(min=1e-37).log2().floor() - 23)
    assert ((lse[0].double() - truth).abs() / ulp).max() < 4


@pytest.mark.parametrize("heads", [1, 3])
def test_sink_gradients_do_not_depend_on_the_number_of_threads(heads):
    inputs = [*dense(1, 40000, 40000, heads, 1, 4), seeded(heads, seed=4)]
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(lambda *x: cpu.attention(*x[:3], window=(3, 0), sinks=x[3]), inputs))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0][1], other[1], strict=True))


@pytest.mark.parametrize(("change", "message"), [
    ({"q": (1, 4, 3, 8)}, "3 query heads are not a multiple of 2"),
    ({"k": (1, 4, 2, 16), "v": (1, 4, 2, 16)}, r"k \(1, 4, 2, 16\), v .* are not \(B, Sq, Hq, D\)"),
    ({"q": (1, 4, 2, 0), "k": (1, 4, 2, 0), "v": (1, 4, 2, 0)}, "heads of no elements"),
    ({"v": (1, 5, 2, 8)}, r"v \(1, 5, 2, 8\) are not"),
    ({"q": (4, 2, 8)}, "cu_seqlens_q is for packed"),
    ({"cu_seqlens_q": [0, 4]}, r"are not \(T, Hq, D\)"),
    ({"cu_seqlens_k": [0, 4]}, "cu_seqlens_k needs cu_seqlens_q"),
    ({"window": (-2, 0)}, "window"), ({"window": (0, -2)}, "window"),
    ({"softcap": -1.0}, "softcap"), ({"softcap": float("nan")}, "softcap"),
    ({"scale": 0.0}, "scale"), ({"scale": -1.0}, "scale"), ({"scale": float("inf")}, "scale"),
    ({"sinks": (3,)}, r"sinks \(3,\) must have one number for each of the 2 query heads"),
], ids=str)
def test_refused(change, message):
    shapes = {name: change.pop(name, (1, 4, 2, 8)) for name in "qkv"}
    options = {name: torch.tensor(value) if name.startswith("cu") else seeded(*value)
               if name == "sinks" else value for name, value in change.items()}
    with pytest.raises(ValueError, match=message) as caught:
        cpu.attention(*(seeded(*shape) for shape in shapes.values()), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("queries", "keys", "message"), [
    ([1, 8], None, "cu_seqlens_q must begin at 0, got 1"),
    ([0, 4, 2, 8], None, "cu_seqlens_q decreases from 4 to 2 at 2"),
    ([0, 9], None, "cu_seqlens_q ends at 9, after the last of 8 tokens"),
    ([0, 8], [0, 9], "cu_seqlens_k ends at 9"),
    ([0, 8], [2, 8], "cu_seqlens_k must begin"),
    ([0, 8], [0, 4, 8], r"\(2,\) and cu_seqlens_k \(3,\) count different"),
    ([[0, 8]], None, r"must be \(N \+ 1,\) integers"),
    ([], None, r"must be \(N \+ 1,\) integers"),
    ([0.0, 8.0], None, r"must be \(N \+ 1,\) integers"),
], ids=str)
def test_refused_boundaries(queries, keys, message):
    x = seeded(8, 2, 8)
    cu_k = None if keys is None else torch.tensor(keys)
    with pytest.raises(ValueError, match=message) as caught:
        cpu.attention(x, x, x, cu_seqlens_q=torch.tensor(queries), cu_seqlens_k=cu_k)
    assert "\n" not in str(caught.value)


def test_other_tokens_need_their_own_boundaries():
    x, y = seeded(8, 2, 8), seeded(9, 2, 8)
    with pytest.raises(ValueError, match="give cu_seqlens_k"):
        cpu.attention(x, y, y, cu_seqlens_q=torch.tensor([0, 8]))
    with pytest.raises(TypeError, match="must be of one type"):
        cpu.attention(x, x.bfloat16(), x.bfloat16(), cu_seqlens_q=torch.tensor([0, 8]))
    assert cpu.attention(*[seeded(0, 5, 2, 16)] * 3).shape == (0, 5, 2, 16)
