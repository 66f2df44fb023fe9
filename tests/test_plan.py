"""The memory that a run says it will need: by formula, and beside what the optimizer holds."""

import pytest
import torch

from fastllm.dist.config import DistConfig
from fastllm.model import Decoder, ModelConfig, num_parameters
from fastllm.optim import OPTIMIZERS, OptimConfig, make_optimizer
from fastllm.plan import make_plan

SHAPE = ModelConfig(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
                    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)


def plan(stage=0, world=1, optim="adamw", dtype=torch.bfloat16, grad_accum=1, **dist):
    return make_plan(SHAPE, OptimConfig(name=optim), DistConfig(zero=stage, **dist), dtype=dtype,
                     tokens=256, grad_accum=grad_accum, world=world)


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
    assert one.weights == pytest.approx(2 * numel, abs=2 * spare)
    assert one.gradients == pytest.approx(4 * numel / world, abs=4 * spare)
    assert (two.states, two.weights, two.gradients) == (one.states, one.weights, one.gradients)
    assert three.weights == pytest.approx(2 * numel / world, abs=2 * spare)


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
