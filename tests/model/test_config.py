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


GEMMA = {"hidden_act": "gelu_pytorch_tanh", "scale_embeddings": True, "rms_norm_offset": 1.0,
         "rms_norm_eps": 1e-6}
PUBLISHED = {  # the shapes of models of others, and how many parameters those say they have
    "Mistral 7B": (7241.73, {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "sliding_window": 4096, "tie_word_embeddings": False}),
    "Gemma 2B": (2506.17, {
        **GEMMA, "vocab_size": 256000, "hidden_size": 2048, "intermediate_size": 16384,
        "num_hidden_layers": 18, "num_attention_heads": 8, "num_key_value_heads": 1,
        "head_dim": 256}),
    "Gemma 2 2B": (2614.34, {
        **GEMMA, "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216,
        "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 256, "sandwich_norms": True}),
    "Gemma 3 1B": (999.89, {
        **GEMMA, "vocab_size": 262144, "hidden_size": 1152, "intermediate_size": 6912,
        "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1,
        "head_dim": 256, "sandwich_norms": True, "qk_norm": True}),
}


@pytest.mark.parametrize(("millions", "fields"), PUBLISHED.values(), ids=PUBLISHED)
def test_models_of_others_have_their_published_sizes(millions, fields):
    assert round(num_parameters(ModelConfig(**fields)) / 1e6, 2) == millions


@pytest.mark.parametrize("changes", [
    {}, {"tie_word_embeddings": False}, {"qk_norm": True}, {"attention_bias": True},
    {"attention_output_bias": True}, {"mlp_bias": True}, {"sandwich_norms": True},
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


@pytest.mark.parametrize(("window", "layer_types"), [
    (1, None), (5, None), (16, None), (40, None), (5, ["sliding_attention", "full_attention"])])
def test_flops_of_windows_count_the_keys_that_a_query_meets(window, layer_types):
    config = ModelConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, max_position_embeddings=16, sliding_window=window,
                         layer_types=layer_types)
    pairs = sum(min(query + 1, config.window(layer) or 16)
                for layer in range(2) for query in range(16))
    by_hand = 3 * pairs * 2 * (2 * config.head_size) * config.num_attention_heads
    assert flops_per_token(config, 16) * 16 == pytest.approx(
        6 * matmul_parameters(config) * 16 + by_hand, rel=1e-12)


@pytest.mark.parametrize(("changes", "words"), [
    ({"hidden_act": "relu"}, ["hidden_act", "relu", "gelu_pytorch_tanh"]),
    ({"sliding_window": 0}, ["sliding_window", "0"]),
    ({"layer_types": ["local"] * 8}, ["layer_types", "local"]),
    ({"layer_types": ["full_attention"]}, ["layer_types", "1 layers"]),
    ({"layer_types": ["sliding_attention"] * 8}, ["layer_types", "sliding_window"]),
    ({"layer_types": ["full_attention"] * 8, "sliding_window": 4}, ["sliding_window", "leave"]),
    ({"rope_local_base_freq": 5.0}, ["rope_local_base_freq", "sliding_window"]),
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
