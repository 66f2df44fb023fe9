"""Attention by ops.attention inside transformers: masks, caches, packing, what is left alone."""

import copy
import pickle
import types

import pytest
import torch
from torch import nn

hf = pytest.importorskip("transformers")
import families  # noqa: E402

import fastllm  # noqa: E402
from fastllm import ops  # noqa: E402
from fastllm.patching import _masks  # noqa: E402
from fastllm.patching._globals import rebound  # noqa: E402

OTHERS = {
    "gpt_oss": (hf.GptOssForCausalLM, hf.GptOssConfig,
                {**families.HEAD, "num_local_experts": 4, "num_experts_per_tok": 2,
                 "sliding_window": 4, "attention_dropout": 0.0}),
    "modernbert": (hf.ModernBertForMaskedLM, hf.ModernBertConfig,
                   {**families.DECODER, "local_attention": 4, "num_hidden_layers": 3,
                    "cls_token_id": 1, "sep_token_id": 2}),
}
WINDOWS = {"gemma2": {"sliding_window": 4}, "gemma3": {"sliding_window": 4}}
TRIED = [*(name for name in families.FAMILIES if name not in ("t5", "phi4", "qwen3_moe")), *OTHERS]
PADDINGS = {
    "whole": None, "ones": [[1] * 9, [1] * 9],
    "behind": [[1] * 9, [1] * 5 + [0] * 4], "before": [[0] * 3 + [1] * 6, [1] * 9],
    "both": [[0, 0] + [1] * 5 + [0] * 2, [0] * 7 + [1] * 2],
}
PACKED = [[0, 1, 2, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 6, 0, 0]]
ATTEND = {"skip": [kind for kind in fastllm.patching.KINDS if kind != "attention"]}


def build(family, **changes):
    options = {**WINDOWS.get(family, {}), **changes}
    return families.build(family, table=families.FAMILIES | OTHERS, **options)


def patched(family, **changes):
    model = build(family, **changes)
    report = fastllm.patch(model, **ATTEND)
    assert report.replaced and not report.skipped, report
    return model


@pytest.fixture
def calls(monkeypatch):
    """The options of each call of ops.attention."""
    seen, attention = [], ops.attention

    def spy(*args, **kwargs):
        seen.append(kwargs)
        return attention(*args, **kwargs)

    monkeypatch.setattr(ops, "attention", spy)
    return seen


def batch(padding=None):
    inputs = families.batch()
    if PADDINGS.get(padding):
        real = inputs["attention_mask"] = torch.tensor(PADDINGS[padding])
        # Neither padding nor what would be predicted from it, which is anything.
        known = real.bool() & nn.functional.pad(real, (1, 0))[:, :-1].bool()
        inputs["labels"] = inputs["labels"].masked_fill(~known, -100)
    return inputs


