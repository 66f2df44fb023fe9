"""Tiny GGUF files, written as llama.cpp's converter writes them, from a `Decoder`."""

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers

from fastllm.model import Decoder, ModelConfig, hf

SIZES = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
         "rope_theta": 5000.0, "init_std": 0.1}
NAMES = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output",
         "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
         "q_norm": "attn_q_norm", "k_norm": "attn_k_norm", "gate_proj": "ffn_gate",
         "up_proj": "ffn_up", "down_proj": "ffn_down", "input_layernorm": "attn_norm",
         "post_attention_layernorm": "ffn_norm"}
GEMMA_NAMES = {"post_attention_layernorm": "post_attention_norm",
               "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm":
               "post_ffw_norm"}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def scrambled(**changes):
    model = Decoder(ModelConfig(**{**SIZES, **changes}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            middle = 1 - model.config.rms_norm_offset
            parameter.copy_(middle + 0.2 * noise if parameter.dim() == 1 else 0.1 * noise)
    return model.eval()


def interleave(rows, heads):
    """llama.cpp's LlamaModel.permute: HF's rows of a head, (2, D/2), become (D/2, 2)."""
    shape = rows.shape
    return rows.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def stored_tensors(model, arch):
    """(GGUF name, numpy fp32) of every tensor."""
    c = model.config
    for name, tensor in hf.hf_tensors(model):
        parts = name.removeprefix("model.").split(".")
        values = tensor.detach().float().numpy().copy()
        if arch == "llama" and parts[-2] in ("q_proj", "k_proj"):
            values = interleave(values, c.num_attention_heads if parts[-2][0] == "q"
                                else c.kv_heads)
        if arch.startswith("gemma") and "norm" in parts[-2]:
            values += 1
        names = {**NAMES, **(GEMMA_NAMES if arch in ("gemma2", "gemma3") else {})}
        place = f"blk.{parts[1]}." if parts[0] == "layers" else ""
        yield f"{place}{names[parts[-2]]}.{parts[-1]}", values


def base_keys(writer, config):
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_size)
    if config.head_dim is not None:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)


def byte_level_vocabulary(size=300):
    """tokens, types, merges: three specials, the bytes, a few merges, and unused rows."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "1 2", "Ġ Ġ"]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet,
              *(merge.replace(" ", "") for merge in merges), "<think>"]
    types = [CONTROL] * 3 + [NORMAL] * (len(tokens) - 4) + [USER_DEFINED]
    unused = [f"[PAD{place}]" for place in range(len(tokens), size)]
    return tokens + unused, types + [UNUSED] * len(unused), merges


def add_byte_level(writer, pre="smollm", **changes):
    tokens, types, merges = byte_level_vocabulary()
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(changes.get("tokens", tokens))
    writer.add_token_types(changes.get("types", types))
    writer.add_token_merges(changes.get("merges", merges))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(changes.get("eos", 2))
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(changes.get("add_bos", False))
    if "template" in changes:
        writer.add_chat_template(changes["template"])


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Forge:
    """Writes GGUF files into a folder."""

    add_byte_level = staticmethod(add_byte_level)
    base_keys = staticmethod(base_keys)
    finish = staticmethod(finish)
    scrambled = staticmethod(scrambled)
    stored_tensors = staticmethod(stored_tensors)
    vocabulary = staticmethod(byte_level_vocabulary)

    def __init__(self, folder):
        self.folder = folder

    def write(self, model, arch="llama", *, kind=None, keys=lambda writer: None, tensors=None,
              tokenizer=add_byte_level, base=base_keys, name="model.gguf"):
        """kind: a quantisation of the matrices; keys: adds to the metadata."""
        path = self.folder / name
        writer = gguf.GGUFWriter(path, arch)
        base(writer, model.config)
        keys(writer)
        tokenizer(writer)
        for key, values in (tensors or dict(stored_tensors(model, arch))).items():
            values = np.ascontiguousarray(values)
            if kind is None or values.ndim == 1:
                writer.add_tensor(key, values)
            else:
                writer.add_tensor(key, gguf.quants.quantize(values, kind), raw_dtype=kind)
        finish(writer)
        return path


@pytest.fixture
def forge(tmp_path):
    return Forge(tmp_path)
