"""GGUF files become the models they were made of: weights to the bit, transformers' own reading."""

import dataclasses
import json

import gguf
import numpy as np
import pytest
import torch
import transformers

from fastllm.config import UserError
from fastllm.data.tokenizer import load_tokenizer
from fastllm.importing import import_model
from fastllm.importing.gguf_reader import File
from fastllm.model import RopeScaling, hf

GEMMA = {"scale_embeddings": True, "rms_norm_offset": 1.0, "hidden_act": "gelu_pytorch_tanh"}
ALTERNATE = ["sliding_attention", "full_attention"]
GEMMA3 = {**GEMMA, "sandwich_norms": True, "qk_norm": True, "sliding_window": 9,
          "rope_local_base_freq": 10000.0, "num_hidden_layers": 7,
          "layer_types": [*["sliding_attention"] * 5, "full_attention", "sliding_attention"]}
CASES = {
    "gemma": ("gemma", {**GEMMA, "rope_theta": 10000.0, "head_dim": 24}),
    "gemma2": ("gemma2", {**GEMMA, "sandwich_norms": True, "sliding_window": 9,
                          "layer_types": ALTERNATE, "attn_logit_softcapping": 50.0,
                          "final_logit_softcapping": 30.0, "rope_theta": 10000.0,
                          "head_dim": 256}),
    "gemma3": ("gemma3", {**GEMMA3, "head_dim": 256}),
    "gemma3, stretched": ("gemma3", {**GEMMA3, "head_dim": 24, "rope_scaling": RopeScaling(
        rope_type="linear", factor=8.0)}),
    "llama": ("llama", {}),
    "llama untied, one key head, wide": ("llama", {"tie_word_embeddings": False, "head_dim": 24,
                                                   "num_key_value_heads": 1}),
    "qwen2": ("qwen2", {"attention_bias": True}),
    # transformers takes 128 for the width of its heads, whatever the file says.
    "qwen3": ("qwen3", {"qk_norm": True, "head_dim": 128}),
}
QUIET = {"say": lambda line: None}


def gemma_keys(writer, config):
    if config.sliding_window is not None:
        writer.add_sliding_window(config.sliding_window)
    if config.attn_logit_softcapping is not None:
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if config.final_logit_softcapping is not None:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if config.rope_scaling.rope_type == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scaling.factor)


def logits(model, ids):
    with torch.no_grad():
        return model.logits(model(ids))


@pytest.fixture
def ids():
    return torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(("arch", "changes"), CASES.values(), ids=CASES)
