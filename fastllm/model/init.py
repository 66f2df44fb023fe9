"""Initial weights by name of distribution.

Every parameter is drawn from its own generator, seeded by one number of the caller's generator
and the parameter's name: the same seed gives the same weights whatever order modules are built in,
whichever device holds them, and however projections are fused.
"""

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastllm.config import UserError
from fastllm.model.config import ModelConfig
from fastllm.model.layers import parts_of


def normal(config: ModelConfig, fan_in: int, fan_out: int) -> float:
    """N(0, init_std^2), as GPT-2 and Llama."""
    return config.init_std


def xavier(config: ModelConfig, fan_in: int, fan_out: int) -> float:
    """Glorot & Bengio (2010): variance 2 / (fan_in + fan_out)."""
    return math.sqrt(2 / (fan_in + fan_out))


def kaiming(config: ModelConfig, fan_in: int, fan_out: int) -> float:
    """He et al. (2015): variance 2 / fan_in."""
    return math.sqrt(2 / fan_in)


# name -> standard deviation of a projection's weights, all of them normal.
INITS: dict[str, Callable[[ModelConfig, int, int], float]] = {
    "normal": normal, "xavier": xavier, "kaiming": kaiming}


def parameter_std(config: ModelConfig, name: str, shape: torch.Size) -> float:
    """Standard deviation of a weight matrix (fan_out, fan_in), by its name in `named_parts`."""
    if name == "embed_tokens.weight":
        return config.init_std      # a look-up sums nothing: no fan to allow for
    if config.init not in INITS:
        raise UserError(f"model.init is '{config.init}'; use one of {', '.join(INITS)}")
    std = INITS[config.init](config, shape[1], shape[0])
    if config.scaled_residual_init and name.endswith(("o_proj.weight", "down_proj.weight")):
        # 2 * layers branches add up in the residual stream (Radford et al., GPT-2, 2019).
        std /= math.sqrt(2 * config.num_hidden_layers)
    return std


@torch.no_grad()
def init_weights(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """Fill every parameter of a `Decoder`: matrices by `config.init`, biases 0, norms so that with
    their offset they are 1.

    Args:
        generator: a CPU generator, of which one number is drawn; None means torch's own.
    """
    fill = filler(model, generator)
    for name, parameter in model.named_parameters():
        fill(name, parameter)


def filler(model: nn.Module, generator: torch.Generator | None = None
           ) -> Callable[[str, Tensor], None]:
    """(name, tensor) -> None that gives one parameter of a `Decoder` its first weights.

    They are those of `init_weights`, so that parameters can be made one at a time and `model` may
    be on the meta device.
    """
    config: ModelConfig = model.config  # type: ignore[assignment]
    base = int(torch.randint(2**62, (), generator=generator, device="cpu"))

    @torch.no_grad()
    def fill(name: str, tensor: Tensor) -> None:
        module = model.get_submodule(name.rpartition(".")[0])
        for part, piece in parts_of(module, name, tensor.detach()):
            if part.endswith(".bias"):
                piece.zero_()
            elif piece.dim() == 1:
                piece.fill_(1.0 - config.rms_norm_offset)
            else:
                _fill_normal(piece, parameter_std(config, part, piece.shape), f"{base}/{part}")

    return fill


def generator_of(key: str) -> torch.Generator:
    """A CPU generator that follows from a text, such as a seed and a name."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)


def _fill_normal(tensor: Tensor, std: float, key: str) -> None:
    # Drawn on the CPU in fp32 and then rounded or moved: every device and dtype starts alike.
    values = torch.empty(tensor.shape, dtype=torch.float32, device="cpu")
    tensor.copy_(values.normal_(0.0, std, generator=generator_of(key)))
