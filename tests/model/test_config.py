"""Shapes: what they count to, what they refuse."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastllm import ops
from fastllm.config import UserError, as_dict, build
from fastllm.model import (
    Decoder,
    ModelConfig,
    RopeScaling,
    flops_per_token,
    matmul_parameters,
    num_parameters,
    shapes,
)


@pytest.mark.parametrize(("name", "millions"), [
    ("demo", 5.48), ("minimind-26m", 25.83), ("minimind-64m", 63.91), ("llama-1b", 1235.81),
    ("llama-8b", 8030.26)])
def test_shapes_have_their_published_sizes(name, millions):
    assert round(num_parameters(shapes.config(name)) / 1e6, 2) == millions


@pytest.mark.parametrize("changes", [
    {}, {"tie_word_embeddings": False}, {"qk_norm": True}, {"attention_bias": True},
    {"head_dim": 12, "num_key_value_heads": 1}])
def test_num_parameters_counts_what_a_model_has(changes):
    config = ModelConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                         num_attention_heads=4, max_position_embeddings=16, **changes)
    assert num_parameters(config) == sum(p.numel() for p in Decoder(config).parameters())


def test_flops_per_token_counts_what_torch_counts():
    config = ModelConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16)
    model = Decoder(config)
    with ops.use_backend("reference"), FlopCounterMode(display=False) as counter:
        model.logits(model(torch.randint(0, 64, (2, 16)))).sum().backward()
    counted = counter.get_flop_counts()["Global"]
    products = counted[torch.ops.aten.mm] + counted.get(torch.ops.aten.addmm, 0)
    assert products == 6 * matmul_parameters(config) * 32

    # Attention by enumeration: every query and the keys up to it, score and value, three passes.
    pairs = sum(query + 1 for query in range(16))
    by_hand = 3 * pairs * 2 * (2 * config.head_size) * config.num_attention_heads * 2
    assert flops_per_token(config, 16) * 16 == 6 * matmul_parameters(config) * 16 + by_hand


@pytest.mark.parametrize(("changes", "words"), [
    ({"hidden_size": 100, "num_attention_heads": 8}, ["hidden_size 100", "num_attention_heads 8"]),
    ({"head_dim": 33}, ["head_dim 33", "odd"]),
    ({"num_attention_heads": 8, "num_key_value_heads": 3}, ["num_key_value_heads 3"]),
    ({"dropout": 1.0}, ["dropout", "1.0"]),
    ({"init": "orthogonal"}, ["init", "orthogonal", "xavier"]),
    ({"recompute": "some"}, ["recompute", "some", "selective"]),
    ({"num_hidden_layers": 0}, ["num_hidden_layers", "0"]),
])
def test_impossible_shapes_are_refused_by_name(changes, words):
    with pytest.raises(UserError) as error:
        ModelConfig(**changes)
    assert all(word in str(error.value) for word in words)
    with pytest.raises(UserError) as error:
        build(ModelConfig, changes)
    assert words[0].split()[0] in str(error.value).replace("-", "_")


@pytest.mark.parametrize("changes", [
    {"rope_type": "longrope"},
    {"rope_type": "llama3", "low_freq_factor": 4.0, "high_freq_factor": 4.0}])
def test_rope_scaling_refuses_what_it_does_not_do(changes):
    with pytest.raises(UserError, match="rope_scaling"):
        RopeScaling(**changes)


def test_layers_build_and_override():
    layer = {**shapes.llama_1b(), "hidden_size": 64, "rope_scaling": {"rope_type": "default"}}
    config = build(ModelConfig, layer)
    assert (config.hidden_size, config.rope_scaling) == (64, RopeScaling())
    full = shapes.config("llama-8b")
    assert build(ModelConfig, as_dict(full)) == full
    assert dataclasses.replace(full, head_dim=None).head_size == 128


def test_unknown_shape_names_the_nearest():
    with pytest.raises(UserError, match="did you mean minimind-26m"):
        shapes.config("minimind-26")
