"""Folders of Hugging Face: the same logits both ways, and one clear line for a wrong file."""

import dataclasses
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fastllm.config import UserError
from fastllm.model import Decoder, ModelConfig, RopeScaling, hf, shapes

SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0,
        "original_max_position_embeddings": 16}
CASES = {
    "llama": ("llama", {}),
    "llama untied": ("llama", {"tie_word_embeddings": False, "num_key_value_heads": 4}),
    "llama wide heads": ("llama", {"head_dim": 24, "num_key_value_heads": 1, "rope_theta": 5e5}),
    "llama3 rope": ("llama", {"rope_scaling": LLAMA3, "rms_norm_eps": 1e-6}),
    "linear rope": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
    "yarn rope": ("llama", {"rope_scaling": YARN}),
    "yarn rope as DeepSeek's": ("qwen3", {"qk_norm": True, "rope_scaling": {
        **YARN, "mscale": 0.7, "mscale_all_dim": 1.2, "truncate": False}}),
    "qwen2": ("qwen2", {"attention_bias": True}),
    "qwen2 wide heads, untied": ("qwen2", {"attention_bias": True, "head_dim": 20,
                                           "tie_word_embeddings": False}),
    "qwen3": ("qwen3", {"qk_norm": True, "head_dim": 24, "rope_theta": 1e6}),
    "qwen3 heads that do not divide": ("qwen3", {"qk_norm": True, "head_dim": 16,
                                                 "num_attention_heads": 6}),
}


def make_config(changes):
    changes = dict(changes)
    if "rope_scaling" in changes:
        changes["rope_scaling"] = RopeScaling(**changes["rope_scaling"])
    return ModelConfig(**{**SIZES, "init_std": 0.1, **changes})


