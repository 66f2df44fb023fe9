"""Folders of Hugging Face: the same logits both ways, and one clear line for a wrong file."""

import dataclasses
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fastllm.config import UserError
from fastllm.generate import GenerateConfig, generate
from fastllm.model import Decoder, KVCache, ModelConfig, RopeScaling, hf, shapes

SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0,
        "original_max_position_embeddings": 16}
SLIDES, FULL = "sliding_attention", "full_attention"
GEMMA = {"scale_embeddings": True, "rms_norm_offset": 1.0, "hidden_act": "gelu_pytorch_tanh"}
GEMMA2 = {**GEMMA, "sandwich_norms": True, "sliding_window": 7, "layer_types": [SLIDES, FULL],
          "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
GEMMA3 = {**GEMMA, "sandwich_norms": True, "sliding_window": 7, "qk_norm": True,
          "layer_types": [SLIDES, FULL], "rope_theta": 5e4, "rope_local_base_freq": 500.0}
CASES = {
    "mistral": ("mistral", {"sliding_window": 7, "head_dim": 24}),
    "llama with every bias": ("llama", {"attention_bias": True, "attention_output_bias": True,
                                        "mlp_bias": True}),
    "llama with gelu": ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "qwen2 that slides above": ("qwen2", {"attention_bias": True, "sliding_window": 9,
                                          "layer_types": [FULL, SLIDES]}),
    "qwen2 that slides": ("qwen2", {"attention_bias": True, "sliding_window": 9}),
    "qwen3 that slides, biased": ("qwen3", {
        "qk_norm": True, "attention_bias": True, "attention_output_bias": True,
        "sliding_window": 1, "layer_types": [SLIDES, FULL]}),
    "gemma": ("gemma", {**GEMMA, "num_key_value_heads": 1, "head_dim": 20}),
    "gemma2": ("gemma2", GEMMA2),
    "gemma2, scores by another root": ("gemma2", {**GEMMA2, "query_pre_attn_scalar": 40,
                                                  "head_dim": 24}),
    "gemma2 without windows and caps": ("gemma2", {**GEMMA, "sandwich_norms": True}),
    "gemma3": ("gemma3_text", GEMMA3),
    "gemma3, stretched": ("gemma3_text", {
        **GEMMA3, "head_dim": 24, "query_pre_attn_scalar": 30,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "final_logit_softcapping": 2.5}),
    "gemma3, all slide": ("gemma3_text", {**GEMMA3, "layer_types": None}),
    "gemma3, one base": ("gemma3_text", {**GEMMA3, "rope_local_base_freq": None}),
    "gemma3 without windows": ("gemma3_text", {**GEMMA, "sandwich_norms": True, "qk_norm": True}),
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


def packed(lengths):
    """The keyword arguments of documents of these lengths in one row."""
    ends = torch.tensor(lengths).cumsum(0)
    return {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
            "cu_seqlens": torch.cat([torch.zeros(1), ends]).int(), "max_seqlen": max(lengths)}


def same_logits(ours, theirs, ids):
    """Equal to fp32's rounding, which grows with the logits."""
    with torch.no_grad():
        wanted = theirs(ids).logits
        torch.testing.assert_close(ours.logits(ours(ids)), wanted, rtol=0,
                                   atol=1e-5 * max(1.0, wanted.abs().max().item()))


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
    same_logits(ours, theirs, ids)
    assert (theirs.config.bos_token_id, theirs.generation_config.eos_token_id) == (1, 2)
    with torch.no_grad():
        drawn = theirs.generate(ids[:, :11], max_new_tokens=14, do_sample=False, eos_token_id=None,
                                pad_token_id=0)[:, 11:]
    greedy = generate(ours, ids[:, :11].tolist(), GenerateConfig(max_new_tokens=14, temperature=0))
    assert greedy == drawn.tolist()

    scramble(theirs)
    theirs.tie_weights()
    theirs.save_pretrained(tmp_path / "theirs")
    back = hf.load(tmp_path / "theirs").eval()
    assert back.config == dataclasses.replace(config, head_dim=config.head_size)
    same_logits(back, theirs, ids)


@pytest.mark.parametrize(("kind", "changes"), CASES.values(), ids=CASES)
def test_packed_documents_equal_single_ones_beyond_the_window(kind, changes, ids):
    model = scramble(Decoder(make_config(changes))).eval()
    lengths = [23, 1, 24]
    with torch.no_grad():
        together = model(ids[:1], **packed(lengths))[0]
        alone = [model(part[None])[0] for part in ids[0].split(lengths)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("kind", "changes"), CASES.values(), ids=CASES)
def test_a_cache_changes_nothing(kind, changes, ids):
    config = make_config(changes)
    model = scramble(Decoder(config)).eval()
    cache = KVCache(config, 2, 48)
    with torch.no_grad():
        whole = model(ids)
        parts = [model(piece, cache=cache) for piece in ids.split([20, 1, 1, 9, 17], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=2e-5)


@pytest.mark.parametrize("changes", [{"sliding_window": 7}, GEMMA2, GEMMA3],
                         ids=["mistral", "gemma2", "gemma3"])
def test_gradients_are_those_of_transformers(changes, ids, tmp_path):
    ours = scramble(Decoder(make_config(changes)))
    hf.save(ours, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager")
    seed = torch.randn(2, 48, 96, generator=torch.Generator().manual_seed(6))
    for logits in (ours.logits(ours(ids)), theirs(ids).logits):
        (logits * seed).sum().backward()
    wanted = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for parameter in ours.parameters():
        parameter.data = parameter.grad
    for name, gradient in hf.hf_tensors(ours):
        scale = wanted[name].abs().max()
        assert scale > 0 and (gradient - wanted[name]).abs().max() <= 1e-4 * scale, name


@pytest.mark.parametrize("changes", [{}, GEMMA, GEMMA2, GEMMA3],
                         ids=["llama", "gemma", "gemma2", "gemma3"])
def test_bf16_is_as_near_to_the_truth_as_transformers(changes, ids, tmp_path):
    ours = scramble(Decoder(make_config(changes))).bfloat16().eval()
    hf.save(ours, tmp_path)
    exact = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    with torch.no_grad():
        truth = exact(ids).logits
        errors = [(logits.double() - truth).norm() for logits in (
            ours.logits(ours(ids)), theirs(ids).logits)]
    assert errors[0] <= 1.2 * errors[1]


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


@pytest.mark.parametrize("kind", hf.ARCHITECTURES)
def test_a_silent_config_means_what_transformers_means(kind):
    values = {"model_type": kind, "vocab_size": 96, "hidden_size": 64, "intermediate_size": 80,
              "num_hidden_layers": 30, "num_attention_heads": 32}
    theirs = transformers.AutoConfig.for_model(**values)
    ours = hf.config_from_hf(values)
    assert ours.head_size == (getattr(theirs, "head_dim", None) or 2)
    for name in ("rms_norm_eps", "tie_word_embeddings", "max_position_embeddings"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.kv_heads == theirs.num_key_value_heads
    act = getattr(theirs, "hidden_activation", None) or theirs.hidden_act
    assert ours.hidden_act == act
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        assert getattr(ours, name) == getattr(theirs, name, None), name
    assert (ours.query_pre_attn_scalar or ours.head_size) == getattr(
        theirs, "query_pre_attn_scalar", ours.head_size)
    same_windows(ours, theirs)
    ropes = theirs.rope_parameters
    if kind == "gemma3_text":
        assert ours.rope_local_base_freq == ropes["sliding_attention"]["rope_theta"]
        ropes = ropes["full_attention"]
    assert ours.rope_theta == ropes["rope_theta"]


def same_windows(ours, theirs):
    types = getattr(theirs, "layer_types", None) or (
        [SLIDES if theirs.model_type == "mistral" else FULL] * theirs.num_hidden_layers)
    assert [ours.window(layer) for layer in range(ours.num_hidden_layers)] == [
        theirs.sliding_window if kind == SLIDES else None for kind in types]


@pytest.mark.parametrize("values", [
    {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 3},
    {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 5},
    {"model_type": "qwen2", "sliding_window": 5},
    {"model_type": "gemma3_text", "sliding_window_pattern": 4, "sliding_window": 5},
    {"model_type": "mistral", "sliding_window": None},
    {"model_type": "gemma", "hidden_act": "gelu"}])
def test_older_spellings_mean_what_transformers_means(values):
    values = {**values, "vocab_size": 96, "hidden_size": 64, "intermediate_size": 80,
              "num_hidden_layers": 30, "num_attention_heads": 32}
    ours = hf.config_from_hf(values)
    theirs = transformers.AutoConfig.for_model(**values)
    same_windows(ours, theirs)
    assert ours.hidden_act == (getattr(theirs, "hidden_activation", None) or theirs.hidden_act)


@pytest.mark.parametrize(("changes", "words"), [
    ({"model_type": "gpt2"}, "gpt2"), ({"hidden_act": "gelu"}, "gelu"),
    ({"model_type": "mistral", "attention_bias": True}, "attention_bias"),
    ({"model_type": "qwen3", "mlp_bias": True}, "mlp_bias"),
    ({"use_sliding_window": True}, "use_sliding_window"),
    ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ({"model_type": "gemma3_text", "attn_logit_softcapping": 5.0}, "attn_logit_softcapping"),
    ({"model_type": "gemma3"}, "model_type 'gemma3' is not supported"),
    ({"model_type": "gemma2", "layer_types": ["chunked_attention", "sliding_attention"]},
     "layer-types"),
    ({"model_type": "gemma2", "layer_types": ["sliding_attention"]}, "layer_types names 1"),
    ({"model_type": "gemma2", "sliding_window": None, "layer_types": ["sliding_attention"] * 2},
     "sliding_window is null"),
    ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 2}, "use_sliding_window"),
    ({"model_type": "gemma3_text", "sliding_window_pattern": 0}, "sliding_window_pattern"),
    ({"model_type": "gemma3_text", "rope_parameters": {
        "full_attention": {}, "sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
     "sliding layers stretch"), ({"vocab_size": None}, "vocab_size"),
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
    ({"scale_embeddings": True}, "rms_norm_offset 1 together"),
    ({**GEMMA2, "mlp_bias": True}, "no mlp_bias"),
    ({**GEMMA3, "attn_logit_softcapping": 5.0}, "Gemma 3 has no attn_logit_softcapping"),
    ({**GEMMA2, "rope_local_base_freq": 5.0}, "Gemma 3's"),
    ({**GEMMA, "qk_norm": True}, "with sandwich_norms"),
    ({**GEMMA, "sliding_window": 4}, "Gemma has no sliding_window"),
    ({"sliding_window": 4, "layer_types": [SLIDES, FULL]}, "Llama has no sliding_window"),
    ({"sliding_window": 4, "mlp_bias": True}, "mlp_bias goes with no"),
    ({"attention_output_bias": True}, "without attention_bias"),
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
        self.refuse(folder, "pytorch_model.bin", "never loaded", "fastllm-train import")

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
