"""The shape of a decoder-only Transformer, what is checked about it, and what it costs.

Fields bear the names of Hugging Face's config.json, so that a reader of one knows the other.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from fastllm.config import UserError

InitName = Literal["normal", "xavier", "kaiming"]
Recompute = Literal["none", "selective", "full"]
RopeType = Literal["default", "linear", "llama3", "yarn"]
HiddenAct = Literal["silu", "gelu_pytorch_tanh"]
LayerType = Literal["full_attention", "sliding_attention"]
# The fields of RopeScaling that a type must have to be read from a file, and those it may have.
ROPE_NEEDED = {"default": (), "linear": ("factor",), "yarn": ("factor",),
               "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
ROPE_FIELDS = {"default": (), "linear": ("factor",),
               "llama3": (*ROPE_NEEDED["llama3"], "original_max_position_embeddings"),
               "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow",
                        "attention_factor", "mscale", "mscale_all_dim", "truncate")}


@dataclass(kw_only=True)
class RopeScaling:
    """How the frequencies of RoPE are stretched beyond the length that a model was trained at."""

    rope_type: RopeType = "default"
    """default: theta^(-2i/d) as they are. linear: all stretched. llama3: Llama 3.1's stretching of
    the long waves. yarn: as Peng et al. (2023), with a factor of cos and sin."""
    factor: Annotated[float, Field(ge=1)] = 1.0
    """How far waves are stretched: all of them (linear), or the long ones. llama3: those longer
    than original_max_position_embeddings / low_freq_factor. yarn: those that turn over less than
    beta_slow times in the original length."""
    low_freq_factor: Annotated[float, Field(gt=0)] = 1.0
    """llama3: see factor."""
    high_freq_factor: Annotated[float, Field(gt=0)] = 4.0
    """llama3: waves shorter than original_max_position_embeddings / high_freq_factor stay."""
    original_max_position_embeddings: Annotated[int, Field(gt=0)] = 8192
    """llama3 and yarn: the length in tokens before stretching."""
    beta_fast: Annotated[float, Field(gt=0)] = 32.0
    """yarn: waves that turn over more often than this in the original length stay."""
    beta_slow: Annotated[float, Field(gt=0)] = 1.0
    """yarn: see factor."""
    attention_factor: Annotated[float, Field(gt=0)] | None = None
    """yarn: what cos and sin are multiplied by; null: 0.1 ln(factor) + 1, or as mscale says."""
    mscale: Annotated[float, Field(ge=0)] | None = None
    """yarn, DeepSeek's: attention_factor is (0.1 mscale ln(factor) + 1) over the same with
    mscale_all_dim, where both are given."""
    mscale_all_dim: Annotated[float, Field(ge=0)] | None = None
    """yarn: see mscale."""
    truncate: bool = True
    """yarn: whether the first and the last stretched wave are rounded outwards to whole ones."""

    def __post_init__(self) -> None:
        if self.rope_type not in get_args(RopeType):
            raise UserError(f"rope_scaling.rope_type '{self.rope_type}' is not implemented; "
                            f"use one of {', '.join(get_args(RopeType))}")
        if self.rope_type == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise UserError(f"rope_scaling.high_freq_factor {self.high_freq_factor} must be "
                            f"greater than low_freq_factor {self.low_freq_factor}")

    def parameters(self) -> dict[str, Any]:
        """The fields that the type reads and that are set, by the names of Hugging Face."""
        names = ("rope_type", *ROPE_FIELDS[self.rope_type])
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@dataclass(kw_only=True)
class ModelConfig:
    """A decoder-only Transformer: RMSNorm, RoPE, grouped-query attention, a gated MLP."""

    vocab_size: Annotated[int, Field(gt=0)] = 6400
    """Rows of the embedding; every token id is below it."""
    hidden_size: Annotated[int, Field(gt=0)] = 512
    """Width of the residual stream."""
    intermediate_size: Annotated[int, Field(gt=0)] = 1408
    """Width of the MLP's gate and of its up projection."""
    hidden_act: HiddenAct = "silu"
    """What the gate goes through: silu (SwiGLU), or the tanh form of gelu (GeGLU, as in Gemma)."""
    num_hidden_layers: Annotated[int, Field(gt=0)] = 8
    """Number of blocks."""
    num_attention_heads: Annotated[int, Field(gt=0)] = 8
    """Number of query heads."""
    num_key_value_heads: Annotated[int, Field(gt=0)] | None = None
    """Number of key and value heads, a divisor of num_attention_heads; null means as many."""
    head_dim: Annotated[int, Field(gt=0)] | None = None
    """Width of one head, even; null means hidden_size / num_attention_heads."""
    max_position_embeddings: Annotated[int, Field(gt=0)] = 2048
    """The longest document, in tokens, that the model takes."""
    rope_theta: Annotated[float, Field(gt=0)] = 10000.0
    """The base of RoPE's frequencies."""
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    """How RoPE's frequencies are stretched."""
    rope_local_base_freq: Annotated[float, Field(gt=0)] | None = None
    """The base of RoPE's frequencies, not stretched, in sliding layers, as in Gemma 3; null: they
    turn as the others do."""
    sliding_window: Annotated[int, Field(gt=0)] | None = None
    """Tokens that a query of a sliding layer sees, itself among them; null: no layer slides."""
    layer_types: list[LayerType] | None = None
    """For every layer sliding_attention or full_attention; null: all slide if there is a
    sliding_window, as in Mistral."""
    query_pre_attn_scalar: Annotated[int, Field(gt=0)] | None = None
    """Scores are divided by its root, as in Gemma 2; null means the width of a head."""
    attn_logit_softcapping: Annotated[float, Field(gt=0)] | None = None
    """Squash the scores to cap * tanh(scores / cap); null means not."""
    rms_norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    """Added to the mean square before its root."""
    rms_norm_offset: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Added to the weight of every norm: 1 in Gemma, whose weights lie around 0."""
    sandwich_norms: bool = False
    """RMSNorm also on what attention and the MLP give, before it is added, as in Gemma 2."""
    scale_embeddings: bool = False
    """Multiply the embedding by the root of hidden_size, as in Gemma."""
    tie_word_embeddings: bool = True
    """Whether the output head is the embedding."""
    qk_norm: bool = False
    """RMSNorm on every query and key head before RoPE, as in Qwen3."""
    attention_bias: bool = False
    """Bias on the query, key and value projections (not on the output one), as in Qwen2."""
    attention_output_bias: bool = False
    """Bias on attention's output projection; Llama's attention_bias is both."""
    mlp_bias: bool = False
    """Bias on the three projections of the MLP."""
    final_logit_softcapping: Annotated[float, Field(gt=0)] | None = None
    """Squash the logits to cap * tanh(logits / cap); null means not."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability, in training, of dropping an element of the embedding or of a branch's output."""
    init: InitName = "normal"
    """Distribution of the initial weights of every projection."""
    init_std: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of `normal`, and of the embedding whatever `init` says."""
    scaled_residual_init: bool = True
    """Divide the initial o_proj and down_proj by sqrt(2 * num_hidden_layers)."""
    recompute: Recompute = "none"
    """Activation checkpointing. full: keep each block's input, run the block again in the backward.
    selective: keep also what the matrix products and attention gave, run only the rest again."""

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if whole and value <= 0 and spec.name != "dropout":
                raise UserError(f"model.{spec.name} is {value}; it must be greater than 0")
        for name, kind in (("init", InitName), ("recompute", Recompute),
                           ("hidden_act", HiddenAct)):
            if getattr(self, name) not in get_args(kind):
                raise UserError(f"model.{name} is '{getattr(self, name)}'; "
                                f"use one of {', '.join(get_args(kind))}")
        self._check_heads()
        self._check_windows()
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.dropout is {self.dropout}; it must be at least 0 and below 1")

    def _check_heads(self) -> None:
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"model.hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}; give head_dim, or change one")
        if self.head_size % 2:
            raise UserError(f"model.head_dim {self.head_size} is odd, and RoPE turns pairs; "
                            f"use {self.head_size + 1}")
        if self.num_attention_heads % self.kv_heads:
            raise UserError(
                f"model.num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.kv_heads}")

    def _check_windows(self) -> None:
        kinds = self.layer_types or []
        for kind in kinds:
            if kind not in get_args(LayerType):
                raise UserError(f"model.layer_types holds '{kind}'; "
                                f"use {' or '.join(get_args(LayerType))}")
        if self.layer_types is not None and len(kinds) != self.num_hidden_layers:
            raise UserError(f"model.layer_types names {len(kinds)} layers, and "
                            f"num_hidden_layers is {self.num_hidden_layers}")
        slides = "sliding_attention" in kinds
        if slides and self.sliding_window is None:
            raise UserError("model.layer_types has sliding layers: give sliding_window")
        if self.layer_types is not None and not slides and self.sliding_window is not None:
            raise UserError(f"model.sliding_window is {self.sliding_window}, and layer_types has "
                            "no sliding layer: leave one out")
        if self.rope_local_base_freq is not None and self.sliding_window is None:
            raise UserError("model.rope_local_base_freq is for sliding layers: give "
                            "sliding_window, or leave it out")

    def window(self, layer: int) -> int | None:
        """Tokens that a query of this layer sees, itself among them; None: all before it."""
        kinds = self.layer_types
        slides = kinds is None or kinds[layer] == "sliding_attention"
        return self.sliding_window if slides else None

    @property
    def head_size(self) -> int:
        """Width of one head: `head_dim`, or what follows from the other sizes."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads: `num_key_value_heads`, or as many as query heads."""
        return self.num_key_value_heads or self.num_attention_heads


