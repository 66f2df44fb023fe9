"""Likelihoods: equal to a plain computation over whole logits, packed or one by one."""

import copy
import random

import pytest
import torch
from task_models import make_model

from fastllm.adapters import AdapterConfig, apply
from fastllm.config import RunError, UserError
from fastllm.tasks.scoring import Continuation, loglikelihoods


def plain(model, one):
    """The log-likelihood by the definition: every logit, in fp64."""
    tokens = [*one.context, *one.ids]
    with torch.no_grad():
        hidden = model(torch.tensor([tokens]))[0]
        logp = model.logits(hidden).log_softmax(-1)
    return sum(float(logp[place - 1, tokens[place]])
               for place in range(len(one.context), len(tokens)))


def draw_questions(vocab, count=9):
    draw = random.Random(0)

    def ids(low, high):
        return [draw.randrange(vocab) for _ in range(draw.randint(low, high))]

    questions = []
    for _ in range(count):
        context = ids(1, 30)
        questions.append([Continuation(context, ids(1, 6)) for _ in range(draw.randint(2, 5))])
    return questions


@pytest.mark.parametrize("changes", [{}, {"final_logit_softcapping": 2.0},
                                     {"tie_word_embeddings": False}])
def test_likelihoods_equal_the_fp64_ones(tokenizer, changes):
    model = make_model(tokenizer, **changes)
    questions = draw_questions(model.config.vocab_size)
    exact = copy.deepcopy(model).double().eval()
    ours = loglikelihoods(model, questions, batch_tokens=200)
    for question, sums in zip(questions, ours, strict=True):
        assert sums == pytest.approx([plain(exact, one) for one in question], rel=1e-5)
    in_double = loglikelihoods(exact, questions, batch_tokens=200)
    for question, sums in zip(questions, in_double, strict=True):
        # linear_logprobs gives fp32 numbers in every dtype.
        assert sums == pytest.approx([plain(exact, one) for one in question], rel=2e-7)


def test_packing_gives_what_one_by_one_gives(model):
    questions = draw_questions(model.config.vocab_size)
    packed = loglikelihoods(model, questions, batch_tokens=100_000)
    alone = [[loglikelihoods(model, [[one]], batch_tokens=1)[0][0] for one in question]
             for question in questions]
    for ours, theirs in zip(packed, alone, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert loglikelihoods(model, questions, batch_tokens=100_000) == packed


def test_equal_inputs_run_once_and_one_question_is_one_forward(model, monkeypatch):
    seen = []
    forward = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, ids, **kwargs: (
        seen.append(ids.shape), forward(self, ids, **kwargs))[1])
    letters = [Continuation([1, 2, 3], [token]) for token in (7, 8, 9)]
    longer = [Continuation([1, 2, 3], [token, 5]) for token in (7, 8)]
    told = []
    loglikelihoods(model, [letters, longer, letters], batch_tokens=4, done=told.append)
    assert seen == [(1, 3), (1, 8), (1, 3)] and told == [1, 2, 3]
    seen.clear()
    loglikelihoods(model, [letters, longer], batch_tokens=11)
    assert seen == [(1, 11)]


def test_dropout_is_off_and_the_mode_is_put_back(model):
    questions = draw_questions(model.config.vocab_size, 2)
    model.train()
    first = loglikelihoods(model, questions, batch_tokens=100)
    assert model.training and loglikelihoods(model, questions, batch_tokens=100) == first
    model.eval()
    assert loglikelihoods(model, questions, batch_tokens=100) == first


def test_what_cannot_be_scored_is_refused(tokenizer, model):
    with pytest.raises(UserError, match="token 9999 is outside"):
        loglikelihoods(model, [[Continuation([1], [9999])]], batch_tokens=10)
    for context, ids in (([], [1]), ([1], [])):
        with pytest.raises(ValueError, match="at least one token"):
            loglikelihoods(model, [[Continuation(context, ids)]], batch_tokens=10)
    broken = make_model(tokenizer)
    with torch.no_grad():
        broken.norm.weight.fill_(torch.nan)
    with pytest.raises(RunError, match="not numbers"):
        loglikelihoods(broken, [[Continuation([1], [2])]], batch_tokens=10)


@pytest.mark.parametrize("name", ["prompt", "prefix", "lora"])
def test_a_model_with_an_adapter_is_scored_with_it(tokenizer, name):
    model = make_model(tokenizer)
    questions = draw_questions(model.config.vocab_size, 4)
    bare = loglikelihoods(model, questions, batch_tokens=1000)
    adapter = apply(model, AdapterConfig(name=name), seed=1)
    with torch.no_grad():
        for _, parameter in adapter.named_parameters():
            parameter.add_(torch.randn(parameter.shape,
                                       generator=torch.Generator().manual_seed(2)))
    ours = loglikelihoods(model, questions, batch_tokens=1000)
    model.eval()
    for question, sums, before in zip(questions, ours, bare, strict=True):
        assert sums == pytest.approx([plain(model, one) for one in question], rel=1e-4)
        assert sums != pytest.approx(before, rel=1e-2)
