"""Losses and gradients beside TRL's own code, on transformers' models with the same weights.

TRL's trainers are not built: their loss methods run on an object that has what they read. Ours is a
packed batch of fused projections, theirs padded rows of transformers' model.
"""

import copy
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fastllm.export import export
from fastllm.model import hf
from fastllm.model.reward import RewardModel
from fastllm.objectives import preference, reward
from fastllm.objectives.preference import PreferenceConfig
from fastllm.objectives.reward import RewardConfig
from fastllm.objectives.sequences import sequence_logprobs

DESIRABLE = torch.tensor([True, False, False, True])
ROWS = [[0, 1, 2, 3], [4, 5], [6, 7]]

pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")


def theirs_of(model, folder, kind=transformers.AutoModelForCausalLM, save=hf.save):
    folder.mkdir(exist_ok=True)
    save(model, folder)
    return kind.from_pretrained(folder, dtype=torch.float32)


def padded(texts):
    """input_ids, attention_mask and completion_mask (B, longest)."""
    rows = [torch.nn.utils.rnn.pad_sequence(column, batch_first=True) for column in zip(
        *((text.ids, torch.ones_like(text.ids), (torch.arange(len(text.ids)) >= text.prompt).long())
          for text in texts), strict=True)]
    return dict(zip(("input_ids", "attention_mask", "completion_mask"), rows, strict=True))


def bare(cls, **attributes):
    """An object of a trainer's class that no constructor has run on."""
    trainer = cls.__new__(cls)
    same = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x,
                           gather_for_metrics=lambda x: x)
    vars(trainer).update(accelerator=same, aux_loss_enabled=False, _tp_size=1,
                         _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
                         _total_train_tokens=0, is_encoder_decoder=False, **attributes)
    return trainer


def assert_same(ours, our_loss, theirs, their_loss):
    """Of means over pairs: the values, and the gradients by Hugging Face's names."""
    value, count = our_loss
    torch.testing.assert_close(value / count, their_loss, rtol=2e-5, atol=2e-6)
    (value / count).backward()
    their_loss.backward()
    grads = copy.deepcopy(ours)
    with torch.no_grad():
        for parameter, source in zip(grads.parameters(), ours.parameters(), strict=True):
            parameter.copy_(source.grad)
    named, checked = dict(theirs.named_parameters()), 0
    for name, gradient in hf.hf_tensors(grads):
        wanted = named[name].grad
        scale = float(wanted.abs().max())
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=2e-5 * scale, msg=name)
        checked += 1
    assert checked == len(named)


