"""The memory that a run says it will need: by formula, and beside what the optimizer holds and what
a forward and backward hold."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastllm import cpu, ops
from fastllm.data.collate import Batch
from fastllm.dist.config import DistConfig
from fastllm.kernels import _chunks
from fastllm.model import Decoder, ModelConfig, num_parameters
from fastllm.objectives import pretrain
from fastllm.optim import OPTIMIZERS, OptimConfig, make_optimizer
from fastllm.plan import activation_bytes, logit_rows, make_plan

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


# -------------------------------------------------------------------------------- activations

CPU = torch.device("cpu")
BACKENDS = [pytest.param("cpp", marks=pytest.mark.skipif(
    not cpu.available(), reason="the C++ extension was not built")), "reference"]
NARROW = {"vocab_size": 150, "hidden_size": 40, "intermediate_size": 108, "num_hidden_layers": 2,
          "num_attention_heads": 4}
WIDE = {"vocab_size": 200, "hidden_size": 64, "intermediate_size": 208, "num_hidden_layers": 2,
        "num_attention_heads": 8}


class Live(TorchDispatchMode):
    """Follows the memory that operators return, from inside our own and oneDNN's as well, until it
    is given back. That of `known` tensors is not counted."""

    def __init__(self, known):
        super().__init__()
        self.blocks = {tensor.untyped_storage().data_ptr(): None for tensor in known}
        self.changes = []  # (number of a block, bytes more)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace in ("fastllm", "fastllm_cpu", "mkldnn"):
            with self:
                result = function.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU),
                                             *args, **(kwargs or {}))
        else:
            result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf.untyped_storage())
        return result

    def _see(self, storage):
        address, size = storage.data_ptr(), storage.nbytes()
        if size and address not in self.blocks:
            number = self.blocks[address] = len(self.changes)
            self.changes.append((number, size))
            weakref.finalize(storage, self._forget, address, number, size)

    def _forget(self, address, number, size):
        del self.blocks[address]
        self.changes.append((number, -size))

    def peak(self, without):
        """The most bytes at a time, but for those of tensors that live now."""
        apart = {self.blocks[tensor.untyped_storage().data_ptr()] for tensor in without}
        now = most = 0
        for number, size in self.changes:
            now += 0 if number in apart else size
            most = max(most, now)
        return most


def batch_of(rows, seq_len, documents, vocab):
    """Each row in so many equal documents."""
    ids = torch.randint(vocab, (rows, seq_len))
    length = seq_len // documents
    ends = torch.arange(0, rows * seq_len + 1, length, dtype=torch.int32)
    return Batch(ids, ids.roll(-1), torch.arange(length).repeat(documents).expand(rows, -1), ends,
                 length, ids.numel())


def measured_and_planned(backend, dtype, rows, seq_len, documents=1, **config):
    """The peak of a training step's forward and backward without the gradients of parameters, and
    `activation_bytes`. Embedding and head are not tied: of two gradients that become one, only the
    sum could be told apart."""
    config = ModelConfig(tie_word_embeddings=False, max_position_embeddings=seq_len, **config)
    model, batch = Decoder(config).to(dtype), batch_of(rows, seq_len, documents, config.vocab_size)
    with ops.use_backend("reference" if backend == "reference" else "auto"):
        with Live([*model.parameters(), *model.buffers(), batch.input_ids, batch.labels,
                   batch.position_ids, batch.cu_seqlens]) as live:
            loss, count = pretrain.loss(model, batch)
            (loss / count).backward()
        return (live.peak([param.grad for param in model.parameters()]),
                activation_bytes(config, rows * seq_len, dtype.itemsize, CPU))


# Under: selective recomputation holds the last product of the block at work, which it never takes
# back. Over: what is counted to the end of the block and freed a little earlier. Beside that,
# scratch inside operators, and random states of 5 KB a block.
WITHIN = (0.95, 1.05)


def near(held, said):
    return WITHIN[0] * held <= said <= WITHIN[1] * held


@pytest.mark.parametrize(("model", "rows", "seq_len"), [(NARROW, 1, 128), (WIDE, 2, 96)],
                         ids=["narrow", "wide"])
@pytest.mark.parametrize("kv_heads", [None, 2])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_activations_are_what_a_step_holds(backend, dtype, recompute, dropout, kv_heads, model,
                                           rows, seq_len):
    held, said = measured_and_planned(backend, dtype, rows, seq_len, recompute=recompute,
                                      dropout=dropout, num_key_value_heads=kv_heads, **model)
    assert near(held, said), (held, said)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_activations_with_qk_norm(backend, dtype):
    held, said = measured_and_planned(backend, dtype, 2, 96, documents=2, qk_norm=True, **WIDE)
    assert near(held, said), (held, said)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_activations_where_chunks_of_logits_are_the_most(backend, dtype):
    """520 tokens in two chunks, whose parts of the head's gradient add up in fp32."""
    held, said = measured_and_planned(backend, dtype, 1, 520, recompute="full",
                                      **{**NARROW, "vocab_size": 21000, "hidden_size": 16})
    assert near(held, said), (held, said)


@pytest.mark.skipif(not cpu.available(), reason="the C++ extension was not built")
def test_activations_of_a_long_document():
    """1,100 tokens: the C++ attention adds up two parts of the queries' gradients."""
    held, said = measured_and_planned("cpp", torch.bfloat16, 1, 1100, recompute="full",
                                      **{**NARROW, "head_dim": 32})
    assert near(held, said), (held, said)


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("tokens", [1, 511, 1000, 5000, 65536])
@pytest.mark.parametrize(("hidden", "vocab"), [(64, 500), (512, 6400), (768, 50257),
                                               (4096, 128256)])
def test_rows_of_logits_are_the_loss_own(hidden, vocab, tokens, width):
    config = ModelConfig(hidden_size=hidden, vocab_size=vocab, num_attention_heads=1)
    own, _ = _chunks.rows(tokens, hidden, vocab, width, cached=True)
    assert logit_rows(config, tokens, width, CPU) == own
    own, _ = _chunks.rows(tokens, hidden, vocab, width)
    assert logit_rows(config, tokens, width, torch.device("cuda")) >= own
