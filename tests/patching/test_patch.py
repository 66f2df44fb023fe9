"""What patch does to a model that is wrapped, hooked, copied, strange or broken."""

import copy
import functools
import pickle
import types

import pytest
import torch
from torch import nn

import fastllm
from fastllm.patching import _check
from fastllm.patching._lazy import LazyLogits

hf = pytest.importorskip("transformers")
import families  # noqa: E402


def check(model, reference, **inputs):
    """Loss and gradients of a patched model are those of the unpatched one, by name."""
    inputs = {**families.batch(), **inputs}
    out, grads = families.step(reference, **inputs)
    ours, our_grads = families.step(model, **inputs)
    torch.testing.assert_close(ours.loss, out.loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(our_grads, grads, atol=1e-5, rtol=1e-5)
    return ours


def patched(family="llama", **options):
    model = families.build(family, **options)
    fastllm.patch(model)
    return model


# --------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("family", families.FAMILIES)
def test_logits_are_made_in_training_only_if_read(family):
    model = patched(family)
    out = model(**families.batch())
    assert isinstance(out.logits, LazyLogits) and out.logits._tensor is None
    plain = model(input_ids=families.batch()["input_ids"], **(
        {"decoder_input_ids": families.batch()["input_ids"]} if family == "t5" else {}))
    assert isinstance(plain.logits, torch.Tensor), "without labels there is no loss to fuse"
    assert isinstance(model.eval()(**families.batch()).logits, torch.Tensor)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "gpt2"])
@pytest.mark.parametrize("items", [7, torch.tensor(7)], ids=["int", "tensor"])
def test_number_of_items(family, items):
    check(patched(family), families.build(family), num_items_in_batch=items)


def test_shifted_labels():
    labels = families.batch()["labels"].roll(-1, 1)
    check(patched(), families.build("llama"), shift_labels=labels)


def test_labels_by_position():
    model = patched("bert")
    ids, labels = families.batch().values()
    # input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, encoder's two, labels
    out = model(ids, None, None, None, None, None, None, labels)
    assert isinstance(out.logits, LazyLogits)


def test_a_loss_function_of_ones_own_sees_logits():
    def loss_function(logits, labels, vocab_size, **kwargs):
        return (logits.float() ** 2).mean()

    reference, model = families.build("llama"), patched()
    reference.loss_function = model.loss_function = loss_function
    check(model, reference)


def test_every_label_ignored():
    batch = families.batch()
    batch["labels"][:] = -100
    assert patched()(**batch).loss == 0