def scramble(module):
    """Every parameter random, norms and biases too."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if parameter.dim() == 1 else 0.1 * noise)
    return module


def theirs_of(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture
def ids():
    return torch.randint(0, 96, (2, 48), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(("kind", "changes"), CASES.values(), ids=CASES)
def test_logits_equal_both_ways(kind, changes, ids, tmp_path):
    config = make_config(changes)
    ours = scramble(Decoder(config)).eval()
    (tmp_path / "ours").mkdir()
    hf.save(ours, tmp_path / "ours", bos_token_id=1, eos_token_id=2)
    theirs = theirs_of(tmp_path / "ours")
    assert type(theirs).__name__ == hf.ARCHITECTURES[kind]
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours(ids)), theirs(ids).logits, rtol=0, atol=1e-5)
    assert (theirs.config.bos_token_id, theirs.generation_config.eos_token_id) == (1, 2)

    scramble(theirs)
    theirs.tie_weights()
    theirs.save_pretrained(tmp_path / "theirs")
    back = hf.load(tmp_path / "theirs").eval()
    assert back.config == dataclasses.replace(config, head_dim=config.head_size)
    with torch.no_grad():
        torch.testing.assert_close(back.logits(back(ids)), theirs(ids).logits, rtol=0, atol=1e-5)


def test_sharded_folder_reads_the_same(ids, tmp_path):
    config = make_config({"tie_word_embeddings": False})
    ours = scramble(Decoder(config)).eval()
    (tmp_path / "one").mkdir()
    hf.save(ours, tmp_path / "one")
    theirs_of(tmp_path / "one").save_pretrained(tmp_path / "many", max_shard_size="50KB")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    back = hf.load(tmp_path / "many")
    for (name, a), (_, b) in zip(hf.hf_tensors(ours), hf.hf_tensors(back), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip_is_exact_in_every_dtype(dtype, tmp_path):
    ours = scramble(Decoder(make_config({"qk_norm": True}))).to(dtype)
    hf.save(ours, tmp_path)
    # The library's own reader agrees with our writer about names, shapes and values.
    file = load_file(tmp_path / hf.WEIGHTS)
    assert {name: t.tolist() for name, t in file.items()} == {
        name: t.tolist() for name, t in hf.hf_tensors(ours)}
    back = hf.load(tmp_path)
    assert back.embed_tokens.weight.dtype == dtype
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), back.parameters(), strict=True))
    assert back.rotary.cos.dtype == torch.float32
    assert hf.load(tmp_path, dtype=torch.float64, dropout=0.1).config.dropout == 0.1


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_config_round_trip_of_every_shape(name):
    config = shapes.config(name)
    assert hf.config_from_hf(json.loads(json.dumps(hf.config_to_hf(config)))) == config


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_rope_is_read_as_transformers_4_and_5_write_it(spelling):
    values = hf.config_to_hf(make_config({}))
    del values["rope_scaling"], values["rope_parameters"], values["rope_theta"]
    if spelling == "rope_scaling":
        values |= {"rope_theta": 5e5, "rope_scaling": LLAMA3}
    else:
        values |= {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}}
    config = hf.config_from_hf(values)
    assert (config.rope_theta, config.rope_scaling) == (5e5, RopeScaling(**LLAMA3))


def test_yarn_without_an_original_length_means_the_model_s():
    values = hf.config_to_hf(make_config({}))
    values["rope_scaling"] = {"type": "yarn", "factor": 2.0, "attention_factor": 1.5}
    assert hf.config_from_hf(values).rope_scaling == RopeScaling(
        rope_type="yarn", factor=2.0, attention_factor=1.5,
        original_max_position_embeddings=SIZES["max_position_embeddings"])


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_a_silent_config_means_what_transformers_means(kind):
    values = {"model_type": kind, "vocab_size": 96, "hidden_size": 64, "intermediate_size": 80,
              "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    theirs = transformers.AutoConfig.for_model(**values)
    ours = hf.config_from_hf(values)
    assert ours.head_size == getattr(theirs, "head_dim", 16)
    for name in ("rms_norm_eps", "tie_word_embeddings", "max_position_embeddings"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]


@pytest.mark.parametrize(("changes", "words"), [
    ({"model_type": "gpt2"}, "gpt2"), ({"hidden_act": "gelu"}, "gelu"),
    ({"attention_bias": True}, "attention_bias"), ({"mlp_bias": True}, "mlp_bias"),
    ({"use_sliding_window": True}, "use_sliding_window"), ({"vocab_size": None}, "vocab_size"),
    ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "longrope"),
    ({"rope_scaling": {"rope_type": "yarn"}}, "yarn rope_scaling lacks factor"),
    ({"rope_scaling": {"type": "dynamic"}}, "dynamic"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
    ({"hidden_size": "wide"}, "hidden-size"), ({"rope_scaling": "yes"}, "rope_scaling"),
])
def test_foreign_configs_are_refused_by_field_and_file(changes, words):
    values = {**hf.config_to_hf(make_config({})), **changes}
    with pytest.raises(UserError, match=f"a/config.json: .*{words}"):
        hf.config_from_hf(values, "a/config.json")


@pytest.mark.parametrize(("changes", "words"), [
    ({"qk_norm": True, "attention_bias": True}, "none has both"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    ({"hidden_size": 62, "head_dim": 16}, "hidden_size 62"),
])
def test_models_that_no_architecture_holds_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        hf.architecture(make_config(changes))


class TestWrongFiles:
    """Each wrong folder gives one line that names the tensor and the file."""

    @pytest.fixture
    def folder(self, tmp_path):
        hf.save(Decoder(make_config({})), tmp_path)
        return tmp_path

    def rewrite(self, folder, change):
        tensors = load_file(folder / hf.WEIGHTS)
        change(tensors)
        save_file(tensors, folder / hf.WEIGHTS)

    def refuse(self, folder, *words):
        with pytest.raises(UserError) as error:
            hf.load(folder)
        message = str(error.value)
        assert all(word in message for word in (str(folder), *words)), message
        assert "\n" not in message

    def test_missing(self, folder):
        self.rewrite(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
        self.refuse(folder, "lacks tensor model.layers.1.mlp.up_proj.weight (80, 64)")

    def test_unexpected(self, folder):
        self.rewrite(folder, lambda t: t.update({"model.layers.2.x": torch.ones(1)}))
        self.refuse(folder, "model.safetensors", "model.layers.2.x")

    def test_shape(self, folder):
        self.rewrite(folder, lambda t: t.update({"model.norm.weight": torch.ones(63)}))
        self.refuse(folder, "model.safetensors", "model.norm.weight is (63,)", "(64,)")

    def test_different_tied_head(self, folder):
        def untie(tensors):
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
        self.rewrite(folder, untie)
        self.refuse(folder, "lm_head.weight differs")

    def test_truncated(self, folder):
        data = (folder / hf.WEIGHTS).read_bytes()
        (folder / hf.WEIGHTS).write_bytes(data[:-5])
        self.refuse(folder, "model.safetensors", "not a readable safetensors file")

    def test_bad_json_and_no_config(self, folder):
        (folder / hf.CONFIG).write_text("{")
        self.refuse(folder, "config.json", "not valid JSON")
        (folder / hf.CONFIG).unlink()
        self.refuse(folder, "config.json", "cannot read")

    def test_pickle_is_never_loaded(self, folder):
        (folder / hf.WEIGHTS).rename(folder / "pytorch_model.bin")
        self.refuse(folder, "pytorch_model.bin", "never loaded")

    @pytest.mark.parametrize(("weight_map", "words"), [
        ({"a": "model-1.safetensors"}, "no such file"),
        ({"a": "../model.safetensors"}, "not the name of a file beside it"),
        ({}, "weight_map"),
        ({"a": "shard.safetensors"}, "lacks tensor a"),
    ])
    def test_bad_index(self, folder, weight_map, words):
        (folder / hf.WEIGHTS).rename(folder / "shard.safetensors")
        (folder / hf.INDEX).write_text(json.dumps({"weight_map": weight_map}))
        self.refuse(folder, words)


def test_equal_tied_head_and_old_rotary_buffers_are_welcome(tmp_path):
    model = scramble(Decoder(make_config({})))
    hf.save(model, tmp_path)
    tensors = load_file(tmp_path / hf.WEIGHTS)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, tmp_path / hf.WEIGHTS)
    back = hf.load(tmp_path)
    for wanted, got in zip(model.parameters(), back.parameters(), strict=True):
        assert torch.equal(wanted, got)


@pytest.mark.parametrize(("text", "expected"), [
    (None, []), ("{}", []), ('{"eos_token_id": 2}', [2]), ('{"eos_token_id": [2, 7]}', [2, 7])])
def test_stop_tokens(tmp_path, text, expected):
    """Chat models end a turn and a text with different tokens, named in generation_config.json."""
    if text is not None:
        (tmp_path / hf.GENERATION).write_text(text, encoding="utf-8")
    assert hf.stop_tokens(tmp_path) == expected
