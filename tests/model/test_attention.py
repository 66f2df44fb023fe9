"""The key-value cache. (Attention's values are held to a plain oracle in test_decoder.)"""

import pytest
import torch

from fastllm.model import Decoder, KVCache, ModelConfig

CONFIG = ModelConfig(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                     num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
                     qk_norm=True)


def test_append_gives_back_all_that_a_layer_holds():
    cache = KVCache(CONFIG, 3, 5)
    key, value = torch.randn(2, 3, 4, 2, 8).unbind()
    for layer in range(2):
        keys, values = cache.append(layer, key[:, :3], value[:, :3])
        assert torch.equal(keys, key[:, :3])
    cache.advance(3)
    keys, values = cache.append(1, key[:, 3:], value[:, 3:])
    assert torch.equal(keys, key)
    assert torch.equal(values, value)
    with pytest.raises(ValueError, match="5 tokens a row and was given 6"):
        cache.append(1, key[:, :3], value[:, :3])


@pytest.mark.parametrize("pieces", [[12], [1] * 12, [5, 1, 6], [11, 1]])
def test_cached_hidden_states_equal_uncached(pieces):
    torch.manual_seed(0)
    model = Decoder(CONFIG).eval()
    ids = torch.randint(0, 40, (2, 12))
    cache = KVCache(CONFIG, 2, 12)
    with torch.no_grad():
        whole = model(ids)
        parts = torch.cat([model(piece, cache=cache) for piece in ids.split(pieces, dim=1)], dim=1)
    assert cache.length == 12
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=2e-6)
