"""GeGLU: gelu(gate) * up, with gelu exact or by tanh, alone and before a linear layer.

gelu(g) = g (1 + erf(g / sqrt(2))) / 2, or g (1 + tanh(sqrt(2 / pi) (g + 0.044715 g^3))) / 2.
Shapes, types, what is kept and the floors are those of `swiglu`.
Sources: Shazeer, "GLU Variants Improve Transformer", arXiv:2002.05202; Hendrycks and Gimpel,
"Gaussian Error Linear Units", arXiv:1606.08415.
"""

from typing import Literal

from torch import Tensor
from torch.nn.functional import gelu, linear

from fastllm.kernels._glu import glu, glu_linear
from fastllm.kernels._spec import Kernel, compute_dtype
from fastllm.kernels.swiglu import ELEMENTWISE, LINEAR

Approximate = Literal["none", "tanh"]
KINDS = {"none": "geglu", "tanh": "geglu_tanh"}


def reference(gate: Tensor, up: Tensor | None = None, *,
              approximate: Approximate = "none") -> Tensor:
    g, u = gate.chunk(2, -1) if up is None else (gate, up)
    wide = compute_dtype(g)
    return (gelu(g.to(wide), approximate=approximate) * u.to(wide)).to(g.dtype)


def reference_linear(gate: Tensor, up: Tensor | None, weight: Tensor, *,
                     approximate: Approximate = "none") -> Tensor:
    return linear(reference(gate, up, approximate=approximate), weight)


def geglu(gate: Tensor, up: Tensor | None = None, *, approximate: Approximate = "none") -> Tensor:
    """gelu(gate) * up for gate, up (..., F) of one shape and type; any strides.

    approximate: "none" (exact, by erf) or "tanh", as in torch. Without up, gate (..., 2F) holds
    both side by side; its gradient is then one tensor that nobody has to join.
    """
    return glu("geglu", _kind("geglu", approximate), gate, up)


def geglu_linear(gate: Tensor, up: Tensor | None, weight: Tensor, *,
                 approximate: Approximate = "none") -> Tensor:
    """geglu(gate, up) @ weight.T for weight (O, F): an MLP from its two projections on.

    Keeps gate and up alone: the backward makes their product again in the pass that makes their
    gradients. up None: as in `geglu`. Takes part in autocast.
    """
    return glu_linear("geglu_linear", _kind("geglu_linear", approximate), gate, up, weight)


def _kind(op: str, approximate: str) -> str:
    if approximate not in KINDS:
        raise ValueError(f'{op}: approximate must be "none" or "tanh", not {approximate!r}')
    return KINDS[approximate]


TANH = {"approximate": "tanh"}
KERNELS = (
    Kernel(name="geglu", public=geglu, reference=reference, **ELEMENTWISE | {
        "bench_options": {"tanh": TANH}},
           variants={"tanh": TANH, "saturated": {"scale": 40.0},
                     "tanh, packed, saturated": {"packed": True, "scale": 40.0, **TANH}}),
    Kernel(name="geglu_linear", public=geglu_linear, reference=reference_linear, **LINEAR | {
        "bench_options": {"tanh": TANH}},
           variants={"tanh, packed": {"packed": True, **TANH}}),
)
