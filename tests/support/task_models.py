"""A small decoder for a tokenizer, of a shape that a test may change."""

import torch

from fastllm.model import Decoder, ModelConfig


def make_model(tokenizer, **changes):
    """A Decoder with random weights, the same every time, dropout on in training."""
    shape = {"vocab_size": tokenizer.vocab_size, "hidden_size": 32, "intermediate_size": 48,
             "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "max_position_embeddings": 512, "init_std": 0.2, "dropout": 0.3}
    return Decoder(ModelConfig(**shape | changes), generator=torch.Generator().manual_seed(0))


def train_on(model, sequences, steps, lr=3e-3):
    """Steps of Adam on sequences (lists of ids, one a batch row of its own length)."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    model.eval()
    for _ in range(steps):
        for ids in sequences:
            row = torch.tensor([ids])
            logits = model.logits(model(row[:, :-1]))
            loss = torch.nn.functional.cross_entropy(logits[0], row[0, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
