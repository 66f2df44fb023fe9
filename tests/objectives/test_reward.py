"""The pairwise loss against Bradley and Terry's formula, text by text in fp64."""

import copy
from dataclasses import replace

import pytest
import torch

from fastllm.config import UserError, build
from fastllm.model.reward import RewardModel
from fastllm.objectives.reward import RewardConfig, loss, loss_and_measures, measure


@pytest.fixture
def model(make_model):
    return RewardModel(make_model(), generator=torch.Generator().manual_seed(5))


def by_hand(model, texts, weight):
    """Each pair's loss and rewards; a text's is read at its last token but one."""
    rewards = [model.score.weight[0] @ model.decoder(text.ids[None, :-1])[0, -1] for text in texts]
    rows = []
    for chosen, rejected in zip(rewards[::2], rewards[1::2], strict=True):
        likely = torch.exp(chosen) / (torch.exp(chosen) + torch.exp(rejected))
        rows.append((-torch.log(likely) + weight * (chosen + rejected) ** 2, chosen, rejected))
    return [torch.stack(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("weight", [0.0, 0.01, 0.5])
def test_value_and_gradients(model, make_batch, texts, assert_like_truth, weight):
    truth, batch = copy.deepcopy(model).double(), make_batch()
    config = RewardConfig(center_coefficient=weight)
    losses, chosen, rejected = by_hand(truth, texts, weight)
    assert_like_truth(model, loss(model, batch, config), truth, losses)
    measured = measure(model, batch, config)
    wanted = {"loss": losses.sum(), "accuracy": (chosen > rejected).sum(),
              "margin": (chosen - rejected).sum(), "chosen_rewards": chosen.sum(),
              "rejected_rewards": rejected.sum()}
    assert measured.keys() == wanted.keys()
    for name, total in wanted.items():
        assert not measured[name].requires_grad
        assert measured[name].item() == pytest.approx(total.item(), rel=1e-4, abs=1e-5), name
    assert 0 < measured["accuracy"] < 4
    value, count, sums = loss_and_measures(model, batch, config)
    assert value.requires_grad and not any(total.requires_grad for total in sums.values())
    assert {"loss": value.detach(), **sums} == measured and count == 4


def test_labels_do_not_matter(model, make_batch):
    batch = make_batch()
    before = loss(model, batch)[0]
    batch.labels.fill_(-100)
    assert torch.equal(loss(model, batch)[0], before)


def test_extreme_rewards_are_finite(model, make_batch):
    with torch.no_grad():
        model.score.weight.mul_(1e6)
    value, _ = loss(model, make_batch())
    value.backward()
    assert value.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())


def test_bf16_rewards_are_not_rounded(model, make_batch):
    model = model.to(torch.bfloat16)
    measured = measure(model, make_batch())
    assert measured["margin"].dtype == torch.float32
    assert measured["margin"].bfloat16().float() != measured["margin"]


def test_a_batch_without_pairs_and_a_negative_weight_are_refused(model, make_batch):
    for function in (loss, measure):
        with pytest.raises(UserError, match="chosen and rejected"):
            function(model, replace(make_batch(), pairs=None))
    with pytest.raises(UserError, match="center-coefficient"):
        build(RewardConfig, {"center_coefficient": -1})
