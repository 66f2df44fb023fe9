"""What a run will need of each rank's memory, said before any of it is taken.

Weights, gradients, states and buffers follow from the partition, to the byte; activations from what
every operator keeps for its backward, to a few percent.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastllm import cpu, ops
from fastllm.callbacks import data_size
from fastllm.dist.buckets import Group, group_parameters, places
from fastllm.dist.config import DistConfig
from fastllm.dist.partition import Layout
from fastllm.dist.python_engine import IN_FLIGHT, wide
from fastllm.dist.units import Unit
from fastllm.model import Decoder, ModelConfig
from fastllm.optim import OptimConfig, Place, make_optimizer


@dataclass(frozen=True)
class Plan:
    """Bytes on one rank."""

    weights: int
    gradients: int
    states: int
    """Optimizer states and fp32 masters."""
    activations: int
    """At their peak, when few gradients are there yet: the total is a little more than the need."""
    buffers: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.states + self.activations + self.buffers

    def line(self) -> str:
        """One line for a person."""
        parts = ", ".join(f"{name} {data_size(value)}" for name, value in vars(self).items())
        return f"memory a rank, predicted: {data_size(self.total)} ({parts})"


def describes(config: ModelConfig) -> bool:
    """Whether the activations of this architecture are known: not yet those of GeGLU, sandwich
    norms, windows, and softcaps of the scores."""
    return not (config.hidden_act != "silu" or config.sandwich_norms or config.sliding_window
                or config.attn_logit_softcapping)


def make_plan(model: ModelConfig, optim: OptimConfig, dist: DistConfig, *, dtype: torch.dtype,
              tokens: int, grad_accum: int, rank: int = 0, world: int = 1,
              device: torch.device | None = None) -> Plan:
    """The plan of one rank; nothing is allocated (the model is built on the meta device).

    tokens: in a micro-batch. device: None is the GPU where there is one, else the CPU.
    """
    with torch.device("meta"):
        decoder = Decoder(model).to(dtype)
    numel, width = sum(param.numel() for param in decoder.parameters()), dtype.itemsize
    local = numel * _local_gradient(dtype, grad_accum)
    activations = activation_bytes(model, tokens, width, device)
    if world == 1:
        states = _state_bytes(list(decoder.named_parameters()), optim, None)
        return Plan(numel * width, local, states, activations, 0)
    units, groups = group_parameters(decoder, dist.zero, dist.bucket_mb)
    buckets = _Buckets([(group, group.layout(world)) for group in groups],
                       units[0] if units else None)
    gradients = _gradient_bytes(buckets, dist.zero, wide(dtype).itemsize)
    if dist.zero < 2 and grad_accum > 1:
        gradients += local
    states = _rank_state_bytes(decoder, groups, optim, dist.zero, rank, world)
    weights = (buckets.shards if dist.zero == 3 else buckets.padded) * width
    return Plan(weights, gradients, states, activations,
                _buffer_bytes(buckets, dist, dtype, world))


# ------------------------------------------------------------------------------ what is sharded


@dataclass(frozen=True)
class _Buckets:
    """The buckets of a model over ranks, and their sizes in elements."""

    laid_out: list[tuple[Group, Layout]]
    root: Unit | None
    """Stage 3: what is no block's."""

    @property
    def shards(self) -> int:
        """Of one rank."""
        return sum(layout.shard for _, layout in self.laid_out)

    @property
    def padded(self) -> int:
        return sum(layout.padded for _, layout in self.laid_out)

    @property
    def largest(self) -> int:
        return max(layout.padded for _, layout in self.laid_out)

    @property
    def gathered(self) -> int:
        """Stage 3: the root stays whole; of the blocks one computes while the next one comes."""
        root = sum(layout.padded for group, layout in self.laid_out if group.unit is self.root)
        blocks = [layout.padded for group, layout in self.laid_out if group.unit is not self.root]
        return root + 2 * max(blocks, default=0)


def _local_gradient(dtype: torch.dtype, grad_accum: int) -> int:
    """Bytes of an element's gradient on a rank by itself: 16-bit ones of several micro-batches are
    summed beside `grad`, in fp32."""
    summed = dtype.itemsize < 4 and grad_accum > 1
    return dtype.itemsize + (wide(dtype).itemsize if summed else 0)


def _gradient_bytes(buckets: _Buckets, stage: int, sums: int) -> int:
    """The sums over ranks, of `sums` bytes an element; in stage 0 everybody's."""
    return (buckets.padded if stage == 0 else buckets.shards) * sums


