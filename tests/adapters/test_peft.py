"""Files of PEFT, both ways: the same logits in transformers under PEFT and here."""

import json

import pytest
import torch
from adapted import EVERYTHING, METHODS, SIZES, adapted, decoder, ids, logits, stirred

from fastllm import adapters
from fastllm.adapters import AdapterConfig
from fastllm.config import UserError
from fastllm.model import hf

PEFT = [name for name in METHODS if name not in ("bottleneck", "qlora")]
SHAPES = {"tied": {}, "untied, norms, wide heads": {
    "tie_word_embeddings": False, "qk_norm": True, "head_dim": 24}, "bias": {
    "attention_bias": True}}


def twin(folder, **changes):
    """transformers' model with the weights of `decoder`."""
    import transformers

    folder.mkdir(exist_ok=True)
    hf.save(decoder(**changes), folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def theirs_of(model):
    with torch.no_grad():
        # PEFT gives the logits of virtual tokens too.
        return model(input_ids=ids(), use_cache=False).logits[:, -ids().shape[1]:]


def ours_of(model):
    with torch.no_grad():
        return logits(model.eval(), input_ids=ids())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", [*PEFT, "qlora"])
def test_ours_in_peft(method, shape, tmp_path):
    import peft

    changes = SHAPES[shape]
    adapter = adapted(method, **changes)
    if method == "qlora":  # PEFT then has the base that the 4 bits stand for
        base = adapters.apply(decoder(**changes), adapter.config)
        base.merge()
        (tmp_path / "base").mkdir()
        hf.save(base.model, tmp_path / "base")
        import transformers
        below = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", dtype=torch.float32).eval()
    else:
        below = twin(tmp_path / "base", **changes)
    adapter.save(tmp_path / "adapter", base=str(tmp_path / "base"))
    assert adapters.base_of(tmp_path / "adapter") == str(tmp_path / "base")
    model = peft.PeftModel.from_pretrained(below, tmp_path / "adapter").eval()
    torch.testing.assert_close(ours_of(adapter.model), theirs_of(model), rtol=0, atol=3e-5)
    back = adapters.load(decoder(**changes), tmp_path / "adapter")
    assert torch.equal(ours_of(back.model), ours_of(adapter.model))
    assert (back.config.name, back.config.scale) == (adapter.config.name, adapter.config.scale)


def peft_config(method, shape):
    import peft

    options = METHODS[method]
    kind = options["name"]
    common = {"task_type": "CAUSAL_LM"}
    if kind in ("lora", "dora"):
        config = AdapterConfig(**options)
        return peft.LoraConfig(
            r=config.rank, lora_alpha=config.alpha, use_rslora=config.rslora,
            use_dora=kind == "dora", target_modules=config.target_names(), **common)
    virtual = {"num_virtual_tokens": options["virtual_tokens"], **common}
    if kind == "prompt":
        return peft.PromptTuningConfig(**virtual)
    if kind == "p-tuning":
        return peft.PromptEncoderConfig(encoder_hidden_size=24, **virtual)
    if "wide heads" in shape:  # PEFT takes heads to be hidden_size / num_attention_heads wide
        virtual |= {"token_dim": 2 * 24, "num_attention_heads": 2}
    return peft.PrefixTuningConfig(**virtual)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", PEFT)
def test_theirs_here(method, shape, tmp_path):
    import peft

    changes = SHAPES[shape]
    torch.manual_seed(0)
    model = peft.get_peft_model(twin(tmp_path / "base", **changes), peft_config(method, shape))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape)
    model.eval().save_pretrained(tmp_path / "adapter")
    adapter = adapters.load(decoder(**changes), tmp_path / "adapter")
    torch.testing.assert_close(ours_of(adapter.model), theirs_of(model), rtol=0, atol=3e-5)
    assert {name for name, _ in adapter.named_parameters()} == {
        name for name, p in adapter.model.named_parameters() if p.requires_grad}
    # Written again it is the same adapter.
    adapter.save(tmp_path / "again", base="x")
    again = adapters.load(decoder(**changes), tmp_path / "again")
    assert torch.equal(ours_of(again.model), ours_of(adapter.model))


