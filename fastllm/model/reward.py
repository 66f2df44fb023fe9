"""A reward model: a decoder whose output head is one number, and its folders.

    reward(x, y) = w . h

h (H,): the hidden state at the last input token, w (1, H): `score`, without a bias (Stiennon et
al., arXiv:2009.01325; Ouyang et al., arXiv:2203.02155). A document of m tokens has m - 1 inputs, so
its final token, which ends the answer, is a label only and is not read: the reward of a text is
read at the last token before its end token. transformers' ...ForSequenceClassification reads at the
last token that is not padding, so that it gives the same number for the text without its end token
(and for the whole text too where the end token is also the one for padding).
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fastllm.model import hf
from fastllm.model.config import ModelConfig
from fastllm.model.decoder import Decoder
from fastllm.model.init import filler
from fastllm.model.layers import Linear


class RewardModel(nn.Module):
    """`decoder` without its output head, and `score`.

    The decoder becomes part of it and loses its lm_head.

    Args:
        generator: source of score's first weights, distributed as the config says (CPU); None
            means torch's own.
    """

    def __init__(self, decoder: Decoder, *, generator: torch.Generator | None = None):
        super().__init__()
        decoder.lm_head = None
        self.decoder = decoder
        own = decoder.embed_tokens.weight
        self.score = Linear(decoder.config.hidden_size, 1).to(device=own.device, dtype=own.dtype)
        if not own.is_meta:
            filler(self, generator)("score.weight", self.score.weight)

    @property
    def config(self) -> ModelConfig:
        """The decoder's."""
        return self.decoder.config

    @property
    def embed_tokens(self) -> nn.Module:
        """The decoder's."""
        return self.decoder.embed_tokens

    @property
    def lm_head(self) -> None:
        """There is none."""
        return None

    def forward(self, input_ids: Tensor, **positions: Any) -> Tensor:
        """Hidden states (B, S, H), by the arguments of `Decoder.forward`."""
        return self.decoder(input_ids, **positions)

    def scores(self, hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
        """The reward of each segment, (N,) float32: `score` at its last position.

        hidden (B, S, H), of `forward`; cu_seqlens (N + 1,) int32, where segments begin in the B * S
        positions laid end to end.
        """
        last = hidden.flatten(0, 1)[cu_seqlens[1:].long() - 1]
        # In fp32: a reward rounded to bf16 equals that of many another answer.
        return linear(last.float(), self.score.weight.float()).squeeze(-1)

    @property
    def hf_config(self) -> dict[str, Any]:
        """What config.json says beside, or in place of, the decoder's."""
        kind = hf.architecture(self.config)
        causal = "Gemma3TextForCausalLM" if kind == "gemma3_text" else hf.ARCHITECTURES[kind]
        return {"architectures": [causal.replace("CausalLM", "SequenceClassification")],
                "num_labels": 1, "id2label": {"0": "REWARD"}, "label2id": {"REWARD": 0}}


def load_reward(folder: str | Path, *, dtype: torch.dtype = torch.float32,
                device: torch.device | str = "cpu") -> RewardModel:
    """The `RewardModel` in a folder that we exported, or one of transformers' with one label.

    dtype: of the weights. Raises UserError naming tensor and file, as for a folder of a language
    model, which has no score.weight.
    """
    with torch.device("meta"):
        model: Any = RewardModel(Decoder(hf.read_config(folder)))
    model = model.to(dtype).to_empty(device=device)
    hf.load_weights(model, folder)
    return model