def moved(model):
    """A reference that is not the model."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return other


@pytest.fixture
def case(make_model, make_batch, texts, tmp_path):
    """Model and packed batch with a reference; transformers' two models."""
    from trl.trainer.utils import add_fused_lm_head

    model, batch = make_model(tie_word_embeddings=False).train(), make_batch()
    other = moved(model)
    with torch.no_grad():
        batch.reference = sequence_logprobs(other, batch)[0][batch.pairs]
    theirs, reference = theirs_of(model, tmp_path / "a"), theirs_of(other, tmp_path / "b")
    for each in (theirs, reference):
        add_fused_lm_head(each, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    return model, batch, theirs, reference


@pytest.mark.parametrize(("name", "kind"), [("dpo", "sigmoid"), ("ipo", "ipo")])
def test_dpo_and_ipo(case, texts, name, kind):
    from trl.trainer.dpo_trainer import DPOTrainer

    model, batch, theirs, reference = case
    trainer = bare(DPOTrainer, model=theirs, ref_model=reference, beta=0.3, loss_types=[kind],
                   loss_weights=[1.0], ld_alpha=None, precompute_ref_logps=False,
                   f_divergence_type="reverse_kl", use_weighting=False, label_smoothing=0.0,
                   args=SimpleNamespace(gradient_checkpointing_kwargs=None))
    their_loss = trainer._compute_loss(theirs, padded([*texts[::2], *texts[1::2]]), False)
    config = PreferenceConfig(name=name, beta=0.3)
    measured = preference.measure(model, batch, config)
    assert_same(model, preference.loss(model, batch, config), theirs, their_loss)
    logged = {key: value[0] for key, value in trainer._metrics["eval"].items()}
    assert logged["logps/chosen"] == pytest.approx(float(measured["chosen_logps"] / 4), rel=1e-5)
    if name == "dpo":  # IPO's rewards are means here, which its loss is made of; TRL logs sums
        for ours, key in [("chosen_rewards", "chosen"), ("accuracy", "accuracies"),
                          ("margin", "margins")]:
            wanted = pytest.approx(logged[f"rewards/{key}"], rel=1e-4, abs=1e-5)
            assert float(measured[ours] / 4) == wanted


def test_kto(case, texts):
    from trl.trainer.kto_trainer import KTOTrainer

    model, batch, theirs, reference = case
    batch = replace(batch, desirable=DESIRABLE)
    trainer = bare(KTOTrainer, model=theirs, ref_model=reference, beta=0.3, loss_type="kto",
                   calculate_KL=True, precompute_ref_logps=False, desirable_weight=1.3,
                   undesirable_weight=0.7, args=SimpleNamespace(gradient_checkpointing_kwargs=None))
    inputs = {**padded(texts[::2]), "label": DESIRABLE,
              **{f"KL_{key}": value for key, value in padded(texts[1::2]).items()}}
    their_loss = trainer._compute_loss(theirs, inputs, False)
    config = PreferenceConfig(name="kto", beta=0.3, desirable_weight=1.3, undesirable_weight=0.7)
    assert_same(model, preference.loss(model, batch, config), theirs, their_loss)


def in_halves(texts):
    """What ORPO's and CPO's collators give: chosen and rejected apart, labels with -100."""
    halves = {}
    for name, part in (("chosen", texts[::2]), ("rejected", texts[1::2])):
        rows = padded(part)
        halves |= {f"{name}_input_ids": rows["input_ids"],
                   f"{name}_attention_mask": rows["attention_mask"],
                   f"{name}_labels": rows["input_ids"].masked_fill(rows["completion_mask"] == 0,
                                                                   -100)}
    return halves


def orpo_trainer():
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    return bare(ORPOTrainer, beta=0.3, padding_value=0)


def test_orpo(make_model, draw, packed, tmp_path):
    """Chosen answers of one length after prompts of one token, so that TRL's mean over all tokens
    of all chosen texts, prompts too, is the mean of each answer's mean."""
    texts = draw([(1, 5), (1, 2), (1, 5), (1, 7), (1, 5), (1, 6), (1, 5), (1, 3)])
    model, batch = make_model().train(), packed(texts, ROWS)
    theirs = theirs_of(model, tmp_path / "a")
    their_loss, _ = orpo_trainer().get_batch_loss_metrics(theirs, in_halves(texts))
    config = PreferenceConfig(name="orpo", beta=0.3)
    assert_same(model, preference.loss(model, batch, config), theirs, their_loss)


def test_orpo_differs_by_the_mean_of_its_first_term_alone(make_model, make_batch, texts, tmp_path):
    """TRL: over the tokens of all chosen prompts and answers; here: each answer's own mean."""
    model, batch = make_model().eval(), make_batch()
    theirs = theirs_of(model, tmp_path / "a")
    config = PreferenceConfig(name="orpo", beta=0.3)
    with torch.no_grad():
        their_loss, metrics = orpo_trainer().get_batch_loss_metrics(theirs, in_halves(texts))
        value, count = preference.loss(model, batch, config)
        sums, counts = sequence_logprobs(model, batch)
    chosen = batch.pairs[:, 0]
    own = -(sums[chosen] / counts[chosen]).mean()
    torch.testing.assert_close(value / count - own, their_loss - metrics["nll_loss"],
                               rtol=1e-5, atol=1e-5)
    assert (own - metrics["nll_loss"]).abs() > 0.1


def test_simpo(make_model, make_batch, texts, tmp_path):
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    model, batch = make_model().train(), make_batch()
    theirs = theirs_of(model, tmp_path / "a")
    trainer = bare(CPOTrainer, beta=2.5, simpo_gamma=1.4, alpha=0.0, cpo_alpha=0.0,
                   label_smoothing=0.0, loss_type="simpo", pad_token_id=0)
    their_loss, _ = trainer.get_batch_loss_metrics(theirs, in_halves(texts))
    config = PreferenceConfig(name="simpo", beta=2.5, gamma=1.4)
    assert_same(model, preference.loss(model, batch, config), theirs, their_loss)


@pytest.mark.parametrize("coefficient", [0.0, 0.05])
def test_reward(make_model, make_batch, texts, tmp_path, coefficient):
    """TRL reads at the end token, which is a label only here: its texts go without it."""
    from trl.trainer.reward_trainer import RewardTrainer

    model = RewardModel(make_model(), generator=torch.Generator().manual_seed(1)).train()
    batch = make_batch()
    theirs = theirs_of(model, tmp_path / "a", transformers.AutoModelForSequenceClassification,
                       export)
    theirs.config.pad_token_id = 0
    trainer = bare(RewardTrainer, model=theirs, args=SimpleNamespace(
        center_rewards_coefficient=coefficient or None))
    inputs = padded([replace(text, ids=text.ids[:-1]) for text in [*texts[::2], *texts[1::2]]])
    del inputs["completion_mask"]
    their_loss = trainer.compute_loss(theirs, inputs)
    config = RewardConfig(center_coefficient=coefficient)
    measured = reward.measure(model, batch, config)
    assert_same(model, reward.loss(model, batch, config), theirs, their_loss)
    logged = {key: value[0] for key, value in trainer._metrics["eval"].items()}
    for key in ("accuracy", "margin"):
        assert float(measured[key] / 4) == pytest.approx(logged[key], rel=1e-4, abs=1e-6)
