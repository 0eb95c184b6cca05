"""The common sections: their contract, their defaults, and what they refuse."""

import dataclasses

import pytest

from accel_train.config.fields import to_dict
from accel_train.config.sections import (
    CheckpointConfig,
    ExperimentConfig,
    HooksConfig,
    ModelConfig,
    StartConfig,
    TrackingConfig,
    TrainingConfig,
    experiment_class,
)
from accel_train.errors import ConfigError

SECTIONS = {
    "model": ModelConfig,
    "training": TrainingConfig,
    "checkpoint": CheckpointConfig,
    "start": StartConfig,
    "hooks": HooksConfig,
    "tracking": TrackingConfig,
}


def test_sections_are_the_contract():
    names = [field.name for field in dataclasses.fields(ExperimentConfig)]
    assert names == ["task", "seed", "name", "description", "tags", "output_dir", *SECTIONS]


@pytest.mark.parametrize("cls", [ExperimentConfig, *SECTIONS.values()])
def test_sections_are_frozen(cls):
    with pytest.raises(dataclasses.FrozenInstanceError):
        cls().x = 1


def test_defaults_are_those_of_the_sources():
    training = TrainingConfig()
    assert (training.learning_rate, training.weight_decay, training.max_epochs) == (3e-4, 0.01, 50)
    assert (training.batch_size, training.max_grad_norm, training.warmup_ratio) == (64, 1.0, 0.1)
    assert CheckpointConfig().keep_last == 3
    assert (StartConfig().weights, StartConfig().lock_timeout) == (None, 60.0)


# -- the task's own section ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Own:
    """A section of a task of somebody's own.

    More words about it.
    """

    size: int = 3
    """How large."""

    def check(self, config):
        if self.size > config.training.batch_size:
            raise ConfigError("own.size", self.size, "is larger than training.batch_size")


def test_a_plain_dataclass_becomes_the_section_of_a_task():
    cls = experiment_class("own", Own)
    config = cls()
    assert (config.section.size, config.section_name) == (3, "own")
    assert to_dict(config)["own"] == {"size": 3}


def test_own_section_checks_itself_against_the_common_ones():
    cls = experiment_class("own", Own)
    section = type(cls().own)
    with pytest.raises(ConfigError, match=r"own\.size: 5 is larger"):
        cls(own=section(size=5), training=TrainingConfig(batch_size=4))


def test_values_of_an_own_section_are_checked_by_type():
    section = type(experiment_class("own", Own)().own)
    with pytest.raises(ConfigError, match=r"own\.size: 'x' must be an integer"):
        section(size="x")


@pytest.mark.parametrize("name", ["training", "seed", "two words"])
def test_own_section_needs_a_name_of_its_own(name):
    with pytest.raises(ConfigError, match="cannot be the name of a task's section"):
        experiment_class(name, Own)


# -- refusals ------------------------------------------------------------------------------

WRONG = [
    (lambda: ModelConfig(n_heads=3), "model.n_heads", "choose a divisor"),
    (lambda: ModelConfig(dropout=1.0), "model.dropout", "[0, 1)"),
    (lambda: ModelConfig(d_model=12, positions="rotary"), "model.n_heads", "even"),
    (lambda: TrainingConfig(learning_rate=0.0), "training.learning_rate", "positive"),
    (lambda: TrainingConfig(max_steps=0), "training.max_steps", "-1"),
    (lambda: TrainingConfig(betas=(0.9, 1.0)), "training.betas", "[0, 1)"),
    (lambda: TrainingConfig(warmup_ratio=1.1), "training.warmup_ratio", "[0, 1]"),
    (lambda: TrainingConfig(gradient_accumulation_steps=5), "training.batch_size", "not divisible"),
    (lambda: TrainingConfig(max_grad_norm=0.0), "training.max_grad_norm", "null"),
    (lambda: TrainingConfig(eval_interval=0), "training.eval_interval", "at least 1"),
    (lambda: TrainingConfig().check_world_size(3), "training.batch_size", "multiple of 3"),
    (lambda: CheckpointConfig(keep_last=0), "checkpoint.keep_last", "at least 1"),
    (lambda: CheckpointConfig(every_steps=0), "checkpoint.every_steps", "at least 1"),
    (lambda: ExperimentConfig(seed=-1), "seed", "2**63"),
    (lambda: ExperimentConfig(name="a/b"), "name", "directory name"),
    (lambda: ExperimentConfig(name=".."), "name", "directory name"),
    (lambda: ExperimentConfig(name="corpora"), "name", "another"),
]


@pytest.mark.parametrize(
    ("build", "field", "cure"), WRONG, ids=[f"{row[1]}-{index}" for index, row in enumerate(WRONG)]
)
def test_wrong_value_is_one_line_with_field_value_and_cure(build, field, cure):
    with pytest.raises(ConfigError) as caught:
        build()

    assert caught.value.field == field
    message = str(caught.value)
    assert message.startswith(f"{field}: {caught.value.value!r} ")
    assert cure in message
    assert "\n" not in message