def check(model, reference, **inputs):
    """Loss and gradients of both, and the logits where there are tokens."""
    out, grads = families.step(reference, **inputs)
    ours, our_grads = families.step(model, **inputs)
    torch.testing.assert_close(ours.loss, out.loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(our_grads, grads, atol=1e-5, rtol=1e-5)
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    if real.dim() == 2:
        torch.testing.assert_close(ours.logits[real.bool()], out.logits[real.bool()], atol=1e-5,
                                   rtol=1e-5)
    assert ours.logits.isfinite().all()


# ------------------------------------------------------------------------------ what it computes


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("family", TRIED)
def test_loss_and_gradients(family, training, calls):
    model, reference = patched(family).train(training), build(family).train(training)
    for padding in PADDINGS:
        calls.clear()
        check(model, reference, **batch(padding))
        assert len(calls) == model.config.num_hidden_layers
        packs = padding not in ("whole", "ones")
        assert all(("cu_seqlens_q" in options) == packs for options in calls)


def test_options_reach_the_op(calls):
    options = {}
    for family in ("llama", "mistral", "gemma2", "gpt_oss", "bert", "modernbert"):
        model = patched(family)
        calls.clear()
        model(**batch())
        options[family] = list(calls)
    assert all(o["window"] == (-1, 0) and o["sinks"] is None for o in options["llama"])
    assert all(o["window"] == (3, 0) for o in options["mistral"])
    assert [o["window"] for o in options["gemma2"]] == [(3, 0), (-1, 0)]
    assert all(o["softcap"] == 50.0 for o in options["gemma2"])
    assert [o["window"] for o in options["gpt_oss"]] == [(3, 0), (-1, 0)]
    assert all(isinstance(o["sinks"], nn.Parameter) for o in options["gpt_oss"])
    assert all(o["window"] == (-1, -1) for o in options["bert"])
    assert {o["window"] for o in options["modernbert"]} == {(-1, -1), (2, 2)}


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_packed_by_positions(family, calls):
    model, reference = patched(family), build(family)
    calls.clear()
    check(model, reference, **batch(), position_ids=torch.tensor(PACKED), use_cache=False)
    assert [options["cu_seqlens_q"].tolist() for options in calls] == [
        [0, 3, 9, 16, 17, 18]] * model.config.num_hidden_layers


@pytest.mark.parametrize("dropout", [0.0, 1e-12], ids=["op", "own"])
@pytest.mark.parametrize("positions", [True, False], ids=["positions", "lengths alone"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_packed_by_lengths(family, positions, dropout, calls):
    """As flash attention takes them; with dropout, here too small to tell, by a mask."""
    model, reference = patched(family, attention_dropout=dropout), build(family)
    place = torch.tensor(PACKED[:1])
    inputs = {name: x[:1] for name, x in batch().items()}
    bounds = torch.tensor([0, 3, 9], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 6,
               "max_length_k": 6}
    if not positions:  # RoPE tells distances only
        inputs |= {"position_ids": None}
        place = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8]])
    theirs = [reference(input_ids=inputs["input_ids"][:, a:b], position_ids=place[:, a:b],
                        use_cache=False).logits for a, b in ((0, 3), (3, 9))]
    calls.clear()
    ours = model(**{name: x for name, x in inputs.items() if name != "labels"}, **lengths,
                 use_cache=False) if not positions else model(
        input_ids=inputs["input_ids"], position_ids=place, use_cache=False, **lengths)
    torch.testing.assert_close(ours.logits, torch.cat(theirs, 1), atol=1e-5, rtol=1e-5)
    assert len(calls) == (0 if dropout else 2)


def test_padding_leaks_nothing():
    model = patched("llama")
    ids, real = families.batch()["input_ids"], torch.tensor(PADDINGS["both"])
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    hidden = model.model(inputs_embeds=embedded, attention_mask=real).last_hidden_state
    assert hidden.isfinite().all()
    (of_tokens,) = torch.autograd.grad(hidden[real.bool()].square().sum(), embedded,
                                       retain_graph=True)
    (of_padding,) = torch.autograd.grad(hidden[~real.bool()].square().sum(), embedded)
    assert not of_tokens[~real.bool()].any() and of_tokens[real.bool()].all()
    assert not of_padding[real.bool()].any() and of_padding.isfinite().all()


def test_rows_of_padding_alone():
    model, reference = patched("llama"), build("llama")
    inputs = batch()
    inputs["attention_mask"] = torch.tensor([[1] * 9, [0] * 9])
    inputs["labels"][1] = -100
    check(model, reference, **inputs)


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_bfloat16(family):
    inputs = batch("both")
    truth = build(family)(**inputs).loss
    model, reference = build(family).bfloat16(), build(family).bfloat16()
    assert not fastllm.patch(model, **ATTEND).skipped
    assert abs(model(**inputs).loss - truth) <= 2 * abs(reference(**inputs).loss - truth) + 0.02


def test_values_narrower_than_keys(calls):
    config = hf.DeepseekV3Config(
        **{**families.DECODER, "num_key_value_heads": 4}, q_lora_rank=8, kv_lora_rank=8,
        qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=6, first_k_dense_replace=2)
    torch.manual_seed(0)
    model = hf.DeepseekV3ForCausalLM(config).train()
    reference = copy.deepcopy(model)
    assert not fastllm.patch(model, **ATTEND).skipped
    calls.clear()
    check(model, reference, **batch("behind"))
    assert len(calls) == 2


