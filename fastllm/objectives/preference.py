"""Losses on preferences: DPO, IPO, KTO, ORPO and SimPO, on packed pairs.

Each is a function of a pair's log-probabilities alone (`Scores`). Symbols: x a prompt, c and r its
chosen and rejected answer, pi the model, ref the reference model, |y| trained tokens of an answer,
s = sigmoid. Evaluation and training share everything but gradients.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastllm.config import UserError
from fastllm.data.collate import Batch
from fastllm.objectives.sequences import ahead, sequence_logprobs

Name = Literal["dpo", "ipo", "kto", "orpo", "simpo"]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]

DEFAULTS: dict[str, dict[str, float]] = {
    "dpo": {"beta": 0.1, "label_smoothing": 0.0},
    "ipo": {"beta": 0.1},
    "kto": {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
    "orpo": {"beta": 0.1},
    "simpo": {"beta": 2.0, "gamma": 1.0},
}
"""The keys that each loss has beside those that all have, with their defaults."""
KEYS = sorted({key for own in DEFAULTS.values() for key in own})

STUCK_AFTER, STUCK_WINDOW, STUCK_WITHIN = 50, 25, 0.005
"""`stuck` looks at so many steps, at the mean of so many newest ones, within this part of ln 2."""


@dataclass(kw_only=True)
class PreferenceConfig:
    """The loss of `dpo` and its kin. A key that the named loss has not is refused."""

    name: Name = "dpo"
    """dpo, ipo, orpo and simpo learn from pairs, kto from single judged answers; orpo and simpo
    need no reference model."""
    beta: Positive | None = None
    """dpo, kto: how dearly the model pays for leaving the reference, default 0.1 (larger: closer to
    it); ipo: the same, tau in the paper, 0.1; orpo: weight of the odds ratio, lambda in the paper,
    0.1; simpo: scale of the mean log-probabilities, 2."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] | None = None
    """dpo: share of the pairs that are taken to be judged the wrong way round, default 0."""
    gamma: NotNegative | None = None
    """simpo: by how much the chosen reward should lead, default 1 (the paper has 0.3 to 1.6)."""
    desirable_weight: Positive | None = None
    """kto: weight of desirable answers, default 1. The paper keeps weight * number of the desirable
    ones within 1 to 4/3 of that of the others."""
    undesirable_weight: Positive | None = None
    """kto: weight of undesirable answers, default 1."""
    chunk_size: Annotated[int, Field(gt=0)] | None = None
    """Tokens whose logits are held at a time; null leaves it to the operator."""

    def __post_init__(self) -> None:
        for key, default in DEFAULTS.get(self.name, {}).items():
            if getattr(self, key) is None:
                setattr(self, key, default)

    def validate(self) -> None:
        for key in KEYS:
            if getattr(self, key) is not None and key not in DEFAULTS[self.name]:
                have = ", ".join(name for name, keys in DEFAULTS.items() if key in keys)
                raise ValueError(f"loss.{key.replace('_', '-')} is set, but {self.name} has no "
                                 f"such thing: leave it out (it is for {have})")


@dataclass(frozen=True)
class Scores:
    """What a loss knows of P pairs.

    chosen, rejected (P,): sums of the model's log-probabilities over the trained tokens, in nats;
    in judged data of the completion, and of one that belongs to another prompt. chosen_count,
    rejected_count (P,) int64: trained tokens. reference_chosen, reference_rejected (P,): the sums
    of the reference model. desirable (P,) bool: the judgement.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_count: Tensor
    rejected_count: Tensor
    reference_chosen: Tensor | None = None
    reference_rejected: Tensor | None = None
    desirable: Tensor | None = None

    def ratios(self) -> tuple[Tensor, Tensor]:
        """log pi - log ref of the two answers, (P,) each; ValueError without a reference."""
        if self.reference_chosen is None or self.reference_rejected is None:
            raise ValueError("these scores have no reference")
        return self.chosen - self.reference_chosen, self.rejected - self.reference_rejected

    def means(self) -> tuple[Tensor, Tensor]:
        """log pi a token of the two answers, (P,) each; 0 for one without tokens."""
        return (self.chosen / self.chosen_count.clamp(min=1),
                self.rejected / self.rejected_count.clamp(min=1))


@dataclass(frozen=True)
class Result:
    """Of each pair, (P,): its loss, and the rewards that the loss gives the two answers. In judged
    data an answer's reward is chosen's if it is desirable, else rejected's; the other one is 0."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def dpo(scores: Scores, *, beta: float, label_smoothing: float) -> Result:
    """Direct preference optimisation (Rafailov et al., arXiv:2305.18290, eq. 7).

        h = [log pi(c|x) - log ref(c|x)] - [log pi(r|x) - log ref(r|x)]
        loss = -(1 - e) log s(beta h) - e log s(-beta h)

    e: label_smoothing, the conservative form (Mitchell, "A note on DPO with noisy preferences",
    2023). Reward of y: beta (log pi - log ref). At the start, where pi = ref, the loss is ln 2.
    """
    chosen, rejected = scores.ratios()
    lead = beta * (chosen - rejected)
    losses = -logsigmoid(lead)
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * logsigmoid(-lead)
    return Result(losses, beta * chosen, beta * rejected)


