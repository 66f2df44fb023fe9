"""config.json of Hugging Face both ways: `ModelConfig` and the families that can hold one.

Llama, Mistral, Qwen2, Qwen3, Gemma, Gemma 2 and the text part of Gemma 3. A field that is not there
means what transformers means by it; one that `Decoder` is not is a UserError that names it.
"""

from collections.abc import Callable
from typing import Any, NoReturn, get_args

import torch

from fastllm.config import UserError, build
from fastllm.model.config import ROPE_FIELDS, ROPE_NEEDED, HiddenAct, ModelConfig

CONFIG = "config.json"
ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM",
                 "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
                 "gemma": "GemmaForCausalLM", "gemma2": "Gemma2ForCausalLM",
                 "gemma3_text": "Gemma3ForCausalLM"}
# Fields of config.json that bear the same name and meaning in ModelConfig.
_SHARED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
           "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings",
           "rms_norm_eps", "tie_word_embeddings")
# What transformers assumes where config.json is silent and ModelConfig would assume otherwise.
_SILENT: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
    "gemma": {"max_position_embeddings": 8192, "num_key_value_heads": 16, "head_dim": 256},
    "gemma2": {"max_position_embeddings": 8192, "num_key_value_heads": 4, "head_dim": 256},
    "gemma3_text": {"max_position_embeddings": 131072, "num_key_value_heads": 4, "head_dim": 256}}
_WINDOW, _LOCAL_BASE = 4096, 10000.0
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16",
          torch.float64: "float64"}
Refuse = Callable[[str], NoReturn]


def architecture(config: ModelConfig) -> str:
    """The model_type that holds this config, a key of ARCHITECTURES.

    Raises UserError, naming why, where none of them can.
    """
    def refuse(why: str) -> NoReturn:
        raise UserError(f"no Hugging Face architecture of ours holds this model: {why}")

    c = config
    if c.scale_embeddings or c.rms_norm_offset or c.sandwich_norms:
        return _gemma(c, refuse)
    for name in ("final_logit_softcapping", "attn_logit_softcapping", "query_pre_attn_scalar",
                 "rope_local_base_freq"):
        if getattr(c, name) is not None:
            refuse(f"{name} is Gemma's, and has none of its norms and scaled embeddings")
    biases = c.attention_bias, c.attention_output_bias
    if c.qk_norm:
        if biases not in ((False, False), (True, True)):
            refuse("Qwen3 has qk_norm and Qwen2 has the query, key and value bias, none has both")
        kind = "qwen3"
    elif biases == (True, False):
        kind = "qwen2"
    elif c.sliding_window is not None and c.layer_types is None and biases == (False, False):
        kind = "mistral"
    else:
        kind = "llama"
        if c.sliding_window is not None:
            refuse("Llama has no sliding_window, Mistral neither layer_types nor biases, and Qwen2 "
                   "attention_bias without attention_output_bias")
        if biases == (False, True):
            refuse("Llama has no attention_output_bias without attention_bias")
        if c.hidden_size % c.num_attention_heads:
            refuse(f"Llama wants hidden_size {c.hidden_size} to be a multiple of "
                   f"num_attention_heads {c.num_attention_heads}")
    if c.mlp_bias and kind != "llama":
        refuse("mlp_bias goes with no sliding_window, no qk_norm, and both of attention's biases "
               "or neither")
    return kind


def _gemma(c: ModelConfig, refuse: Refuse) -> str:
    if not (c.scale_embeddings and c.rms_norm_offset == 1):
        refuse("Gemma has scale_embeddings and rms_norm_offset 1 together")
    if c.attention_bias != c.attention_output_bias or c.mlp_bias:
        refuse("Gemma has attention_bias with attention_output_bias or neither, and no mlp_bias")
    if c.qk_norm and c.sandwich_norms:
        if c.attn_logit_softcapping is not None:
            refuse("Gemma 3 has no attn_logit_softcapping")
        kind = "gemma3_text"
    elif c.sandwich_norms:
        kind = "gemma2"
    else:
        kind = "gemma"
        for name in ("final_logit_softcapping", "attn_logit_softcapping", "query_pre_attn_scalar",
                     "sliding_window"):
            if getattr(c, name) is not None:
                refuse(f"Gemma has no {name} without sandwich_norms")
        if c.qk_norm:
            refuse("Gemma 3 has qk_norm with sandwich_norms")
    if kind == "gemma2" and c.rope_local_base_freq is not None:
        refuse("rope_local_base_freq is Gemma 3's, which has qk_norm")
    if kind != "gemma" and c.hidden_size % c.num_attention_heads:
        refuse(f"Gemma wants hidden_size {c.hidden_size} to be a multiple of "
               f"num_attention_heads {c.num_attention_heads}")
    return kind