def test_cross_attention(calls):
    """Padding of the encoder hides keys from queries of another number, all of which count."""
    config = hf.BartConfig(
        vocab_size=families.VOCAB, d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
        decoder_ffn_dim=48, max_position_embeddings=64, dropout=0.0, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=2)
    torch.manual_seed(0)
    model = hf.BartForConditionalGeneration(config).train()
    reference = copy.deepcopy(model)
    report = fastllm.patch(model, **ATTEND)
    assert len(report.replaced) == 6 and not report.skipped
    for padding in ("whole", "both"):
        inputs = {**batch(padding), "labels": families.batch()["labels"][:, :5].contiguous()}
        out, grads = families.step(reference, **inputs)
        calls.clear()
        ours, our_grads = families.step(model, **inputs)
        assert len(calls) == 6
        torch.testing.assert_close(ours.logits, out.logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(our_grads, grads, atol=1e-5, rtol=1e-5)
    options = {**batch("before"), "max_new_tokens": 6, "do_sample": False}
    del options["labels"]
    theirs = reference.eval().generate(**options)
    assert torch.equal(model.eval().generate(**options), theirs)


# ----------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("padding", ["whole", "before"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2", "gpt_oss"])
def test_generation(family, padding, calls):
    model, reference = patched(family).eval(), build(family).eval()
    ids, real = families.batch()["input_ids"], PADDINGS[padding]
    given = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0,
             "attention_mask": torch.tensor(real) if real else None, "disable_compile": True}
    for options in ({}, {"num_beams": 3}, {"cache_implementation": "static"}):
        theirs = reference.generate(ids, **given, **options)
        calls.clear()
        assert torch.equal(model.generate(ids, **given, **options), theirs)
        if "cache_implementation" not in options:
            # The prompt, and each token after it where no padding stands before it.
            assert len(calls) == (2 if real else 12)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss"])
def test_prompt_in_pieces(family, calls):
    model, reference = patched(family).eval(), build(family).eval()
    ids, results = families.batch()["input_ids"], []
    calls.clear()
    for each in (model, reference):
        cache = hf.DynamicCache(config=each.config)
        pieces = [each(input_ids=ids[:, a:b], past_key_values=cache).logits
                  for a, b in ((0, 4), (4, 8), (8, 9))]
        results.append(torch.cat(pieces, 1))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)
    assert len(calls) == 6


# -------------------------------------------------------------- what runs the model's own function


HOLES = torch.tensor([[1, 1, 0, 1, 1, 1, 0, 1, 1], [1] * 9])


@pytest.mark.parametrize("family", ["llama", "gemma2", "bert"])
def test_padding_between_tokens(family, calls):
    model, reference = patched(family), build(family)
    calls.clear()
    check(model, reference, **batch(), attention_mask=HOLES)
    assert not calls
    if family == "llama":
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        with pytest.raises(RuntimeError, match="padding between tokens"):
            compiled(**batch(), attention_mask=HOLES)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_masks_of_ones_own(family, calls):
    torch.manual_seed(2)
    seen = (torch.rand(2, 1, 9, 9) < 0.6) | torch.eye(9, dtype=torch.bool)
    if family == "gemma2":
        seen = torch.zeros(2, 1, 9, 9).masked_fill(~seen, torch.finfo(torch.float32).min)
    model, reference = patched(family), build(family)
    calls.clear()
    check(model, reference, **batch(), attention_mask=seen)
    assert not calls


@pytest.mark.parametrize("padding", ["whole", "both"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "bert"])
def test_dropout(family, padding, calls):
    name = "attention_probs_dropout_prob" if family == "bert" else "attention_dropout"
    model, reference = patched(family, **{name: 0.5}), build(family, **{name: 0.5})
    calls.clear()
    losses = []
    for each in (model, reference):
        torch.manual_seed(5)
        losses.append(each(**batch(padding)).loss)
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)
    assert not calls
    model.eval()(**batch())
    assert len(calls) == 2


def test_attentions_are_returned(calls):
    model, reference = (f("llama", attn_implementation="eager") for f in (patched, build))
    ours, theirs = (m(**batch("both"), output_attentions=True) for m in (model, reference))
    torch.testing.assert_close(ours.attentions, theirs.attentions, atol=1e-5, rtol=1e-5)
    calls.clear()
    model(**batch("both"))
    assert len(calls) == 2