def ipo(scores: Scores, *, beta: float) -> Result:
    """Identity preference optimisation (Azar et al., arXiv:2310.12036, eq. 17).

        h = [log pi(c|x) - log ref(c|x)] / |c| - [log pi(r|x) - log ref(r|x)] / |r|
        loss = (h - 1 / (2 beta))^2

    beta: the paper's tau. The paper writes sums; its authors recommend means over tokens, with
    which their results were made, and TRL follows them, as this does. Reward: beta times the mean.
    """
    ratios = scores.ratios()
    chosen = ratios[0] / scores.chosen_count.clamp(min=1)
    rejected = ratios[1] / scores.rejected_count.clamp(min=1)
    losses = (chosen - rejected - 1 / (2 * beta)).square()
    return Result(losses, beta * chosen, beta * rejected)


def kto(scores: Scores, *, beta: float, desirable_weight: float, undesirable_weight: float
        ) -> Result:
    """Kahneman-Tversky optimisation (Ethayarajh et al., arXiv:2402.01306, eq. 8).

        q = log pi(y|x) - log ref(y|x)
        z0 = max(0, mean over the pairs of log pi(y'|x) - log ref(y'|x)), a constant
        loss = w_d s(-beta (q - z0)) where y is desirable, w_u s(-beta (z0 - q)) where it is not

    y: the completion, y': one of another prompt, w_d and w_u: desirable_weight and
    undesirable_weight. z0 estimates the divergence KL(pi || ref); it is that of the micro-batch on
    this rank, so that larger micro-batches have a steadier one. Reward: beta q.
    """
    if scores.desirable is None:
        raise ValueError("these scores have no judgement (desirable)")
    ratio, mismatched = scores.ratios()
    z0 = mismatched.detach().mean().clamp(min=0)
    lead = beta * (ratio - z0)
    losses = torch.where(scores.desirable, desirable_weight * torch.sigmoid(-lead),
                         undesirable_weight * torch.sigmoid(lead))
    rewards = beta * ratio
    nothing = torch.zeros_like(rewards)
    return Result(losses, torch.where(scores.desirable, rewards, nothing),
                  torch.where(scores.desirable, nothing, rewards))


def orpo(scores: Scores, *, beta: float) -> Result:
    """Odds ratio preference optimisation (Hong et al., arXiv:2403.07691, eq. 6 and 7).

        p(y) = exp(log pi(y|x) / |y|),    odds(y) = p(y) / (1 - p(y))
        loss = -log p(c) - beta log s(log odds(c) - log odds(r))

    beta: the paper's lambda. The first term is the chosen answer's own mean over its tokens, so
    that every pair weighs the same. Reward: beta log p.
    """
    chosen, rejected = scores.means()
    log_odds = (chosen - _log1mexp(chosen)) - (rejected - _log1mexp(rejected))
    return Result(-chosen - beta * logsigmoid(log_odds), beta * chosen, beta * rejected)


def simpo(scores: Scores, *, beta: float, gamma: float) -> Result:
    """Simple preference optimisation (Meng et al., arXiv:2405.14734, eq. 6).

        loss = -log s(beta log pi(c|x) / |c| - beta log pi(r|x) / |r| - gamma)

    beta, gamma: 2 to 2.5 and 0.3 to 1.6 in the paper; the defaults 2 and 1 are those that it has
    for Llama-3-Base. Reward: beta times the mean log-probability.
    """
    chosen, rejected = (beta * mean for mean in scores.means())
    return Result(-logsigmoid(chosen - rejected - gamma), chosen, rejected)


LOSSES: dict[str, Callable[..., Result]] = {
    "dpo": dpo, "ipo": ipo, "kto": kto, "orpo": orpo, "simpo": simpo}
_REFERENCE_FREE = {"orpo", "simpo"}


def needs_reference(config: PreferenceConfig) -> bool:
    """Whether the loss compares the model with a reference model: dpo, ipo and kto do."""
    return config.name not in _REFERENCE_FREE


def loss(model: Any, batch: Batch, config: PreferenceConfig | None = None) -> tuple[Tensor, int]:
    """Sum of the loss over the pairs (fp32, 0-d) and their number. model: a `Decoder`.

    A pair without a trained token in an answer that the loss compares says nothing: it adds 0.
    Raises UserError for a batch that lacks pairs, reference or judgement.
    """
    total, count, _ = loss_and_measures(model, batch, config)
    return total, count


