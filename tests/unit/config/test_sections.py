"""What a configuration is, which ones are refused, and what its hash covers."""

import dataclasses
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accel_train.config.sections import (
    CheckpointConfig,
    ExperimentConfig,
    GateConfig,
    GraphConfig,
    HooksConfig,
    ModelConfig,
    RulesConfig,
    TextConfig,
    TrackingConfig,
    TrainingConfig,
    WalksConfig,
    canonical_json,
    check_output_dir,
    config_hash,
    differing_fields,
    experiment_id,
    from_dict,
    hashed_fields,
    run_directory,
    to_dict,
)
from accel_train.errors import ConfigError

SECTIONS = {
    "graph": GraphConfig,
    "rules": RulesConfig,
    "walks": WalksConfig,
    "text": TextConfig,
    "model": ModelConfig,
    "training": TrainingConfig,
    "gate": GateConfig,
    "checkpoint": CheckpointConfig,
    "hooks": HooksConfig,
    "tracking": TrackingConfig,
}


def leaves(values, prefix=""):
    for name, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def with_field(name, value):
    """A default configuration with one dotted field changed."""
    section, _, field = name.rpartition(".")
    changed = {field: value} if not section else {section: SECTIONS[section](**{field: value})}
    return ExperimentConfig(**changed)


# -- fields --------------------------------------------------------------------------------


def test_sections_are_the_contract():
    names = [field.name for field in dataclasses.fields(ExperimentConfig)]
    assert names == ["task", "seed", "name", "description", "tags", "output_dir", *SECTIONS]


@pytest.mark.parametrize("cls", [ExperimentConfig, *SECTIONS.values()])
def test_every_field_is_typed_and_frozen(cls):
    assert typing.get_type_hints(cls).keys() == {field.name for field in dataclasses.fields(cls)}
    with pytest.raises(dataclasses.FrozenInstanceError):
        cls().x = 1


def test_defaults_are_those_of_the_sources():
    training = TrainingConfig()
    assert (training.learning_rate, training.weight_decay, training.max_epochs) == (3e-4, 0.01, 50)
    assert (training.batch_size, training.max_grad_norm, training.warmup_ratio) == (64, 1.0, 0.1)
    assert (GateConfig().num_sequences, GateConfig().edge_threshold, GateConfig().rule_threshold) == (1000, 0.95, 0.8)
    assert CheckpointConfig().keep_last == 3


def test_plain_values_and_back():
    config = ExperimentConfig(
        seed=7,
        tags=("a",),
        rules=RulesConfig(jump_lengths=(4, 8)),
        training=TrainingConfig(betas=(0.9, 0.95)),
    )
    assert from_dict(to_dict(config)) == config


def test_stored_configuration_with_an_unknown_field_is_refused():
    with pytest.raises(ConfigError, match="lrr"):
        from_dict({"training": {"lrr": 1}})


def test_jump_lengths_come_from_the_context_unless_given():
    assert RulesConfig(jump_scales=(0.25, 0.5)).lengths(64) == (16, 32)
    assert RulesConfig(jump_lengths=(3, 5)).lengths(64) == (3, 5)
    assert RulesConfig(jump_scales=(0.001,)).lengths(64) == (1,)


def test_gate_ends_training_for_walks_unless_told_otherwise():
    assert ExperimentConfig().stop_on_pass is True
    assert ExperimentConfig(gate=GateConfig(stop_on_pass=False)).stop_on_pass is False


# -- refusals ------------------------------------------------------------------------------

