"""A GGUF file's model: its `ModelConfig`, and its weights in the order of a `Decoder`.

Nothing that the file says is dropped in silence: a key of its architecture that is not known here,
a tensor without a place and a missing one are each a UserError that names it.
Source: llama.cpp's convert_hf_to_gguf.py, whose changes to names, rows and norms are undone here.
"""

from collections.abc import Callable, Iterator
from math import pi
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastllm import export
from fastllm.config import UserError
from fastllm.importing.gguf_reader import MAGIC, File, Stored
from fastllm.importing.gguf_tokenizer import read_tokenizer
from fastllm.model import Decoder, ModelConfig, RopeScaling, hf

# general.architecture -> model_type of Hugging Face. Mistral is stored as llama.
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma": "gemma",
                 "gemma2": "gemma2", "gemma3": "gemma3_text"}
# Names of a block's tensors, ours to GGUF's.
_BLOCK = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
          "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
          "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
          "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
          "mlp.down_proj": "ffn_down"}
# Where each branch is normed twice, GGUF names the four norms otherwise.
_SANDWICH = {**_BLOCK, "post_attention_layernorm": "post_attention_norm",
             "pre_feedforward_layernorm": "ffn_norm",
             "post_feedforward_layernorm": "post_ffw_norm"}
_OUTSIDE = {"model.embed_tokens.weight": "token_embd.weight", "lm_head.weight": "output.weight",
            "model.norm.weight": "output_norm.weight"}
_FREQUENCIES = "rope_freqs.weight"
_MOST_LAYERS = 10000
_LONGEST = 1 << 24  # tokens: beyond any model's, and RoPE's tables are made for them
# Keys that say nothing which the weights do not, or that are about how to run the file.
_NEUTRAL = {"vocab_size", "tensor_data_layout", "rope.scaling.finetuned"}


