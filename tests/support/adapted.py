"""Tiny decoders with each adapter, as if trained, and packed batches for them."""

import torch

from fastllm.adapters import Adapter, AdapterConfig, apply
from fastllm.model import Decoder, ModelConfig

SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
         "init_std": 0.1}
EVERYTHING = ["all-linear", "embed_tokens", "lm_head"]
METHODS = {
    "lora": {"name": "lora", "rank": 4, "alpha": 8.0},
    "rslora": {"name": "lora", "rank": 4, "rslora": True, "alpha": 3.0},
    "lora of two parts": {"name": "lora", "rank": 3, "alpha": 4.0,
                          "targets": ["q_proj", "v_proj", "down_proj"]},
    "lora of everything": {"name": "lora", "rank": 4, "alpha": 8.0, "targets": EVERYTHING},
    "dora": {"name": "dora", "rank": 4, "alpha": 8.0},
    "dora of two parts": {"name": "dora", "rank": 3, "alpha": 4.0,
                          "targets": ["k_proj", "up_proj"]},
    "dora of everything": {"name": "dora", "rank": 4, "alpha": 8.0, "targets": EVERYTHING},
    "qlora": {"name": "qlora", "rank": 4, "alpha": 8.0, "block_size": 32,
              "targets": ["q_proj", "o_proj"]},
    "prompt": {"name": "prompt", "virtual_tokens": 3},
    "p-tuning": {"name": "p-tuning", "virtual_tokens": 3, "encoder_hidden_size": 24},
    "prefix": {"name": "prefix", "virtual_tokens": 3},
    "bottleneck": {"name": "bottleneck", "bottleneck_size": 8},
}
MERGEABLE = [name for name, options in METHODS.items() if "lora" in name or "dora" in name]
UNCHANGED_AT_FIRST = [*[name for name in MERGEABLE if name != "qlora"], "bottleneck"]


def decoder(dtype: torch.dtype = torch.float32, **changes) -> Decoder:
    """The same random weights at every call, norms and biases too."""
    model = Decoder(ModelConfig(**{**SIZES, **changes}), initialize=False)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if parameter.dim() == 1 else 0.1 * noise)
    return model.to(dtype)


def adapted(method: str, dtype: torch.dtype = torch.float32, *, trained: bool = True,
            options: dict | None = None, **changes) -> Adapter:
    """A fresh decoder with a method; trained: with adapter weights that no start has."""
    config = AdapterConfig(**{**METHODS[method], **(options or {})})
    adapter = apply(decoder(dtype, **changes), config, seed=1)
    return stirred(adapter) if trained else adapter


def stirred(adapter: Adapter) -> Adapter:
    """Every adapter parameter moved by a random amount."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, parameter in adapter.named_parameters():
            parameter += (0.1 * torch.randn(parameter.shape, generator=generator)).to(parameter)
    return adapter


def ids(rows: int = 2, length: int = 24, seed: int = 5) -> torch.Tensor:
    return torch.randint(0, 96, (rows, length), generator=torch.Generator().manual_seed(seed))


def packed(lengths: list[list[int]], seed: int = 6) -> tuple[list[torch.Tensor], dict]:
    """(documents, `Decoder.forward`'s arguments); lengths: of each row's documents, all rows alike
    in sum."""
    flat = [length for row in lengths for length in row]
    whole = ids(1, sum(flat), seed)[0]
    starts = torch.tensor([0, *flat]).cumsum(0)
    return list(whole.split(flat)), {
        "input_ids": whole.view(len(lengths), -1),
        "position_ids": torch.cat([torch.arange(n) for n in flat]).view(len(lengths), -1),
        "cu_seqlens": starts.int(), "max_seqlen": max(flat)}


def logits(model: Decoder, **batch) -> torch.Tensor:
    return model.logits(model(**batch))