def test_hidden_states_and_attentions_are_returned():
    options = {"output_hidden_states": True, "output_attentions": True}
    reference = families.build("llama", attn_implementation="eager")
    ours = check(patched(attn_implementation="eager"), reference, **options)
    theirs = reference(**families.batch(), **options)
    torch.testing.assert_close(ours.hidden_states, theirs.hidden_states, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.attentions, theirs.attentions, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------- wrapped and copied models


def test_idempotent():
    model = families.build("llama")
    first = fastllm.patch(model)
    methods = {name: vars(module).get("forward") for name, module in model.named_modules()}
    assert str(fastllm.patch(model)) == str(first)
    assert methods == {name: vars(module).get("forward") for name, module in model.named_modules()}
    assert fastllm.unpatch(model) == len(first.replaced)


def test_deep_copy_is_patched_and_its_own():
    model = patched()
    twin = copy.deepcopy(model)
    assert twin.model.norm.forward.__self__ is twin.model.norm
    assert fastllm.unpatch(model) > 0
    assert isinstance(check(twin, model).logits, LazyLogits)


def test_pickle_is_the_plain_model():
    twin = pickle.loads(pickle.dumps(patched()))
    reference = families.build("llama")
    assert torch.equal(check(twin, reference).logits, reference(**families.batch()).logits)
    assert str(fastllm.patch(twin)) == str(fastllm.patch(families.build("llama")))
    assert isinstance(check(twin, reference).logits, LazyLogits)


def test_saved_and_loaded(tmp_path):
    model = patched()
    model.save_pretrained(tmp_path)
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(loaded) is hf.LlamaForCausalLM
    check(model, loaded.train())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_gradient_checkpointing(family, reentrant):
    for first in (True, False):
        model = families.build(family)
        if first:
            fastllm.patch(model)
        reference = families.build(family)
        for each in (model, reference):
            each.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if not first:
            assert not fastllm.patch(model).skipped
        check(model, reference)


def test_checkpointed_dropout_is_drawn_once():
    model = patched("gpt2", resid_pdrop=0.5, embd_pdrop=0.5)
    torch.manual_seed(3)
    _, grads = families.step(model, **families.batch())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(3)
    _, again = families.step(model, **families.batch())
    torch.testing.assert_close(again, grads, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("targets", [
    ["q_proj", "v_proj"], ["gate_proj", "down_proj"], ["q_proj", "lm_head"], "all-linear",
    ["embed_tokens", "q_proj"]], ids=str)
@pytest.mark.parametrize("patch_first", [True, False], ids=["patch, wrap", "wrap, patch"])
def test_peft(targets, patch_first):
    peft = pytest.importorskip("peft")

    def wrapped(patch):
        model = families.build("llama")
        if patch and patch_first:
            fastllm.patch(model)
        torch.manual_seed(2)
        model = peft.get_peft_model(model, peft.LoraConfig(
            r=4, target_modules=targets, init_lora_weights=False)).train()
        if patch and not patch_first:
            report = fastllm.patch(model)
            if "lm_head" not in targets:
                assert not report.skipped, report
            else:
                assert [entry.what for entry in report.skipped] == ["LlamaForCausalLM"]
        return model

    model = wrapped(True)
    check(model, wrapped(False))
    merged, plain = (m.merge_and_unload() for m in (model, wrapped(False)))
    with torch.no_grad():
        torch.testing.assert_close(merged(**families.batch()).loss, plain(**families.batch()).loss)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_compiles_whole_with_the_fused_loss(family):
    model = patched(family)
    ops = []

    def backend(graph, inputs):
        ops.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch._dynamo.reset()
    out = torch.compile(model, backend=backend, fullgraph=True)(**families.batch())
    torch.testing.assert_close(out.loss, families.build(family)(**families.batch()).loss)
    assert any("linear_cross_entropy" in op for op in ops)
    assert isinstance(out.logits, LazyLogits) and out.logits._tensor is None


def test_autocast():
    model, reference = patched("qwen3"), families.build("qwen3")
    losses = []
    for m in (model, reference):
        with torch.autocast("cpu", torch.bfloat16):
            loss = m(**families.batch()).loss
        loss.backward()
        losses.append(loss)
    truth = families.build("qwen3")(**families.batch()).loss
    assert abs(losses[0] - truth) <= 2 * abs(losses[1] - truth) + 0.02


@pytest.mark.parametrize("family", ["llama", "gemma2", "t5"])
@pytest.mark.parametrize("narrow", ["input", "weight"])
def test_norms_of_two_types(family, narrow):
    """Float32 norms in a bfloat16 model, as peft prepares them, give the type that they gave."""
    model = families.build(family)
    norm = next(m for name, m in model.named_modules() if name.lower().endswith("norm"))
    x = torch.randn(2, 3, 32)
    x = x.bfloat16() if narrow == "input" else x
    norm.to(torch.bfloat16 if narrow == "weight" else torch.float32)
    theirs = norm(x)
    assert fastllm.patch(nn.Sequential(norm)).replaced
    ours = norm(x)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0.02)


# --------------------------------------------------------------------- what is left, and named


class MeanAbs(nn.Module):
    """Quacks like an RMSNorm."""

    def __init__(self, width):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), 1e-6

    def forward(self, x):
        return x / (x.abs().mean(-1, keepdim=True) + self.eps) * self.weight


class EpsOutside(MeanAbs):
    def forward(self, x):
        return x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.eps) * self.weight


class Exponential(MeanAbs):
    """Is Gemma's norm for weights of zero, and no other."""

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight.exp()


@pytest.mark.parametrize("kind", [MeanAbs, EpsOutside, Exponential])
def test_a_norm_that_computes_something_else_is_left(kind):
    report = fastllm.patch(nn.Sequential(nn.Linear(8, 8), kind(8)))
    assert not report.replaced
    (left,) = report.skipped
    assert left.path == "1" and left.what == kind.__name__ and "neither norm" in left.why
    assert kind.__name__ in str(report)


