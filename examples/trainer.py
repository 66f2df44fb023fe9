"""transformers.Trainer with a patched model: nothing else changes."""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import fastllm

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128,
                                     num_hidden_layers=2, num_attention_heads=4))
print(fastllm.patch(model))

text = torch.randint(0, 256, (64, 33))
rows = [{"input_ids": row, "labels": row} for row in text]

with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder, max_steps=4, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        learning_rate=1e-3, logging_steps=1, report_to="none", save_strategy="no",
        disable_tqdm=True)
    Trainer(model, arguments, train_dataset=rows).train()
