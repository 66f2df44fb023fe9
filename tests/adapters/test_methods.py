"""Every method: where it starts, what it trains, packed documents, caches, dtypes, recompute."""

import copy

import pytest
import torch
from adapted import (
    EVERYTHING,
    METHODS,
    UNCHANGED_AT_FIRST,
    adapted,
    decoder,
    ids,
    logits,
    packed,
    stirred,
)

from fastllm import config, ops
from fastllm.adapters import AdapterConfig, apply
from fastllm.config import UserError
from fastllm.generate import GenerateConfig, generate, stream
from fastllm.model import KVCache

LENGTHS = [[5, 9, 2], [16], [1, 15]]


def loss_of(model, batch):
    hidden = model(**batch)
    labels = torch.roll(batch["input_ids"], -1, 1)
    return ops.linear_cross_entropy(hidden.flatten(0, 1), model.lm_head_weight, labels.flatten(),
                                    reduction="sum")


@pytest.mark.parametrize("method", UNCHANGED_AT_FIRST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_starts_at_the_output_of_the_model(method, dtype):
    _, batch = packed(LENGTHS)
    expected = logits(decoder(dtype), **batch)
    model = adapted(method, dtype, trained=False).model
    assert torch.equal(logits(model, **batch), expected)
    assert not torch.equal(logits(adapted(method, dtype).model, **batch), expected)


@pytest.mark.parametrize("method", METHODS)
def test_only_the_adapter_is_trained(method):
    _, batch = packed(LENGTHS)
    adapter = adapted(method)
    model = adapter.model
    own = dict(adapter.named_parameters())
    assert own == {n: p for n, p in model.named_parameters() if p.requires_grad}
    base = {name for name, _ in decoder().named_parameters()}
    assert not base & set(own)
    before = copy.deepcopy(model.state_dict())
    loss_of(model, batch).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in own), name
        if name in own:
            assert parameter.grad.abs().sum() > 0, name
    torch.optim.SGD(own.values(), lr=1e-2).step()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name not in own), name


@pytest.mark.parametrize("method", METHODS)
def test_packed_documents_are_the_documents_alone(method):
    documents, batch = packed(LENGTHS)
    model = adapted(method).model
    together = model(**batch)
    assert together.shape == (3, 16, 64)
    for document, piece in zip(documents, together.flatten(0, 1).split(list(map(len, documents))),
                               strict=True):
        torch.testing.assert_close(piece, model(document[None])[0], rtol=0, atol=2e-5)
        positions = torch.arange(len(document))[None]
        torch.testing.assert_close(piece, model(document[None], position_ids=positions)[0],
                                   rtol=0, atol=2e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_cache_gives_what_the_whole_gives(method):
    model = adapted(method).model.eval()
    tokens = ids(2, 10)
    with torch.no_grad():
        whole = model(tokens)
        cache = KVCache(model.config, 2, 10 + model.virtual_tokens)
        steps = [model(tokens[:, :4], cache=cache), model(tokens[:, 4:5], cache=cache),
                 model(tokens[:, 5:], cache=cache)]
    assert cache.length == cache.capacity
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=0, atol=2e-5)


