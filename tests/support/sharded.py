"""Trains a small model of our ops under FSDP2 on every rank and prints its losses and gradients.

Started by tests/test_fsdp.py, one process a rank: `sharded.py RANK WORLD PORT BACKEND`.
"""

import os
import sys

import torch
import torch.distributed as dist

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fastllm import nn, ops

VOCAB, WIDTH = 13, 16


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.up = torch.nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = torch.nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x):
        gate, up = self.up(self.norm(x)).chunk(2, -1)
        return x + self.down(ops.swiglu(gate, up))


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = torch.nn.ModuleList(Layer() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.loss = nn.LinearCrossEntropyLoss(WIDTH, VOCAB, reduction="sum")

    def forward(self, ids, labels):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.loss(self.norm(x), labels)


def main(rank: int, world: int, port: str, backend: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": str(rank),
                   "WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Model()
    if world > 1:
        dist.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (world,))
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    ids = torch.randint(VOCAB, (4, 6), generator=torch.Generator().manual_seed(1))
    labels = ids.roll(-1, 1)
    part = slice(rank * 4 // world, (rank + 1) * 4 // world)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1 / ids.numel())
    with ops.use_backend(backend, "rms_norm", "layer_norm", "swiglu", "embedding",
                         "linear_cross_entropy"):
        for _ in range(3):
            loss = model(ids[part], labels[part])
            # FSDP averages over ranks what is summed over tokens here.
            (loss * world).backward()
            total = loss.detach().clone()
            if world > 1:
                dist.all_reduce(total)
            optimizer.step()
            optimizer.zero_grad()
            if rank == 0:
                print(f"{total.item():.7g}", flush=True)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