def _buffer_bytes(buckets: _Buckets, dist: DistConfig, dtype: torch.dtype, world: int) -> int:
    """What is on its way between ranks, what int8 left unsent, and stage 3's gathered parameters;
    with offload what goes to the CPU and back."""
    width = dtype.itemsize
    wire = {"same": width, "fp32": 4, "bf16": 2, "int8": 1.02}[dist.wire_dtype]
    held = int((IN_FLIGHT + 1) * (2 - 1 / world) * buckets.largest * wire)
    if dist.wire_dtype == "int8":
        held += 4 * buckets.padded
    if dist.zero == 3:
        held += buckets.gathered * width
        if dist.param_wire_dtype == "int8":
            held += int(buckets.largest * 1.02)
    if dist.offload != "none":
        held += buckets.shards * (wide(dtype).itemsize
                                  + (width if dist.offload == "optimizer" else 0))
    return held


def _rank_state_bytes(decoder: Decoder, groups: list[Group], optim: OptimConfig, stage: int,
                      rank: int, world: int) -> int:
    """Of the optimizer over what one rank updates: everything in stage 0, else its shards."""
    named = dict(decoder.named_parameters())
    if stage == 0:
        return _state_bytes(list(named.items()), optim, None)
    mine = [piece for group in groups for piece in group.owned(rank, world)]
    tensors = [(name, named[name].new_empty(run.size)) for name, run in mine]
    return _state_bytes(tensors, optim, places(named, mine))


def _state_bytes(named: list[tuple[str, Tensor]], optim: OptimConfig,
                 where: dict[str, Place] | None) -> int:
    return make_optimizer(named, optim, places=where).held_bytes()


# -------------------------------------------------------------------------------- activations


def activation_bytes(config: ModelConfig, tokens: int, width: int,
                     device: torch.device | None = None) -> int:
    """What a micro-batch's forward and backward hold at most, beside weights and their gradients.

    There are two moments of which one is the peak. At the end of the forward every block keeps its
    part, the last norm its input, its result and that one's gradient are there, and the loss has
    its logits. As the backward enters the blocks, the last of them works beside what all of them
    keep, and, with recomputation, beside what it has run again.

    It describes the ops that run on `device` by `ops.dispatch`. Triton's and the C++ ones keep the
    same tensors, but for qk_norm in 16 bits, for which the C++ one keeps fp32 copies; the plain
    ones keep more, most of it in fp32. Left out: scratch inside operators, of which the C++
    attention's packed keys show with documents of some dozens of tokens and heads that are together
    wider than the model; and all that torch.compile arranges otherwise.

    width: bytes of an element of the model's dtype. device: as in `make_plan`.
    """
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    block = _Block(config, width, device)
    longest = min(tokens, config.max_position_embeddings)
    kept = {"none": block.kept, "selective": block.products, "full": block.stream}[config.recompute]
    last = kept if config.recompute == "none" else block.stream + block.again
    everywhere = 4 * config.head_size + block.mask  # cos and sin; the embedding's dropout
    forward = everywhere + config.num_hidden_layers * kept + block.norm + 3 * block.stream
    backward = everywhere + (config.num_hidden_layers - 1) * kept + last + block.working(longest)
    return max(tokens * forward + _loss_bytes(config, tokens, width, device), tokens * backward)


