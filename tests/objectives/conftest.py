"""Documents with prompts, the same packed in pairs, and a model for them."""

from dataclasses import dataclass

import pytest
import torch

from fastllm.data.collate import Batch
from fastllm.model import Decoder, ModelConfig

VOCAB = 48


@dataclass(frozen=True)
class Text:
    """ids (m,), of which the first `prompt` are not trained."""

    ids: torch.Tensor
    prompt: int

    @property
    def labels(self):
        """(m - 1,): the ids after each, -100 in the prompt."""
        labels = self.ids[1:].clone()
        labels[:self.prompt - 1] = -100
        return labels


def draw_texts(sizes, seed=3):
    """Texts of (prompt, answer) sizes; the two of a pair, one after the other, share a prompt."""
    generator = torch.Generator().manual_seed(seed)
    texts = []
    for number, (prompt, answer) in enumerate(sizes):
        ids = torch.randint(3, VOCAB, (prompt + answer,), generator=generator)
        if number % 2:
            ids[:prompt] = texts[-1].ids[:prompt]
        texts.append(Text(ids, prompt))
    return texts


def pack(texts, rows, width=28, **fields):
    """The batch with these texts (by number) in each row of `width`, and padding after them."""
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    labels, positions = torch.full_like(ids, -100), torch.zeros_like(ids)
    bounds, segment = [0], {}
    for row, numbers in enumerate(rows):
        at = 0
        for number in numbers:
            text = texts[number]
            size = len(text.labels)
            ids[row, at:at + size] = text.ids[:-1]
            labels[row, at:at + size] = text.labels
            positions[row, at:at + size] = torch.arange(size)
            segment[number] = len(bounds) - 1
            at += size
            bounds.append(row * width + at)
        positions[row, at:] = torch.arange(width - at)
        if at < width:
            bounds.append((row + 1) * width)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    pairs = torch.tensor([[segment[number], segment[number + 1]]
                          for numbers in rows for number in numbers[::2]])
    return Batch(input_ids=ids, labels=labels, position_ids=positions, cu_seqlens=cu_seqlens,
                 max_seqlen=int(cu_seqlens.diff().max()), num_tokens=int((labels != -100).sum()),
                 pairs=pairs, **fields)


SIZES = [(4, 5), (4, 2), (3, 1), (3, 7), (6, 3), (6, 6), (2, 4), (2, 3)]
ROWS = [[0, 1, 2, 3], [4, 5], [6, 7]]


@pytest.fixture
def texts():
    """Four pairs: answers of 1 to 7 tokens."""
    return draw_texts(SIZES)


@pytest.fixture
def make_model():
    def make(**changes):
        config = ModelConfig(**{
            "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 40,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 32, "init_std": 0.2, **changes})
        return Decoder(config, generator=torch.Generator().manual_seed(0))
    return make


@pytest.fixture
def make_batch(texts):
    """The four pairs packed in three rows, with a reference near the model and judgements."""
    def make(reference=None, desirable=None):
        return pack(texts, ROWS, reference=reference, desirable=desirable)
    return make


@pytest.fixture
def packed():
    """`pack`, for texts of a test's own."""
    return pack


@pytest.fixture
def draw():
    """`draw_texts`, likewise."""
    return draw_texts


@pytest.fixture
def plain_logprobs():
    """Sum over each text's trained tokens, text by text in fp64, with all logits: no packing."""
    def measure(model, texts):
        sums = []
        for text in texts:
            logits = model.logits(model(text.ids[None, :-1]))[0]
            assert logits.dtype == torch.float64
            total = logits.new_zeros(())
            for t in range(text.prompt - 1, len(text.ids) - 1):
                row = logits[t]
                total = total + row[text.ids[t + 1]] - torch.log(torch.exp(row).sum())
            sums.append(total)
        return sums
    return measure


@pytest.fixture
def assert_like_truth():
    """Check a loss of four pairs, (value, count), and its gradients against an fp64 model's."""
    def check(model, found, truth, losses):
        value, count = found
        losses.sum().backward()
        assert (value.shape, value.dtype, count) == ((), torch.float32, 4)
        torch.testing.assert_close(value.double(), losses.sum().detach(), rtol=1e-5, atol=1e-5)
        value.backward()
        for ours, theirs in zip(model.parameters(), truth.parameters(), strict=True):
            scale = float(theirs.grad.abs().max())
            torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4,
                                       atol=2e-5 * scale)

    return check
