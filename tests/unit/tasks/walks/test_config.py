"""The section of the walks task: defaults and refusals."""

import pytest
from configs import experiment_config

from accel_train.config.sections import ModelConfig, TrainingConfig
from accel_train.errors import ConfigError
from accel_train.tasks.walks.config import GateConfig, GraphConfig, RulesConfig, WalksConfig


def whole(**section):
    return experiment_config(walks=WalksConfig(**section))


def test_defaults_are_those_of_the_source():
    gate = GateConfig()
    assert (gate.num_sequences, gate.edge_threshold, gate.rule_threshold, gate.stop_on_pass) == (1000, 0.95, 0.8, True)


def test_jump_lengths_come_from_the_context_unless_given():
    assert RulesConfig(jump_scales=(0.25, 0.5)).lengths(64) == (16, 32)
    assert RulesConfig(jump_lengths=(3, 5)).lengths(64) == (3, 5)
    assert RulesConfig(jump_scales=(0.001,)).lengths(64) == (1,)


WRONG = [
    (lambda: GraphConfig(n=101), "walks.graph.n", "choose a multiple"),
    (lambda: GraphConfig(n=65_536), "walks.graph.n", "uint16"),
    (lambda: GraphConfig(K=1), "walks.graph.K", "at least 2"),
    (lambda: GraphConfig(p_in=0.0), "walks.graph.p_in", "(0, 1]"),
    (lambda: GraphConfig(p_out=1.5), "walks.graph.p_out", "(0, 1]"),
    (lambda: RulesConfig(jump_lengths=(4, 0)), "walks.rules.jump_lengths", "at least 1"),
    (lambda: RulesConfig(jump_lengths=()), "walks.rules.jump_lengths", "at least one"),
    (lambda: RulesConfig(jump_scales=(-1.0,)), "walks.rules.jump_scales", "positive"),
    (lambda: RulesConfig(jump_scales=()), "walks.rules.jump_scales", "at least one"),
    (lambda: GateConfig(rule_threshold=1.5), "walks.gate.rule_threshold", "[0, 1]"),
    (lambda: whole(walk_length=64), "walks.walk_length", "longer walks"),
    (lambda: whole(num_walks=5), "walks.num_walks", "smaller batch"),
    (lambda: whole(gate=GateConfig(prompt_length=65)), "walks.gate.prompt_length", "shorter prompt"),
    (
        lambda: whole(gate=GateConfig(unscorable_rules="error"), rules=RulesConfig(jump_scales=(1.5,))),
        "walks.rules.jump_scales",
        "shorten the jump",
    ),
    (
        lambda: whole(gate=GateConfig(unscorable_rules="error"), rules=RulesConfig(jump_lengths=(65,))),
        "walks.rules.jump_lengths",
        "shorten the jump",
    ),
    (lambda: whole(rules=RulesConfig(jumpers_per_block=126)), "walks.rules.jumpers_per_block", "126"),
]


@pytest.mark.parametrize(("build", "field", "cure"), WRONG, ids=[f"{row[1]}-{n}" for n, row in enumerate(WRONG)])
def test_wrong_value_is_one_line_with_field_value_and_cure(build, field, cure):
    with pytest.raises(ConfigError) as caught:
        build()
    assert caught.value.field == field
    message = str(caught.value)
    assert message.startswith(f"{field}: {caught.value.value!r} ")
    assert cure in message
    assert "\n" not in message


def test_walks_that_fill_one_context_are_enough():
    model, training = ModelConfig(max_seq_len=16), TrainingConfig(batch_size=8)
    config = experiment_config(walks=WalksConfig(walk_length=17, num_walks=8), model=model, training=training)
    assert config.section.slug == "n500"
