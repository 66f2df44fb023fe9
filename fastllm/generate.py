"""Text from a decoder: keys and values cached, tokens drawn by temperature, top-k and top-p.

Prompts of one length run together as a batch; prompts of other lengths run after them. That needs
no padding, so a prompt's logits are those it would have alone. Each prompt draws from its own
generator, seeded by (seed, its place in the list): its text does not depend on its neighbours.
"""

from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fastllm.config import UserError
from fastllm.data.tokenizer import Tokenizer
from fastllm.model import Decoder, KVCache
from fastllm.model.init import generator_of


@dataclass(kw_only=True)
class GenerateConfig:
    """How tokens are drawn and when to stop."""

    max_new_tokens: Annotated[int, Field(gt=0)] = 128
    """Tokens to add to each prompt at most."""
    temperature: Annotated[float, Field(ge=0)] = 0.8
    """Divides the logits; 0 takes the likeliest token always."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Draw among the k likeliest tokens; 0 means all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw among the fewest likeliest tokens whose probabilities reach p together."""
    seed: Annotated[int, Field(ge=0)] = 0
    """The same seed gives the same tokens."""


def generate(model: Decoder, prompts: Sequence[Sequence[int]], config: GenerateConfig | None = None,
             *, eos_token_ids: Collection[int] = (), batch_size: int | None = None,
             until: Callable[[list[int]], bool] | None = None) -> list[list[int]]:
    """The tokens that follow each prompt, in the prompts' order.

    Args:
        prompts: token ids, at least one a prompt, of any lengths.
        eos_token_ids: tokens that end a text; the one that ended it is the last of the result.
        batch_size: prompts of one length that run together at most; None: all of them.
        until: asked after every token with a prompt's tokens so far; true ends its text there.

    Raises UserError for an empty prompt, a token outside the vocabulary, or a prompt that with
    max_new_tokens is longer than the model's max_position_embeddings.
    """
    config = config or GenerateConfig()
    _check(model, prompts, config)
    lengths: dict[int, list[int]] = {}
    for place, prompt in enumerate(prompts):
        lengths.setdefault(len(prompt), []).append(place)
    results: list[list[int]] = [[] for _ in prompts]
    training = model.training
    model.eval()
    try:
        for places in _batches(lengths.values(), batch_size):
            rows = [list(prompts[place]) for place in places]
            draws = [generator_of(f"{config.seed}/{place}") for place in places]
            cache = _cache(model, len(rows), len(rows[0]) + config.max_new_tokens)
            ended = [False] * len(rows)
            for tokens in _steps(model, rows, draws, config, cache, ended):
                for row, (place, token) in enumerate(zip(places, tokens, strict=True)):
                    if not ended[row]:
                        results[place].append(token)
                        ended[row] = token in eos_token_ids or (
                            until is not None and until(results[place]))
    finally:
        model.train(training)
    return results


def stream(model: Decoder, prompt: Sequence[int], config: GenerateConfig | None = None, *,
           eos_token_ids: Collection[int] = (), cache: KVCache | None = None,
           place: int = 0) -> Generator[int, None, None]:
    """The tokens that follow one prompt, each as soon as it is drawn: those of `generate`.

    Args:
        cache: holds the first tokens of the prompt (fewer than all of it) already, after the
            model's virtual tokens where it has some, and has room for the prompt and
            max_new_tokens. The others are run and stay in it, and so does every token yielded but
            the last.
        place: the prompt's place among those that `generate` would be given: it draws as that one.

    Raises UserError as `generate` does.
    """
    config = config or GenerateConfig()
    _check(model, [prompt], config)
    if cache is None:
        cache = _cache(model, 1, len(prompt) + config.max_new_tokens)
    training = model.training
    model.eval()
    try:
        rows, ended = [list(prompt[max(cache.length - model.virtual_tokens, 0):])], [False]
        draws = [generator_of(f"{config.seed}/{place}")]
        for (token,) in _steps(model, rows, draws, config, cache, ended):
            ended[0] = token in eos_token_ids
            yield token
    finally:
        model.train(training)


