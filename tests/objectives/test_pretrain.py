"""The pretraining loss against torch's cross entropy, in sums over trained tokens."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from fastllm.data.collate import Batch
from fastllm.model import Decoder, ModelConfig
from fastllm.objectives.pretrain import PretrainConfig, loss


def make(**changes):
    config = ModelConfig(**{"vocab_size": 48, "hidden_size": 32, "intermediate_size": 40,
                            "num_hidden_layers": 2, "num_attention_heads": 4,
                            "num_key_value_heads": 2, "max_position_embeddings": 16,
                            "init_std": 0.2, **changes})
    return Decoder(config, generator=torch.Generator().manual_seed(0))


def batch(rows=(0, 1)):
    """Two rows of 8: documents of 5 and 3 (the last of padding), and one of 8."""
    ids = torch.randint(0, 48, (2, 8), generator=torch.Generator().manual_seed(1))
    labels = torch.randint(0, 48, (2, 8), generator=torch.Generator().manual_seed(2))
    labels[0, 5:] = -100
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2], list(range(8))])
    keep = list(rows)
    cu_seqlens = {(0, 1): [0, 5, 8, 16], (0,): [0, 5, 8], (1,): [0, 8]}[tuple(rows)]
    return Batch(input_ids=ids[keep], labels=labels[keep], position_ids=positions[keep],
                 cu_seqlens=torch.tensor(cu_seqlens, dtype=torch.int32), max_seqlen=8,
                 num_tokens=int((labels[keep] != -100).sum()))


def by_hand(model, b, config):
    hidden = model(b.input_ids, position_ids=b.position_ids, cu_seqlens=b.cu_seqlens,
                   max_seqlen=b.max_seqlen)
    logits = model.logits(hidden).flatten(0, 1)
    labels = b.labels.flatten()
    total = cross_entropy(logits, labels, reduction="sum", label_smoothing=config.label_smoothing)
    squares = logits.logsumexp(-1).square()[labels != -100].sum()
    return total + config.z_loss * squares


@pytest.mark.parametrize("model_changes", [{}, {"tie_word_embeddings": False},
                                           {"final_logit_softcapping": 1.5}])
@pytest.mark.parametrize("config", [
    PretrainConfig(), PretrainConfig(label_smoothing=0.1, z_loss=1e-2, chunk_size=3)])
def test_loss_and_gradients_equal_torch(model_changes, config):
    model, b = make(**model_changes), batch()
    value, count = loss(model, b, config)
    assert (value.shape, value.dtype, count) == ((), torch.float32, 13)
    value.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    wanted = by_hand(model, b, config)
    torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5)
    wanted.backward()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=2e-5)


def test_rows_add_up():
    model = make()
    whole, first, second = (loss(model, batch(rows)) for rows in ((0, 1), (0,), (1,)))
    assert whole[1] == first[1] + second[1] == 13
    torch.testing.assert_close(whole[0], first[0] + second[0], rtol=1e-5, atol=1e-5)


def test_nothing_to_train_is_zero():
    model, b = make(), batch()
    b.labels.fill_(-100)
    b.num_tokens = 0
    value, count = loss(model, b)
    assert (value.item(), count) == (0.0, 0)
    value.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_bf16_loss_is_summed_in_fp32():
    model = make().to(torch.bfloat16)
    value, _ = loss(model, batch())
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(loss(make(), batch())[0].item(), rel=0.02)
