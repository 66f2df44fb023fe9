"""What a micro-batch's forward and backward hold at most, beside weights and their gradients.

A formula of the model's shape and of the modules that an adapter has put into it; nothing is run.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastllm import cpu, ops
from fastllm.adapters.bottleneck import Bottleneck
from fastllm.adapters.lora import LoraEmbedding, LoraLinear
from fastllm.adapters.prompt import PromptEmbedding
from fastllm.model import Decoder
from fastllm.model.reward import RewardModel
from fastllm.plan.losses import Loss, loss_bytes

FUSED_ROWS = 1024
"""Of `fastllm.kernels.quant`: up to so many tokens a GPU reads 4-bit weights as they are."""


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What one forward and backward take."""

    tokens: int
    """Positions of all its rows; of preferences those of both answers."""
    longest: int | None = None
    """Tokens of a document at most; None: as many as the model takes."""
    documents: int = 1
    """About; of interest to adapters that put virtual tokens before each."""
    loss: Loss = "cross_entropy"


def activation_bytes(model: nn.Module, batch: MicroBatch, device: torch.device | None = None
                     ) -> int:
    """Bytes at the peak.

    There are two moments of which one is the peak. At the end of the forward every block keeps its
    part, the last norm its input, its result and that one's gradient are there, and the loss has
    its logits. As the backward enters the blocks, the last of them works beside what all of them
    keep, and, with recomputation, beside what it has run again.

    It describes the ops that run on `device` by `ops.dispatch`. Triton's and the C++ ones keep the
    same tensors, but for qk_norm in 16 bits, for which the C++ one keeps fp32 copies; the plain
    ones keep more, most of it in fp32. Left out: scratch inside operators, of which the C++
    attention's packed keys show with documents of some dozens of tokens and heads that are together
    wider than the model; in selective recomputation what runs again before a block's products are
    let go, which shows with adapters where qk_norm goes by fp32 copies, or where 4-bit weights meet
    few tokens; and all that torch.compile arranges otherwise.

    model: a `Decoder`, one with an adapter, or a `RewardModel`; on any device. device: where it
    will be; None is the GPU where there is one, else the CPU.
    """
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    decoder: Any = model.decoder if isinstance(model, RewardModel) else model
    assert isinstance(decoder, Decoder)
    config, prompt = decoder.config, isinstance(decoder.embed_tokens, PromptEmbedding)
    virtual = batch.documents * decoder.virtual_tokens
    tokens = batch.tokens + (virtual if prompt else 0)
    longest = min(tokens, batch.longest or config.max_position_embeddings)
    block = _Block(decoder, device, 0 if prompt else virtual, tokens)
    layers = config.num_hidden_layers
    kept = {"none": block.kept, "selective": block.products, "full": block.stream}[config.recompute]
    last = kept if config.recompute == "none" else block.stream + block.again
    everywhere = block.beside + block.mask  # and the embedding's dropout
    forward = everywhere + layers * kept + block.norm + 3 * block.stream
    backward = everywhere + (layers - 1) * kept + last
    fixed, again = (layers, 0) if config.recompute == "none" else (0, 1)
    unreached = tokens * block.unreached if config.recompute == "none" else 0
    loss = loss_bytes(decoder, batch.loss, batch.tokens, device)
    peak = max(tokens * forward + fixed * block.fixed + loss,
               tokens * backward + (fixed + again) * block.fixed + block.working(longest))
    return peak - unreached + block.scores


