"""Initial weights: their spread by name, and that they follow from the seed alone."""

import math

import pytest
import torch

from fastllm.config import UserError
from fastllm.model import Decoder, ModelConfig, init_weights
from fastllm.model.layers import named_parts


def config(**changes):
    return ModelConfig(**{"vocab_size": 512, "hidden_size": 128, "intermediate_size": 320,
                          "num_hidden_layers": 3, "num_attention_heads": 4,
                          "num_key_value_heads": 2, "max_position_embeddings": 16,
                          "tie_word_embeddings": False, **changes})


def build(seed=0, **changes):
    return Decoder(config(**changes), generator=torch.Generator().manual_seed(seed))


def expected_std(init, name, shape, scaled):
    if name == "embed_tokens.weight":
        return 0.02
    std = {"normal": 0.02, "xavier": math.sqrt(2 / sum(shape)), "kaiming": math.sqrt(2 / shape[1])}
    divisor = math.sqrt(6) if scaled and ("o_proj" in name or "down_proj" in name) else 1.0
    return std[init] / divisor


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("init", ["normal", "xavier", "kaiming"])
def test_every_matrix_has_the_std_of_its_name(init, scaled):
    model = build(init=init, scaled_residual_init=scaled, init_std=0.02)
    checked = 0
    for name, weight in named_parts(model):
        if weight.dim() == 2:
            std = expected_std(init, name, weight.shape, scaled)
            # The estimate's own standard error is std / sqrt(2n); five of them never fail by luck.
            slack = 5 / math.sqrt(2 * weight.numel())
            assert weight.std().item() == pytest.approx(std, rel=slack), name
            assert abs(weight.mean().item()) < 5 * std / math.sqrt(weight.numel()), name
            checked += 1
    assert checked == 3 * 7 + 2


def test_norms_are_one_and_biases_zero():
    model = build(qk_norm=True, attention_bias=True)
    for name, tensor in named_parts(model):
        if "norm" in name:
            assert (tensor == 1).all(), name
        if name.endswith("bias"):
            assert (tensor == 0).all(), name


def test_norms_with_an_offset_come_to_one():
    for name, tensor in named_parts(build(rms_norm_offset=1.0, sandwich_norms=True, qk_norm=True)):
        if "norm" in name:
            assert (tensor == 0).all(), name


def test_the_seed_decides_and_nothing_else_does():
    def weights(model):
        return dict(named_parts(model))

    first, again, other = weights(build(1)), weights(build(1)), weights(build(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]), name
        assert tensor.dim() == 1 or not torch.equal(tensor, other[name]), name

    # More layers, another head, a fused or lone projection, another dtype: same names, same values.
    deeper = weights(build(1, num_hidden_layers=5, tie_word_embeddings=True,
                           scaled_residual_init=False))
    shallow = weights(build(1, scaled_residual_init=False))
    shared = shallow.keys() & deeper.keys()
    assert len(shared) == len(shallow) - 1
    assert all(torch.equal(shallow[name], deeper[name]) for name in shared)

    low = build(5).to(torch.bfloat16)
    init_weights(low, torch.Generator().manual_seed(1))
    assert all(torch.equal(first[name].bfloat16(), tensor) for name, tensor in weights(low).items())

    with torch.device("meta"):
        empty = Decoder(config())
    empty.to_empty(device="cpu")
    init_weights(empty, torch.Generator().manual_seed(1))
    assert all(torch.equal(first[name], tensor) for name, tensor in weights(empty).items())


def test_layers_differ_from_each_other():
    seen = [tensor for _, tensor in named_parts(build()) if tensor.shape == (320, 128)]
    assert len(seen) == 6
    assert len({tensor[0, 0].item() for tensor in seen}) == 6


def test_torch_manual_seed_governs_the_default():
    torch.manual_seed(3)
    first = Decoder(config()).embed_tokens.weight
    torch.manual_seed(3)
    assert torch.equal(first, Decoder(config()).embed_tokens.weight)


def test_unknown_init_is_named():
    model = build()
    model.config.init = "magic"
    with pytest.raises(UserError, match=r"magic.*normal, xavier, kaiming"):
        init_weights(model)