WRONG = [
    (lambda: GraphConfig(n=101), "graph.n", "choose a multiple"),
    (lambda: GraphConfig(n=65_536), "graph.n", "uint16"),
    (lambda: GraphConfig(K=1), "graph.K", "at least 2"),
    (lambda: GraphConfig(p_in=0.0), "graph.p_in", "(0, 1]"),
    (lambda: GraphConfig(p_out=1.5), "graph.p_out", "(0, 1]"),
    (lambda: RulesConfig(jump_lengths=(4, 0)), "rules.jump_lengths", "at least 1 step"),
    (lambda: RulesConfig(jump_lengths=()), "rules.jump_lengths", "at least one"),
    (lambda: RulesConfig(jump_scales=(-1.0,)), "rules.jump_scales", "positive"),
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
    (lambda: GateConfig(rule_threshold=1.5), "gate.rule_threshold", "[0, 1]"),
    (lambda: CheckpointConfig(keep_last=0), "checkpoint.keep_last", "at least 1"),
    (lambda: CheckpointConfig(every_steps=0), "checkpoint.every_steps", "at least 1"),
    (lambda: ExperimentConfig(seed=-1), "seed", "2**63"),
    (lambda: ExperimentConfig(name="a/b"), "name", "directory name"),
    (lambda: ExperimentConfig(name=".."), "name", "directory name"),
    (lambda: ExperimentConfig(name="corpora"), "name", "another"),
    (lambda: ExperimentConfig(walks=WalksConfig(walk_length=64)), "walks.walk_length", "longer walks"),
    (lambda: ExperimentConfig(walks=WalksConfig(num_walks=5)), "walks.num_walks", "smaller batch"),
    (lambda: ExperimentConfig(gate=GateConfig(prompt_length=65)), "gate.prompt_length", "shorter prompt"),
    (
        lambda: ExperimentConfig(gate=GateConfig(unscorable_rules="error"), rules=RulesConfig(jump_scales=(1.5,))),
        "rules.jump_scales",
        "shorten the jump",
    ),
    (
        lambda: ExperimentConfig(gate=GateConfig(unscorable_rules="error"), rules=RulesConfig(jump_lengths=(65,))),
        "rules.jump_lengths",
        "shorten the jump",
    ),
    (lambda: ExperimentConfig(rules=RulesConfig(jumpers_per_block=126)), "rules.jumpers_per_block", "126"),
]


@pytest.mark.parametrize(
    ("build", "field", "cure"), WRONG, ids=[f"{row[1]}-{index}" for index, row in enumerate(WRONG)]
)
def test_wrong_value_is_refused_in_one_line_with_field_value_and_cure(build, field, cure):
    with pytest.raises(ConfigError) as caught:
        build()

    assert caught.value.field == field
    message = str(caught.value)
    assert message.startswith(f"{field}: {caught.value.value!r} ")
    assert cure in message
    assert "\n" not in message


