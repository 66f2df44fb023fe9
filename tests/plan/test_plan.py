"""The memory that a run says it will need: by formula, and beside what model and optimizer hold."""

import adapted
import pytest
import torch

from fastllm import adapters
from fastllm.adapters import AdapterConfig
from fastllm.dist.config import DistConfig
from fastllm.model import Decoder, ModelConfig, num_parameters
from fastllm.model.reward import RewardModel
from fastllm.optim import OPTIMIZERS, OptimConfig, make_optimizer
from fastllm.plan import MicroBatch, make_plan

SHAPE = ModelConfig(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
                    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
BATCH = MicroBatch(tokens=256)


def on_meta(config=SHAPE, adapter=None, dtype=torch.bfloat16, reward=False):
    with torch.device("meta"):
        model = Decoder(config).to(dtype)
    if adapter:
        adapters.apply(model, AdapterConfig(**adapter))
    return RewardModel(model) if reward else model


def plan_of(model, stage=0, world=1, optim="adamw", grad_accum=1, rank=0, **dist):
    return make_plan(model, OptimConfig(name=optim), DistConfig(zero=stage, **dist), BATCH,
                     grad_accum=grad_accum, world=world, rank=rank)


def plan(stage=0, world=1, optim="adamw", dtype=torch.bfloat16, grad_accum=1, **dist):
    return plan_of(on_meta(dtype=dtype), stage, world, optim, grad_accum, **dist)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_of_one_rank_are_the_optimizers(name, dtype):
    model = Decoder(SHAPE).to(dtype)
    optimizer = make_optimizer(model.named_parameters(), OptimConfig(name=name))
    assert plan(optim=name, dtype=dtype).states == optimizer.held_bytes()


@pytest.mark.parametrize("world", [2, 3, 8])
def test_shards_are_a_part_of_the_whole(world):
    """Within the paddings: 256 elements a parameter and rank."""
    numel = num_parameters(SHAPE)
    spare = 256 * (sum(1 for _ in Decoder(SHAPE).parameters()) + world * 6)
    one, two, three = (plan(stage, world) for stage in (1, 2, 3))
    assert one.states == pytest.approx(12 * numel / world, abs=12 * spare)
    assert one.trained == pytest.approx(2 * numel, abs=2 * spare)
    assert one.gradients == pytest.approx(4 * numel / world, abs=4 * spare)
    assert (two.states, two.trained, two.gradients) == (one.states, one.trained, one.gradients)
    assert three.trained == pytest.approx(2 * numel / world, abs=2 * spare)


def test_what_more_micro_batches_cost():
    """Below stage 2 they are summed whole, from stage 2 on in the shards."""
    numel = num_parameters(SHAPE)
    assert plan(1, 2, grad_accum=4).gradients - plan(1, 2).gradients == 6 * numel
    assert plan(2, 2, grad_accum=4) == plan(2, 2)


def test_every_stage_needs_less():
    totals = [plan(stage, 8).total for stage in range(4)]
    assert totals == sorted(totals, reverse=True)
    assert plan().total > totals[1]


def test_the_line_names_every_part():
    line = plan(2, 2, wire_dtype="int8").line()
    for word in ("weights", "gradients", "states", "activations", "buffers", "predicted"):
        assert word in line
    assert "frozen" not in line
    line = plan_of(on_meta(adapter={"name": "lora"})).line()
    assert "trained weights" in line and "frozen weights" in line


# ------------------------------------------------------------------------ what is really there


def size(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def is_of(plan, model, optim="adamw"):
    """To the byte: weights, tables, gradients and states of a model in memory."""
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    assert plan.trained == plan.gradients == size(trained)
    assert plan.trained + plan.frozen + plan.tables == size([*parameters, *model.buffers()])
    optimizer = make_optimizer(model.named_parameters(), OptimConfig(name=optim))
    assert plan.states == optimizer.held_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", adapted.METHODS)
def test_an_adapter_is_what_it_holds(method, dtype):
    """The frozen base in its dtype or in 4 bits with its scales; the rest of what is trained."""
    planned = plan_of(on_meta(ModelConfig(**adapted.SIZES), adapted.METHODS[method], dtype))
    is_of(planned, adapted.adapted(method, dtype, trained=False).model)
    assert planned.frozen > planned.trained


def test_what_double_quantization_saves():
    config = ModelConfig(**adapted.SIZES)
    double, single = (plan_of(on_meta(config, {
        "name": "qlora", "rank": 4, "block_size": 32, "double_quant": twice})).frozen
        for twice in (True, False))
    weights = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96)  # of the projections of two blocks
    # A scale of 32 weights in 1 byte in place of 4, one of 256 scales and 4 bytes a projection.
    assert single - double == pytest.approx(3 * weights / 32, rel=0.1)
    assert double < plan_of(on_meta(config, {"name": "lora", "rank": 4})).frozen - 1.4 * weights


@pytest.mark.parametrize("tied", [True, False])
def test_a_reward_model_has_no_output_head(tied):
    config = ModelConfig(**adapted.SIZES, tie_word_embeddings=tied)
    is_of(plan_of(on_meta(config, reward=True)), RewardModel(Decoder(config).to(torch.bfloat16)))


def test_biases_and_norms_of_other_architectures_count():
    config = ModelConfig(**adapted.SIZES, sandwich_norms=True, attention_bias=True, mlp_bias=True,
                         attention_output_bias=True, qk_norm=True, sliding_window=8,
                         rope_local_base_freq=1e4, hidden_act="gelu_pytorch_tanh")
    is_of(plan_of(on_meta(config)), Decoder(config).to(torch.bfloat16))


@pytest.mark.parametrize("method", adapted.METHODS)
def test_ranks_share_the_states_of_an_adapter(method):
    """Every element's states are one rank's, and the frozen base is everybody's."""
    model = on_meta(ModelConfig(**adapted.SIZES), adapted.METHODS[method])
    alone = plan_of(model)
    for world in (2, 3):
        everyone = plan_of(model, 0, world)
        assert everyone.states == alone.states and everyone.frozen == alone.frozen
        for stage in (1, 2):
            ranks = [plan_of(model, stage, world, rank=rank) for rank in range(world)]
            assert sum(each.states for each in ranks) == alone.states
            assert {each.frozen for each in ranks} == {alone.frozen}
            assert all(alone.trained <= each.trained < alone.trained + alone.frozen
                       for each in ranks)