def generate_text(model: Decoder, tokenizer: Tokenizer, prompts: Sequence[str],
                  config: GenerateConfig | None = None, *, bos_token_id: int | None = None,
                  eos_token_ids: Collection[int] = ()) -> list[str]:
    """The text that follows each prompt.

    Args:
        bos_token_id: put before every prompt, where documents began with it in training.
        eos_token_ids: tokens that end a text; they are not part of it.
    """
    start = [] if bos_token_id is None else [bos_token_id]
    ids = [start + tokenizer.encode(prompt) for prompt in prompts]
    rows = generate(model, ids, config, eos_token_ids=eos_token_ids)
    return [tokenizer.decode([token for token in row if token not in eos_token_ids])
            for row in rows]


def filter_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """(B, V) with -inf where a token may not be drawn: outside the top k, or outside the nucleus.

    Top-k comes first, and tokens as likely as the k-th stay. The nucleus (Holtzman et al., 2020)
    always holds the likeliest token.
    """
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        outside = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(outside, -torch.inf)
    return logits


def sample(logits: Tensor, uniform: Tensor, config: GenerateConfig) -> Tensor:
    """One token a row, (B,) int64, from logits (B, V) and one uniform number in [0, 1) a row.

    The token is where the cumulative probability passes the uniform number, so that what is drawn
    follows from the number alone, on every device and at every batch size.
    """
    if config.temperature == 0:
        return logits.argmax(dim=-1)
    allowed = filter_logits(logits.double() / config.temperature, config.top_k, config.top_p)
    cumulative = allowed.softmax(dim=-1).cumsum(dim=-1)
    target = uniform.to(cumulative).unsqueeze(-1) * cumulative[..., -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1)


def _batches(groups: Iterable[list[int]], size: int | None) -> Iterator[list[int]]:
    for group in groups:
        for start in range(0, len(group), size or len(group)):
            yield group[start:start + (size or len(group))]


def _cache(model: Decoder, rows: int, capacity: int) -> KVCache:
    weight = model.lm_head_weight
    capacity += model.virtual_tokens
    return KVCache(model.config, rows, capacity, device=weight.device, dtype=weight.dtype)


@torch.no_grad()
def _steps(model: Decoder, rows: list[list[int]], draws: list[torch.Generator],
           config: GenerateConfig, cache: KVCache, ended: list[bool]) -> Iterator[list[int]]:
    """The next token of every row, step by step, until the caller has marked all as ended."""
    ids = torch.tensor(rows, device=model.lm_head_weight.device)
    for _ in range(config.max_new_tokens):
        logits = model.logits(model(ids, cache=cache)[:, -1]).float()
        # fp32 numbers are at most 1 - 2^-24: times the fp64 total they stay below it.
        uniform = torch.stack([torch.rand((), generator=draw) for draw in draws])
        chosen = sample(logits, uniform, config)
        yield chosen.tolist()
        if all(ended):
            return
        ids = chosen.unsqueeze(-1)


def _check(model: Decoder, prompts: Sequence[Sequence[int]], config: GenerateConfig) -> None:
    limit = model.config.max_position_embeddings - model.virtual_tokens
    vocab = model.config.vocab_size
    for place, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(f"prompt {place} is empty: give it at least one token")
        if not 0 <= min(prompt) <= max(prompt) < vocab:
            raise UserError(f"prompt {place} holds token {max(prompt, key=abs)}, outside the "
                            f"model's vocabulary of {vocab}: is this the model's tokenizer?")
        if len(prompt) + config.max_new_tokens > limit:
            raise UserError(f"prompt {place} has {len(prompt)} tokens; with max_new_tokens "
                            f"{config.max_new_tokens} it is longer than the model's {limit}: "
                            "shorten one of them")
