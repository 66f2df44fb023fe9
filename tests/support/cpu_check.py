"""How the C++ ops are judged: err(ours) <= 2 err(torch in the tested dtype) + tiny, in fp64."""

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TINY = {torch.float32: 2e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}


def seeded(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(function, inputs, grads=None):
    """(outputs..., gradients of the floating inputs...); the upstream gradients are made here."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if grads is None:
        grads = [seeded(*y.shape, seed=7 + i).to(y.dtype) for i, y in enumerate(outputs)]
    wanted = [x for x in leaves if x.requires_grad]
    return [y.detach() for y in outputs], list(torch.autograd.grad(outputs, wanted, grads)), grads


def check(ours, reference, inputs, dtype, factor=2.0, unit=False):
    """Values and gradients of `ours` by the rule; inputs are tensors of `dtype` (or integers).

    unit: a rounding unit comes on top, as for fewer than 16 numbers, whose largest error is luck.
    """
    before = [x.clone() for x in inputs]
    outputs, gradients, upstream = run(ours, inputs)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True)), "an input changed"
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    truth = run(reference, wide, [g.double() for g in upstream])
    same = run(reference, inputs, upstream)
    names = [f"output {i}" for i in range(len(outputs))] + [f"d{i}" for i in range(len(gradients))]
    for name, a, t, r in zip(names, outputs + gradients, truth[0] + truth[1], same[0] + same[1],
                             strict=True):
        assert a.shape == t.shape, name
        if not a.numel():
            continue
        error, allowed = (a.double() - t).abs().max(), (r.double() - t).abs().max()
        bound = factor * allowed + TINY[dtype] * max(1.0, float(t.abs().max()))
        if unit or a.numel() < 16:
            bound += torch.finfo(dtype).eps * max(1.0, float(t.abs().max()))
        assert error <= bound, f"{name} in {dtype}: {error:.3g} > {bound:.3g}"


def plain_attention(q, k, v, sinks=None, *, causal=False, window=None, softcap=None, scale=None,
                    cu_seqlens_q=None, cu_seqlens_k=None):
    """(out, lse) from the definition: every score, every mask, one document after the other."""
    options = {"causal": causal, "window": window, "softcap": softcap, "scale": scale}
    if cu_seqlens_q is not None:
        ends = [x.tolist() for x in (cu_seqlens_q, cu_seqlens_k)]
        outs, lses = [], []
        for a, b, c, d in zip(ends[0], ends[0][1:], ends[1], ends[1][1:], strict=False):
            out, lse = plain_attention(q[None, a:b], k[None, c:d], v[None, c:d], sinks, **options)
            outs, lses = [*outs, out[0]], [*lses, lse[0]]
        # Nothing, of every input.
        none = 0 * sum(x.sum() for x in (q, k, v, sinks) if x is not None)
        tail = q[ends[0][-1]:] * 0 + none
        alone = sinks if sinks is not None else torch.full(
            (q.shape[1],), -torch.inf, device=q.device)
        nothing = alone[:, None] + tail.sum(-1).t().to(lses[0].dtype if lses else torch.float32)
        return torch.cat([*outs, tail]), torch.cat([*lses, nothing], 1)
    queries, keys = q.shape[1], k.shape[1]
    left, right = (-1, -1) if window is None else window
    right = 0 if causal else right
    own, key = (torch.arange(n, device=q.device) for n in (queries, keys))
    own = own[:, None] + keys - queries
    mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device)
    mask = mask & (key >= own - left) if left >= 0 else mask
    mask = mask & (key <= own + right) if right >= 0 else mask
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (scale or q.shape[-1] ** -0.5)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        sink = sinks[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], -1)
    top = scores.detach().amax(-1, keepdim=True) if scores.shape[-1] else (
        scores.sum(-1, True) - torch.inf)
    weights = (scores - top.where(top > -torch.inf, 0)).exp()
    total = weights.sum(-1, keepdim=True)
    out = torch.einsum("bhqk,bkhd->bqhd", weights[..., :keys] / total.where(total > 0, 1), v)
    lse = total.where(total > 0, 1).log() + top
    return out, lse.squeeze(-1).to(torch.promote_types(q.dtype, torch.float32))
