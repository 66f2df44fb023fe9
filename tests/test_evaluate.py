"""fastllm.evaluate: bits per byte against figures worked out by hand."""

import math
import random
import shutil
import subprocess

import pytest
import torch

from fastllm.config import UserError
from fastllm.evaluate import evaluate, xz_bits_per_byte


class Rows:
    """A stand-in for a batch: `count` trained tokens of a loss known beforehand."""

    def __init__(self, count):
        self.count = count

    def to(self, device):
        return self


def uniform(vocab):
    """A model that gives every token of the vocabulary the same probability."""
    return lambda model, batch: (torch.tensor(batch.count * math.log(vocab)), batch.count)


def test_a_uniform_model_over_256_tokens_needs_8_bits_a_token():
    result = evaluate(None, [Rows(10), Rows(0), Rows(30)], 20, device=torch.device("cpu"),
                      loss=uniform(256))
    assert result["val_loss"] == pytest.approx(math.log(256), rel=1e-6)
    assert result["val_tokens"] == 40
    assert result["val_bpb"] == pytest.approx(8 * 40 / 20, rel=1e-6)


def test_no_gradient_is_kept():
    seen = []

    def loss(model, batch):
        seen.append(torch.is_grad_enabled())
        return torch.tensor(1.0), 1

    evaluate(None, [Rows(1)], 1, device=torch.device("cpu"), loss=loss)
    assert seen == [False]


@pytest.mark.parametrize("batches", [[], [Rows(0)]])
def test_nothing_to_evaluate_is_an_error(batches):
    with pytest.raises(UserError, match=r"data\.holdout"):
        evaluate(None, batches, 0, device=torch.device("cpu"), loss=uniform(2))


def test_xz_is_that_of_the_command_line(tmp_path):
    draw = random.Random(0)
    words = [bytes(draw.choices(range(97, 110), k=5)) for _ in range(50)]
    documents = [b" ".join(draw.choices(words, k=200)) for _ in range(20)]
    ours = xz_bits_per_byte(documents)
    assert 1 < ours < 8
    if xz := shutil.which("xz"):
        text = b"".join(documents)
        packed = subprocess.run([xz, "-9", "-c"], input=text, capture_output=True, check=True)
        # liblzma's checksum type may differ between the two: a few bytes of container.
        assert ours == pytest.approx(8 * len(packed.stdout) / len(text), rel=0.01)


def test_xz_of_noise_needs_8_bits():
    assert xz_bits_per_byte([random.Random(1).randbytes(20000)]) == pytest.approx(8, abs=0.05)
