"""Matrices changed by a product of rank r: y = x W^T + scale (x A^T) B^T, and DoRA's form of it.

A (r, K) and B (N, r) belong to a named part (N, K) of a weight. Parts of one fused weight share
their products: A of all of them end to end, B in a block diagonal, so that a fused projection
costs one narrow product and one wide one beside its own, and no copy of W.
DoRA divides each row of W + scale B A by its norm and multiplies it with a learned magnitude. The
norm counts as a constant in the backward (section 4.3 of the paper). It is had without forming the
sum: |w + s b A|^2 = |w|^2 + 2 s b (A w) + s^2 b (A A^T) b^T, one product of W with r rows.
Sources: Hu et al., "LoRA", arXiv:2106.09685; Liu et al., "DoRA", arXiv:2402.09353; Kalajdzievski,
"rsLoRA", arXiv:2312.03732.
"""

from collections.abc import Collection
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastllm import ops
from fastllm.adapters.base import Switch
from fastllm.adapters.config import AdapterConfig
from fastllm.adapters.nf4 import NF4Weight
from fastllm.model.layers import Embedding, Linear


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type of sums over weights of this one: at least fp32."""
    return torch.promote_types(dtype, torch.float32)


def _fused(x: Tensor) -> bool:
    """Whether `ops.lora_linear` is one operator for x, and not plain torch."""
    return x.is_cuda


@torch.no_grad()
def row_norms(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The norms of the rows of weight (N, K) + scale b (N, r) a (r, K): (N,) in weight's type."""
    kind = wide(weight.dtype)
    own = torch.linalg.vector_norm(weight, dim=1, dtype=kind).square()
    cross = ((weight @ a.t()).to(kind) * b.to(kind)).sum(1)
    a, b = a.to(kind), b.to(kind)
    change = ((b @ (a @ a.t())) * b).sum(1)
    return (own + 2 * scale * cross + scale**2 * change).clamp(min=0).sqrt().to(weight.dtype)


class LowRank(nn.Module):
    """A (r, K), B (N, r) and DoRA's magnitude (N,) of one part of a weight."""

    magnitude: nn.Parameter | None

    def __init__(self, rows: int, columns: int, config: AdapterConfig, like: Tensor):
        super().__init__()
        self.scale = config.scale
        self.lora_A = nn.Parameter(like.new_zeros(config.rank, columns))
        self.lora_B = nn.Parameter(like.new_zeros(rows, config.rank))
        self.register_parameter("magnitude", nn.Parameter(like.new_zeros(rows))
                                if config.name == "dora" else None)

    def gain(self, weight: Tensor) -> Tensor | None:
        """DoRA: magnitude over the norm of each row of the changed weight, (N,); else None."""
        if self.magnitude is None:
            return None
        return self.magnitude / row_norms(weight, self.lora_A, self.lora_B, self.scale)

    @torch.no_grad()
    def set_magnitude(self, weight: Tensor) -> None:
        """DoRA begins with the norms that the rows have."""
        if self.magnitude is not None:
            self.magnitude.copy_(row_norms(weight, self.lora_A, self.lora_B, self.scale))

    def changed(self, weight: Tensor) -> Tensor:
        """The part (N, K) with its change, differentiable in A, B and magnitude."""
        full = torch.addmm(weight, self.lora_B, self.lora_A, alpha=self.scale)
        gain = self.gain(weight)
        return full if gain is None else full * gain[:, None]

    @torch.no_grad()
    def folded(self, weight: Tensor) -> Tensor:
        """`changed`, summed in fp32 and not rounded yet."""
        kind, gain = wide(weight.dtype), self.gain(weight)
        full = torch.addmm(weight.to(kind), self.lora_B.to(kind), self.lora_A.to(kind),
                           alpha=self.scale)
        return full if gain is None else full * gain.to(kind)[:, None]


