"""fastllm's kernels inside a transformers model: one call, and a report of what it did."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fastllm

model = LlamaForCausalLM(LlamaConfig(vocab_size=1000, hidden_size=64, intermediate_size=128,
                                     num_hidden_layers=2, num_attention_heads=4))
print(fastllm.patch(model))

ids = torch.randint(0, 1000, (2, 16))
model.train()(input_ids=ids, labels=ids).loss.backward()
fastllm.unpatch(model)
