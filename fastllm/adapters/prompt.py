"""Learned rows of the embedding before every document.

prompt: the rows themselves (Lester et al., "The Power of Scale for Parameter-Efficient Prompt
Tuning", arXiv:2104.08691). p-tuning: an MLP makes them from an embedding of the same size (Liu et
al., "GPT Understands, Too", arXiv:2103.10385; PEFT's form without the LSTM).
A hook before the decoder puts ids above the vocabulary at the virtual tokens' places, the embedding
looks up learned rows for them, and a hook after it takes their hidden states away: whoever calls
the model sees its own tokens only.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastllm.adapters import virtual
from fastllm.adapters.base import Adapter, Switch
from fastllm.config import UserError
from fastllm.model import Decoder
from fastllm.model.layers import Embedding


class PromptEmbedding(Switch, Embedding):
    """An embedding (V, H) around the given one's weight; id V + j is virtual token j of v.

    encoder_hidden_size: width of p-tuning's MLP; None: the rows are the parameters.
    """

    encoder: nn.Sequential | None

    def __init__(self, base: Embedding, tokens: int, encoder_hidden_size: int | None):
        with torch.device("meta"):
            Embedding.__init__(self, base.num_embeddings, base.embedding_dim)
        self.weight = base.weight
        size = base.embedding_dim
        like: dict[str, Any] = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.virtual_rows = nn.Parameter(base.weight.new_zeros(tokens, size))
        hidden = encoder_hidden_size
        self.encoder = None if hidden is None else nn.Sequential(
            nn.Linear(size, hidden, **like), nn.ReLU(), nn.Linear(hidden, hidden, **like),
            nn.ReLU(), nn.Linear(hidden, size, **like))
        self._taken: tuple[torch.Size, Tensor | None] | None = None

    def rows(self) -> Tensor:
        """What the virtual tokens are embedded as, (v, H)."""
        return self.virtual_rows if self.encoder is None else self.encoder(self.virtual_rows)

    def forward(self, ids: Tensor) -> Tensor:
        """(...) int64 below V + v to (..., H)."""
        if not self.active:
            return super().forward(ids)
        known, rows = self.num_embeddings, self.rows()
        count = rows.shape[0]
        is_virtual = ids >= known
        x = super().forward(ids.masked_fill(is_virtual, 0))
        # The other ids look up a row of zeros that takes no gradient.
        table = torch.cat((rows, rows.new_zeros(1, rows.shape[1])))
        at = (ids - known).masked_fill(~is_virtual, count)
        return torch.where(is_virtual[..., None],
                           functional.embedding(at, table, padding_idx=count), x)

    def before(self, model: Decoder, args: tuple[Any, ...], kwargs: dict[str, Any]
               ) -> tuple[tuple[Tensor], dict[str, Any]] | None:
        """`Decoder.forward`'s arguments with the virtual tokens' ids among them."""
        ids, others = virtual.begin(model, args, kwargs)
        self._taken = None
        positions, cache = others.get("position_ids"), others.get("cache")
        bounds, count = others.get("cu_seqlens"), self.virtual_rows.shape[0]
        if not self.active or ids.dim() != 2:  # of a wrong shape the decoder says so itself
            return None
        if cache is not None and cache.length:  # they are in it
            if positions is not None:
                others["position_ids"] = positions + count
            return (ids,), others
        ahead = torch.arange(count, device=ids.device)
        if bounds is None:
            def wider(rows: Tensor, first: Tensor) -> Tensor:
                return torch.cat((first.expand(ids.shape[0], count), rows), dim=1)

            self._taken = ids.shape, None
            if positions is not None:
                others["position_ids"] = wider(positions + count, ahead)
            if others.get("max_seqlen") is not None:
                others["max_seqlen"] += count
            return (wider(ids, self.num_embeddings + ahead),), others
        if positions is None:
            return None
        real, first, longer = virtual.places(bounds, count, ids.numel())
        self._taken = ids.shape, real
        ahead = ahead.repeat(bounds.shape[0] - 1)
        others |= {
            "position_ids": virtual.between(positions.flatten() + count, ahead, real, first)[None],
            "cu_seqlens": longer, "max_seqlen": others["max_seqlen"] + count}
        return (virtual.between(ids.flatten(), self.num_embeddings + ahead, real, first)[None],), \
            others

    def after(self, model: Decoder, args: Any, hidden: Tensor) -> Tensor:
        """The hidden states of the caller's own tokens, (B, S, H)."""
        taken, self._taken = self._taken, None
        if taken is None:
            return hidden
        shape, real = taken
        if real is None:
            return hidden[:, self.virtual_rows.shape[0]:]
        return hidden[0].index_select(0, real).view(*shape, hidden.shape[-1])


class PromptAdapter(Adapter):
    """prompt and p-tuning.

    First values: of prompt rows of the embedding, drawn at random (the paper's "sampled
    vocabulary"); of p-tuning PEFT's, a standard normal embedding and torch's own for the MLP.

    encoder: False for the rows that a file of p-tuning holds, whose MLP is gone.
    """

    embedding: PromptEmbedding

    def _attach(self, encoder: bool = True) -> None:
        model, config = self.model, self.config
        hidden = None
        if config.name == "p-tuning" and encoder:
            hidden = config.encoder_hidden_size or model.config.hidden_size
        if model.config.scale_embeddings:
            raise UserError(f"adapter.name {config.name} is not made for models that scale their "
                            "embeddings, such as Gemma, whose libraries do not agree on the scale "
                            "of virtual tokens: use prefix or lora")
        base = model.embed_tokens
        self.embedding = made = PromptEmbedding(base, config.virtual_tokens, hidden)
        if hidden is None:
            chosen = torch.randint(0, base.num_embeddings, (config.virtual_tokens,),
                                   generator=self.generator("virtual_rows"))
            made.virtual_rows.copy_(base.weight[chosen.to(base.weight.device)])
        else:
            made.virtual_rows.copy_(self.draw("virtual_rows", made.virtual_rows.shape, 1.0))
        for name, parameter in ({} if made.encoder is None else
                                dict(made.encoder.named_parameters())).items():
            linear: Any = made.get_submodule(f"encoder.{name.rpartition('.')[0]}")
            bound = linear.in_features ** -0.5
            parameter.copy_(torch.empty(parameter.shape, device="cpu").uniform_(
                -bound, bound, generator=self.generator(f"encoder.{name}")))
        model.embed_tokens = made
        model.virtual_tokens = config.virtual_tokens
        model.register_forward_pre_hook(made.before, with_kwargs=True)
        model.register_forward_hook(made.after)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield "prompt_embeddings", self.embedding.rows()

    def described(self) -> dict[str, Any]:
        shape, config = self.model.config, self.config
        values = {"num_virtual_tokens": config.virtual_tokens, "token_dim": shape.hidden_size,
                  "num_attention_heads": shape.num_attention_heads,
                  "num_layers": shape.num_hidden_layers, "num_transformer_submodules": 1}
        if config.name == "prompt":
            return {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM", **values}
        return {"peft_type": "P_TUNING", "encoder_reparameterization_type": "MLP",
                "encoder_hidden_size": config.encoder_hidden_size or shape.hidden_size, **values}
