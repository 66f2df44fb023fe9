"""LoRA, rsLoRA, DoRA and QLoRA as methods: which matrices, first values, files, merging."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastllm.adapters.base import Adapter
from fastllm.adapters.lora import LoraEmbedding, LoraHead, LoraLinear, LowRank
from fastllm.config import UserError
from fastllm.model import Decoder
from fastllm.model.layers import Embedding, Linear


class LowRankAdapter(Adapter):
    """lora (Hu et al., 2021), dora (Liu et al., 2024), qlora (Dettmers et al., 2023).

    First values are PEFT's: A uniform in +-1/sqrt(K), B zero; for the embedding A zero, B standard
    normal. The model's outputs do not change by it.
    """

    mergeable = True

    def _attach(self) -> None:
        model, config = self.model, self.config
        targets, quantize = config.target_names(), config.name == "qlora"
        errors = torch.zeros(2, dtype=torch.float64)
        for path, base in _linears(model):
            parts = base.parts or {path.rpartition(".")[2]: base.out_features}
            if not quantize and not any(part in targets for part in parts):
                continue
            changed = self._linear(path, base, targets, quantize)
            _replace(model, path, changed)
            if changed.nf4 is not None and not base.weight.is_meta:
                weight = base.weight.float()
                error = changed.nf4.dense(torch.float32) - weight
                errors += torch.stack([error.square().sum(), weight.square().sum()]).double().cpu()
        if quantize:
            self.quantization_error = float((errors[0] / errors[1]).sqrt())
        if "embed_tokens" in targets:
            model.embed_tokens = LoraEmbedding(model.embed_tokens, config)
        if "lm_head" in targets:
            model.head_change = LoraHead(model.lm_head_weight, config)
        for name, low in self.parts():
            if name == "model.embed_tokens":
                low.lora_B.copy_(self.draw(f"{name}.lora_B", low.lora_B.shape, 1.0))
                continue
            bound = low.lora_A.shape[1] ** -0.5
            low.lora_A.copy_(torch.empty(low.lora_A.shape, device="cpu").uniform_(
                -bound, bound, generator=self.generator(f"{name}.lora_A")))
        for module in model.modules():
            if isinstance(module, LoraLinear | LoraEmbedding):
                module.set_magnitudes()
        if model.head_change is not None:
            model.head_change.lora.set_magnitude(model._head())

    def _linear(self, path: str, base: Linear, targets: list[str], quantize: bool) -> LoraLinear:
        try:
            return LoraLinear(base, path.rpartition(".")[2], targets, self.config,
                              quantize=quantize)
        except ValueError as error:
            raise UserError(f"adapter.block-size {self.config.block_size} does not fit {path}: "
                            f"{error}") from None

    def parts(self) -> Iterator[tuple[str, LowRank]]:
        """Every changed matrix under its Hugging Face name."""
        if isinstance(self.model.embed_tokens, LoraEmbedding):
            yield "model.embed_tokens", self.model.embed_tokens.lora
        for path, module in self.model.named_modules():
            if isinstance(module, LoraLinear):
                for part, low in module.changes().items():
                    yield f"model.{path.rpartition('.')[0]}.{part}", low
        if self.model.head_change is not None:
            yield "lm_head", self.model.head_change.lora

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, low in self.parts():
            prefix = f"base_model.model.{name}."
            if name == "model.embed_tokens":
                yield f"{prefix}lora_embedding_A", low.lora_A
                yield f"{prefix}lora_embedding_B", low.lora_B
            else:
                yield f"{prefix}lora_A.weight", low.lora_A
                yield f"{prefix}lora_B.weight", low.lora_B
            if low.magnitude is not None:
                yield f"{prefix}lora_magnitude_vector", low.magnitude

    def described(self) -> dict[str, Any]:
        config = self.config
        return {
            "peft_type": "LORA", "r": config.rank, "lora_alpha": config.alpha,
            "lora_dropout": config.dropout, "use_rslora": config.rslora,
            "use_dora": config.name == "dora", "target_modules": config.target_names(),
            "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True,
            "modules_to_save": None, "layers_to_transform": None, "layers_pattern": None,
            "rank_pattern": {}, "alpha_pattern": {}}

    def _merge(self) -> None:
        model = self.model
        for path, module in list(model.named_modules()):
            if isinstance(module, LoraLinear):
                _replace(model, path, module.merged(self.like.dtype))
        embedding, head = model.embed_tokens, model.head_change
        changed = isinstance(embedding, LoraEmbedding) or head is not None
        if changed and model.lm_head is None:
            # Only one of the two is changed, or each in its own way: they part.
            model.lm_head = _around(Linear(embedding.embedding_dim, embedding.num_embeddings),
                                    embedding.weight.clone())
            model.config = dataclasses.replace(model.config, tie_word_embeddings=False)
        if head is not None:
            own = model.lm_head.weight  # type: ignore[union-attr]
            own.copy_(head.lora.folded(own))
            model.head_change = None
        if isinstance(embedding, LoraEmbedding):
            embedding.weight.copy_(embedding.folded())
            with torch.device("meta"):
                plain = Embedding(embedding.num_embeddings, embedding.embedding_dim)
            plain.weight = embedding.weight
            model.embed_tokens = plain


def _linears(model: Decoder) -> list[tuple[str, Linear]]:
    """The projections of the blocks by name."""
    return [(f"layers.{path}", module) for path, module in model.layers.named_modules()
            if isinstance(module, Linear)]


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _around(linear: Linear, weight: Tensor) -> Linear:
    linear.weight = nn.Parameter(weight)
    return linear