def test_an_implementation_set_since(calls):
    model, reference = patched("llama"), build("llama", attn_implementation="eager")
    model.set_attn_implementation("eager")
    calls.clear()
    check(model, reference, **batch("both"))
    assert len(calls) == 2
    seen = []

    def mine(module, query, key, value, mask, **options):
        seen.append(mask)
        return query.transpose(1, 2), None

    hf.AttentionInterface.register("mine", mine)
    model.set_attn_implementation("mine")
    model(**batch("both"))
    assert seen == [None, None] and len(calls) == 2


def left(model):
    report = fastllm.patch(model, **ATTEND)
    assert not report.replaced
    assert not any("forward" in vars(module) for module in model.modules())
    return {entry.why for entry in report.skipped}


def test_biases_are_left():
    (why,) = left(build("t5"))
    assert "position_bias" in why


def test_other_implementations_are_left():
    model = build("llama")
    model.config._attn_implementation_internal = "flash_attention_2"
    assert left(model) == {"its attention implementation is 'flash_attention_2', not sdpa or eager"}
    (why,) = left(build("gpt2", attn_implementation="eager"))
    assert "weights" in why


def test_an_attention_that_computes_something_else_is_left():
    """Judged by its values: one that is causal where its masks are not, another that scales."""
    model = build("bert")
    model.bert.encoder.layer[0].attention.self.is_causal = True
    report = fastllm.patch(model, **ATTEND)
    assert [entry.path for entry in report.skipped] == ["bert.encoder.layer.0.attention.self"]
    reference = build("bert")
    reference.bert.encoder.layer[0].attention.self.is_causal = True
    for padding in ("whole", "both"):
        check(model, reference, **batch(padding))

    def function(module, query, key, value, mask, **options):
        out, weights = hf.AttentionInterface()["sdpa"](module, query, key, value, mask, **options)
        return out * 1.01, weights

    class Scaled(hf.models.llama.modeling_llama.LlamaAttention):
        forward = rebound(hf.models.llama.modeling_llama.LlamaAttention.forward, {
            "ALL_ATTENTION_FUNCTIONS": types.SimpleNamespace(get_interface=lambda *_: function)})

    model = build("llama")
    model.model.layers[1].self_attn.__class__ = Scaled
    report = fastllm.patch(model, **ATTEND)
    assert [entry.path for entry in report.replaced] == ["model.layers.0.self_attn"]
    assert "differs" in report.skipped[0].why


def test_masks_that_somebody_handles_are_left():
    """A layer that reads the mask as a tensor finds one."""
    model, reference = build("llama"), build("llama")

    def shorten(module, args, kwargs):
        if kwargs["attention_mask"] is not None:
            kwargs["attention_mask"] = kwargs["attention_mask"].clone()
        return args, kwargs

    for each in (model, reference):
        each.model.layers[1].register_forward_pre_hook(shorten, with_kwargs=True)
    assert all("could not be run" in why for why in left(model))
    check(model, reference, **batch("both"))


def test_one_attention_left_leaves_the_masks(calls):
    model, reference = build("llama"), build("llama")
    attention = model.model.layers[1].self_attn
    own = attention.forward
    attention.forward = lambda *args, **kwargs: own(*args, **kwargs)
    report = fastllm.patch(model, **ATTEND)
    assert [entry.path for entry in report.skipped] == ["model.layers.1.self_attn"]
    calls.clear()
    check(model, reference, **batch("both"))
    assert not calls
    check(model, reference, **batch())
    assert len(calls) == 1


# ------------------------------------------------------------------ instances, copies, registration


def test_a_shared_config_does_not_change(calls):
    config = hf.LlamaConfig(**families.DECODER)
    model, other = hf.LlamaForCausalLM(config), hf.LlamaForCausalLM(config)
    before = config.to_dict(), dict(vars(config))
    fastllm.patch(model)
    assert (config.to_dict(), dict(vars(config))) == before
    assert model.config is other.config is config and config._attn_implementation == "sdpa"
    calls.clear()
    other(**batch("both"))
    assert not calls
    model(**batch("both"))
    assert len(calls) == 2