@torch.no_grad()
def measure(model: Any, batch: Batch, config: PreferenceConfig | None = None
            ) -> dict[str, Tensor]:
    """Sums over the pairs (fp32, 0-d), without gradients; UserError as `loss`.

    loss; accuracy: pairs whose chosen reward is above the rejected one, ties half (all of them are
    where training begins); margin: the difference of
    the two; chosen_rewards, rejected_rewards; chosen_logps, rejected_logps: of the answers, in
    nats. In judged data accuracy counts answers whose reward is above 0 if desirable and below 0 if
    not, margin adds the rewards of the desirable and subtracts those of the others, and chosen and
    rejected are the desirable and the undesirable ones.
    """
    total, _, sums = loss_and_measures(model, batch, config)
    return {"loss": total, **sums}


def loss_and_measures(model: Any, batch: Batch, config: PreferenceConfig | None = None
                      ) -> tuple[Tensor, int, dict[str, Tensor]]:
    """`loss`, and `measure` but for its loss, of one forward: for a training step's record."""
    config = config or PreferenceConfig()
    scores = _scores(model, batch, config)
    result = _result(scores, config)
    with torch.no_grad():
        sums = _sums(scores, result)
    return result.losses.sum(), batch.count, sums


def _sums(scores: Scores, result: Result) -> dict[str, Tensor]:
    """`measure` but for its loss."""
    chosen, rejected = result.chosen_rewards, result.rejected_rewards
    logps = scores.chosen, scores.rejected
    if scores.desirable is not None:
        nothing = torch.zeros_like(scores.chosen)
        logps = (torch.where(scores.desirable, scores.chosen, nothing),
                 torch.where(scores.desirable, nothing, scores.chosen))
    return {"accuracy": ahead(chosen, rejected), "margin": (chosen - rejected).sum(),
            "chosen_rewards": chosen.sum(), "rejected_rewards": rejected.sum(),
            "chosen_logps": logps[0].sum(), "rejected_logps": logps[1].sum()}


def stuck(history: list[float], config: PreferenceConfig) -> str | None:
    """A line for the user where DPO's loss has not left its beginning, ln 2; else None.

    history: the loss of each step so far. With label smoothing it begins at ln 2 too. Silent before
    STUCK_AFTER steps, and for the other losses.
    """
    if config.name != "dpo" or len(history) < STUCK_AFTER:
        return None
    mean = sum(history[-STUCK_WINDOW:]) / STUCK_WINDOW
    if not abs(mean - math.log(2)) <= STUCK_WITHIN * math.log(2):
        return None
    return (f"after {len(history)} steps the loss is {mean:.4f}, still ln 2, where DPO begins: the "
            "model is not moving. Raise --optim.lr (usual: 1e-6 for the whole model, 5e-6 to 5e-5 "
            "for LoRA), unless the warmup is not over")


def _scores(model: Any, batch: Batch, config: PreferenceConfig) -> Scores:
    if batch.pairs is None:
        raise UserError(f"{config.name} learns from pairs and this batch has none: give rows with "
                        + ("prompt, completion and label" if config.name == "kto" else
                           "chosen and rejected answers"))
    if needs_reference(config) and batch.reference is None:
        raise UserError(f"{config.name} needs the reference model's log-probabilities and this "
                        "batch has none: fill batch.reference, or choose loss.name orpo or simpo")
    if (config.name == "kto") != (batch.desirable is not None):
        raise UserError("kto learns from judged answers and this batch has no desirable: give rows "
                        "with prompt, completion and label" if config.name == "kto" else
                        f"{config.name} learns from pairs and this batch is of judged answers: "
                        "choose loss.name kto")
    sums, counts = sequence_logprobs(model, batch, chunk_size=config.chunk_size)
    chosen, rejected = sums[batch.pairs].unbind(1)
    counted, other = counts[batch.pairs].unbind(1)
    scores = Scores(chosen, rejected, counted, other, desirable=batch.desirable)
    if batch.reference is None or not needs_reference(config):
        return scores
    first, second = batch.reference.unbind(1)
    return replace(scores, reference_chosen=first, reference_rejected=second)


def _result(scores: Scores, config: PreferenceConfig) -> Result:
    options = {key: getattr(config, key) for key in DEFAULTS[config.name]}
    result = LOSSES[config.name](scores, **options)
    says = scores.chosen_count > 0
    if config.name != "kto":
        says = says & (scores.rejected_count > 0)
    return Result(*(torch.where(says, value, torch.zeros_like(value))
                    for value in (result.losses, result.chosen_rewards, result.rejected_rewards)))


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) of x <= 0, exact at both ends (Mächler, "Accurately computing
    log(1 - exp(-|a|))", 2012); above -eps it stays at the finite log(eps), without a gradient."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    return torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))
