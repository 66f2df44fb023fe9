"""Preference losses against formulas written anew, text by text in fp64, and their edges."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from fastllm import config as configuration
from fastllm.config import UserError
from fastllm.objectives import preference
from fastllm.objectives.preference import LOSSES, PreferenceConfig, Scores, loss, measure, stuck

REFERENCE = torch.tensor([[-24.0, -11.0], [-6.0, -33.0], [-14.0, -22.0], [-20.0, -15.0]])
DESIRABLE = torch.tensor([True, False, False, True])
CASES = [
    {"name": "dpo"}, {"name": "dpo", "beta": 0.5, "label_smoothing": 0.2}, {"name": "ipo"},
    {"name": "ipo", "beta": 0.4}, {"name": "kto"},
    {"name": "kto", "beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.7},
    {"name": "orpo"}, {"name": "orpo", "beta": 0.6}, {"name": "simpo"},
    {"name": "simpo", "beta": 2.5, "gamma": 0.3}]
CONFIGS = [PreferenceConfig(**case) for case in CASES]


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def by_hand(sums, lengths, config):
    """Loss and the two rewards of each pair, by the papers, one pair after the other."""
    b, rows = config.beta, []
    moved = [sums[2 * i + 1] - float(REFERENCE[i, 1]) for i in range(4)]
    z0 = max(0.0, float(sum(moved).detach()) / 4)
    assert z0 > 0
    for i in range(4):
        c, r, nc, nr = sums[2 * i], sums[2 * i + 1], lengths[2 * i], lengths[2 * i + 1]
        rc, rr = c - float(REFERENCE[i, 0]), moved[i]
        if config.name == "dpo":
            e, p = config.label_smoothing, sigmoid(b * rc - b * rr)
            rows.append((-(1 - e) * torch.log(p) - e * torch.log(1 - p), b * rc, b * rr))
        elif config.name == "ipo":
            rows.append(((rc / nc - rr / nr - 0.5 / b) ** 2, b * rc / nc, b * rr / nr))
        elif config.name == "kto":
            if DESIRABLE[i]:
                value = config.desirable_weight * (1 - sigmoid(b * (rc - z0)))
                rows.append((value, b * rc, 0 * rc))
            else:
                value = config.undesirable_weight * (1 - sigmoid(b * (z0 - rc)))
                rows.append((value, 0 * rc, b * rc))
        elif config.name == "orpo":
            pc, pr = torch.exp(c / nc), torch.exp(r / nr)
            odds_ratio = pc / (1 - pc) / (pr / (1 - pr))
            rows.append((-c / nc - b * torch.log(sigmoid(torch.log(odds_ratio))),
                         b * c / nc, b * r / nr))
        else:
            rows.append((-torch.log(sigmoid(b * c / nc - b * r / nr - config.gamma)),
                         b * c / nc, b * r / nr))
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def complete(make_batch, config):
    return make_batch(REFERENCE if preference.needs_reference(config) else None,
                      DESIRABLE if config.name == "kto" else None)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_value_and_gradients_equal_the_papers(make_model, make_batch, texts, plain_logprobs,
                                              assert_like_truth, config):
    model, batch = make_model(), complete(make_batch, config)
    truth = copy.deepcopy(model).double()
    sums = plain_logprobs(truth, texts)
    lengths = [len(text.ids) - text.prompt for text in texts]
    losses, chosen, rejected = by_hand(sums, lengths, config)
    assert_like_truth(model, loss(model, batch, config), truth, losses)

    measured = measure(model, batch, config)
    kto = config.name == "kto"
    good, bad = sums[::2], sums[1::2]
    if kto:
        good = [s for s, wanted in zip(sums[::2], DESIRABLE, strict=True) if wanted]
        bad = [s for s, wanted in zip(sums[::2], DESIRABLE, strict=True) if not wanted]
    wanted = {"loss": losses.sum(), "accuracy": (chosen > rejected).sum(),
              "margin": chosen.sum() - rejected.sum(), "chosen_rewards": chosen.sum(),
              "rejected_rewards": rejected.sum(), "chosen_logps": sum(good),
              "rejected_logps": sum(bad)}
    assert measured.keys() == wanted.keys()
    for name, total in wanted.items():
        assert not measured[name].requires_grad
        assert measured[name].item() == pytest.approx(total.item(), rel=1e-5, abs=1e-4), name
    assert 0 < measured["accuracy"] < 4
    value, count, sums = preference.loss_and_measures(model, batch, config)
    assert value.requires_grad and not any(total.requires_grad for total in sums.values())
    assert {"loss": value.detach(), **sums} == measured and count == 4


def random_scores(reference=True):
    generator = torch.Generator().manual_seed(6)
    draws = [-20 * torch.rand(5, generator=generator, dtype=torch.float64) - 0.5 for _ in range(4)]
    counts = [torch.randint(1, 9, (5,), generator=generator) for _ in range(2)]
    wanted = torch.tensor([True, False, True, False, True])
    return draws if reference else draws[:2], counts, wanted


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradcheck(case):
    config = PreferenceConfig(**case)
    options = {key: getattr(config, key) for key in preference.DEFAULTS[config.name]}
    (chosen, rejected, *reference), counts, wanted = random_scores()
    # Below: KTO's z0 is a constant, so its gradient is not that of the value by the mismatched one.
    rejected.requires_grad_(config.name != "kto")

    def total(chosen, rejected):
        scores = Scores(chosen, rejected, *counts, *reference, wanted)
        result = LOSSES[config.name](scores, **options)
        return result.losses, result.chosen_rewards, result.rejected_rewards

    assert torch.autograd.gradcheck(total, (chosen.requires_grad_(), rejected))


def test_z0_is_a_constant_and_never_negative():
    (chosen, _, *_), counts, wanted = random_scores()
    chosen.requires_grad_()
    zeros = torch.zeros_like(chosen)

    def at(moved):
        mismatched = (zeros + moved).requires_grad_()
        scores = Scores(chosen, mismatched, *counts, zeros, zeros, wanted)
        result = preference.kto(scores, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0)
        result.losses.sum().backward()
        assert mismatched.grad is None
        return result.losses.detach()

    assert torch.equal(at(-3.0), at(0.0))
    assert not torch.equal(at(3.0), at(0.0))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("far", [(0.0, 0.0), (0.0, -1e4), (-1e4, 0.0), (-1e4, -1e4), (-1e-9, 0.0)])
def test_extreme_scores_are_finite(case, far):
    config = PreferenceConfig(**case)
    options = {key: getattr(config, key) for key in preference.DEFAULTS[config.name]}
    sums = [torch.full((2,), value, requires_grad=True) for value in far]
    count, zeros = torch.ones(2, dtype=torch.int64), torch.zeros(2)
    scores = Scores(*sums, count, count, zeros, zeros, torch.tensor([True, False]))
    result = LOSSES[config.name](scores, **options)
    result.losses.sum().backward()
    for value in (result.losses, *(s.grad for s in sums if s.grad is not None)):
        assert value.isfinite().all()


def test_log_of_one_minus_p_is_exact_at_both_ends():
    """One rounding or two in fp32 from p near 1 to p near 0, in value and in slope."""
    x = -torch.logspace(-5, 1, 40)
    x.requires_grad_()
    wide = x.detach().double().requires_grad_()
    value, truth = preference._log1mexp(x), torch.log(-torch.expm1(wide))
    value.sum().backward()
    truth.sum().backward()
    torch.testing.assert_close(value.double(), truth, rtol=1e-6, atol=0)
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=2e-6, atol=0)


@pytest.mark.parametrize("config", CONFIGS[::2], ids=str)
def test_extreme_logits_are_finite(make_model, make_batch, config):
    model, batch = make_model(), complete(make_batch, config)
    with torch.no_grad():
        model.norm.weight.mul_(1e4)
    value, _ = loss(model, batch, config)
    value.backward()
    assert value.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_nothing_trained_is_zero(make_model, make_batch, config):
    model, batch = make_model(), complete(make_batch, config)
    batch.labels.fill_(-100)
    value, _ = loss(model, batch, config)
    assert value.item() == 0
    value.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_a_pair_with_an_empty_answer_says_nothing(make_model, make_batch):
    config = PreferenceConfig(name="orpo")
    model, batch = make_model(), make_batch()
    whole = loss(model, batch, config)[0]
    alone = loss(model, replace(batch, pairs=batch.pairs[:1]), config)[0]
    begin, end = batch.cu_seqlens[batch.pairs[0, 1]], batch.cu_seqlens[batch.pairs[0, 1] + 1]
    batch.labels.view(-1)[begin:end] = -100
    torch.testing.assert_close(loss(model, batch, config)[0], whole - alone)


def test_no_pairs_sum_to_zero(make_model, make_batch):
    """The rows that fill up the last batch of an evaluation hold none."""
    batch = replace(complete(make_batch, CONFIGS[4]), pairs=torch.zeros(0, 2, dtype=torch.int64),
                    reference=torch.zeros(0, 2), desirable=torch.zeros(0, dtype=torch.bool))
    measured = measure(make_model(), batch, CONFIGS[4])
    assert all(value == 0 for value in measured.values())


def test_dpo_begins_at_ln_2(make_model, make_batch):
    model, batch = make_model(), make_batch()
    with torch.no_grad():
        sums, _ = preference.sequence_logprobs(model, batch)
    batch.reference = sums[batch.pairs]
    for smoothing in (0.0, 0.3):
        value, count = loss(model, batch, PreferenceConfig(label_smoothing=smoothing))
        assert value.item() / count == pytest.approx(math.log(2), rel=1e-6)


def test_defaults_and_strange_keys():
    assert [PreferenceConfig(name=name).beta for name in LOSSES] == [0.1, 0.1, 0.1, 0.1, 2.0]
    assert PreferenceConfig(name="simpo").gamma == 1.0
    assert [name for name in LOSSES if preference.needs_reference(PreferenceConfig(name=name))] \
        == ["dpo", "ipo", "kto"]
    PreferenceConfig(name="kto").validate()
    again = configuration.build(PreferenceConfig, configuration.as_dict(CONFIGS[5]))
    assert again == CONFIGS[5]
    for case, key, owner in [({"name": "ipo", "gamma": 0.5}, "loss.gamma", "simpo"),
                             ({"name": "simpo", "label_smoothing": 0.1}, "loss.label-smoothing",
                              "dpo"), ({"desirable_weight": 2.0}, "loss.desirable-weight", "kto")]:
        with pytest.raises(ValueError, match=f"{key} is set.*it is for {owner}"):
            PreferenceConfig(**case).validate()
    with pytest.raises(UserError, match="beta"):
        configuration.build(PreferenceConfig, {"beta": 0})


@pytest.mark.parametrize(("name", "field", "says"), [
    ("dpo", "pairs", "dpo learns from pairs and this batch has none"),
    ("kto", "pairs", "prompt, completion and label"),
    ("ipo", "reference", "ipo needs the reference model's log-probabilities"),
    ("kto", "desirable", "kto learns from judged answers")])
def test_what_a_batch_lacks_is_said(make_model, make_batch, name, field, says):
    config = PreferenceConfig(name=name)
    batch = replace(complete(make_batch, config), **{field: None})
    for function in (loss, measure):
        with pytest.raises(UserError, match=says):
            function(make_model(), batch, config)


def test_judged_answers_are_for_kto(make_model, make_batch):
    with pytest.raises(UserError, match=r"choose loss\.name kto"):
        loss(make_model(), make_batch(REFERENCE, DESIRABLE), PreferenceConfig())


def test_stuck():
    flat = [math.log(2) + 1e-3 * (-1) ** n for n in range(60)]
    said = stuck(flat, PreferenceConfig())
    assert said and "\n" not in said and "--optim.lr" in said and "1e-6" in said
    assert stuck(flat, PreferenceConfig(label_smoothing=0.2))
    assert stuck(flat[:49], PreferenceConfig()) is None
    assert stuck([0.69 - 0.002 * n for n in range(60)], PreferenceConfig()) is None
    assert stuck([1.0 - 0.01 * n for n in range(60)], PreferenceConfig()) is None
    assert stuck([math.nan] * 60, PreferenceConfig()) is None
    assert stuck(flat, PreferenceConfig(name="ipo")) is None
