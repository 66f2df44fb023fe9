"""fastllm: a training runtime for language models, fast on NVIDIA GPUs and exact everywhere."""

from pathlib import Path

__version__ = "0.1.0"

# In a checkout kernels/ lies beside this package; setup.py installs it as fastllm.kernels.
if (Path(__file__).parents[1] / "setup.py").is_file():
    __path__.append(str(Path(__file__).parents[1]))
