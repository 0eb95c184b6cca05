"""A static cache holds what a growing one does, whichever way a token is added."""

import pytest
import torch

from accel_train.config.sections import ModelConfig
from accel_train.model.kv_cache import KVCache, StaticCache
from accel_train.model.transformer import TransformerLM

CONTEXT, BATCH = 12, 6
CONFIG = ModelConfig(d_model=16, n_layers=2, n_heads=2, max_seq_len=CONTEXT, positions="rotary", dropout=0.0)
LIKE = torch.zeros(1, dtype=torch.float64)


@pytest.mark.parametrize("kind", [KVCache, StaticCache])
def test_append_returns_the_tokens_so_far(kind):
    cache = kind(CONFIG, BATCH, CONTEXT, LIKE)
    keys, values = torch.rand(2, BATCH, 2, 4, 8, dtype=torch.float64)

    cache.append(1, keys[:, :, :3], values[:, :, :3])
    cache.length = 3
    found = cache.append(1, keys[:, :, 3:], values[:, :, 3:])

    assert torch.equal(found[0], keys)
    assert torch.equal(found[1], values)


def test_static_cache_writes_at_its_position_only():
    cache = StaticCache(CONFIG, BATCH, CONTEXT, LIKE)
    cache.position.fill_(5)

    cache.adding = True
    visible = cache.visible
    keys, _ = cache.append(0, *torch.ones(2, BATCH, 2, 1, 8, dtype=torch.float64))
    cache.adding = False

    assert keys.sum(dim=(0, 1, 3)).nonzero().tolist() == [[5]]
    assert visible.tolist() == [[True] * 6 + [False] * 6]
    assert cache.visible is None


def test_static_cache_writes_one_place_without_sorting_it(monkeypatch):
    """Deterministic algorithms are off for the write to a single place, and on again afterwards."""
    seen = []
    index_copy = torch.Tensor.index_copy_

    def watched(tensor, *arguments):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return index_copy(tensor, *arguments)

    monkeypatch.setattr(torch.Tensor, "index_copy_", watched)
    cache = StaticCache(CONFIG, BATCH, CONTEXT, LIKE)
    cache.adding = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        cache.append(0, *torch.ones(2, BATCH, 2, 1, 8, dtype=torch.float64))
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [False, False]


def test_extend_static_gives_the_logits_of_extend():
    torch.manual_seed(0)
    model = TransformerLM(CONFIG, 11).double()
    tokens = torch.randint(11, (BATCH, 7))
    growing = model.new_cache(BATCH, CONTEXT)
    static = StaticCache(CONFIG, BATCH, CONTEXT, model.token_embedding.weight.detach())
    model.extend(tokens[:, :6], growing)
    model.extend(tokens[:, :6], static)
    static.position.fill_(6)

    with torch.no_grad():
        for _ in range(2):  # the second pass overwrites the first
            logits = model.extend_static(tokens[:, 6:], static)

    torch.testing.assert_close(logits, model.extend(tokens[:, 6:], growing), atol=1e-10, rtol=1e-10)
    assert static.length == 6