class _Block:
    """Bytes that a token takes in one block.

    `stream`, `queries`, `keys` and `gate`: of one tensor as wide as the model, as all query heads,
    as all key heads, and as the MLP.
    """

    def __init__(self, config: ModelConfig, width: int, device: torch.device) -> None:
        self.config, self.width, self.on_cpu = config, width, device.type == "cpu"
        self.stream, self.gate = config.hidden_size * width, config.intermediate_size * width
        self.queries = config.num_attention_heads * config.head_size * width
        self.keys = config.kv_heads * config.head_size * width
        self.backends = {op: backend for op, (backend, _) in ops.dispatch(device).items()}

    def _fp32(self, size: int, *, copies: int, results: int) -> int:
        """fp32 tensors of `size` bytes in the model's dtype: copies, which fp32 itself needs not,
        and results."""
        return size * 4 // self.width * (results + (copies if self.width < 4 else 0))

    @property
    def norm(self) -> int:
        """Beside its input: a sum; the plain one also the input and the quotient in fp32."""
        plain = self.backends["rms_norm"] == "reference"
        return 4 + (self._fp32(self.stream, copies=1, results=1) if plain else 0)

    @property
    def attention(self) -> int:
        """Queries and keys after rotation, values, the result and its sums. Plain attention has
        the result by document, and joined."""
        heads = self.queries + self.keys
        kept = 2 * heads + 4 * self.config.num_attention_heads
        if self.backends["attention"] == "reference":
            kept += self.queries
        if self.config.qk_norm:  # the whole projection too, of which the values are a view
            backend = self.backends["qk_norm_rope"]
            kept += heads
            if backend != "triton":
                kept += self._fp32(heads, copies=1, results=int(backend == "reference"))
        return kept

    @property
    def swiglu(self) -> int:
        """Beside gate and up: nothing; the plain one both in fp32, and silu(gate)."""
        plain = self.backends["swiglu"] == "reference"
        return self._fp32(self.gate, copies=2, results=1) if plain else 0

    @property
    def mask(self) -> int:
        """Of one dropout: a factor an element on a CPU, a byte on a GPU."""
        if not self.config.dropout:
            return 0
        return self.stream if self.on_cpu else self.config.hidden_size

    @property
    def kept(self) -> int:
        """Without recomputation: the residual stream at both norms, gate and up, and what the
        operators keep. (The norms' results and the MLP's are made again: `made_again`.)"""
        return (2 * self.stream + 2 * self.gate + self.attention + 2 * self.norm + self.swiglu
                + 2 * self.mask)

    @property
    def products(self) -> int:
        """With selective recomputation: the block's input, and the results of its four products
        and of attention."""
        return (3 * self.stream + 2 * self.gate + 2 * (self.queries + self.keys)
                + 4 * self.config.num_attention_heads)

    @property
    def again(self) -> int:
        """Of a block that was run again, beside its input: as without recomputation, and the norms'
        results. Plain ops in 16 bits have let go of what they copied to fp32."""
        again = self.kept + self.stream
        if self.backends["swiglu"] == "reference" and self.width < 4:
            again -= self.stream + 2 * self.gate
        return again

    def working(self, longest: int) -> int:
        """In the backward, beside what is kept: the gradient of the residual stream, and of the
        MLP's middle, gate and up; or, as these and gate and up are gone, those of attention. The
        mask of the MLP's dropout is gone by then.

        longest: tokens of a document. The C++ attention adds up the queries' gradients of long ones
        from up to 8 parts in fp32, of 1024 keys or more.
        """
        plain, parts = self.backends["swiglu"] == "reference", 0
        middle = self._fp32(self.gate, copies=0, results=1) if plain else self.gate
        if self.backends["attention"] == "cpp" and longest > 1024:
            parts = self._fp32(self.queries, copies=0, results=min(8, -(-longest // 1024)))
        return max(self.stream + 3 * middle,
                   2 * (self.queries + self.keys) + parts - 2 * self.gate) - self.mask


def logit_rows(config: ModelConfig, tokens: int, width: int, device: torch.device) -> int:
    """Rows of logits that the loss holds at a time: as many on a CPU, at most as many on a GPU.

    The rule is that of `fastllm.kernels._chunks`: what stays in a CPU's cache; a quarter of a GB,
    or the output head's size, on a GPU.
    """
    row = config.vocab_size * width
    if device.type == "cpu":
        most, multiple = max(512, (20 << 20) // row), 1
    else:
        most, multiple = max(1024, max(256 << 20, row * config.hidden_size) // row), 128
    alike = -(-tokens // -(-tokens // most))  # chunks of equal size, as few as they can be
    return min(tokens, -(-alike // multiple) * multiple)


def _loss_bytes(config: ModelConfig, tokens: int, width: int, device: torch.device) -> int:
    """What the linear cross-entropy works with: a chunk of logits, and, in 16 bits, the output
    head's gradient in fp32 where chunks add up to it."""
    head = config.vocab_size * config.hidden_size
    rows = logit_rows(config, tokens, width, device)
    held = rows * config.vocab_size * width
    # A GPU may take fewer rows than `rows`, but no chunk of fewer than 1024.
    several = rows < tokens or (device.type != "cpu" and tokens > 1024)
    if width < 4 and several:
        held += 4 * head
    backend = ops.dispatch(device)["linear_cross_entropy"][0]
    if backend == "reference":  # three fp32 copies and a mask of the rows at work
        held += 13 * min(rows, 256) * config.vocab_size
    elif backend == "cpp" and width == 4 and cpu.matmul_backend()[0] == "onednn":
        # That product takes a copy of the transposed logits, and has no out=.
        held += rows * config.vocab_size * width + 4 * head
    return held
