"""The log-likelihood of continuations, many of them in one forward.

Every continuation goes with its whole context as a document of its own, packed end to end with
cu_seqlens, so that none sees another. Inputs that are the same (letters after one question) run
once. Only the positions that predict a continuation go through the output head, and their logits
are never held whole.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastllm import ops
from fastllm.config import RunError, UserError
from fastllm.model import Decoder


class Continuation(NamedTuple):
    """Token ids: a context of at least one, and what follows it, at least one."""

    context: list[int]
    ids: list[int]

    @property
    def inputs(self) -> tuple[int, ...]:
        """What the model reads: all but the last token, which nothing follows."""
        return (*self.context, *self.ids[:-1])


def loglikelihoods(model: Decoder, questions: Sequence[Sequence[Continuation]], *,
                   batch_tokens: int, done: Callable[[int], None] | None = None
                   ) -> list[list[float]]:
    """The sum of the log-probabilities (nats) of each continuation's tokens, question by question.

    Args:
        batch_tokens: tokens in a batch at most; the continuations of one question always run
            together, and one of more tokens runs alone.
        done: told the number of questions answered after each batch.

    Raises UserError for a token outside the vocabulary, ValueError for an input longer than the
    model's max_position_embeddings, RunError where the model gives what is not a number.
    """
    _check(model, questions)
    results: list[list[float]] = []
    training = model.training
    model.eval()
    try:
        for batch in _batches(questions, batch_tokens):
            flat = [one for question in batch for one in question]
            sums = iter(_batch(model, flat))
            results += [[next(sums) for _ in question] for question in batch]
            if done:
                done(len(results))
    finally:
        model.train(training)
    return results


def _check(model: Decoder, questions: Sequence[Sequence[Continuation]]) -> None:
    vocab = model.config.vocab_size
    for question in questions:
        for one in question:
            if not one.context or not one.ids:
                raise ValueError("a context and a continuation have at least one token each")
            if (worst := max(*one.context, *one.ids)) >= vocab:
                raise UserError(f"token {worst} is outside the model's vocabulary of {vocab}: is "
                                "this the model's tokenizer?")


def _batches(questions: Sequence[Sequence[Continuation]], batch_tokens: int
             ) -> Iterator[list[Sequence[Continuation]]]:
    batch: list[Sequence[Continuation]] = []
    held = 0
    for question in questions:
        size = sum(map(len, {one.inputs for one in question}))
        if batch and held + size > batch_tokens:
            yield batch
            batch, held = [], 0
        batch.append(question)
        held += size
    if batch:
        yield batch


@torch.no_grad()
def _batch(model: Decoder, continuations: Sequence[Continuation]) -> list[float]:
    starts: dict[tuple[int, ...], int] = {}
    ids: list[int] = []
    positions: list[int] = []
    borders = [0]
    for one in continuations:
        if one.inputs not in starts:
            starts[one.inputs] = len(ids)
            ids += one.inputs
            positions += range(len(one.inputs))
            borders.append(len(ids))
    where = [starts[one.inputs] + len(one.context) - 1 + step
             for one in continuations for step in range(len(one.ids))]
    labels = [token for one in continuations for token in one.ids]
    owner = [place for place, one in enumerate(continuations) for _ in one.ids]

    head = model.lm_head_weight
    device = head.device

    def tensor(values: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    longest = max(len(inputs) for inputs in starts)
    hidden = model(tensor(ids)[None], position_ids=tensor(positions)[None],
                   cu_seqlens=tensor(borders, torch.int32), max_seqlen=longest)[0]
    logp = ops.linear_logprobs(hidden[tensor(where)], head, tensor(labels),
                               softcap=model.config.final_logit_softcapping)
    sums = torch.zeros(len(continuations), dtype=torch.float64)
    sums.index_add_(0, torch.tensor(owner), logp.double().cpu())
    totals = sums.tolist()
    if any(map(math.isnan, totals)):
        raise RunError("the model's log-probabilities are not numbers: its weights are damaged or "
                       "overflow in this dtype; try another --dtype")
    return totals
