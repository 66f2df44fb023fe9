"""fastllm.nn in a model and a loop of one's own; no transformers."""

import torch
from torch import nn

from fastllm import nn as fnn


class Block(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = fnn.RMSNorm(width)
        self.gate_up, self.down = nn.Linear(width, 2 * inner), nn.Linear(inner, width)
        self.act = fnn.SwiGLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.act(self.gate_up(self.norm(x))))


torch.manual_seed(0)
vocabulary, width = 256, 64
body = nn.Sequential(fnn.Embedding(vocabulary, width), Block(width, 128), Block(width, 128))
loss_of = fnn.LinearCrossEntropyLoss(width, vocabulary)
optimizer = fnn.AdamW([*body.parameters(), *loss_of.parameters()], lr=1e-2)
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=5)

ids = torch.randint(0, vocabulary, (4, 33))
for step in range(20):
    loss = loss_of(body(ids[:, :-1]), ids[:, 1:])
    loss.backward()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    print(step, round(loss.item(), 4))
