"""What the hash of a configuration covers, and what a run is called."""

import dataclasses
import subprocess
import sys

import pytest
from configs import experiment_config
from hypothesis import given, settings
from hypothesis import strategies as st

from accel_train.config.fields import from_dict, result_values, to_dict
from accel_train.config.identity import config_hash, differing_fields, experiment_id
from accel_train.config.sections import TrainingConfig
from accel_train.tasks.registry import BUILT_IN, config_class
from accel_train.tasks.text.config import TextConfig

COMMON_LEFT_OUT = {
    "name",
    "description",
    "tags",
    "output_dir",
    "training.log_interval",
    "training.num_workers",
    "training.cuda_graph",
    "training.timeout_seconds",
    "start.lock_timeout",
    "start.weights",
    "checkpoint.every_steps",
    "checkpoint.keep_last",
    "checkpoint.verify",
    "tracking.log_with",
    "tracking.project",
}
"""Fields that cannot change the trained bits. ``start.weights`` enters the hash as its weights' digest."""
LEFT_OUT = {"walks": set(), "text": {"text.download_timeout", "text.download_attempts"}}


def leaves(values, prefix=""):
    for name, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def with_field(name, value):
    """The default configuration with one dotted field changed."""
    values = to_dict(experiment_config())
    *sections, leaf = name.split(".")
    place = values
    for section in sections:
        place = place[section]
    place[leaf] = value
    return from_dict(values, config_class("walks"))


@pytest.mark.parametrize("task", BUILT_IN)
def test_hash_covers_every_field_but_those_listed(task):
    config = experiment_config(task=task)
    hashed, every = set(leaves(result_values(config))), set(leaves(to_dict(config)))
    assert every - hashed == COMMON_LEFT_OUT | LEFT_OUT[task]


def test_a_configuration_holds_its_own_task_only():
    assert "text" not in to_dict(experiment_config())
    assert "walks" not in to_dict(experiment_config(task="text"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", 1),
        ("walks.graph.p_in", 0.3),
        ("walks.rules.jump_lengths", (4, 8)),
        ("walks.num_walks", 21_000),
        ("model.dropout", 0.1),
        ("training.learning_rate", 1e-3),
        ("training.eval_interval", 100),
        ("walks.gate.rule_threshold", 0.7),
        ("hooks.update", ("identity",)),
    ],
)
def test_field_that_changes_the_result_changes_the_hash(name, value):
    assert config_hash(with_field(name, value)) != config_hash(experiment_config())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("name", "mine"),
        ("description", "words"),
        ("tags", ("a",)),
        ("output_dir", "elsewhere"),
        ("training.log_interval", 3),
        ("training.num_workers", 2),
        ("training.cuda_graph", False),
        ("training.timeout_seconds", 5.0),
        ("start.lock_timeout", 5.0),
        ("start.weights", "somewhere"),
        ("checkpoint.every_steps", 7),
        ("checkpoint.keep_last", 9),
        ("tracking.log_with", ("wandb",)),
        ("tracking.project", "p"),
    ],
)
def test_field_without_effect_leaves_the_hash(name, value):
    assert config_hash(with_field(name, value)) == config_hash(experiment_config())


def test_weights_that_a_run_starts_from_change_the_hash():
    assert config_hash(experiment_config(), "digest") != config_hash(experiment_config())


def test_hash_is_the_same_in_every_process():
    script = (
        "from accel_train.config.identity import config_hash\n"
        "from accel_train.tasks.registry import config_class\n"
        "print(config_hash(config_class('walks')()))"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == config_hash(experiment_config())


@settings(deadline=None)  # a busy machine is no defect
@given(st.integers(0, 2**63 - 1), st.floats(1e-6, 1.0))
def test_hash_survives_storage(seed, rate):
    config = experiment_config(seed=seed, training=TrainingConfig(learning_rate=rate))
    assert config_hash(from_dict(to_dict(config), config_class("walks"))) == config_hash(config)


@pytest.mark.parametrize(
    ("values", "slug"),
    [
        ({}, "walks_n500_w64_d128_L4_s42"),
        ({"task": "text", "seed": 7}, "text_bpe8000_w64_d128_L4_s7"),
        ({"task": "text", "text": TextConfig(tokenizer="char")}, "text_char_w64_d128_L4_s42"),
    ],
)
def test_experiment_id_is_readable_and_ends_in_the_hash(values, slug):
    config = experiment_config(**values)
    assert experiment_id(config) == f"{slug}-{config_hash(config)[:8]}"


def test_differing_fields_are_listed_with_both_values():
    ours, theirs = to_dict(experiment_config()), to_dict(with_field("training.learning_rate", 1e-3))
    assert differing_fields(ours, theirs) == ["training.learning_rate: 0.0003 here, 0.001 there"]


def test_equal_configurations_differ_in_nothing():
    config = experiment_config()
    assert differing_fields(to_dict(config), to_dict(dataclasses.replace(config))) == []
