"""ZeRO's engine in C++ beside the one in Python, in a world of one: no process group is needed.

(tests/dist runs both over real ranks.) These also run under the sanitizers.
"""

import gc

import pytest
import torch

_C = pytest.importorskip("fastllm._C", reason="built without a C++ compiler")

from fastllm.dist.python_engine import Options, PythonEngine  # noqa: E402

SHAPES = [(3,), (0, 4), (17, 31), (256,), (1,), (40, 40)]


def parameters(dtype, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=draw).to(dtype)) for shape in SHAPES]


def engines(dtype, options):
    """(engine, parameters, buckets) of both kinds: two buckets, the later parameters first."""
    made = []
    for kind in (PythonEngine, _C.Engine):
        params = parameters(dtype)
        engine = kind(0, 1, None, None, options)
        buckets = [engine.add("late", params[3:], True), engine.add("early", params[:3], True)]
        made.append((engine, params, buckets))
    return made


def backward(params, seed, skip=()):
    """Gradients that are random numbers, through autograd, some of them transposed."""
    draw = torch.Generator().manual_seed(seed)
    loss = 0.0
    for i, param in enumerate(params):
        factor = torch.randn(param.shape, generator=draw)
        if i not in skip:
            wide = param.float()
            loss = loss + ((wide.t() * factor.t()) if param.dim() == 2 else wide * factor).sum()
    loss.backward()


@pytest.mark.parametrize("wire", ["same", "fp32", "bf16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_gradients_are_the_oracles(dtype, wire):
    """Three steps of two micro-batches that are exchanged and one that is not."""
    made = engines(dtype, Options(wire=wire, scale=0.5))
    for step in range(3):
        found = []
        for engine, params, buckets in made:
            engine.local = True
            backward(params, 10 * step)
            engine.local = False
            for micro in (1, 2):
                backward(params, 10 * step + micro, skip=(2,) if micro == 2 else ())
            square, unused = engine.finish()
            found.append([engine.grad(number).clone() for number in buckets])
            assert unused == [] and square == pytest.approx(
                sum(float(grad.double().square().sum()) for grad in found[-1]), rel=1e-12)
            engine.zero()
            assert all(param.grad is None for param in params)
        for ours, theirs in zip(*found, strict=True):
            assert ours.dtype == (dtype if dtype == torch.float64 else torch.float32)
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("in_flight", [0, 2])
def test_gradients_are_gathered_where_every_rank_needs_them(in_flight):
    """Parameters at their places in the bucket, `grad` a part of it; three rounds are added up."""
    options = Options(gather_grads=True, in_flight=in_flight)
    for engine, params, buckets in engines(torch.float32, options):
        expected = parameters(torch.float32)
        for round_ in range(3):
            backward(params, round_)
            backward(expected, round_)
        engine.finish()
        for number, mine in zip(buckets, (expected[3:], expected[:3]), strict=True):
            whole = engine.whole_grad(number)
            assert engine.grad(number).data_ptr() == whole.data_ptr()
            for param, begin in zip(mine, engine.layout(number).begins, strict=True):
                found = whole[begin:begin + param.numel()].view(param.shape)
                assert torch.allclose(found, param.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_parameters_travel_in_int8(dtype):
    """Both engines' the same; off by half a step of a block's scale at most; exact on demand, and
    the shard is never rounded."""
    found = []
    for engine, params, buckets in engines(dtype, Options(release=True, param_wire="int8")):
        expected = parameters(dtype)
        for exact in (False, True, False):
            engine.exact = exact
            for number in buckets:
                engine.gather_start(number)
                engine.gather_wait(number)
            for param, true in zip(params, expected, strict=True):
                if exact:
                    assert torch.equal(param, true)
                elif true.numel():
                    apart, most = (param - true).abs().max(), true.abs().max()
                    assert apart <= (0.51 / 127 + torch.finfo(dtype).eps) * most
                    assert apart > 0 or true.numel() == 1
            if not exact:
                found.append([param.detach().clone() for param in params])
            for number in buckets:
                engine.release(number)
        held = torch.cat([engine.shard(number) for number in buckets])
        assert torch.equal(held[held != 0].sort()[0],
                           torch.cat([p.detach().flatten() for p in expected]).sort()[0])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_unused_parameters_are_listed():
    for engine, params, buckets in engines(torch.float32, Options()):
        backward(params, 1, skip=(2, 4))
        assert engine.finish()[1] == [(buckets[0], 1), (buckets[1], 2)]
        engine.zero()
        backward(params, 1)
        assert engine.finish()[1] == []


def test_parameters_come_and_go():
    """Released they read as NaN and take no memory; gathered, the forward and backward are right,
    for views that autograd saved before the release too."""
    for engine, params, buckets in engines(torch.float32, Options(release=True)):
        expected = parameters(torch.float32)
        for number in buckets:
            assert engine.full(number).untyped_storage().nbytes() == 0
        assert params[2].shape == (17, 31) and bool(params[2].isnan().all())
        for _ in range(3):
            for number in buckets:
                engine.gather_start(number)
                engine.gather_wait(number)
            assert all(torch.equal(p, e) for p, e in zip(params, expected, strict=True))
            x = torch.ones(2, 31, requires_grad=True)
            y = (x @ params[2].t()).square().sum()  # saves a view of the weight
            for number in buckets:
                engine.release(number)
            engine.gather_wait(buckets[1])
            y.backward()
            assert torch.allclose(x.grad, 2 * (torch.ones(2, 17) * expected[2].sum(1))
                                  @ expected[2])
            engine.finish()
            engine.shard(buckets[1]).mul_(1.0)
            engine.publish()
            engine.zero()
            assert bool(params[2].isnan().all())


def test_an_update_of_the_shard_is_seen_by_parameters_and_autograd():
    for engine, params, buckets in engines(torch.float32, Options()):
        version = params[3]._version
        engine.shard(buckets[0]).fill_(2.0)
        engine.publish()
        assert bool((params[3] == 2).all()) and params[3]._version > version


def test_parameters_outlive_the_engine():
    for engine, params, _ in engines(torch.bfloat16, Options()):
        engine.close()
        del engine
        gc.collect()
        backward(params, 3)
        assert params[5].grad is not None
    engine = _C.Engine(0, 1, None, None, Options(release=True))
    params = parameters(torch.float32)
    engine.add("all", params, True)
    del engine  # without close: the hooks go with it
    gc.collect()
    params[2].data = torch.ones(17, 31)
    params[2].sum().backward()


def test_the_listener_hears_of_every_launch():
    for engine, params, _ in engines(torch.float32, Options()):
        heard = []
        engine.check = heard.append
        backward(params, 0)
        engine.finish()
        assert heard == ["reduce-scatter of late", "reduce-scatter of early"]