def test_output_directory_must_be_writable_and_is_not_created(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")

    check_output_dir(ExperimentConfig(output_dir=str(tmp_path / "new" / "deep")))
    with pytest.raises(ConfigError, match="output_dir"):
        check_output_dir(ExperimentConfig(output_dir=str(tmp_path / "file" / "below")))
    monkeypatch.setattr("os.access", lambda path, _mode: path != tmp_path)  # root may write anywhere
    with pytest.raises(ConfigError, match=r"output_dir.*not writable"):
        check_output_dir(ExperimentConfig(output_dir=str(tmp_path / "new")))

    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# -- hash and names ------------------------------------------------------------------------

OF_TEXT = {
    "gate.val_loss_threshold",
    "gate.overfit_gap_threshold",
    "gate.repetition_threshold",
    "gate.language_threshold",
    "gate.loss_rises_threshold",
    "gate.latency_p95_ms_threshold",
    "gate.rss_mb_threshold",
}
OF_WALKS = {
    "gate.num_sequences",
    "gate.prompt_length",
    "gate.edge_threshold",
    "gate.rule_threshold",
    "gate.sampled_rule_threshold",
    "gate.rule_lift_threshold",
    "gate.min_rule_checks",
    "gate.unscorable_rules",
}


LEFT_OUT = {
    "name",
    "description",
    "tags",
    "output_dir",
    "training.log_interval",
    "training.num_workers",
    "training.cuda_graph",
    "training.timeout_seconds",
    "training.lock_timeout",
    "training.init_from",
    "checkpoint.every_steps",
    "checkpoint.keep_last",
    "checkpoint.verify",
    "tracking.log_with",
    "tracking.project",
    *OF_TEXT,
}
"""Fields that cannot change the trained bits. ``init_from`` enters the hash as its weights' digest."""


def test_hash_covers_every_field_but_those_listed():
    config = ExperimentConfig()
    hashed, every = set(leaves(hashed_fields(config))), set(leaves(to_dict(config)))

    assert {name for name in every - hashed if not name.startswith("text.")} == LEFT_OUT
    assert not [name for name in hashed if name.startswith("text.")]  # the other task's section


def test_hash_of_the_text_task_covers_its_own_fields():
    config = ExperimentConfig(task="text")
    hashed, every = set(leaves(hashed_fields(config))), set(leaves(to_dict(config)))
    left_out = {name for name in every - hashed if name.partition(".")[0] not in {"graph", "rules", "walks"}}
    assert left_out == (LEFT_OUT - OF_TEXT) | OF_WALKS | {"text.download_timeout", "text.download_attempts"}
    assert not [name for name in hashed if name.partition(".")[0] in {"graph", "rules", "walks"}]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", 1),
        ("graph.p_in", 0.3),
        ("rules.jump_lengths", (4, 8)),
        ("walks.num_walks", 21_000),
        ("model.dropout", 0.1),
        ("training.learning_rate", 1e-3),
        ("training.eval_interval", 100),
        ("gate.rule_threshold", 0.7),
        ("hooks.update", ("identity",)),
    ],
)
def test_field_that_changes_the_result_changes_the_hash(name, value):
    assert config_hash(with_field(name, value)) != config_hash(ExperimentConfig())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("name", "mine"),
        ("description", "words"),
        ("tags", ("a",)),
        ("output_dir", "elsewhere"),
        ("text.vocab_size", 500),
        ("training.log_interval", 3),
        ("training.num_workers", 2),
        ("training.cuda_graph", False),
        ("training.timeout_seconds", 5.0),
        ("training.lock_timeout", 5.0),
        ("training.init_from", "somewhere"),
        ("checkpoint.every_steps", 7),
        ("checkpoint.keep_last", 9),
        ("tracking.log_with", ("wandb",)),
        ("tracking.project", "p"),
    ],
)
def test_field_that_cannot_change_the_result_leaves_the_hash(name, value):
    assert config_hash(with_field(name, value)) == config_hash(ExperimentConfig())


def test_weights_that_a_run_starts_from_change_the_hash():
    assert config_hash(ExperimentConfig(), "digest") != config_hash(ExperimentConfig())


def test_hash_is_the_same_in_every_process():
    script = "from accel_train.config.sections import *; print(config_hash(ExperimentConfig()))"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == config_hash(ExperimentConfig())


@settings(deadline=None)  # a busy machine is no defect
@given(st.integers(0, 2**63 - 1), st.floats(1e-6, 1.0))
def test_hash_survives_storage(seed, rate):
    config = ExperimentConfig(seed=seed, training=TrainingConfig(learning_rate=rate))
    assert config_hash(from_dict(to_dict(config))) == config_hash(config)


def test_experiment_id_is_readable_and_ends_in_the_hash():
    config = ExperimentConfig()
    assert experiment_id(config) == f"walks_n500_w64_d128_L4_s42-{config_hash(config)[:8]}"


def test_run_lives_under_its_name_or_else_its_id():
    config = ExperimentConfig(output_dir="out")
    assert run_directory(config) == Path("out") / experiment_id(config)
    assert run_directory(dataclasses.replace(config, name="mine")) == Path("out/mine")


def test_canonical_json_does_not_depend_on_the_order():
    assert (
        canonical_json({"b": 1, "a": [1.5, None]})
        == canonical_json({"a": [1.5, None], "b": 1})
        == '{"a":[1.5,null],"b":1}'
    )


def test_differing_fields_are_listed_with_both_values():
    ours, theirs = to_dict(ExperimentConfig()), to_dict(with_field("training.learning_rate", 1e-3))
    assert differing_fields(ours, theirs) == ["training.learning_rate: 0.0003 here, 0.001 there"]
