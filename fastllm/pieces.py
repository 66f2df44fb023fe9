"""A run of consecutive elements of a tensor whose other elements lie elsewhere: what a rank owns.

Optimizer states and checkpoints are made of pieces, so that neither knows how many ranks there are.
"""

from dataclasses import dataclass
from math import prod

from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """Elements offset .. offset + tensor.numel() of the flattened tensor `name` of `shape`.

    tensor: contiguous; of any shape, since only its elements in order matter.
    """

    name: str
    tensor: Tensor
    offset: int
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, name: str, tensor: Tensor) -> "Piece":
        """All of a tensor."""
        return cls(name, tensor, 0, tuple(tensor.shape))

    @property
    def size(self) -> int:
        """Elements of the piece."""
        return self.tensor.numel()

    @property
    def whole_size(self) -> int:
        """Elements of the tensor that it is a piece of."""
        return prod(self.shape)