def config_to_hf(config: ModelConfig, *, dtype: torch.dtype = torch.float32,
                 bos_token_id: int | None = None, eos_token_id: int | list[int] | None = None,
                 pad_token_id: int | None = None) -> dict[str, Any]:
    """The content of config.json. RoPE is written as transformers 5 reads it and as 4 does."""
    kind = architecture(config)
    values = {name: getattr(config, name) for name in _SHARED}
    values |= {"num_key_value_heads": config.kv_heads, "head_dim": config.head_size}
    scaling = config.rope_scaling
    rope = scaling.parameters()
    whole = {"rope_theta": config.rope_theta, **rope}
    values |= {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "hidden_act": config.hidden_act,
        "attention_dropout": 0.0,
        "initializer_range": config.init_std,
        "rope_theta": config.rope_theta,
        "rope_parameters": whole,
        "rope_scaling": rope if scaling.rope_type != "default" else None,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "use_cache": True,
        "dtype": DTYPES[dtype],
        "torch_dtype": DTYPES[dtype],
    }
    if kind not in ("mistral", "qwen2"):
        values["attention_bias"] = config.attention_bias
    if kind == "llama":
        values["mlp_bias"] = config.mlp_bias
    if kind in ("gemma", "gemma2", "gemma3_text"):
        values["hidden_activation"] = config.hidden_act
    if kind in ("gemma2", "gemma3_text"):
        values |= {"query_pre_attn_scalar": config.query_pre_attn_scalar or config.head_size,
                   "final_logit_softcapping": config.final_logit_softcapping,
                   "attn_logit_softcapping": config.attn_logit_softcapping}
    if kind == "gemma3_text":
        local = config.rope_local_base_freq or config.rope_theta
        values |= {"rope_local_base_freq": local, "rope_parameters": {
            "full_attention": whole,
            "sliding_attention": {"rope_type": "default", "rope_theta": local}}}
        if config.rope_local_base_freq is None and config.sliding_window is not None:
            values["rope_parameters"]["sliding_attention"] = dict(whole)
    return values | _windows_to_hf(config, kind)


def _windows_to_hf(config: ModelConfig, kind: str) -> dict[str, Any]:
    slides = config.sliding_window is not None
    if kind == "mistral":
        return {"sliding_window": config.sliding_window}
    if kind in ("llama", "gemma") or (kind in ("qwen2", "qwen3") and not slides):
        return {}
    types = config.layer_types or (["sliding_attention" if slides else "full_attention"]
                                   * config.num_hidden_layers)
    more = {"sliding_window": config.sliding_window or _WINDOW, "layer_types": list(types)}
    if kind in ("qwen2", "qwen3"):
        # What transformers made layer_types of before it wrote them.
        first = types.index("sliding_attention")
        more |= {"use_sliding_window": True, "max_window_layers": first}
    return more


def config_from_hf(values: dict[str, Any], source: str = CONFIG) -> ModelConfig:
    """The `ModelConfig` that the content of a config.json says.

    Raises UserError, naming `source` and the field, for a model that `Decoder` is not.
    """
    def refuse(why: str) -> NoReturn:
        raise UserError(f"{source}: {why}")

    kind = values.get("model_type")
    if kind not in ARCHITECTURES:
        refuse(f"model_type '{kind}' is not supported; "
               f"there are: {', '.join(ARCHITECTURES)}")
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                 "num_attention_heads"):
        if values.get(name) is None:
            refuse(f"lacks {name}")
    refused = ["quantization_config", "use_bidirectional_attention"]
    # What these families have no place for, and transformers would pass over.
    refused += {"llama": [], "qwen3": ["mlp_bias"]}.get(str(kind), ["mlp_bias"])
    refused += [] if kind in ("qwen2", "qwen3") else ["use_sliding_window"]
    refused += ["attention_bias"] if kind in ("mistral", "qwen2") else []
    refused += ["attn_logit_softcapping"] if kind == "gemma3_text" else []
    for name in refused:
        if values.get(name):
            refuse(f"{name} = {values[name]} is not supported")
    gemma = str(kind).startswith("gemma")
    given: dict[str, Any] = {
        **_SILENT[str(kind)], "rms_norm_eps": 1e-6, "tie_word_embeddings": gemma,
        "hidden_act": _activation(values, str(kind), refuse)}
    given |= {name: values[name] for name in _SHARED if values.get(name) is not None}
    if "head_dim" in values and values["head_dim"] is None:
        given.pop("head_dim", None)
    if "num_key_value_heads" in values and values["num_key_value_heads"] is None:
        given.pop("num_key_value_heads", None)
    bias = bool(values.get("attention_bias"))
    given |= {"qk_norm": kind in ("qwen3", "gemma3_text"),
              "attention_bias": bias or kind == "qwen2", "attention_output_bias": bias,
              "mlp_bias": bool(values.get("mlp_bias")), "scale_embeddings": gemma,
              "rms_norm_offset": 1.0 if gemma else 0.0,
              "sandwich_norms": kind in ("gemma2", "gemma3_text"),
              "init_std": values.get("initializer_range") or ModelConfig.init_std}
    if kind in ("gemma2", "gemma3_text"):
        caps = {"gemma2": (50.0, 30.0)}.get(str(kind), (None, None))
        given |= {"attn_logit_softcapping": values.get("attn_logit_softcapping", caps[0]),
                  "final_logit_softcapping": values.get("final_logit_softcapping", caps[1])}
        scalar = values.get("query_pre_attn_scalar", 256)
        given["query_pre_attn_scalar"] = None if scalar == given.get("head_dim") else scalar
    given |= _windows_from_hf(values, str(kind), refuse)
    given |= _ropes_from_hf(values, str(kind), given, refuse)
    try:
        return build(ModelConfig, given)
    except UserError as error:
        refuse(str(error))