@pytest.mark.parametrize("family", ["mistral", "gemma2", "bert"])
def test_copies(family, calls):
    model, reference = patched(family), build(family)
    keys = list(model.state_dict())
    assert keys == list(reference.state_dict())
    twin, plain = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert not any("forward" in vars(module) and vars(module)["forward"] != type(
        module).forward.__get__(module) for module in plain.modules())
    assert fastllm.unpatch(model) == 2 and fastllm.unpatch(model) == 0
    assert [set(vars(a)) for a in model.modules()] == [set(vars(b)) for b in reference.modules()]
    for each, count in ((model, 0), (plain, 0), (twin, 2)):
        calls.clear()
        check(each, reference, **batch("both"))
        assert len(calls) == count


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss", "bert"])
def test_by_name(family, tmp_path, calls):
    """from_pretrained(..., attn_implementation="fastllm"), without a patch."""
    fastllm.patching.register()
    reference = build(family)
    reference.save_pretrained(tmp_path)
    model = type(reference).from_pretrained(tmp_path, attn_implementation="fastllm").train()
    for padding in PADDINGS:
        calls.clear()
        check(model, reference, **batch(padding))
        assert len(calls) == 2
    name = "attention_probs_dropout_prob" if family == "bert" else "attention_dropout"
    calls.clear()
    for each in (model, reference):
        for module in each.modules():
            if family == "bert" and isinstance(module, nn.Dropout):
                module.p = 1e-12  # asks for dropout and leaves all
            elif hasattr(module, name):
                setattr(module, name, 1e-12)
    check(model, reference, **batch("both"))
    assert not calls
    if family != "bert":
        check(model, reference, **batch(), position_ids=torch.tensor(PACKED), use_cache=False)
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0,
                   "disable_compile": True}
        for cache in ("dynamic", "static"):
            theirs, ours = (each.eval().generate(
                batch()["input_ids"], **options, cache_implementation=cache)
                for each in (reference, model))
            assert torch.equal(ours, theirs)


# ------------------------------------------------------------------------- with the rest of torch


@pytest.mark.parametrize(("family", "kind"), [
    ("mistral", "whole"), ("gemma2", "both"), ("llama", "packed")])
def test_compiles_whole(family, kind):
    graph_ops = []

    def backend(graph, inputs):
        graph_ops.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    model, inputs = patched(family), {**batch(kind), "use_cache": False}
    if kind == "packed":
        inputs["position_ids"] = torch.tensor(PACKED)
    torch._dynamo.reset()
    out = torch.compile(model, backend=backend, fullgraph=True)(**inputs)
    torch.testing.assert_close(out.loss, build(family)(**inputs).loss, atol=1e-5, rtol=1e-5)
    assert any("fastllm_cpu.attention" in op or "autograd_function" in op for op in graph_ops)
    assert not any("scaled_dot_product_attention" in op for op in graph_ops)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("padding", ["whole", "both"])
def test_gradient_checkpointing(padding, reentrant, calls):
    model, reference = patched("mistral"), build("mistral")
    for each in (model, reference):
        each.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls.clear()
    check(model, reference, **batch(padding))
    assert len(calls) == 4


def test_masks_wait_for_nothing():
    """Values of a tensor on the meta device cannot be read."""
    class Config:
        _attn_implementation, sliding_window, is_causal = "sdpa", 4, True

    from transformers import masking_utils

    fastllm.patching.register()
    asked = _masks.Asking(Config, None, True)
    padding = torch.ones(2, 9, dtype=torch.bool, device="meta")
    for make in (masking_utils.create_causal_mask, masking_utils.create_bidirectional_mask,
                 masking_utils.create_sliding_window_causal_mask,
                 masking_utils.create_bidirectional_sliding_window_mask):
        options = {} if "bidirectional" in make.__name__ else {"past_key_values": None}
        made = make(config=asked, inputs_embeds=torch.empty(2, 9, 4, device="meta"),
                    attention_mask=padding, **options)
        assert isinstance(made, _masks.Mask) and made.queries.device.type == "meta"