class Stranger(MeanAbs):
    """An unknown norm that is one: recognised by what it computes."""

    def forward(self, x):
        return self.weight * nn.functional.normalize(
            torch.cat((x, torch.full_like(x[..., :1], (self.eps * x.shape[-1]) ** 0.5)), -1),
            dim=-1, eps=0.0)[..., :-1] * x.shape[-1] ** 0.5


def test_a_norm_of_unknown_make_is_replaced():
    (found,) = fastllm.patch(nn.Sequential(Stranger(8))).replaced
    assert found.by == "ops.rms_norm"


def test_an_epsilon_that_is_not_the_modules_own_is_seen():
    norm = families.build("llama").model.norm
    norm.forward_epsilon, norm.variance_epsilon = 1e-6, 1e-6
    type_forward = type(norm).forward

    class Other(type(norm)):
        def forward(self, x):
            self.variance_epsilon, kept = 1e-4, self.variance_epsilon
            try:
                return type_forward(self, x)
            finally:
                self.variance_epsilon = kept

    norm.__class__ = Other
    assert not fastllm.patch(nn.Sequential(norm)).replaced


def test_other_activations_are_left():
    report = fastllm.patch(families.build("llama", hidden_act="relu"))
    left = [entry for entry in report.skipped if entry.what == "LlamaMLP"]
    assert len(left) == 2 and "neither SiLU nor GELU" in left[0].why
    report = fastllm.patch(families.build("llama", hidden_act="gelu_pytorch_tanh"))
    assert not report.skipped


def test_eager_experts_are_named():
    model = families.build("mixtral")
    model.set_experts_implementation("eager")
    report = fastllm.patch(model)
    assert {entry.what for entry in report.skipped} == {"MixtralExperts"}
    assert "inline" in report.skipped[0].why


def test_other_rotations_are_left():
    config = hf.CohereConfig(**{**families.DECODER, "logit_scale": 0.5})
    torch.manual_seed(0)
    model = hf.CohereForCausalLM(config).train()
    reference = copy.deepcopy(model)
    report = fastllm.patch(model)
    left = {entry.what: entry.why for entry in report.skipped}
    assert "rotated" in left["CohereAttention"] or "differs" in left["CohereAttention"]
    done = {entry.what: entry.by for entry in report.replaced}
    assert done["CohereForCausalLM"] == "ops.linear_cross_entropy"
    assert done["CohereLayerNorm"] == "ops.layer_norm"
    check(model, reference)  # logit_scale is taken along


@pytest.mark.parametrize("name", ["Olmo2", "Granite", "StableLm", "GPTNeoX", "OPT", "Starcoder2"])
def test_architectures_nobody_prepared_for(name):
    config = {**families.DECODER}
    if name == "OPT":
        config = {**config, "ffn_dim": 48, "word_embed_proj_dim": 32}
    torch.manual_seed(0)
    model = getattr(hf, f"{name}ForCausalLM")(getattr(hf, f"{name}Config")(**config)).eval()
    model.training = True  # without the dropout of its layers
    reference = copy.deepcopy(model)
    report = fastllm.patch(model)
    assert any(entry.by == "ops.linear_cross_entropy" for entry in report.replaced), report
    assert all(entry.why for entry in report.skipped)
    check(model, reference)


def test_methods_of_others_are_left():
    model = families.build("llama")
    model.model.norm.forward = lambda x: x
    report = fastllm.patch(model)
    assert [entry.path for entry in report.skipped] == ["model.norm"]
    assert "somebody else" in report.skipped[0].why
    fastllm.unpatch(model)
    assert model.model.norm.forward(3) == 3