def matmul_parameters(config: ModelConfig) -> int:
    """Weights that every token is multiplied with: all projections and the output head."""
    c = config
    attention = (2 * c.num_attention_heads + 2 * c.kv_heads) * c.head_size * c.hidden_size
    mlp = 3 * c.hidden_size * c.intermediate_size
    return c.num_hidden_layers * (attention + mlp) + c.vocab_size * c.hidden_size


def num_parameters(config: ModelConfig) -> int:
    """Number of trained parameters; a tied embedding counts once."""
    c = config
    per_layer = (4 if c.sandwich_norms else 2) * c.hidden_size
    if c.qk_norm:
        per_layer += 2 * c.head_size
    if c.attention_bias:
        per_layer += (c.num_attention_heads + 2 * c.kv_heads) * c.head_size
    if c.attention_output_bias:
        per_layer += c.hidden_size
    if c.mlp_bias:
        per_layer += 2 * c.intermediate_size + c.hidden_size
    untied = 0 if c.tie_word_embeddings else c.vocab_size * c.hidden_size
    return matmul_parameters(c) + untied + c.num_hidden_layers * per_layer + c.hidden_size


def flops_per_token(config: ModelConfig, seq_len: float) -> float:
    """FLOPs of one token's forward and backward, for the model FLOPs utilisation (MFU).

    6 * N + 6 * num_attention_heads * head_dim * (seq_len + 1) for every layer, where N is
    `matmul_parameters`: the embedding's look-up multiplies nothing, and the norms' few products are
    left out. In a document of seq_len tokens a causal query meets (seq_len + 1) / 2 keys on
    average, and meeting one costs 4 * head_dim FLOPs a head (the score, and the weighted value),
    three times over with the backward. The masked half that some conventions add is not counted,
    nor what activation checkpointing computes again. Within a window of w < seq_len tokens the mean
    is w - w (w - 1) / (2 seq_len).

    Args:
        seq_len: tokens of a document; for packed batches the mean over tokens of their document's
            length gives the exact count, where no window is shorter.
    """
    c = config

    def twice_the_keys(window: int | None) -> float:
        if window is None or window >= seq_len:
            return seq_len + 1
        return 2 * window - window * (window - 1) / seq_len

    met = sum(twice_the_keys(c.window(layer)) for layer in range(c.num_hidden_layers))
    return 6 * matmul_parameters(c) + 6 * c.num_attention_heads * c.head_size * met