class _Block:
    """Bytes that a token takes in one block, and, where said so, a block by itself.

    `stream`, `queries`, `keys` and `gate`: of one tensor as wide as the model, as all query heads,
    as all key heads, and as the MLP.

    prefix: virtual keys that the tokens meet.
    """

    def __init__(self, decoder: Decoder, device: torch.device, prefix: int, tokens: int) -> None:
        self.decoder, self.config = decoder, decoder.config
        self.prefix, self.tokens, self.on_cpu = prefix, tokens, device.type == "cpu"
        config, width = self.config, decoder.norm.weight.element_size()
        self.width = width
        self.layer: Any = decoder.layers[0]
        self.stream, self.gate = config.hidden_size * width, config.intermediate_size * width
        self.queries = config.num_attention_heads * config.head_size * width
        self.keys = config.kv_heads * config.head_size * width
        self.backends = {op: backend for op, (backend, _) in ops.dispatch(device).items()}
        self.plain_mlp = self.backends[
            "swiglu" if config.hidden_act == "silu" else "geglu"] == "reference"

    def _fp32(self, size: int, *, copies: int, results: int) -> int:
        """fp32 tensors of `size` bytes in the model's dtype: copies, which fp32 itself needs not,
        and results."""
        return size * 4 // self.width * (results + (copies if self.width < 4 else 0))

    @property
    def beside(self) -> int:
        """Of all blocks: cos and sin; what an adapter of the embedding keeps."""
        config, embedding = self.config, self.decoder.embed_tokens
        held = 4 * config.head_size * (1 if config.rope_local_base_freq is None else 2)
        if isinstance(embedding, LoraEmbedding):
            held += embedding.lora.lora_A.shape[0] * self.width
            if embedding.lora.magnitude is not None:
                held += self.stream
        if isinstance(embedding, PromptEmbedding):
            held += 9  # which tokens are virtual, and which of these
        return held

    @property
    def norm(self) -> int:
        """Beside its input: a sum; the plain one also the input in fp32, and for a trained weight
        the quotient."""
        plain = self.backends["rms_norm"] == "reference"
        trained = int(self.decoder.norm.weight.requires_grad)
        return 4 + (self._fp32(self.stream, copies=1, results=trained) if plain else 0)

    @property
    def attention(self) -> int:
        """Queries and keys after rotation, values, the result and its sums. Plain attention has
        the result by document, and joined."""
        heads = self.queries + self.keys
        kept = 2 * heads + 4 * self.config.num_attention_heads
        if self.backends["attention"] == "reference":
            kept += self.queries + (2 * (self.queries - self.keys) if self.prefix else 0)
        if self.config.qk_norm:  # the whole projection too, of which the values are a view
            backend = self.backends["qk_norm_rope"]
            kept += heads
            if backend != "triton":
                kept += self._fp32(heads, copies=1, results=int(backend == "reference"))
        return kept

    @property
    def scores(self) -> int:
        """Of plain attention with a window or a softcap: fp32 matrices of all tokens by all keys,
        for every head: two or three that are kept, three and a half more at work."""
        config = self.config
        capped = config.attn_logit_softcapping is not None
        layers = [layer for layer in range(config.num_hidden_layers)
                  if capped or config.window(layer) is not None]
        if self.backends["attention"] != "reference" or not layers:
            return 0
        matrix = 4 * config.num_attention_heads * self.tokens * (self.tokens + self.prefix)
        keeping = len(layers) if config.recompute == "none" else 1
        return int(matrix * (keeping * (2 + capped) + 3.5))

    @property
    def swiglu(self) -> int:
        """Beside gate and up: nothing; the plain one both in fp32, and silu(gate) or gelu(gate)."""
        return self._fp32(self.gate, copies=2, results=1) if self.plain_mlp else 0

    @property
    def sandwich(self) -> int:
        """What the norms of both branches keep: their inputs too, in fp32 where they are plain."""
        if not self.config.sandwich_norms:
            return 0
        copied = self.backends["rms_norm"] == "reference" and self.width < 4
        return 2 * (self.norm + (0 if copied else self.stream))

    @property
    def mask(self) -> int:
        """Of one dropout: a factor an element on a CPU, a byte on a GPU."""
        return self._mask(self.stream) if self.config.dropout else 0

    def _mask(self, size: int) -> int:
        return size if self.on_cpu else size // self.width

    @property
    def kept(self) -> int:
        """Without recomputation: the residual stream at both norms, gate and up, and what the
        operators and an adapter keep. (The norms' results and the MLP's are made again:
        `made_again`.) Frozen projections change nothing: what they read is kept by others."""
        return (2 * self.stream + 2 * self.gate + self.attention + 2 * self.norm + self.swiglu
                + self.sandwich + 2 * self.mask + sum(map(self._change, self._changed()))
                + sum(map(self._narrow, self._bottlenecks()))
                # Keys and values before a prefix joins them, and where a token then is.
                + (2 * self.keys + 8 if self.prefix else 0))

    @property
    def products(self) -> int:
        """With selective recomputation: the block's input, and the results of its four products
        and of attention; and of those of an adapter."""
        added = 0
        for linear in self._changed():
            added += self._rank(linear)
            if self.on_cpu or linear.dropout:  # then the change is a product of its own
                added += linear.out_features * self.width
        for bottleneck in self._bottlenecks():
            added += self.stream + bottleneck.down.out_features * self.width
        return (3 * self.stream + 2 * self.gate + 2 * (self.queries + self.keys)
                + 4 * self.config.num_attention_heads + added)

    @property
    def again(self) -> int:
        """Of a block that was run again, beside its input: as without recomputation, and the norms'
        results that a product keeps. Plain ops in 16 bits have let go of what they copied to fp32.
        """
        readers = (self.layer.self_attn.qkv_proj, self.layer.mlp.gate_up_proj)
        again = self.kept - self.stream + self.stream * sum(map(self._keeps_input, readers))
        if self.plain_mlp and self.width < 4:
            again -= self.stream + 2 * self.gate
        return again

    @property
    def unreached(self) -> int:
        """What the first block does not keep, where it has nothing to train before itself."""
        embedding, attention = self.decoder.embed_tokens, self.layer.self_attn
        if any(param.requires_grad for param in embedding.parameters()):
            return 0
        if attention.prefix is not None:
            return self.norm + 2 * self.keys
        if attention.qkv_proj in self._changed():
            return self.norm
        if attention.o_proj in self._changed():
            return self.norm + self.attention - self.queries
        trains = any(param.requires_grad for param in attention.parameters())
        return self.norm + self.attention + (0 if trains else self.stream)

    def working(self, longest: int) -> int:
        """In the backward, of all tokens, beside what is kept: the gradient of the residual stream,
        and of the MLP's middle, gate and up; or, as these and gate and up are gone, those of
        attention; or a weight that is in 4 bits. The mask of the MLP's dropout is gone by then.

        longest: tokens of a document. The C++ attention adds up the queries' gradients of long ones
        from up to 8 parts in fp32, of 1024 keys or more.
        """
        mlp, parts = self.layer.mlp, 0
        middle = self._fp32(self.gate, copies=0, results=1) if self.plain_mlp else self.gate
        if self.backends["attention"] == "cpp" and longest > 1024:
            parts = self._fp32(self.queries, copies=0, results=min(8, -(-longest // 1024)))
        inside = self.stream + 3 * middle
        if _is_dora(mlp.gate_up_proj):
            # The gradient before the gain, and the gain's by element; gate and up are gone, and
            # what the down projection kept.
            gains = 4 if mlp.gate_up_proj.bias is None else 6
            inside = max(inside, gains * self.gate - self.swiglu
                         + (0 if _is_dora(mlp.down_proj) else self.stream))
        if mlp.down_proj in self._changed() and mlp.down_proj.dropout:
            inside -= self.gate  # the dropped middle and its mask are gone
        # What came after the down projection is gone.
        inside -= sum(map(self._narrow, self._bottlenecks())) // 2
        inside -= self.stream if self.config.sandwich_norms else 0
        attention = 2 * (self.queries + self.keys) + parts - 2 * self.gate
        return max(self.tokens * (max(inside, attention) - self.mask),
                   self.tokens * (self.stream + self.gate) + self._dense(mlp.down_proj),
                   self.tokens * 2 * self.stream + self._dense(mlp.gate_up_proj))

    # ------------------------------------------------------------------------------- adapters

    @property
    def fixed(self) -> int:
        """Of a block, whatever its tokens: the parts of a fused projection's change, joined; and a
        prefix's keys and values, repeated for every document and among the others."""
        held = 4 * self.prefix * self.keys
        for linear in self._changed():
            if len(linear.rows) > 1:
                held += self._rank(linear) * (linear.in_features + linear.out_features)
        return held

    def _dense(self, linear: nn.Linear) -> int:
        """qlora: a weight while a product has it out of its 4 bits. Plain torch goes by fp32
        numbers and 32-bit codes."""
        if not isinstance(linear, LoraLinear) or linear.nf4 is None:
            return 0
        size = linear.in_features * linear.out_features
        if self.on_cpu:
            return 14 * size
        return size * self.width if self.tokens > FUSED_ROWS else 0

    def _changed(self) -> list[LoraLinear]:
        """The projections of a block that are changed."""
        return [linear for linear in _linears(self.layer)
                if isinstance(linear, LoraLinear) and linear.lora]

    def _rank(self, linear: LoraLinear) -> int:
        """What a changed projection's narrow product takes."""
        return self.width * sum(low.lora_A.shape[0] for low in linear.changes().values())

    def _change(self, linear: LoraLinear) -> int:
        """What a changed projection keeps: its narrow product; its input with elements dropped,
        and which; DoRA's result before its gain."""
        held, read = self._rank(linear), linear.in_features * self.width
        if linear.dropout:
            held += read + self._mask(read)
        if _is_dora(linear):
            held += linear.out_features * self.width
        return held

    def _keeps_input(self, linear: nn.Linear) -> bool:
        """Whether a projection's input itself is kept for the backward. oneDNN's product keeps that
        of a frozen one too."""
        if isinstance(linear, LoraLinear) and linear.lora and not linear.dropout:
            return True
        if isinstance(linear, LoraLinear) and linear.nf4 is not None:
            return False
        exact = self.backends["linear"] == "cpp" and self.width == 4
        return linear.weight.requires_grad or (exact and cpu.matmul_backend()[0] == "onednn")

    def _bottlenecks(self) -> Iterator[Bottleneck]:
        for branch in (self.layer.self_attn, self.layer.mlp):
            if isinstance(made := getattr(branch, "bottleneck", None), Bottleneck):
                yield made

    def _narrow(self, bottleneck: Bottleneck) -> int:
        """A bottleneck's input, and its middle before and after gelu."""
        return self.stream + 2 * bottleneck.down.out_features * self.width


def _linears(layer: nn.Module) -> list[nn.Linear]:
    """The four projections of a block."""
    block: Any = layer
    return [block.self_attn.qkv_proj, block.self_attn.o_proj, block.mlp.gate_up_proj,
            block.mlp.down_proj]


def _is_dora(linear: nn.Linear) -> bool:
    return isinstance(linear, LoraLinear) and any(
        low.magnitude is not None for low in linear.changes().values())
