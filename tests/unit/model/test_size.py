"""How large a model is, and the warning before its training does not fit."""

import dataclasses

import psutil
import pytest

from accel_train.config.sections import ExperimentConfig, ModelConfig, TrainingConfig
from accel_train.model import size as memory
from accel_train.model.transformer import TransformerLM


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("d_ff", [None, 24])
def test_the_number_of_weights_is_that_of_the_model(tied, positions, d_ff):
    config = ModelConfig(
        d_model=16, n_layers=3, n_heads=2, max_seq_len=12, d_ff=d_ff, tie_embeddings=tied, positions=positions
    )
    assert memory.parameters(config, 37) == TransformerLM(config, 37).num_parameters


def test_it_warns_when_the_machine_has_less_than_training_takes(monkeypatch):
    config = ExperimentConfig(task="text")
    needed = memory.training_bytes(config, 8000)
    for free, warned in ((needed + 1, False), (needed - 1, True)):
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: type("", (), {"available": free}))
        assert bool(memory.warnings(config, 8000)) == warned


def test_more_of_anything_takes_more():
    config = ExperimentConfig(task="text")
    small = memory.training_bytes(config, 8000)
    for changed in (
        dataclasses.replace(config, model=ModelConfig(d_model=256)),
        dataclasses.replace(config, training=TrainingConfig(batch_size=128)),
    ):
        assert memory.training_bytes(changed, 8000) > small
    accumulated = dataclasses.replace(config, training=TrainingConfig(gradient_accumulation_steps=4))
    assert memory.training_bytes(accumulated, 8000) < small
