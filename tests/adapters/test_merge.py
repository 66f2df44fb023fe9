"""Merged models: the same logits, plain names, and folders that transformers loads."""

import pytest
import torch
from adapted import MERGEABLE, METHODS, adapted, decoder, ids, logits, packed

from fastllm import ops
from fastllm.adapters import (
    AdapterConfig,
    apply,
    difference_bound,
    largest_difference,
    merge_check,
)
from fastllm.config import UserError
from fastllm.export import export


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [{}, {"tie_word_embeddings": False, "attention_bias": True}])
@pytest.mark.parametrize("method", MERGEABLE)
def test_logits_before_and_after(method, shape, dtype):
    adapter = adapted(method, dtype, **shape)
    own = dict(adapter.model.named_parameters())
    difference, bound = merge_check(adapter, ids())
    # Not exactly nothing: a check that merged nothing would find no difference at all.
    assert 0 < difference <= bound
    model = adapter.model
    plain = dict(decoder(dtype, **shape).named_parameters())
    untied = "everything" in method and model.lm_head is not None
    found = dict(model.named_parameters())
    assert set(found) - set(plain) <= ({"lm_head.weight"} if untied else set())
    assert set(plain) <= set(found)
    if method != "qlora":
        assert all(found[name] is own[name] for name in plain)
    assert all(p.requires_grad and p.dtype == dtype for p in found.values())
    assert model.config.tie_word_embeddings == (model.lm_head is None)
    assert not list(adapter.named_parameters())
    apply(model, AdapterConfig(name="lora"))  # and may be adapted again


@pytest.mark.parametrize("method", MERGEABLE)
def test_merged_model_in_transformers(method, tmp_path):
    import transformers

    adapter = adapted(method, attention_bias=True)
    adapter.model.eval()
    with torch.no_grad():
        before = logits(adapter.model, input_ids=ids())
        export(adapter.merge(), tmp_path / "merged")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "merged", dtype=torch.float32).eval()
        torch.testing.assert_close(theirs(ids()).logits, before, rtol=0, atol=1e-4)


def test_the_bound_catches_what_is_no_rounding():
    """A change folded in twice, a scale left out, a part left out."""
    for dtype in (torch.float32, torch.bfloat16):
        adapter = adapted("lora", dtype)
        model = adapter.model.eval()
        with torch.no_grad():
            before = logits(model, input_ids=ids())
            bound = difference_bound(before, model)
            adapter.merge()
            weight = model.layers[0].mlp.down_proj.weight
            change = weight - decoder(dtype).layers[0].mlp.down_proj.weight
            for share in (1.0, -0.5, -1.0):
                weight += share * change
                assert largest_difference(before, logits(model, input_ids=ids())) > bound
                weight -= share * change
    assert largest_difference(torch.ones(2), torch.tensor([1.0, 1.5])) == 0.5
    with pytest.raises(ValueError, match="do not compare"):
        largest_difference(torch.ones(2), torch.ones(3))


def test_merge_check_refuses_before_it_changes_anything():
    adapter = adapted("prefix")
    with pytest.raises(UserError, match="keep the adapter's folder"):
        merge_check(adapter, ids())
    assert adapter.model.virtual_tokens == 3


def test_qlora_is_four_bits_and_says_its_error():
    full, adapter = decoder(), adapted("qlora", trained=False)
    model, held = adapter.model, dict(adapter.model.named_parameters())
    projections = {name: p for name, p in full.named_parameters()
                   if name.endswith("_proj.weight")}
    assert len(projections) == 8 and not set(projections) & set(held)
    numbers = sum(p.numel() for p in projections.values())
    stored = sum(b.numel() * b.element_size() for name, b in model.named_buffers()
                 if ".nf4." in name)
    # 4 bits, an int8 scale for 32 weights, and fp32 numbers for 256 of these.
    assert 0.5 <= stored / numbers < 0.5 + 1 / 32 + 0.01
    before = {name: b.clone() for name, b in model.named_buffers() if ".nf4." in name}
    model.to(torch.bfloat16)
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers() if name in before)
    assert next(p for _, p in adapter.named_parameters()).dtype == torch.bfloat16
    model.float()
    adapter.merge()
    squares = [((p - model.get_parameter(name)).square().sum(), p.square().sum())
               for name, p in projections.items()]
    error = (sum(a for a, _ in squares) / sum(b for _, b in squares)).sqrt().detach()
    assert adapter.quantization_error == pytest.approx(float(error), rel=1e-4)
    assert 0.05 < float(error) < 0.12


