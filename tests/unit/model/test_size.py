"""How large a model is, and the warning before its training does not fit."""

import psutil
import pytest

from accel_train.config.sections import ModelConfig, TrainingConfig
from accel_train.model import size
from accel_train.model.transformer import TransformerLM


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("d_ff", [None, 24])
def test_transformer_parameters_counts_those_of_the_model(tied, positions, d_ff):
    config = ModelConfig(
        d_model=16, n_layers=3, n_heads=2, max_seq_len=12, d_ff=d_ff, tie_embeddings=tied, positions=positions
    )
    assert size.transformer_parameters(config, 37) == size.count_parameters(TransformerLM(config, 37))


def test_warnings_tell_when_memory_is_short(monkeypatch):
    needed = size.training_bytes(ModelConfig(), TrainingConfig(), 8000)
    for free, warned in ((needed + 1, False), (needed - 1, True)):
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: type("", (), {"available": free}))
        assert bool(size.warnings(ModelConfig(), TrainingConfig(), 8000)) == warned


def test_training_bytes_grow_with_model_and_batch():
    small = size.training_bytes(ModelConfig(), TrainingConfig(), 8000)
    assert size.training_bytes(ModelConfig(d_model=256), TrainingConfig(), 8000) > small
    assert size.training_bytes(ModelConfig(), TrainingConfig(batch_size=128), 8000) > small
    assert size.training_bytes(ModelConfig(), TrainingConfig(gradient_accumulation_steps=4), 8000) < small