def test_weights_come_back_to_the_bit_and_transformers_reads_the_same(
        arch, changes, ids, forge, tmp_path):
    model = forge.scrambled(**changes)
    path = forge.write(model, arch, keys=lambda writer: gemma_keys(writer, model.config),
                       tokenizer=lambda writer: forge.add_byte_level(
                           writer, pre="qwen2" if arch == "qwen2" else "smollm"))
    folder = import_model(path, tmp_path / "out", **QUIET)
    back = hf.load(folder).eval()
    for (name, ours), (_, theirs) in zip(hf.hf_tensors(back), hf.hf_tensors(model), strict=True):
        if arch.startswith("gemma") and ours.dim() == 1:  # (w + 1) - 1
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2**-22)
        else:
            assert torch.equal(ours, theirs), name
    assert back.config == dataclasses.replace(model.config, head_dim=model.config.head_size,
                                              init_std=back.config.init_std)
    written = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        wanted = logits(back, ids)
        near = 2e-5 * max(1.0, wanted.abs().max().item())  # fp32's rounding grows with them
        torch.testing.assert_close(written(ids).logits, wanted, rtol=0, atol=near)
        # transformers also converts GGUF files by code of its own, as far as that goes.
        if arch != "gemma" and model.config.rope_scaling == RopeScaling():
            own = transformers.AutoModelForCausalLM.from_pretrained(
                tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
            torch.testing.assert_close(own(ids).logits, wanted, rtol=0, atol=near)


@pytest.mark.parametrize(("kind", "dtype"), [
    ("F16", "float32"), ("BF16", "float32"), ("Q4_0", "float32"), ("Q4_1", "float32"),
    ("Q5_0", "float32"), ("Q5_1", "float32"), ("Q8_0", "float32")])
def test_quantised_files_become_what_their_blocks_say(kind, dtype, forge, tmp_path):
    model = forge.scrambled(hidden_size=64)
    quantised = gguf.GGMLQuantizationType[kind]
    folder = import_model(forge.write(model, kind=quantised), tmp_path / "out", **QUIET)
    back = dict(hf.hf_tensors(hf.load(folder)))
    assert json.loads((folder / hf.CONFIG).read_text())["dtype"] == dtype
    assert kind.endswith("16") or not torch.equal(back["model.layers.1.mlp.up_proj.weight"], dict(
        hf.hf_tensors(model))["model.layers.1.mlp.up_proj.weight"])
    for name, exact in hf.hf_tensors(model):
        if exact.dim() == 2 and not name.split(".")[-2].startswith(("q_", "k_")):
            blocks = gguf.quants.quantize(exact.detach().numpy(), quantised)
            wanted = gguf.quants.dequantize(blocks, quantised)
            assert np.array_equal(back[name].detach().numpy(), wanted), name


def test_every_type_that_the_package_undoes_is_read_and_others_are_named(forge, tmp_path):
    generator = np.random.default_rng(0)
    read, refused = set(), set()
    for kind in gguf.GGMLQuantizationType:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        data = generator.integers(0, 100, (3, size), dtype=np.uint8)
        path = tmp_path / f"{kind.name}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_tensor("w", data, raw_dtype=kind)
        forge.finish(writer)
        try:
            wanted = gguf.quants.dequantize(data, kind)
        except NotImplementedError:
            with pytest.raises(UserError, match=f"tensor w is of type {kind.name}, "):
                File(path)
            refused.add(kind.name)
            continue
        values = next(File(path).rows("w", whole=True))
        assert values.shape == (3, block)
        assert np.array_equal(values.numpy(), wanted, equal_nan=True)
        read.add(kind.name)
    assert {"F32", "F16", "BF16", "Q4_0", "Q4_K", "Q6_K", "Q2_K", "IQ4_NL", "TQ1_0"} <= read
    assert {"Q8_K", "I8", "F64"} <= refused


def test_rows_come_in_parts_that_make_the_whole(forge, tmp_path, monkeypatch):
    monkeypatch.setattr("fastllm.importing.gguf_reader._ROWS_BYTES", 7 * 4 * 64)
    file = File(forge.write(forge.scrambled()))
    parts = list(file.rows("token_embd.weight"))
    assert len(parts) > 40 and max(len(part) for part in parts) == 7
    assert torch.equal(torch.cat(parts), next(file.rows("token_embd.weight", whole=True)))
    assert next(file.rows("output_norm.weight")).shape == (64,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_is_that_asked_for(dtype, forge, tmp_path):
    model = forge.scrambled()
    folder = import_model(forge.write(model), tmp_path / "out", dtype=dtype, **QUIET)
    back = hf.load(folder)
    for (name, ours), (_, exact) in zip(hf.hf_tensors(back), hf.hf_tensors(model), strict=True):
        assert torch.equal(ours, exact.to(dtype)), name


def frequencies(factor, low, high, length, theta=5000.0, width=16):
    """rope_freqs.weight as llama.cpp's converter makes it (LlamaModel.generate_extra_tensors)."""
    factors = []
    for exponent in range(0, width, 2):
        wave = 2 * np.pi * theta ** (exponent / width)
        if wave < length / high:
            factors.append(1.0)
        elif wave > length / low:
            factors.append(factor)
        else:
            smooth = (length / wave - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def test_llama3_scaling_is_recognised_by_its_factors(forge, tmp_path):
    model = forge.scrambled(rope_theta=500000.0)
    tensors = dict(forge.stored_tensors(model, "llama"))
    made = frequencies(32.0, 1.0, 4.0, 8192, theta=500000.0)
    assert len(set(made.tolist())) > 2
    path = forge.write(model, tensors={**tensors, "rope_freqs.weight": made})
    back = hf.read_config(import_model(path, tmp_path / "out", **QUIET))
    assert back.rope_scaling == RopeScaling(rope_type="llama3", factor=32.0)
    made[-1] *= 1.01
    path = forge.write(model, tensors={**tensors, "rope_freqs.weight": made})
    with pytest.raises(UserError, match=r"rope_freqs\.weight"):
        import_model(path, tmp_path / "out", **QUIET)


@pytest.mark.parametrize(("kind", "wanted"), [
    ("linear", RopeScaling(rope_type="linear", factor=4.0)),
    ("yarn", RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=32))])
def test_other_scalings_come_from_the_metadata(kind, wanted, forge, tmp_path):
    def keys(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(32)

    path = forge.write(forge.scrambled(), keys=keys)
    assert hf.read_config(import_model(path, tmp_path / "out", **QUIET)).rope_scaling == wanted


def test_chat_template_and_tokens_go_with_it(forge, tmp_path):
    said = []
    path = forge.write(forge.scrambled(), tokenizer=lambda writer: forge.add_byte_level(
        writer, template="{{ messages[0].content }}!"))
    folder = import_model(tmp_path, tmp_path / "out", say=said.append)
    words = transformers.AutoTokenizer.from_pretrained(folder)
    assert words.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"
    assert (words.bos_token, words.eos_token, words.pad_token) == (
        None, "<|im_end|>", "<|endoftext|>")
    assert path.exists() and len(said) == 1 and "'<|endoftext|>' (id 0)" in said[0]
    assert load_tokenizer(folder).pad_id == 0


@pytest.mark.parametrize(("keys", "words"), [
    (lambda w: w.add_expert_count(8), "llama.expert_count = 8 is not supported"),
    (lambda w: w.add_sliding_window(4096), "llama.attention.sliding_window = 4096"),
    (lambda w: w.add_logit_scale(0.5), "llama.logit_scale"),
    (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE), "'longrope'"),
    (lambda w: w.add_uint16("split.count", 3), "one of 3 parts"),
    (lambda w: w.add_string("llama.attention.value_length", "x"), "value_length is 'x'"),
])
def test_what_the_model_is_not_is_refused_by_key(keys, words, forge, tmp_path):
    with pytest.raises(UserError, match=words):
        import_model(forge.write(forge.scrambled(), keys=keys), tmp_path / "out", **QUIET)
    assert not (tmp_path / "out").exists()


def test_unknown_architectures_missing_keys_and_tensors_are_named(forge, tmp_path):
    model = forge.scrambled()
    tensors = dict(forge.stored_tensors(model, "llama"))

    def refuse(words, **changes):
        with pytest.raises(UserError, match=words):
            import_model(forge.write(model, **changes), tmp_path / "out", **QUIET)

    refuse("general.architecture 'rwkv7' is not supported; there are: llama", arch="rwkv7",
           tensors=tensors)
    refuse(r"llama\.context_length|llama\.attention.head_count is missing",
           base=lambda writer, config: None)
    less = {name: values for name, values in tensors.items() if name != "blk.1.ffn_down.weight"}
    refuse(r"lacks tensor blk\.1\.ffn_down\.weight \(64, 96\)", tensors=less)
    refuse(r"tensor blk\.1\.attn_q\.bias has no place",
           tensors={**tensors, "blk.1.attn_q.bias": np.zeros(64, np.float32)})
    refuse(r"token_embd\.weight is \(300, 63\), its metadata say \(300, 64\)",
           tensors={**tensors, "token_embd.weight": tensors["token_embd.weight"][:, :63]})
    refuse("block_count is 1000000", tensors=tensors, base=lambda writer, config: forge.base_keys(
        writer, type(config)(**{**vars(config), "num_hidden_layers": 1000000})))


def test_wrong_sources_are_one_line(tmp_path, forge):
    with pytest.raises(UserError, match="there is no"):
        import_model(tmp_path / "none.gguf", tmp_path / "out")
    with pytest.raises(UserError, match=r"neither a \.gguf file nor pytorch_model\.bin"):
        import_model(tmp_path, tmp_path / "out")
    for name in ("a.gguf", "b.gguf"):
        forge.write(forge.scrambled(), name=name)
    with pytest.raises(UserError, match="2 GGUF files"):
        import_model(tmp_path, tmp_path / "out")
    (tmp_path / "x.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="needs no import"):
        import_model(tmp_path / "x.safetensors", tmp_path / "out")


def test_the_package_is_named_where_it_is_missing(tmp_path, forge, monkeypatch):
    path = forge.write(forge.scrambled())
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(UserError, match=r"fastllm-train\[export\]"):
        import_model(path, tmp_path / "out")
