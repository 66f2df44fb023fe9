"""Generation: equal to transformers when greedy, to the model's own logits, to itself by seed."""

import pytest
import torch

from fastllm.config import UserError
from fastllm.generate import (
    GenerateConfig,
    filter_logits,
    generate,
    generate_text,
    sample,
    stream,
)
from fastllm.model import Decoder, KVCache, ModelConfig, hf


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
                         init_std=0.3, dropout=0.5)
    return Decoder(config, generator=torch.Generator().manual_seed(0)).eval()


GREEDY = GenerateConfig(max_new_tokens=20, temperature=0)
PROMPTS = [[1, 2, 3], [7], [9, 8, 7], [5, 4, 3, 2, 1]]


def test_greedy_equals_transformers(model, tmp_path):
    import transformers

    hf.save(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ours = generate(model, PROMPTS, GREEDY)
    for prompt, row in zip(PROMPTS, ours, strict=True):
        ids = torch.tensor([prompt])
        text = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20,
                               do_sample=False, eos_token_id=None, pad_token_id=0)
        assert row == text[0, len(prompt):].tolist()


def test_greedy_equals_the_uncached_model(model):
    prompt = [3, 1, 4]
    for token in generate(model, [prompt], GREEDY)[0]:
        with torch.no_grad():
            logits = model.logits(model(torch.tensor([prompt]))[0, -1])
        assert token == int(logits.argmax())
        prompt = [*prompt, token]


@pytest.mark.parametrize("changes", [
    {"temperature": 0}, {"temperature": 1.0}, {"temperature": 1.5, "top_k": 10},
    {"temperature": 1.0, "top_p": 0.7}])
def test_a_prompt_does_not_depend_on_its_neighbours(model, changes):
    config = GenerateConfig(max_new_tokens=16, seed=3, **changes)
    together = generate(model, PROMPTS, config)
    alone = generate(model, PROMPTS[:1], config)
    assert together[0] == alone[0]
    assert generate(model, PROMPTS, config) == together


def test_the_seed_and_the_place_decide(model):
    def run(seed):
        return generate(model, [[1, 2]] * 2, GenerateConfig(max_new_tokens=16, temperature=2.0,
                                                            seed=seed))
    assert run(1) == run(1)
    assert run(1) != run(2)
    assert run(1)[0] != run(1)[1]
    state = torch.get_rng_state()
    run(5)
    assert torch.equal(state, torch.get_rng_state())


def test_eos_stops_each_row_by_itself(model):
    free = generate(model, PROMPTS, GREEDY)
    stop = free[0][4]
    stopped = generate(model, PROMPTS, GREEDY, eos_token_ids=[stop])
    for row, whole in zip(stopped, free, strict=True):
        end = whole.index(stop) + 1 if stop in whole else len(whole)
        assert row == whole[:end]


def test_training_mode_is_put_back_and_dropout_is_off(model):
    wanted = generate(model, PROMPTS, GREEDY)
    model.train()
    try:
        assert generate(model, PROMPTS, GREEDY) == wanted
        assert model.training
    finally:
        model.eval()


def test_filters_keep_what_they_say():
    logits = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log()

    def kept(**kwargs):
        return (filter_logits(logits, **{"top_k": 0, "top_p": 1.0, **kwargs}) > -torch.inf).tolist()

    assert kept() == [[True] * 4]
    assert kept(top_k=1) == [[True, False, False, False]]
    assert kept(top_k=2) == [[True, True, True, False]]     # a tie at the edge stays
    assert kept(top_p=0.4) == [[True, False, False, False]]
    assert kept(top_p=0.6) == [[True, True, False, False]]
    assert kept(top_p=0.95) == [[True] * 4]
    assert kept(top_k=3, top_p=0.5) == [[True, False, False, False]]


@pytest.mark.parametrize("config", [
    GenerateConfig(temperature=0.7), GenerateConfig(temperature=1.0, top_k=5),
    GenerateConfig(temperature=1.0, top_p=0.8)])
def test_draws_have_the_distribution_that_was_asked(config):
    logits = torch.randn(12, generator=torch.Generator().manual_seed(1)) * 2
    count = 40_000
    # Evenly spread numbers instead of random ones: frequencies are then right to 1 / count.
    uniform = (torch.arange(count) + 0.5) / count
    drawn = sample(logits.expand(count, -1), uniform, config)
    wanted = filter_logits((logits / config.temperature)[None], config.top_k, config.top_p)
    frequency = torch.bincount(drawn, minlength=12) / count
    torch.testing.assert_close(frequency, wanted.softmax(-1)[0], rtol=0, atol=2 / count)


def test_the_ends_of_the_unit_interval_are_drawable():
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).expand(2, -1)
    config = GenerateConfig(temperature=1.0)
    assert sample(logits, torch.tensor([0.0, 1 - 2**-24]), config).tolist() == [1, 2]


def test_text_in_text_out(model):
    class Letters:
        def encode(self, text):
            return [ord(letter) - 64 for letter in text]

        def decode(self, ids):
            return " ".join(map(str, ids))

    ids = generate(model, [[0, 1, 2]], GREEDY, eos_token_ids=[50])[0]
    text = generate_text(model, Letters(), ["AB"], GREEDY, bos_token_id=0, eos_token_ids=[50])
    assert text == [" ".join(str(token) for token in ids if token != 50)]


@pytest.mark.parametrize(("prompt", "words"), [
    ([], "prompt 1 is empty"), ([64], "token 64.*vocabulary of 64"), ([-1], "token -1"),
    ([1] * 50, "50 tokens.*20.*64")])
def test_bad_prompts_are_named(model, prompt, words):
    with pytest.raises(UserError, match=words):
        generate(model, [[1], prompt], GREEDY)


def test_a_stream_is_generate_token_by_token(model):
    config = GenerateConfig(max_new_tokens=16, temperature=1.5, seed=4)
    together = generate(model, [[5, 6]] * 3, config)
    assert [list(stream(model, [5, 6], config, place=place)) for place in range(3)] == together
    stop = together[0][3]
    stopped = list(stream(model, [5, 6], config, eos_token_ids=[stop]))
    assert stopped == together[0][:together[0].index(stop) + 1]


def test_a_stream_goes_on_from_its_cache(model):
    cache = KVCache(model.config, 1, 64)
    first = list(stream(model, [5, 6], GREEDY, cache=cache))
    assert cache.length == 2 + len(first) - 1
    longer = [5, 6, *first, 9]
    assert list(stream(model, longer, GREEDY, cache=cache)) == generate(model, [longer], GREEDY)[0]


def test_batch_size_changes_nothing(model):
    config = GenerateConfig(max_new_tokens=8, temperature=1.5, seed=4)
    prompts = [[1, 2], [3], [4, 5], [6, 7], [8, 9]]
    assert generate(model, prompts, config, batch_size=2) == generate(model, prompts, config)


def test_until_ends_one_row(model):
    free = generate(model, PROMPTS, GREEDY)
    ended = generate(model, PROMPTS, GREEDY, until=lambda tokens: tokens == free[0][:4])
    assert ended == [free[0][:4], *free[1:]]