def test_first_steps_are_those_of_peft(tmp_path):
    """The same gradients for the same adapter, DoRA's included."""
    import peft

    for method in ("lora of everything", "dora of two parts"):
        below = twin(tmp_path / "base")
        adapter = adapted(method)
        adapter.save(tmp_path / "adapter", base="x")
        model = peft.PeftModel.from_pretrained(below, tmp_path / "adapter", is_trainable=True)
        weights = torch.randn(2, 24, 96, generator=torch.Generator().manual_seed(2))
        (model(input_ids=ids(), use_cache=False).logits * weights).sum().backward()
        (logits(adapter.model, input_ids=ids()) * weights).sum().backward()
        theirs = {name.replace(".default", "").removesuffix(".weight"): p.grad
                  for name, p in model.named_parameters() if p.requires_grad}
        ours = {name.removesuffix(".weight"): p.grad for name, p in adapter.tensors()}
        assert theirs.keys() == ours.keys()
        for name, gradient in ours.items():
            torch.testing.assert_close(gradient, theirs[name], rtol=1e-3, atol=1e-3)


def test_bottleneck_and_qlora_come_back(tmp_path):
    for method in ("bottleneck", "qlora"):
        adapter = adapted(method)
        adapter.save(tmp_path / method, base="x")
        back = adapters.load(decoder(), tmp_path / method)
        assert back.config == adapter.config
        assert torch.equal(ours_of(back.model), ours_of(adapter.model))
    adapter.save(tmp_path / "qlora", base="y")  # over the older one
    assert adapters.base_of(tmp_path / "qlora") == "y"
    assert sorted(path.name for path in (tmp_path / "qlora").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize(("change", "words"), [
    ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported"),
    ({"rank_pattern": {"q_proj": 2}}, "rank_pattern = .* is not supported"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"bias": "all"}, "bias = all"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights = pissa"),
    ({"target_modules": ".*q_proj"}, "target_modules"),
    ({"target_modules": ["q_proj"]}, "tensor .* has no place in this model"),
    ({"r": 8}, r"is \(4, .*the model's is \(8"),
    ({"r": 0}, "rank: '0' is not possible"),
    ({"use_dora": True}, "lacks tensor .*lora_magnitude_vector"),
])
def test_a_file_that_does_not_fit_is_one_line(change, words, tmp_path):
    adapted("lora").save(tmp_path, base="x")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=words) as caught:
        adapters.load(decoder(), tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_other_damage_is_one_line(tmp_path):
    import peft

    with pytest.raises(UserError, match="cannot read"):
        adapters.load(decoder(), tmp_path)
    adapted("lora").save(tmp_path, base="")
    with pytest.raises(UserError, match="base_model_name_or_path does not name"):
        adapters.base_of(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        adapters.load(decoder(), tmp_path)
    weights.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match="is pickle"):
        adapters.load(decoder(), tmp_path)
    # PEFT writes a changed embedding's base with it: another one is another model.
    model = peft.get_peft_model(twin(tmp_path / "base"), peft.LoraConfig(
        r=4, target_modules=EVERYTHING[1:]))
    model.save_pretrained(tmp_path / "theirs")
    adapters.load(decoder(), tmp_path / "theirs")
    other = decoder()
    with torch.no_grad():
        other.embed_tokens.weight[0, 0] += 1
    with pytest.raises(UserError, match="belongs to another model"):
        adapters.load(other, tmp_path / "theirs")


def test_p_tuning_is_stored_as_its_rows(tmp_path):
    adapter = adapted("p-tuning")
    adapter.save(tmp_path, base="x")
    back = adapters.load(decoder(), tmp_path)
    (name, rows), = back.named_parameters()
    assert rows.shape == (3, SIZES["hidden_size"]), name
    assert not torch.equal(ours_of(stirred(back).model), ours_of(adapter.model))