class LoraLinear(Switch, Linear):
    """A `Linear` some of whose parts are changed, around the parameters of the given one.

    quantize: keep the frozen weight in 4 bits, as an `NF4Weight`, and no parameter `weight`.
    """

    def __init__(self, base: Linear, name: str, targets: Collection[str], config: AdapterConfig,
                 *, quantize: bool = False):
        with torch.device("meta"):
            Linear.__init__(self, base.in_features, base.out_features, parts=base.parts,
                            bias=base.bias is not None)
        self.bias = base.bias
        self.rows = dict(base.parts) if base.parts is not None else {name: base.out_features}
        self.scale, self.dropout = config.scale, config.dropout
        self.nf4: NF4Weight | None = None
        if quantize:
            self.nf4 = NF4Weight(base.weight, block_size=config.block_size,
                                 double_quant=config.double_quant)
            del self.weight
        else:
            self.weight = base.weight
        self.lora = nn.ModuleDict({
            part: LowRank(rows, base.in_features, config, base.weight)
            for part, rows in self.rows.items() if part in targets})

    def changes(self) -> dict[str, LowRank]:
        """The changed parts by name."""
        return {part: low for part, low in self.lora.items() if isinstance(low, LowRank)}

    def set_magnitudes(self) -> None:
        """See `LowRank.set_magnitude`."""
        for part, low in self.changes().items():
            if low.magnitude is not None:
                low.set_magnitude(self._part(part))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) to (..., N)."""
        if not self.active or not self.lora:
            return self._own(x, self.bias)
        a, b, gain = self._joined()
        bias = self.bias if gain is None else None
        if _fused(x) and not (self.dropout and self.training):
            weight = self.weight if self.nf4 is None else self.nf4.value()
            y = ops.lora_linear(x, weight, a, b, scale=self.scale, bias=bias)
        else:
            # Apart, where the change reads x with elements dropped, and where the operator is
            # plain torch anyway: `ops.linear` has the faster product there.
            y = self._own(x, bias)
            narrow = functional.linear(functional.dropout(x, self.dropout, self.training), a)
            y = torch.addmm(y.flatten(0, -2), narrow.flatten(0, -2), b.t(),
                            alpha=self.scale).view(y.shape)
        if gain is None:
            return y
        return y * gain if self.bias is None else torch.addcmul(self.bias, y, gain)

    @torch.no_grad()
    def merged(self, dtype: torch.dtype) -> Linear:
        """A plain `Linear` with the changes in its weight: this one's parameter, or one of `dtype`
        from the 4 bits."""
        source = self.weight if self.nf4 is None else self.nf4.dense(wide(dtype))
        weight = self.weight if self.nf4 is None else nn.Parameter(source.to(dtype, copy=True))
        sizes = list(self.rows.values())
        for part, own, target in zip(self.rows, source.split(sizes), weight.split(sizes),
                                     strict=True):
            if part in self.lora:
                target.copy_(self.changes()[part].folded(own))
        with torch.device("meta"):
            plain = Linear(self.in_features, self.out_features, parts=self.parts,
                           bias=self.bias is not None)
        plain.weight, plain.bias = weight, self.bias
        return plain

    def _own(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.nf4 is not None:
            return self.nf4.linear(x, bias)
        return ops.linear(x, self.weight, bias)

    def _part(self, part: str) -> Tensor:
        at = list(self.rows).index(part)
        return self.weight.split(list(self.rows.values()))[at]

    def _gain(self, part: str, low: LowRank) -> Tensor | None:
        return None if low.magnitude is None else low.gain(self._part(part))

    def _joined(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """A of all changed parts end to end, their B in a block diagonal over all rows, and the
        gains of all rows (DoRA)."""
        changes = self.changes()
        if len(self.rows) == 1:
            ((part, low),) = changes.items()
            return low.lora_A, low.lora_B, self._gain(part, low)
        first = next(iter(changes.values()))
        a = torch.cat([low.lora_A for low in changes.values()])
        b = torch.block_diag(*[changes[part].lora_B if part in changes else
                               first.lora_B.new_zeros(rows, 0)
                               for part, rows in self.rows.items()])
        gains = [self._gain(part, changes[part]) if part in changes else
                 first.lora_B.new_ones(rows) for part, rows in self.rows.items()]
        whole = [gain for gain in gains if gain is not None]
        return a, b, torch.cat(whole) if first.magnitude is not None else None


class LoraEmbedding(Switch, Embedding):
    """An embedding changed by (A^T)[ids] B^T, A (r, V), B (H, r), around the given one's weight.

    It is PEFT's: DoRA's magnitude is one of each of the H columns.
    """

    def __init__(self, base: Embedding, config: AdapterConfig):
        with torch.device("meta"):
            Embedding.__init__(self, base.num_embeddings, base.embedding_dim)
        self.weight = base.weight
        self.lora = LowRank(base.embedding_dim, base.num_embeddings, config, base.weight)

    def set_magnitudes(self) -> None:
        """See `LowRank.set_magnitude`."""
        self.lora.set_magnitude(self.weight.t())

    def forward(self, ids: Tensor) -> Tensor:
        """(...) int64 to (..., H)."""
        x = super().forward(ids)
        if not self.active:
            return x
        low = self.lora
        narrow = functional.embedding(ids, low.lora_A.t())
        x = torch.addmm(x.flatten(0, -2), narrow.flatten(0, -2), low.lora_B.t(),
                        alpha=low.scale).view(x.shape)
        gain = low.gain(self.weight.t())
        return x if gain is None else x * gain

    def folded(self) -> Tensor:
        """The changed embedding (V, H), not rounded yet."""
        return self.lora.folded(self.weight.t()).t()


class LoraHead(Switch):
    """The output head W (V, H) changed by B A, as `Decoder.head_change`.

    The losses take the head as one weight. It is made anew for each of them, with a gradient of
    its size: V H numbers twice while a micro-batch lasts. A tied embedding is not changed by it.
    """

    def __init__(self, weight: Tensor, config: AdapterConfig):
        super().__init__()
        self.lora = LowRank(weight.shape[0], weight.shape[1], config, weight)

    def weight(self, own: Tensor) -> Tensor:
        """(V, H) of the head's own weight."""
        return self.lora.changed(own) if self.active else own

    def logits(self, hidden: Tensor, own: Tensor) -> Tensor:
        """(..., H) to (..., V), without making the weight."""
        logits = ops.linear(hidden, own)
        if not self.active:
            return logits
        low = self.lora
        narrow = functional.linear(hidden, low.lora_A)
        logits = torch.addmm(logits.flatten(0, -2), narrow.flatten(0, -2), low.lora_B.t(),
                             alpha=low.scale).view(logits.shape)
        gain = low.gain(own)
        return logits if gain is None else logits * gain

    def forward(self, *_: Tensor) -> NoReturn:
        """A head is asked for its weight or for logits."""
        raise TypeError("LoraHead has no forward: use weight(own) or logits(hidden, own)")
