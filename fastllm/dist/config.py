"""What the command line and a YAML file say of training on many ranks."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field


@dataclass(kw_only=True)
class DistConfig:
    zero: Annotated[int, Field(ge=0, le=3)] = 0
    """What is sharded over the ranks: 0 nothing, 1 optimizer states and fp32 masters, 2 also the
    gradients across micro-batches, 3 also the parameters."""
    wire_dtype: Literal["same", "fp32", "bf16", "int8"] = "same"
    """Of gradients between ranks: the parameters' own, or another; sums are made in fp32. int8 has
    a scale for 256 elements and carries its rounding over to the next step."""
    param_wire_dtype: Literal["same", "int8"] = "same"
    """Of parameters between ranks in stage 3: as they are, or rounded to int8 on the way to a
    forward or backward; shards and checkpoints stay exact."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """optimizer: states, masters and their update live on the CPU; all: in stage 3 also the shards
    of the parameters."""
    bucket_mb: Annotated[float, Field(gt=0)] = 25.0
    """MB of gradients that are exchanged at a time, below stage 3 (there: a block of the model)."""
    prefetch: bool = True
    """Stage 3: gather the next block while one computes."""
    check: bool = False
    """Compare the name of every collective over the ranks before it starts: slow, to debug."""
    engine: Literal["auto", "cpp", "python"] = "auto"
    """auto: the C++ one where the extension was built."""
    timeout: Annotated[float, Field(gt=0)] = 600.0
    """Seconds after which a rank that does not come to a collective is given up."""
