"""Shapes, types, options and layouts drawn together, for every kernel on every backend.

A few draws a kernel in `make test`, over two thousand in `make battery`.
"""

import kernel_check as kc
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

QUICK, MANY = 12, 45
by_case = pytest.mark.parametrize(("kernel", "backend"), kc.CASES, ids=kc.IDS)
quiet = {"deadline": None, "derandomize": True, "database": None,
         "suppress_health_check": list(HealthCheck)}


def draw_call(kernel, data, options, layouts):
    axes = [st.sampled_from(sorted({shape[i] for shape in kernel.test_shapes}))
            for i in range(len(kernel.axes))]
    shape = data.draw(st.tuples(*axes).filter(lambda s: torch.Size(s).numel() <= 40_000))
    call = kc.make(kernel, shape, data.draw(st.sampled_from(kernel.dtypes)),
                   draw=data.draw(st.integers(0, 1 << 20)), **options)
    if kernel.mutates:
        return call
    layout = kc.LAYOUTS.get(data.draw(st.sampled_from(["plain", *layouts])), lambda t: t)
    return call.map(lambda t: layout(t) if t.dim() > 1 else t)


@by_case
@settings(max_examples=QUICK, **quiet)
@given(data=st.data())
def test_draws(kernel, backend, data):
    options = data.draw(st.sampled_from([{}, *kernel.variants.values()]))
    call = draw_call(kernel, data, options, ["padded"])
    if kc.takes(kernel, backend, call):
        kc.check(kernel, kc.op_of(kernel, backend), call)


@pytest.mark.battery
@by_case
@settings(max_examples=MANY, **quiet)
@given(data=st.data())
def test_many_draws(kernel, backend, data):
    """Two variants' options at once: the op computes what they mean together, or names what it
    cannot combine."""
    known = st.sampled_from([{}, *kernel.variants.values(), *kernel.bench_options.values()])
    options = {**data.draw(known), **data.draw(known)}
    call = draw_call(kernel, data, options, ["padded", "strided", "permuted"])
    if not kc.takes(kernel, backend, call):
        return
    try:
        kc.check(kernel, kc.op_of(kernel, backend), call)
    except (ValueError, TypeError) as refusal:
        if not str(refusal).startswith(kernel.public.__name__):
            raise


def test_there_are_enough():
    assert (QUICK + MANY) * len(kc.CASES) >= 2000