class Packed(nn.Module):
    """A linear layer of integers that are weights only in its forward."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter((linear.weight * 64 + 128).round().to(torch.uint8), False)

    def forward(self, x):
        return nn.functional.linear(x, (self.weight.to(x.dtype) - 128) / 64)


def test_quantised_layers():
    model = families.build("llama", torch.bfloat16)
    for layer in model.model.layers:
        for part in (layer.mlp, layer.self_attn):
            for name, child in list(part.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(part, name, Packed(child))
    reference = copy.deepcopy(model)
    assert not fastllm.patch(model).skipped
    torch.testing.assert_close(model(**families.batch()).loss, reference(**families.batch()).loss,
                               atol=0.02, rtol=0.02)


def test_a_wrapper_around_ours_stays():
    model = patched()
    ours = model.forward.__func__

    @functools.wraps(ours)  # which copies whatever ours is marked by
    def wrapper(self, *args, **kwargs):
        return ours(self, *args, **kwargs)

    model.forward = types.MethodType(wrapper, model)
    fastllm.unpatch(model)
    assert model.forward.__func__ is wrapper


def test_hooks_run_and_a_hooked_head_is_called():
    model, seen = families.build("llama"), []
    model.model.norm.register_forward_hook(lambda *_: seen.append("norm"))
    fastllm.patch(model)
    seen.clear()  # of the trial runs
    model.lm_head.register_forward_hook(lambda *_: seen.append("head"))
    out = model(**families.batch())
    assert seen == ["norm", "head"]
    assert isinstance(out.logits, torch.Tensor)


def test_hooks_of_accelerate_stay():
    accelerate = pytest.importorskip("accelerate")
    model = families.build("llama")
    for module in list(model.modules()):
        accelerate.hooks.add_hook_to_module(module, accelerate.hooks.ModelHook())
    report = fastllm.patch(model)
    assert {entry.by for entry in report.replaced} >= {
        "ops.rms_norm", "ops.rope + ops.attention", "ops.swiglu"}
    check(model, families.build("llama"))
    fastllm.unpatch(model)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    check(model, families.build("llama"))


def test_a_model_without_weights():
    with torch.device("meta"):
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**families.DECODER))
    report = fastllm.patch(model)
    assert not report.replaced and "meta" in report.skipped[0].why


def test_a_model_that_cannot_be_run():
    model = families.build("llama")
    model.model.register_forward_pre_hook(lambda *_: 1 / 0)
    report = fastllm.patch(model)
    assert {entry.what for entry in report.skipped} == {"LlamaAttention", "LlamaForCausalLM"}
    assert all("could not be run" in entry.why for entry in report.skipped)


def test_kinds():
    model = families.build("llama")
    report = fastllm.patch(model, skip=("loss", "rope", "embedding", "attention"))
    assert {entry.by for entry in report.replaced} == {"ops.rms_norm", "ops.swiglu"}
    with pytest.raises(ValueError, match="no kind 'norms'"):
        fastllm.patch(model, skip=("norms",))


def test_nothing_global_changes():
    from transformers.models.llama import modeling_llama

    before = {name: dict(vars(value)) if isinstance(value, type) else value
              for name, value in vars(modeling_llama).items()}
    other, state = families.build("llama"), torch.random.get_rng_state()
    fastllm.patch(families.build("llama"))
    torch.random.set_rng_state(state)
    model = families.build("llama")
    state = torch.random.get_rng_state()
    fastllm.patch(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    after = {name: dict(vars(value)) if isinstance(value, type) else value
             for name, value in vars(modeling_llama).items()}
    assert before.keys() == after.keys() and all(before[k] == after[k] for k in before)
    assert not any("forward" in vars(module) for module in other.modules())


def test_plain_torch_modules():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 8, padding_idx=0), nn.RMSNorm(8, eps=1e-5),
                          nn.LayerNorm(8), nn.LayerNorm(8, bias=False), nn.Dropout(0.0))
    ids = torch.tensor([[1, 0, 3]])
    reference = copy.deepcopy(model)
    report = fastllm.patch(model)
    assert [entry.by for entry in report.replaced] == [
        "ops.embedding", "ops.rms_norm", "ops.layer_norm", "ops.layer_norm", "ops.dropout"]
    torch.testing.assert_close(model(ids), reference(ids))


@pytest.mark.parametrize("module", [
    nn.LayerNorm((2, 3)), nn.LayerNorm(8, elementwise_affine=False), nn.GroupNorm(2, 8),
    nn.BatchNorm1d(8), nn.Embedding(4, 3, max_norm=1.0), nn.Dropout(0.5, inplace=True)], ids=str)
def test_torch_modules_that_are_left(module):
    report = fastllm.patch(nn.Sequential(module))
    assert not report.replaced and not vars(module).get("forward")


def test_agreement():
    a = torch.randn(3, 4)
    _check.agree("x", a, a * (1 + 1e-7))
    for wrong in (a * 1.001, a.double(), a[:2], a * torch.tensor([[1.0], [1.0], [1.1]])):
        with pytest.raises(_check.Differs):
            _check.agree("x", wrong, a)
    with pytest.raises(_check.Differs, match="zero"):
        _check.agree("x", a * 0, a * 0)
