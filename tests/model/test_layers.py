"""RoPE's table against exact angles and transformers; fused projections shown in parts."""

import math

import pytest
import torch

from fastllm.model import Decoder, ModelConfig, RopeScaling, shapes
from fastllm.model.layers import RotaryTable, named_parts

SMALL = ModelConfig(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=3000,
                    attention_bias=True)


def test_rotary_table_is_correctly_rounded_far_out():
    table = RotaryTable(SMALL)
    for position, pair in [(0, 0), (1, 3), (2999, 0), (2999, 1)]:
        angle = position * 10000.0 ** (-2 * pair / 8)
        assert table.cos[position, pair] == pytest.approx(math.cos(angle), abs=1e-7)
        assert table.sin[position, pair] == pytest.approx(math.sin(angle), abs=1e-7)


def test_gather_by_position():
    table = RotaryTable(SMALL)
    cos, sin = table(torch.tensor([[5, 0], [2, 2]]))
    assert cos.shape == sin.shape == (2, 2, 4)
    assert torch.equal(cos[0, 0], table.cos[5])
    assert torch.equal(sin[1, 1], table.sin[2])


def test_rotary_table_survives_casts_and_meta():
    expected = RotaryTable(SMALL).cos
    model = Decoder(SMALL).to(torch.bfloat16).half().double()
    assert model.rotary.cos.dtype == torch.float32
    assert torch.equal(model.rotary.cos, expected)
    with torch.device("meta"):
        empty = Decoder(SMALL)
    assert empty.rotary.cos.is_meta
    assert torch.equal(empty.to_empty(device="cpu").rotary.cos, expected)
    assert not [name for name in model.state_dict() if "rotary" in name]


@pytest.mark.parametrize("config", [
    shapes.config("llama-1b"), shapes.config("llama-8b"), shapes.config("minimind-64m"),
    ModelConfig(rope_scaling=RopeScaling(rope_type="llama3", factor=4.0, low_freq_factor=2.0,
                                         high_freq_factor=9.0,
                                         original_max_position_embeddings=512)),
    ModelConfig(rope_scaling=RopeScaling(rope_type="linear", factor=4.0)),
    ModelConfig(rope_scaling=RopeScaling(rope_type="yarn", factor=4.0, beta_fast=20.0,
                                         original_max_position_embeddings=512))])
def test_the_table_is_that_of_transformers(config):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    theirs = LlamaRotaryEmbedding(LlamaConfig(
        head_dim=config.head_size, max_position_embeddings=config.max_position_embeddings,
        rope_parameters={"rope_theta": config.rope_theta, **config.rope_scaling.parameters()}))
    positions = torch.tensor([[0, 1, 100, 1000]])
    cos, sin = theirs(torch.zeros(1), positions)
    for ours, table in zip(RotaryTable(config)(positions), (cos, sin), strict=True):
        # Angles of a thousand radians have an error of 1e-4 in their float32.
        torch.testing.assert_close(ours, table[..., :config.head_size // 2], rtol=0, atol=2e-4)


def test_named_parts_are_views_that_cover_every_parameter_once():
    model = Decoder(SMALL)
    parts = dict(named_parts(model))
    assert sum(part.numel() for part in parts.values()) == sum(
        p.numel() for p in model.parameters())
    key = parts["layers.1.self_attn.k_proj.weight"]
    assert key.shape == (16, 32)
    key.fill_(7.0)
    fused = model.layers[1].self_attn.qkv_proj.weight
    assert (fused[32:48] == 7).all()
    assert not (fused[:32] == 7).any()
    assert not (fused[48:] == 7).any()
    assert parts["layers.0.self_attn.v_proj.bias"].shape == (16,)
    assert {"embed_tokens.weight", "layers.0.mlp.up_proj.weight", "norm.weight"} <= parts.keys()
