"""fastllm on a machine without Triton, without transformers, without a GPU."""

import os
import subprocess
import sys

import pytest

BLOCK = """
import importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
"""


def run(blocked: tuple[str, ...], program: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", BLOCK.format(blocked=blocked) + program], capture_output=True,
        text=True, timeout=300, env={**environment, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_costs_nothing():
    out = run((), "import fastllm, sys\nprint([n for n in ('torch', 'triton', 'transformers')"
                  " if n in sys.modules])")
    assert out.strip() == "[]"


def test_without_triton_and_transformers():
    run(("triton", "transformers", "peft", "accelerate"), """
import torch, fastllm
from fastllm import nn, ops, patch, unpatch
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.RMSNorm(8), torch.nn.LayerNorm(8))
x = torch.randn(2, 8)
before = model(x)
assert len(fastllm.patch(model).replaced) == 2
torch.testing.assert_close(model(x), before)
model(x).sum().backward()
assert unpatch(model) == 2
loss = nn.LinearCrossEntropyLoss(8, 5)
loss(x, torch.tensor([1, 2])).backward()
nn.AdamW(loss.parameters()).step()
""")


def test_patched_transformers_model_without_triton():
    pytest.importorskip("transformers")
    run(("triton",), """
import torch, fastllm
from transformers import LlamaConfig, LlamaForCausalLM
model = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=48,
                                     num_hidden_layers=1, num_attention_heads=2))
ids = torch.randint(0, 50, (2, 6))
before = model.train()(input_ids=ids, labels=ids).loss
report = fastllm.patch(model)
assert not report.skipped, report
after = model(input_ids=ids, labels=ids).loss
torch.testing.assert_close(after, before)
after.backward()
""")
