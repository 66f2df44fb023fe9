"""The decoder against a plain fp64 oracle, packed against unpacked, and what it refuses."""

import math

import pytest
import torch
from torch.nn.functional import rms_norm, silu

from fastllm.model import Decoder, KVCache, ModelConfig, hf

SHAPES = {
    "plain": {},
    "untied, one key head": {"tie_word_embeddings": False, "num_key_value_heads": 1},
    "qk norm, wide heads": {"qk_norm": True, "head_dim": 12},
    "bias, softcap": {"attention_bias": True, "final_logit_softcapping": 2.0},
}
LENGTHS = [[5, 1, 6], [9, 3]]      # documents of each row of 12 tokens


def tiny(**changes):
    return ModelConfig(**{"vocab_size": 48, "hidden_size": 32, "intermediate_size": 40,
                          "num_hidden_layers": 2, "num_attention_heads": 4,
                          "num_key_value_heads": 2, "max_position_embeddings": 16,
                          "init_std": 0.2, "scaled_residual_init": False, **changes})


def make(config):
    model = Decoder(config, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():       # norms and biases away from 1 and 0, where mistakes would hide
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def packed():
    ids = torch.randint(0, 48, (2, 12), generator=torch.Generator().manual_seed(2))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])
    ends = torch.tensor([n for row in LENGTHS for n in row]).cumsum(0)
    return ids, positions, torch.cat([torch.zeros(1), ends]).int()


