"""Weight-decay groups."""

import pytest
import torch
from torch import nn

from fastllm.optim import describe, param_groups


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.norm = nn.LayerNorm(4)
        self.router_norm = nn.Parameter(torch.ones(2, 4))  # a norm by name, though it is a matrix
        self.lm_head = nn.Linear(4, 11, bias=False)


def names(groups):
    return {group.name: group.names for group in groups}


def test_decay_leaves_out_norms_and_biases():
    groups = param_groups(Small().named_parameters(), 0.1)
    assert names(groups) == {
        "decay": ["embed_tokens.weight", "layers.0.weight", "layers.1.weight", "layers.2.weight",
                  "lm_head.weight"],
        "no_decay": ["router_norm", "layers.0.bias", "layers.1.bias", "layers.2.bias",
                     "norm.weight", "norm.bias"]}
    assert [group.weight_decay for group in groups] == [0.1, 0.0]
    assert groups[0].numel() == 44 + 3 * 16 + 44


def test_embeddings_may_be_left_out():
    groups = param_groups(Small().named_parameters(), 0.1, decay_embeddings=False)
    assert "embed_tokens.weight" in names(groups)["no_decay"]
    assert "lm_head.weight" in names(groups)["decay"]


def test_positions_count_the_trainable_parameters_in_the_given_order():
    model = Small()
    model.layers[1].requires_grad_(False)
    groups = param_groups(model.named_parameters(), 0.1)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    for group in groups:
        assert [trainable[i] for i in group.positions] == group.names
    assert sorted(i for group in groups for i in group.positions) == list(range(len(trainable)))


def test_tied_parameters_come_once_and_twice_is_an_error():
    model = Small()
    model.lm_head.weight = model.embed_tokens.weight
    groups = param_groups(model.named_parameters(), 0.1)
    assert "lm_head.weight" not in names(groups)["decay"]
    with pytest.raises(ValueError, match=r"lm_head\.weight comes twice .first as embed_tokens"):
        param_groups(model.named_parameters(remove_duplicate=False), 0.1)


def test_an_empty_group_is_not_made_and_no_parameter_is_an_error():
    weight = torch.ones(2, 2, requires_grad=True)
    assert list(names(param_groups([("w", weight)], 0.1))) == ["decay"]
    with pytest.raises(ValueError, match="no parameter with requires_grad"):
        param_groups([("w", torch.ones(2))], 0.1)


def test_the_summary_counts_and_shortens():
    lines = describe(param_groups(Small().named_parameters(), 0.1)).splitlines()
    assert lines[0].split() == ["decay", "weight_decay", "0.1", "5", "tensors", "136",
                                "parameters:", "embed_tokens.weight,", "layers.*.weight,",
                                "lm_head.weight"]
    assert "no_decay" in lines[1] and "layers.*.bias" in lines[1]