def test_qlora_keeps_no_dense_weight_for_the_backward():
    module = adapted("qlora").model.layers[0].self_attn.qkv_proj
    x = torch.randn(5, 64, requires_grad=True)
    kept = []

    def pack(tensor):
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x)
    assert kept and all(min(shape) <= 5 for shape in kept if len(shape) == 2)
    weight = module.nf4.dense(torch.float32)
    low = module.lora["q_proj"]
    expected = x @ weight.t() + torch.cat((2.0 * x @ low.lora_A.t() @ low.lora_B.t(),
                                           torch.zeros(5, 64)), 1)
    torch.testing.assert_close(y, expected)
    for a, b in zip(torch.autograd.grad(y.square().sum(), [x, low.lora_A, low.lora_B]),
                    torch.autograd.grad(expected.square().sum(), [x, low.lora_A, low.lora_B]),
                    strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", MERGEABLE)
def test_the_operator_of_a_gpu_gives_the_same(method, monkeypatch):
    _, batch = packed([[5, 9, 2], [16]])
    found = []
    for fused in (False, True):
        monkeypatch.setattr("fastllm.adapters.lora._fused", lambda x, fused=fused: fused)
        adapter = adapted(method, attention_bias=True)
        out = logits(adapter.model, **batch)
        out.square().sum().backward()
        found.append([out, *(p.grad for _, p in adapter.named_parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_against_float64(method):
    """Of every adapter parameter, in fp32, against the plain operators in fp64."""
    _, batch = packed([[5, 9, 2], [16]])
    weights = torch.randn(2, 16, 96, generator=torch.Generator().manual_seed(2))
    narrow = adapted(method)
    exact = adapted(method)
    exact.model.double()
    (logits(narrow.model, **batch) * weights).sum().backward()
    with ops.use_backend("reference"):
        (logits(exact.model, **batch) * weights.double()).sum().backward()
    pairs = zip(narrow.named_parameters(), exact.named_parameters(), strict=True)
    for (name, a), (_, b) in pairs:
        assert b.grad.dtype == torch.float64
        error = (a.grad.double() - b.grad).norm() / b.grad.norm()
        assert error < 1e-5, name


def plain_low_rank(weight, low, x, bias=None):
    """The papers' formulas, one by one, in autograd's own operators."""
    full = weight + low["scale"] * low["b"] @ low["a"]
    if "m" in low:
        full = low["m"][:, None] * full / full.norm(dim=1, keepdim=True).detach()
    return x @ full.t() + (0 if bias is None else bias)


@pytest.mark.parametrize("name", ["lora", "dora"])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["k_proj"], ["all-linear"]])
def test_a_fused_projection_is_the_formula(name, targets):
    adapter = adapted("lora", options={"name": name, "targets": targets}, attention_bias=True)
    adapter.model.double()
    module = adapter.model.layers[0].self_attn.qkv_proj
    x = torch.randn(3, 5, 64, dtype=torch.float64, requires_grad=True,
                    generator=torch.Generator().manual_seed(0))
    weights = torch.randn(3, 5, 128, dtype=torch.float64,
                          generator=torch.Generator().manual_seed(1))
    sizes = list(module.parts.values())
    outs, parameters = [], []
    for part, weight, bias in zip(module.parts, module.weight.split(sizes),
                                  module.bias.split(sizes), strict=True):
        if part in module.lora:
            low = module.lora[part]
            parameters += [low.lora_A, low.lora_B] + ([low.magnitude] if name == "dora" else [])
            values = {"scale": adapter.config.scale, "a": low.lora_A, "b": low.lora_B}
            outs.append(plain_low_rank(weight, values | (
                {"m": low.magnitude} if name == "dora" else {}), x, bias))
        else:
            outs.append(x @ weight.t() + bias)
    expected = torch.cat(outs, -1)
    found = module(x)
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad((found * weights).sum(), [x, *parameters]),
                    torch.autograd.grad((expected * weights).sum(), [x, *parameters]),
                    strict=True):
        torch.testing.assert_close(a, b)