@pytest.mark.parametrize("method", ["lora of everything", "prompt", "p-tuning", "prefix"])
def test_generation(method):
    model = adapted(method).model
    options = GenerateConfig(max_new_tokens=6, temperature=0)
    prompts = [[3, 5, 7], [9, 2], [1, 2, 3]]
    made = generate(model, prompts, options)
    with torch.no_grad():
        for prompt, tokens in zip(prompts, made, strict=True):
            text = list(prompt)
            for token in tokens:
                assert int(logits(model, input_ids=torch.tensor([text]))[0, -1].argmax()) == token
                text.append(token)
    # A cache that is kept between turns has the virtual tokens once.
    cache = KVCache(model.config, 1, 20 + model.virtual_tokens)
    first = list(stream(model, prompts[0], options, cache=cache))
    assert first == made[0]
    again = list(stream(model, prompts[0] + first + [4], options, cache=cache))
    assert again == generate(model, [prompts[0] + first + [4]], options)[0]
    room = model.config.max_position_embeddings - model.virtual_tokens
    with pytest.raises(UserError, match="longer than the model"):
        generate(model, [[1] * (room - 5)], options)
    assert generate(model, [[1] * (room - 6)], options)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_changes_nothing(method, recompute):
    _, batch = packed(LENGTHS)
    options = {"dropout": 0.2} if METHODS[method]["name"] in ("lora", "dora", "qlora") and (
        "everything" not in method) else {}
    found = []
    for kind in ("none", recompute):
        adapter = adapted(method, options=options, recompute=kind, dropout=0.1)
        torch.manual_seed(3)
        loss_of(adapter.model.train(), batch).backward()
        found.append({name: p.grad for name, p in adapter.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_bf16_trains(method):
    _, batch = packed(LENGTHS)
    wide, narrow = adapted(method), adapted(method, torch.bfloat16)
    assert {p.dtype for _, p in narrow.named_parameters()} == {torch.bfloat16}
    for adapter in (wide, narrow):
        loss_of(adapter.model, batch).backward()
    for (name, a), (_, b) in zip(wide.named_parameters(), narrow.named_parameters(), strict=True):
        similarity = torch.cosine_similarity(a.grad.flatten(), b.grad.float().flatten(), dim=0)
        assert similarity > 0.96, name


@pytest.mark.parametrize("method", METHODS)
def test_disabled_is_the_base(method):
    _, batch = packed(LENGTHS)
    adapter = adapted(method)
    expected = logits(decoder(), **batch)
    with adapter.disabled():
        base = logits(adapter.model, **batch)
        assert not base.requires_grad and adapter.model.virtual_tokens == 0
        assert adapter.model.lm_head_weight is adapter.model._head()
    if method == "qlora":
        fresh = apply(decoder(), adapter.config).model
        expected = logits(fresh, **batch)
    assert torch.equal(base, expected.detach())
    assert not torch.equal(logits(adapter.model, **batch), base)


@pytest.mark.parametrize("method", METHODS)
def test_seed_decides_the_first_values_and_copies_stand_alone(method):
    def values(seed):
        made = apply(decoder(), AdapterConfig(**METHODS[method]), seed=seed)
        return {name: p.detach().clone() for name, p in made.named_parameters()}

    one, same, other = values(1), values(1), values(2)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    adapter = adapted(method)
    twin = copy.deepcopy(adapter.model)
    expected = logits(twin, input_ids=ids())
    stirred(adapter)
    assert torch.equal(logits(twin, input_ids=ids()), expected)
    assert not torch.equal(logits(adapter.model, input_ids=ids()), expected)


@pytest.mark.parametrize("method", METHODS)
def test_parameters_are_restored_by_name(method):
    adapter = adapted(method)
    stored = {name: p.detach().clone() for name, p in adapter.named_parameters()}
    expected = logits(adapter.model, input_ids=ids())
    fresh = apply(decoder(), AdapterConfig(**METHODS[method]), seed=9)
    with torch.no_grad():
        for name, parameter in fresh.named_parameters():
            parameter.copy_(stored.pop(name))
    assert not stored
    assert torch.equal(logits(fresh.model, input_ids=ids()), expected)


@pytest.mark.parametrize("method", ["lora of two parts", "dora", "qlora"])
def test_dropout_is_of_training_only_and_of_the_change_only(method):
    tokens = ids()
    adapter = adapted(method, options={"dropout": 0.5})
    still = adapted(method).model.eval()(tokens)
    assert torch.equal(adapter.model.eval()(tokens), still)
    assert not torch.equal(adapter.model.train()(tokens), still)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if name.endswith("lora_B"):
                parameter.zero_()
    assert torch.equal(adapter.model.train()(tokens), adapter.model.eval()(tokens))


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_virtual_tokens_count_towards_the_longest_document(method):
    model = adapted(method).model
    assert model(ids(1, 61)).shape == (1, 61, 64)
    with pytest.raises(ValueError, match="max_position_embeddings 64"):
        model(ids(1, 62))


def test_compile():
    torch._dynamo.reset()
    _, batch = packed(LENGTHS)
    for method in ("lora of two parts", "prompt", "prefix"):
        model = adapted(method).model
        expected = model(**batch)
        torch.testing.assert_close(torch.compile(model, backend="eager")(**batch), expected,
                                   rtol=0, atol=2e-5)


@pytest.mark.parametrize(("options", "words"), [
    ({"name": "none"}, "adapter.name is none"),
    ({"name": "prompt", "rank": 4}, "adapter.rank is set, but adapter.name prompt"),
    ({"name": "lora", "virtual_tokens": 4}, "adapter.virtual-tokens is set"),
    ({"name": "lora", "targets": ["w_proj"]}, "there is no 'w_proj'"),
    ({"name": "lora", "targets": []}, "adapter.targets is empty"),
    ({"name": "dora", "targets": EVERYTHING, "dropout": 0.1}, "does not go with lm_head"),
    ({"name": "qlora", "block_size": 128}, "block-size 128 does not fit"),
])
def test_wrong_options_are_one_line(options, words):
    with pytest.raises(UserError, match=words) as caught:
        apply(decoder(), AdapterConfig(**options))
    assert "\n" not in str(caught.value)


def test_the_section_is_read_as_typed():
    words = ["--adapter.name", "qlora", "--adapter.block-size", "32", "--adapter.targets",
             "all-linear", "lm_head", "--adapter.rslora", "--adapter.alpha", "8"]
    made = config.build(AdapterConfig, config.from_arguments(words)["adapter"])
    assert (made.block_size, made.scale, made.target_names()[-2:]) == (
        32, 2.0, ["down_proj", "lm_head"])
    with pytest.raises(UserError, match="dropout is set, but"):
        config.build(AdapterConfig, {"name": "prefix", "dropout": 0.1})


def test_one_adapter_a_model():
    adapter = adapted("prompt")
    with pytest.raises(UserError, match="has an adapter already"):
        apply(adapter.model, AdapterConfig(name="lora"))
    with pytest.raises(UserError, match="cannot be merged"):
        adapter.merge()


def test_other_shapes_of_attention():
    """Qwen's shapes: a bias on q, k and v, or norms on q and k, and heads of another width."""
    _, batch = packed(LENGTHS)
    for changes in ({"attention_bias": True}, {"qk_norm": True, "head_dim": 24}):
        for method in ("lora", "dora of two parts", "prefix"):
            model = adapted(method, **changes).model
            documents, _ = packed(LENGTHS)
            whole = model(**batch).flatten(0, 1)[:5]
            torch.testing.assert_close(whole, model(documents[0][None])[0], rtol=0, atol=2e-5)