def oracle(weights, config, ids):
    """Logits of one document, (S,) -> (S, V): the textbook's formulas in fp64, nothing shared."""
    w = {name.removeprefix("model."): value for name, value in weights.items()}
    norm = lambda x, name: rms_norm(x, x.shape[-1:], w[name], config.rms_norm_eps)  # noqa: E731
    heads, groups, size = config.num_attention_heads, config.kv_heads, config.head_size
    rate = config.rope_theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    turn = torch.polar(torch.ones(len(ids), size // 2, dtype=torch.float64),
                       torch.outer(torch.arange(len(ids)).double(), rate))[:, None]

    def rope(x):
        pairs = torch.complex(x[..., :size // 2], x[..., size // 2:]) * turn
        return torch.cat([pairs.real, pairs.imag], dim=-1)

    x = w["embed_tokens.weight"][ids]
    for i in range(config.num_hidden_layers):
        at = f"layers.{i}.self_attn."
        normed = norm(x, f"layers.{i}.input_layernorm.weight")
        q, k, v = (normed @ w[f"{at}{p}_proj.weight"].T + w.get(f"{at}{p}_proj.bias", 0.0)
                   for p in "qkv")
        q, k, v = (y.view(len(ids), -1, size) for y in (q, k, v))
        if config.qk_norm:
            q, k = norm(q, f"{at}q_norm.weight"), norm(k, f"{at}k_norm.weight")
        q, k = rope(q), rope(k)
        k, v = (y.repeat_interleave(heads // groups, dim=1) for y in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(size)
        scores = scores.masked_fill(torch.ones(len(ids), len(ids)).triu(1).bool(), -torch.inf)
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
        x = x + mixed @ w[f"{at}o_proj.weight"].T
        normed = norm(x, f"layers.{i}.post_attention_layernorm.weight")
        gate, up, down = (w[f"layers.{i}.mlp.{p}_proj.weight"] for p in ("gate", "up", "down"))
        x = x + (silu(normed @ gate.T) * (normed @ up.T)) @ down.T
    logits = norm(x, "norm.weight") @ w.get("lm_head.weight", w["embed_tokens.weight"]).T
    cap = config.final_logit_softcapping
    return logits if cap is None else cap * (logits / cap).tanh()


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_packed_logits_and_gradients_equal_the_fp64_oracle_per_document(changes):
    config = tiny(**changes)
    model = make(config)
    ids, positions, cu_seqlens = packed()
    seed = torch.randn(24, 48, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    exact = {name: value.double().requires_grad_() for name, value in hf.hf_tensors(model)}
    documents = ids.flatten().split(cu_seqlens.diff().tolist())
    wanted = torch.cat([oracle(exact, config, document) for document in documents])
    (wanted * seed).sum().backward()

    hidden = model(ids, position_ids=positions, cu_seqlens=cu_seqlens, max_seqlen=9)
    logits = model.logits(hidden).flatten(0, 1)
    (logits * seed.float()).sum().backward()

    torch.testing.assert_close(logits.double(), wanted, rtol=1e-5, atol=1e-5)
    for parameter in model.parameters():
        parameter.data = parameter.grad
    for name, gradient in hf.hf_tensors(model):
        scale = exact[name].grad.abs().max()
        error = (gradient - exact[name].grad).abs().max() / scale
        assert error < 1e-5, f"{name}: {error}"


def test_packed_equals_each_document_alone():
    model = make(tiny(qk_norm=True))
    ids, positions, cu_seqlens = packed()
    seed = torch.randn(24, 32, generator=torch.Generator().manual_seed(3))
    hidden = model(ids, position_ids=positions, cu_seqlens=cu_seqlens, max_seqlen=9).flatten(0, 1)
    (hidden * seed).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    lengths = cu_seqlens.diff().tolist()
    for document, together, part in zip(ids.flatten().split(lengths), hidden.split(lengths),
                                        seed.split(lengths), strict=True):
        alone = model(document[None])[0]
        torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)
        (alone * part).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=2e-5)


def test_documents_do_not_see_each_other():
    model = make(tiny())
    ids, positions, cu_seqlens = packed()
    changed = ids.clone()
    changed[0, 2] = (changed[0, 2] + 1) % 48     # third token of the first of six documents
    with torch.no_grad():
        before, after = (model(x, position_ids=positions, cu_seqlens=cu_seqlens, max_seqlen=9)
                         for x in (ids, changed))
    differs = (before != after).any(-1)
    assert differs[0, 2:5].all()
    assert not differs[0, :2].any()
    assert not differs[0, 5:].any()
    assert not differs[1].any()


def test_dropout_follows_the_seed_and_stops_in_eval():
    model = make(tiny(dropout=0.3))
    ids = packed()[0]

    def run(seed):
        torch.manual_seed(seed)
        return model(ids).detach()

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    model.eval()
    assert torch.equal(run(1), run(2))
    plain = make(tiny())
    assert torch.equal(run(1), plain(ids))


def test_dropout_reaches_the_embedding_and_both_branches():
    """Each is dropped element by element with the probability asked, and scaled up elsewhere."""
    model = make(tiny(dropout=0.25, num_hidden_layers=1, vocab_size=48))
    block, seen = model.layers[0], {}
    model.embed_tokens.register_forward_hook(lambda m, i, o: seen.update(embedded=o))
    block.register_forward_hook(lambda m, i, o: seen.update(stream=i[0], end=o))
    block.self_attn.register_forward_hook(lambda m, i, o: seen.update(attention=o))
    block.post_attention_layernorm.register_forward_hook(lambda m, i, o: seen.update(middle=i[0]))
    block.mlp.register_forward_hook(lambda m, i, o: seen.update(mlp=o))
    torch.manual_seed(0)
    with torch.no_grad():
        model(torch.randint(0, 48, (8, 16)))
    for branch, added in [(seen["embedded"], seen["stream"]),
                          (seen["attention"], seen["middle"] - seen["stream"]),
                          (seen["mlp"], seen["end"] - seen["middle"])]:
        dropped = added == 0
        assert 0.2 < dropped.float().mean() < 0.3
        torch.testing.assert_close(added[~dropped], branch[~dropped] / 0.75, rtol=1e-3, atol=1e-5)


def test_bf16_stays_close_and_keeps_its_dtype():
    model = make(tiny())
    ids = packed()[0]
    with torch.no_grad():
        wanted = model(ids)
        low = model.to(torch.bfloat16)(ids)
    assert low.dtype == torch.bfloat16
    assert (low.float() - wanted).norm() / wanted.norm() < 0.05


def test_misuse_is_refused():
    model = make(tiny())
    ids, positions, cu_seqlens = packed()
    for kwargs, words in [
        ({"input_ids": ids[0]}, r"input_ids must be \(B, S\)"),
        ({"input_ids": ids, "position_ids": positions[:, :3]}, "position_ids"),
        ({"input_ids": ids, "cu_seqlens": cu_seqlens}, "needs position_ids"),
        ({"input_ids": ids, "position_ids": positions, "cu_seqlens": cu_seqlens,
          "cache": KVCache(model.config, 2, 16)}, "does not go with cu_seqlens"),
        ({"input_ids": torch.zeros(1, 17, dtype=torch.long)}, "17 tokens.*16"),
    ]:
        with pytest.raises(ValueError, match=words):
            model(**kwargs)


GEMMA = {"hidden_act": "gelu_pytorch_tanh", "scale_embeddings": True, "rms_norm_offset": 1.0,
         "sandwich_norms": True, "qk_norm": True, "sliding_window": 4, "query_pre_attn_scalar": 9,
         "rope_local_base_freq": 100.0, "layer_types": ["sliding_attention", "full_attention"]}


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 1}, {**GEMMA, "num_hidden_layers": 2}],
                         ids=["plain", "gemma"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_the_model_compiles_as_one_graph(recompute, changes):
    """No graph break on packed documents, and the gradients of the plain model."""
    model = Decoder(ModelConfig(vocab_size=40, hidden_size=32, intermediate_size=48,
                                num_attention_heads=4, num_key_value_heads=2,
                                max_position_embeddings=16, recompute=recompute, **changes))
    documents = {"position_ids": torch.tensor([[*range(5), *range(11)], [*range(16)]]),
                 "cu_seqlens": torch.tensor([0, 5, 16, 32], dtype=torch.int32), "max_seqlen": 16}
    ids = torch.randint(0, 40, (2, 16))
    gradients = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        run(ids, **documents).square().sum().backward()
        gradients.append(model.embed_tokens.weight.grad.clone())
    # Not the same bits: compiled plain attention masks a row where eager runs each document alone.
    plain, compiled = gradients
    assert (plain - compiled).norm() <= 1e-5 * plain.norm()
