"""Peak memory of the linear loss: counted by the allocator where small, worked out where large."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import memory


def test_the_peak_of_a_call_is_counted():
    def run():
        a = torch.ones(1000)
        del a
        b = torch.ones(500)
        return b + b

    assert memory.peak(run) == 4000
    assert memory.peak(lambda: torch.ones(500) + torch.ones(500)) == 6000


@pytest.mark.parametrize("contender", memory.OURS)
def test_no_more_than_a_part_of_the_logits_is_held(contender):
    """Narrow hidden states, so that tokens times words would stand out."""
    tokens, width, vocab = 128, 16, 2048
    assert memory.count((tokens, width, vocab), contender, 16) < 0.75 * 2 * tokens * vocab


@pytest.mark.parametrize("shape", memory.WORKED_OUT)
def test_least_memory_is_less_than_that_of_others(shape):
    bytes_of = {name: memory.formula(shape, name) for name in (
        "ours", "ours, recompute", "ours, recompute, main_grad", "liger, float32 sums", "cce",
        "cce, float32 sums", "eager")}
    if shape[0] < shape[2] / 4:
        assert bytes_of["ours, recompute, main_grad"] < bytes_of["cce"]
        assert bytes_of["ours, recompute"] < 0.6 * bytes_of["cce, float32 sums"]
        assert bytes_of["ours"] <= bytes_of["liger, float32 sums"]
    assert bytes_of["ours"] < 0.25 * bytes_of["eager"]
