"""Log-probabilities of packed sequences against the texts alone, and what they hold in memory."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastllm.objectives.preference import PreferenceConfig, loss
from fastllm.objectives.sequences import sequence_logprobs


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False},
                                     {"final_logit_softcapping": 1.5}])
def test_sums_and_counts_are_those_of_the_texts_alone(make_model, make_batch, texts,
                                                      plain_logprobs, changes):
    model, batch = make_model(**changes), make_batch()
    sums, counts = sequence_logprobs(model, batch)
    assert (sums.dtype, counts.dtype) == (torch.float32, torch.int64)
    assert sums.shape == counts.shape == (len(batch.cu_seqlens) - 1,)
    wanted = torch.stack(plain_logprobs(copy.deepcopy(model).double(), texts))
    at = batch.pairs.flatten()
    torch.testing.assert_close(sums[at].double(), wanted, rtol=1e-5, atol=1e-5)
    assert counts[at].tolist() == [len(text.ids) - text.prompt for text in texts]
    tails = [n for n in range(len(sums)) if n not in at.tolist()]
    assert tails and not sums[tails].any() and not counts[tails].any()


def test_chunks_and_repetition_change_nothing(make_model, make_batch):
    model, batch = make_model(), make_batch()
    whole, small, again = (sequence_logprobs(model, batch, chunk_size=size)[0]
                           for size in (None, 5, 5))
    torch.testing.assert_close(whole, small, rtol=1e-6, atol=1e-6)
    assert torch.equal(small, again)


def test_nothing_trained_is_zero(make_model, make_batch):
    model, batch = make_model(), make_batch()
    batch.labels.fill_(-100)
    sums, counts = sequence_logprobs(model, batch)
    assert not sums.any() and not counts.any()
    sums.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an op makes, in the forward and in the backward."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, list | tuple) else (out,):
            if isinstance(tensor, torch.Tensor):
                Largest.elements = max(Largest.elements, tensor.numel())
        return out


@pytest.mark.parametrize("name", ["dpo", "orpo"])
def test_no_tensor_of_tokens_by_vocabulary(make_model, draw, packed, name):
    """1024 tokens and 1024 words: a million logits. Chunks of 8 and the head have 32 thousand."""
    texts = draw([(4, 28)] * 32)
    batch = packed(texts, [list(range(n, n + 8)) for n in range(0, 32, 8)], width=256,
                   reference=torch.zeros(16, 2))
    model = make_model(vocab_size=1024, max_position_embeddings=256)
    Largest.elements = 0
    with Largest():
        loss(model, batch, PreferenceConfig(name=name, chunk_size=8))[0].backward()
    tokens = batch.input_ids.numel()
    assert tokens * 32 <= Largest.elements <= tokens * 80 * 2 < tokens * 1024 / 4
    assert all(p.grad is not None for p in model.parameters())
