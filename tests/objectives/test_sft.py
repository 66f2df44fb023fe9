"""Supervised fine-tuning: pretraining's loss, and NEFTune's noise by its paper's formula."""

import itertools
import math

import pytest
import torch

from fastllm import adapters
from fastllm.adapters import AdapterConfig
from fastllm.config import UserError, build
from fastllm.objectives import pretrain, sft
from fastllm.objectives.pretrain import PretrainConfig
from fastllm.objectives.sft import SftConfig

ALPHA = 7.0
NOISY = SftConfig(neftune_alpha=ALPHA)


def noisy_loss(model, batch):
    torch.manual_seed(11)
    return sft.loss(model, batch, NOISY)


def by_hand(model, batch):
    """The loss with each position's embedding moved by its own document's scale."""
    torch.manual_seed(11)
    drawn = torch.rand(*batch.input_ids.shape, 32) * 2 - 1
    bounds = batch.cu_seqlens.tolist()
    for begin, end in itertools.pairwise(bounds):
        drawn.view(-1, 32)[begin:end] *= ALPHA / math.sqrt((end - begin) * 32)
    plain = model.embed_tokens.forward
    model.embed_tokens.forward = lambda ids: plain(ids) + drawn
    try:
        return pretrain.loss(model, batch)
    finally:
        model.embed_tokens.forward = plain


@pytest.mark.parametrize(("rows", "width"), [([[0, 1]], 13), ([[0, 1, 2, 3], [4, 5], [6, 7]], 28)],
                         ids=["a full row", "packed and padded"])
def test_noise_is_the_papers_in_value_and_gradient(make_model, texts, packed, rows, width):
    model, batch = make_model().train(), packed(texts, rows, width)
    value, count = noisy_loss(model, batch)
    value.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    wanted, number = by_hand(model, batch)
    wanted.backward()
    assert count == number == batch.num_tokens
    torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-6)
    assert (value - pretrain.loss(model, batch)[0]).abs() > 0.05
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-5, atol=1e-5)


def test_noise_is_bounded_by_each_documents_length(make_model, texts, packed):
    """What reaches the first layer, beside the plain embedding."""
    model, batch = make_model().train(), packed(texts, [[0, 1, 2, 3], [4, 5], [6, 7]])
    seen = []
    handle = model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    noisy_loss(model, batch)
    handle.remove()
    noise = (seen[0] - model.embed_tokens(batch.input_ids)).detach().flatten(0, 1).abs()
    bounds = batch.cu_seqlens.tolist()
    for begin, end in itertools.pairwise(bounds):
        bound = ALPHA / math.sqrt((end - begin) * 32)
        assert 0.8 * bound < noise[begin:end].max() <= bound + 1e-6
        assert noise[begin:end].mean() == pytest.approx(bound / 2, rel=0.25)


def test_evaluation_and_no_alpha_have_no_noise(make_model, make_batch):
    model, batch = make_model(), make_batch()
    plain = pretrain.loss(model, batch)[0]
    assert torch.equal(sft.loss(model.train(), batch)[0], plain)
    assert torch.equal(sft.loss(model.eval(), batch, NOISY)[0], plain)
    noisy_loss(model.train(), batch)
    assert torch.equal(pretrain.loss(model, batch)[0], plain)  # the hook is gone


def test_the_hook_goes_when_the_model_fails(make_model, make_batch):
    model, batch = make_model().train(), make_batch()
    batch.max_seqlen = 1000
    with pytest.raises(ValueError):
        noisy_loss(model, batch)
    assert not model.embed_tokens._forward_hooks


def test_other_terms_are_those_of_pretraining(make_model, make_batch):
    model, batch = make_model().train(), make_batch()
    options = {"label_smoothing": 0.1, "z_loss": 1e-2, "chunk_size": 5}
    assert torch.equal(sft.loss(model, batch, SftConfig(**options))[0],
                       pretrain.loss(model, batch, PretrainConfig(**options))[0])


def test_bf16_keeps_its_type(make_model, make_batch):
    model = make_model().to(torch.bfloat16).train()
    value, _ = noisy_loss(model, make_batch())
    assert value.dtype == torch.float32 and value.isfinite()


def test_compiled_model_draws_anew_and_is_compiled_once(make_model, make_batch, texts, packed):
    model, batch = make_model().train(), make_batch()
    other = packed(texts, [[2, 3, 0, 1], [6, 7], [4, 5]])
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters["stats"]
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(noisy_loss(compiled, batch)[0], noisy_loss(model, batch)[0])
    torch.testing.assert_close(noisy_loss(compiled, other)[0], noisy_loss(model, other)[0])
    graphs = counters["unique_graphs"]
    first, second = (sft.loss(compiled, batch, NOISY)[0] for _ in range(2))
    assert first != second
    assert counters["unique_graphs"] == graphs
    torch._dynamo.reset()


def test_noise_and_virtual_tokens_are_refused(make_model, make_batch):
    model = make_model(max_position_embeddings=64).train()
    adapters.apply(model, build(AdapterConfig, {"name": "prompt"}), seed=0)
    with pytest.raises(UserError, match="neftune-alpha does not go with"):
        noisy_loss(model, make_batch())


def test_negative_alpha_is_refused():
    with pytest.raises(UserError, match="neftune-alpha"):
        build(SftConfig, {"neftune_alpha": -1})
