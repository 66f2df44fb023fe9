"""Every family: all that can be replaced is, and neither loss nor gradients change."""

import collections

import pytest
import torch

pytest.importorskip("transformers")
import families

import fastllm

RMS, LOSS = "ops.rms_norm", "ops.linear_cross_entropy"
ATTENTION = "ops.attention"
BOTH = "ops.rope + ops.attention"
EMBED, DROP, GATE = "ops.embedding", "ops.dropout", "ops.swiglu"
GEMMA_RMS, GEGLU = "ops.rms_norm(offset=1)", 'ops.geglu(approximate="tanh")'
REPLACED = {
    "llama": {EMBED: 1, GATE: 2, RMS: 5, BOTH: 2, LOSS: 1},
    "mistral": {EMBED: 1, GATE: 2, RMS: 5, BOTH: 2, LOSS: 1},
    "qwen2": {EMBED: 1, GATE: 2, RMS: 5, BOTH: 2, LOSS: 1},
    "qwen3": {EMBED: 1, GATE: 2, RMS: 9, BOTH: 2, LOSS: 1},
    "gemma2": {"ops.embedding, scaled": 1, GEGLU: 2, GEMMA_RMS: 9, BOTH: 2, LOSS: 1},
    "gemma3": {"ops.embedding, scaled": 1, GEGLU: 2, GEMMA_RMS: 13, BOTH: 2, LOSS: 1},
    "phi3": {EMBED: 1, GATE: 2, RMS: 5, BOTH: 2, LOSS: 1, DROP: 4},
    "phi4": {EMBED: 1, GATE: 2, RMS: 5, BOTH: 2, LOSS: 1, DROP: 4},
    "mixtral": {EMBED: 1, GATE: 2, RMS: 5, BOTH: 2, LOSS: 1},
    "qwen3_moe": {EMBED: 1, GATE: 2, RMS: 9, BOTH: 2, LOSS: 1},
    "gpt2": {EMBED: 2, ATTENTION: 2, "ops.layer_norm": 5, DROP: 7, LOSS: 1},
    "bert": {EMBED: 3, ATTENTION: 2, "ops.layer_norm": 6, DROP: 7, LOSS: 1},
    "t5": {EMBED: 5, GEGLU: 4, RMS: 12, DROP: 16, LOSS: 1},
}
LEFT = {"t5": {"T5Attention"}}  # which add a bias to the scores


@pytest.mark.parametrize("family", families.FAMILIES)
def test_everything_is_replaced(family):
    report = fastllm.patch(families.build(family))
    assert collections.Counter(entry.by for entry in report.replaced) == REPLACED[family]
    assert {entry.what for entry in report.skipped} == LEFT.get(family, set()), report


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("family", families.FAMILIES)
def test_loss_and_gradients(family, training, masked):
    model, inputs = families.build(family).train(training), families.batch(masked)
    out, grads = families.step(model, **inputs)
    fastllm.patch(model)
    assert model.training == training
    ours, our_grads = families.step(model, **inputs)
    torch.testing.assert_close(ours.loss, out.loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(our_grads, grads, atol=1e-5, rtol=1e-5)
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    torch.testing.assert_close(torch.as_tensor(ours.logits[...])[real], out.logits[real],
                               atol=1e-5, rtol=1e-5)
    # What else the model returns is as it was: the loss of a mixture's router, for one.
    assert ours.keys() == out.keys()
    if "aux_loss" in out:
        torch.testing.assert_close(ours.aux_loss, out.aux_loss)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_bfloat16_is_as_near_to_float32(family):
    inputs = families.batch()
    truth, true_grads = families.step(families.build(family), **inputs)
    model = families.build(family, torch.bfloat16)

    def errors():
        out, grads = families.step(model, **inputs)
        flat = [torch.cat([grads[name].double().flatten() for name in sorted(true_grads)]) for
                grads in (grads, true_grads)]
        return abs(out.loss.item() - truth.loss.item()), float((flat[0] - flat[1]).norm())

    theirs = errors()
    assert {entry.what for entry in fastllm.patch(model).skipped} == LEFT.get(family, set())
    ours = errors()
    assert ours[0] <= 2 * theirs[0] + 0.01
    assert ours[1] <= 1.5 * theirs[1]


@pytest.mark.parametrize("family", families.FAMILIES)
def test_unpatch_restores(family):
    model, inputs = families.build(family), families.batch()
    out, grads = families.step(model, **inputs)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    keys = list(model.state_dict())
    report = fastllm.patch(model)
    assert list(model.state_dict()) == keys
    assert fastllm.unpatch(model) == len(report.replaced)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    again, again_grads = families.step(model, **inputs)
    assert torch.equal(again.loss, out.loss)
    assert all(torch.equal(again_grads[name], grads[name]) for name in grads)
    assert fastllm.unpatch(model) == 0


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3", "qwen3_moe", "gpt2", "t5"])
def test_generation(family):
    model = families.build(family).eval()
    prompt = families.batch()["input_ids"][:, :4]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    theirs = model.generate(prompt, **options)
    fastllm.patch(model)
    assert torch.equal(model.generate(prompt, **options), theirs)


@pytest.mark.parametrize("scaling", [
    {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 32, "rope_theta": 10000.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
     "rope_theta": 10000.0},
    {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}],
    ids=lambda scaling: scaling["rope_type"])
def test_scaled_rope(scaling):
    model, inputs = families.build("llama", rope_parameters=scaling), families.batch()
    out, grads = families.step(model, **inputs)
    assert not fastllm.patch(model).skipped
    ours, our_grads = families.step(model, **inputs)
    torch.testing.assert_close(ours.loss, out.loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(our_grads, grads, atol=1e-5, rtol=1e-5)


def test_fifty_steps_of_training():
    losses = []
    for patched in (False, True):
        model = families.build("llama")
        if patched:
            fastllm.patch(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        generator = torch.Generator().manual_seed(0)
        for _ in range(50):
            ids = torch.randint(3, families.VOCAB, (4, 17), generator=generator)
            ids[:, 1::2] = ids[:, ::2][:, :8]  # something to learn
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    theirs, ours = losses[:50], losses[50:]
    assert theirs[-1] < 0.95 * theirs[0]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)