def is_gguf(path: Path) -> bool:
    """Whether a path is a file that begins as GGUF does, or is called so."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return path.suffix == ".gguf" or file.read(len(MAGIC)) == MAGIC


def import_gguf(path: Path, target: str | Path, dtype: torch.dtype | None,
                say: Callable[[str], object]) -> Path:
    """`import_model` of a GGUF file."""
    file = File(path)
    config = read_config(file)
    with torch.device("meta"):
        model = Decoder(config)
    tokenizer, template, stop_ids = read_tokenizer(file, say)
    return export.export_weights(model, weights(file, model), target, tokenizer, template,
                                 dtype or _exact(file), stop_ids)


def _exact(file: File) -> torch.dtype:
    """The smallest type that holds every tensor of the file exactly."""
    kinds = {stored.kind.name for stored in file.tensors.values()}
    return {frozenset({"F16"}): torch.float16, frozenset({"BF16"}): torch.bfloat16}.get(
        frozenset(kinds), torch.float32)


class _Keys:
    """The metadata of the file's architecture, of which every key must be asked for."""

    def __init__(self, file: File) -> None:
        name = file.metadata.get("general.architecture")
        if name not in ARCHITECTURES:
            raise UserError(f"{file.path}: general.architecture {name!r} is not supported; "
                            f"there are: {', '.join(ARCHITECTURES)}")
        self.path, self.architecture = file.path, str(name)
        self._values = {key.removeprefix(f"{name}."): value for key, value in file.metadata.items()
                        if key.startswith(f"{name}.")}

    def refuse(self, key: str, why: str) -> NoReturn:
        raise UserError(f"{self.path}: {self.architecture}.{key} {why}")

    def take(self, key: str, kind: type, default: Any = None, *, needed: bool = False) -> Any:
        """The value of a key, an int or float above 0 or a str; the default where it is absent."""
        if key not in self._values:
            if needed:
                self.refuse(key, "is missing: the file is not complete")
            return default
        value = self._values.pop(key)
        if isinstance(value, int) and not isinstance(value, bool) and kind is float:
            value = float(value)
        good = isinstance(value, kind) and not isinstance(value, bool)
        if not good or (kind is not str and not 0 < value < float("inf")):
            self.refuse(key, f"is {_short(value)}; it must be "
                        + ("a text" if kind is str else f"a positive {kind.__name__}"))
        return value

    def number(self, key: str) -> int:
        return self.take(key, int, needed=True)

    def finish(self) -> None:
        """Refuse what was not asked for, unless it is off (0, false or empty)."""
        for key, value in self._values.items():
            if key not in _NEUTRAL and (not isinstance(value, int | float) or value):
                self.refuse(key, f"= {_short(value)} is not supported")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_config(file: File) -> ModelConfig:
    """The `ModelConfig` that the metadata and the shapes of the tensors say.

    Raises UserError naming the key that is missing, impossible or not supported.
    """
    keys = _Keys(file)
    kind = ARCHITECTURES[keys.architecture]
    split = file.metadata.get("split.count", 1)
    if split not in (0, 1):
        raise UserError(f"{file.path}: is one of {split} parts: join them with "
                        "llama-gguf-split --merge")
    heads = keys.number("attention.head_count")
    hidden = keys.number("embedding_length")
    head_dim = keys.take("attention.key_length", int, hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (value := keys.take(key, int, head_dim)) != head_dim:
            keys.refuse(key, f"is {value}, not the head's {head_dim}; that is not supported")
    positions = keys.number("context_length")
    if positions > _LONGEST:
        keys.refuse("context_length", f"is {positions}; at most {_LONGEST} is supported")
    values: dict[str, Any] = {
        "vocab_size": _embedding(file).shape[0],
        "hidden_size": hidden, "head_dim": head_dim, "num_attention_heads": heads,
        "num_key_value_heads": keys.take("attention.head_count_kv", int, heads),
        "intermediate_size": keys.number("feed_forward_length"),
        "num_hidden_layers": keys.number("block_count"), "max_position_embeddings": positions,
        "rms_norm_eps": _decimal(keys.take("attention.layer_norm_rms_epsilon", float,
                                           needed=True)),
        "rope_theta": _decimal(keys.take("rope.freq_base", float, 10000.0)),
        "rope_scaling": _rope_scaling(file, keys, head_dim, positions),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "qk_norm": kind in ("qwen3", "gemma3_text"), "attention_bias": kind == "qwen2"}
    if kind.startswith("gemma"):
        values |= _gemma(keys, kind, values)
    keys.finish()
    _check_sizes(file, values)
    return ModelConfig(**values)


def _gemma(keys: _Keys, kind: str, values: dict[str, Any]) -> dict[str, Any]:
    """What Gemma has besides. The file leaves much of it to llama.cpp, which knows it by layers."""
    same = {"hidden_act": "gelu_pytorch_tanh", "scale_embeddings": True, "rms_norm_offset": 1.0}
    if kind == "gemma":
        return same
    layers, two = values["num_hidden_layers"], kind == "gemma2"
    window = keys.take("attention.sliding_window", int, needed=True)
    pattern = 2 if two else keys.take("attention.sliding_window_pattern", int, 6)
    if layers > _MOST_LAYERS:
        keys.refuse("block_count", f"is {layers}")
    types = ["full_attention" if (layer + 1) % pattern == 0 else "sliding_attention"
             for layer in range(layers)]
    alike = "full_attention" not in types
    same |= {"sandwich_norms": True, "layer_types": None if alike else types,
             "final_logit_softcapping": keys.take("final_logit_softcapping", float,
                                                  30.0 if two else None)}
    if set(types) == {"full_attention"}:
        same["layer_types"] = None
    else:
        same["sliding_window"] = window
    if two:
        same["attn_logit_softcapping"] = keys.take("attn_logit_softcapping", float, 50.0)
    elif "sliding_window" in same:
        same["rope_local_base_freq"] = _decimal(keys.take("rope.freq_base_swa", float, 10000.0))
    if layers == (46 if two else 62):
        # The 27B of either: scores go by hidden_size / heads, which is not the width of a head.
        same["query_pre_attn_scalar"] = values["hidden_size"] // values["num_attention_heads"]
    return same


def _decimal(value: float) -> float:
    """The shortest decimal of an fp32 number: 1e-05, where the file's bits say 9.99999974e-06."""
    return float(str(torch.tensor(value, dtype=torch.float32).numpy()[()]))


def _embedding(file: File) -> Stored:
    stored = file.tensors.get("token_embd.weight")
    if stored is None or len(stored.shape) != 2:
        raise UserError(f"{file.path}: lacks tensor token_embd.weight: it holds no language model")
    return stored


def _check_sizes(file: File, values: dict[str, Any]) -> None:
    """Refuse sizes that the tensors do not have, before a model of that size is laid out."""
    layers = values["num_hidden_layers"]
    if layers > len(file.tensors):
        raise UserError(f"{file.path}: block_count is {layers}, and the file has "
                        f"{len(file.tensors)} tensors")
    hidden, width = values["hidden_size"], values["head_dim"]
    for name, shape in {
            "token_embd.weight": (values["vocab_size"], hidden),
            "blk.0.attn_q.weight": (values["num_attention_heads"] * width, hidden),
            "blk.0.attn_k.weight": (values["num_key_value_heads"] * width, hidden),
            "blk.0.ffn_up.weight": (values["intermediate_size"], hidden)}.items():
        _check_shape(file, name, shape)


def _check_shape(file: File, name: str, shape: tuple[int, ...]) -> None:
    stored = file.tensors.get(name)
    if stored is None:
        raise UserError(f"{file.path}: lacks tensor {name} {shape}")
    if stored.shape != shape:
        raise UserError(f"{file.path}: tensor {name} is {stored.shape}, its metadata say {shape}")


def _rope_scaling(file: File, keys: _Keys, head_dim: int, positions: int) -> RopeScaling:
    """How RoPE is stretched: by the metadata, or by Llama 3's tensor of factors."""
    kind = keys.take("rope.scaling.type", str, "none")
    factor = keys.take("rope.scaling.factor", float, keys.take("rope.scale_linear", float, 1.0))
    original = keys.take("rope.scaling.original_context_length", int, None)
    if kind not in ("none", "linear", "yarn"):
        keys.refuse("rope.scaling.type", f"'{kind}' is not supported; there are: none, linear, "
                    "yarn")
    if _FREQUENCIES in file.tensors:
        if kind != "none" or factor != 1:
            keys.refuse("rope.scaling.type", f"'{kind}' beside a tensor {_FREQUENCIES} is not "
                        "supported")
        return _llama3(file, _decimal_base(file), head_dim, original)
    if kind == "yarn":
        return RopeScaling(rope_type="yarn", factor=factor, attention_factor=None,
                           original_max_position_embeddings=original or positions)
    # Files from before scaling had a type give the linear factor alone.
    return RopeScaling(rope_type="linear", factor=factor) if factor != 1 else RopeScaling()


def _decimal_base(file: File) -> float:
    key = f"{file.metadata['general.architecture']}.rope.freq_base"
    return float(file.metadata.get(key, 10000.0))


def _llama3(file: File, theta: float, head_dim: int, original: int | None) -> RopeScaling:
    """Llama 3's scaling whose factors are those of the tensor. UserError where none is."""
    _check_shape(file, _FREQUENCIES, (head_dim // 2,))
    factors = next(file.rows(_FREQUENCIES)).double()
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    if bool((factors == 1).all()):
        return RopeScaling()
    largest, low, high = float(factors.max()), 1.0, 4.0
    for length in dict.fromkeys([original or 8192, 8192]):
        turns = length * frequency / (2 * pi)  # within the original length
        smooth = ((turns - low) / (high - low)).clamp(0, 1)
        wanted = 1 / ((1 - smooth) / largest + smooth)
        if torch.allclose(factors, wanted, rtol=1e-4, atol=0):
            return RopeScaling(rope_type="llama3", factor=_decimal(largest), low_freq_factor=low,
                               high_freq_factor=high, original_max_position_embeddings=length)
    raise UserError(f"{file.path}: the factors of {_FREQUENCIES} are not those of Llama 3's "
                    "rope_scaling, which alone is supported")


def weights(file: File, model: Decoder) -> Iterator[Tensor]:
    """The elements of every parameter of `model`, in order, some rows of one at a time, in fp32.

    model: of `read_config`, on meta. Names and shapes are compared before this returns: UserError
    names the tensor that is missing, left over or of another shape.
    """
    block = _SANDWICH if model.config.sandwich_norms else _BLOCK
    names = {name: _stored_name(name, block) for name, _ in hf.hf_tensors(model)}
    for name, tensor in hf.hf_tensors(model):
        _check_shape(file, names[name], tuple(tensor.shape))
    for name in file.tensors.keys() - {*names.values(), _FREQUENCIES}:
        raise UserError(f"{file.path}: tensor {name} has no place in a "
                        f"{file.metadata['general.architecture']} model")
    return _values(file, model.config, names)


def _stored_name(name: str, block: dict[str, str]) -> str:
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    _, _, layer, rest = name.split(".", 3)
    part, _, leaf = rest.rpartition(".")
    return f"blk.{layer}.{block[part]}.{leaf}"


def _values(file: File, config: ModelConfig, names: dict[str, str]) -> Iterator[Tensor]:
    turned = file.metadata["general.architecture"] == "llama"
    for name, stored in names.items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.kv_heads}.get(
            name.split(".")[-2])
        if turned and heads is not None:
            # llama.cpp turns neighbours (2i, 2i + 1) where we turn (i, i + D/2): rows were moved.
            rows = next(file.rows(stored, whole=True))
            yield rows.view(heads, -1, 2, *rows.shape[1:]).transpose(1, 2)
        elif len(file.tensors[stored].shape) == 1 and config.rms_norm_offset:
            # The norms of Gemma, which has no other vectors, are stored with their offset in them.
            yield next(file.rows(stored)) - config.rms_norm_offset
        else:
            yield from file.rows(stored)