def _activation(values: dict[str, Any], kind: str, refuse: Refuse) -> str:
    if kind in ("gemma2", "gemma3_text"):
        name = "hidden_activation"
        act = values.get(name, "gelu_pytorch_tanh")
    else:
        name = "hidden_act"
        act = values.get(name, "gelu_pytorch_tanh" if kind == "gemma" else "silu")
        if kind == "gemma" and act == "gelu":
            act = "gelu_pytorch_tanh"  # the first Gemma files say gelu and mean its tanh form
    if act not in get_args(HiddenAct):
        refuse(f"{name} '{act}' is not supported; there are: {', '.join(get_args(HiddenAct))}")
    return act


def _windows_from_hf(values: dict[str, Any], kind: str, refuse: Refuse) -> dict[str, Any]:
    """sliding_window and layer_types, in the one form that says the same."""
    layers, window = values["num_hidden_layers"], values.get("sliding_window", _WINDOW)
    if kind in ("llama", "gemma"):
        return {}
    if kind == "mistral":
        return {"sliding_window": window}
    if kind in ("qwen2", "qwen3") and not values.get("use_sliding_window"):
        if "sliding_attention" in (values.get("layer_types") or ()):
            refuse("layer_types has sliding layers, and use_sliding_window is not set")
        return {}
    types = values.get("layer_types")
    if types is None and isinstance(layers, int):
        pattern, first = 2 if kind == "gemma2" else 6, values.get("max_window_layers", 28)
        if kind == "gemma3_text":
            pattern = values.get("sliding_window_pattern", pattern)
        if not isinstance(first, int) or not isinstance(pattern, int) or pattern < 1:
            refuse(f"max_window_layers {first!r} or sliding_window_pattern {pattern!r} is not a "
                   "number of layers")
        slides = [layer >= first if kind in ("qwen2", "qwen3") else (layer + 1) % pattern != 0
                  for layer in range(layers)]
        types = ["sliding_attention" if slide else "full_attention" for slide in slides]
    if window is None or not types or "sliding_attention" not in types:
        if types and "sliding_attention" in types:
            refuse("layer_types has sliding layers, and sliding_window is null")
        return {}
    alike = types == ["sliding_attention"] * layers
    return {"sliding_window": window, "layer_types": None if alike else types}


def _ropes_from_hf(values: dict[str, Any], kind: str, given: dict[str, Any],
                   refuse: Refuse) -> dict[str, Any]:
    """What RoPE's fields say, of sliding layers too in Gemma 3."""
    positions = given["max_position_embeddings"]
    if kind != "gemma3_text":
        return _rope_from_hf(values, positions, 10000.0, refuse)
    both = values.get("rope_parameters")
    both = both if isinstance(both, dict) and "full_attention" in both else {}
    near = both.get("sliding_attention") or {}
    flat = {**values, "rope_parameters": None}
    if both.get("full_attention"):
        flat |= {"rope_scaling": None, "rope_parameters": both["full_attention"]}
    found = _rope_from_hf(flat, positions, 1e6, refuse)
    if given.get("sliding_window") is None:
        return found
    local = _rope_from_hf({"rope_parameters": near}, positions,
                          values.get("rope_local_base_freq", _LOCAL_BASE), refuse)
    if local == found:
        return found
    if local["rope_scaling"] != {"rope_type": "default"}:
        refuse("rope_parameters of the sliding layers stretch them; that is not supported")
    return {**found, "rope_local_base_freq": local["rope_theta"]}


def _rope_from_hf(values: dict[str, Any], positions: int, base: float, refuse: Refuse
                  ) -> dict[str, Any]:
    """rope_theta and rope_scaling, as layers of `ModelConfig`."""
    # transformers 5 writes rope_parameters, theta included; 4 wrote rope_theta and rope_scaling.
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        refuse(f"rope_scaling is {rope!r}; it must be an object")
    theta = rope.get("rope_theta", values.get("rope_theta", base))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_FIELDS:
        refuse(f"rope_type '{kind}' is not supported; there are: {', '.join(ROPE_FIELDS)}")
    if rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0)) != 1.0:
        refuse("partial_rotary_factor other than 1 is not supported")
    scaling = {"rope_type": kind}
    for key in ROPE_FIELDS[kind]:
        if rope.get(key) is not None:
            scaling[key] = rope[key]
        elif key == "original_max_position_embeddings":
            scaling[key] = positions
        elif key in ROPE_NEEDED[kind]:
            refuse(f"the {kind} rope_scaling lacks {key}")
    return {"rope_theta": theta, "rope_scaling": scaling}
