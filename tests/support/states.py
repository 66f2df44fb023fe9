"""States to be saved, whole and in pieces over ranks."""

import torch

from fastllm.pieces import Piece


def state(seed, wide=False):
    """part -> name -> tensor: odd sizes, a scalar, an empty one, every dtype of a checkpoint."""
    draw = torch.Generator().manual_seed(seed)

    def bits(*shape, dtype=torch.float32):
        count = int(torch.tensor(shape).prod()) if shape else 1
        raw = torch.randint(0, 256, (count * dtype.itemsize,), generator=draw, dtype=torch.uint8)
        return raw.view(dtype).view(shape)

    model = {"w": bits(7, 5, dtype=torch.bfloat16), "b": bits(), "none": torch.empty(0, 3),
             "tiny": bits(2, dtype=torch.float16)}
    optimizer = {"exp_avg.w": bits(7, 5), "code.w": bits(35, dtype=torch.int8),
                 "master.w": bits(7, 5, dtype=torch.float64), "exp_avg.b": bits()}
    if wide:
        optimizer["exp_avg.v"] = bits(wide)
    return {"model": model, "optimizer": optimizer}


def cut(whole, rank, size, seed=None):
    """A rank's pieces of every tensor; even cuts, or, with a seed, cuts anywhere (some empty)."""
    parts = {}
    for part, tensors in whole.items():
        parts[part] = []
        for name, tensor in tensors.items():
            count = tensor.numel()
            if seed is None:
                edges = [count * r // size for r in range(size + 1)]
            else:
                draw = torch.Generator().manual_seed(seed * 1000 + len(parts[part]))
                inner = torch.randint(0, count + 1, (size - 1,), generator=draw).tolist()
                edges = [0, *sorted(inner), count]
            first, last = edges[rank], edges[rank + 1]
            parts[part].append(Piece(name, tensor.reshape(-1)[first:last].clone(), first,
                                     tuple(tensor.shape)))
    return parts


def same(a, b):
    """Whether two states are equal to the bit."""
    return a.keys() == b.keys() and all(
        a[part].keys() == b[part].keys() and all(
            a[part][name].dtype == b[part][name].dtype
            and a[part][name].shape == b[part][name].shape
            and torch.equal(a[part][name].reshape(-1).view(torch.uint8),
                            b[part][name].reshape(-1).view(torch.uint8))
            for name in a[part]) for part in a)


def read(saved):
    """Everything that a checkpoint holds."""
    return {part: saved.tensors(part) for part in saved.layout}
