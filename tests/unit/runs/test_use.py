"""A run in use: found, judged again, made to write."""

import dataclasses
import json
import shutil

import pytest
import torch
from configs import experiment_config
from safetensors.torch import load_file

from accel_train.config.sections import ModelConfig, StartConfig, TrainingConfig
from accel_train.errors import CheckpointError, CheckpointMismatch, CheckpointsDamaged, ConfigError
from accel_train.runs.directory import run_directory
from accel_train.runs.experiment import run
from accel_train.runs.initial_weights import WEIGHTS
from accel_train.runs.use import evaluate, find_run, generate, load_model, saved_data
from accel_train.tasks.base import Evaluation, GenerationOptions
from accel_train.tasks.walks.config import GateConfig, GraphConfig, RulesConfig, WalksConfig
from accel_train.tasks.walks.task import WalksTask

CONFIG = experiment_config(
    walks=WalksConfig(
        num_walks=64,
        walk_length=17,
        graph=GraphConfig(n=20, K=2, p_in=0.6, p_out=0.3),
        rules=RulesConfig(jumpers_per_block=1, jump_lengths=(2, 3)),
        gate=GateConfig(num_sequences=30, prompt_length=4, min_rule_checks=5, stop_on_pass=False),
    ),
    model=ModelConfig(d_model=16, n_layers=1, n_heads=2, max_seq_len=16),
    training=TrainingConfig(batch_size=16, max_epochs=1),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = dataclasses.replace(CONFIG, output_dir=str(tmp_path_factory.mktemp("results")))
    assert run(config) == 0
    return run_directory(config)


def test_a_run_is_found_with_its_newest_checkpoint(finished):
    found = find_run(finished)
    assert (found.step, found.checkpoint.name) == (4, "step_0000004")
    assert found.config.section == CONFIG.section


def test_the_model_of_a_run_is_loaded_without_its_data(finished):
    model = load_model(str(finished))
    assert (model.vocab_size, model.config) == (20, CONFIG.model)


def test_the_loaded_weights_are_those_of_the_checkpoint(finished):
    saved = load_file(find_run(finished).checkpoint / WEIGHTS)
    loaded = load_model(finished).state_dict()
    assert all(torch.equal(loaded[name].cpu(), saved[name]) for name in saved)


def test_a_run_with_weights_of_another_is_found(finished, tmp_path):
    """The digest of the weights is part of its hash, and the record has it when the source is gone."""
    config = dataclasses.replace(
        CONFIG, name="second", output_dir=str(tmp_path), start=StartConfig(weights=str(finished))
    )
    assert run(config) == 0
    assert find_run(run_directory(config)).step == 4


def test_a_damaged_newest_checkpoint_is_passed_over(finished, tmp_path):
    copy = shutil.copytree(finished, tmp_path / "copy")
    newest = copy / "checkpoints" / "step_0000007"
    shutil.copytree(copy / "checkpoints" / "step_0000004", newest)
    assert find_run(copy).step == 4, "a folder with the manifest of another step is not sound"


def test_a_run_with_damaged_checkpoints_alone_is_refused(finished, tmp_path):
    copy = shutil.copytree(finished, tmp_path / "copy")
    (copy / "checkpoints" / "step_0000004" / WEIGHTS).write_bytes(b"no weights")
    with pytest.raises(CheckpointsDamaged):
        load_model(copy)


def test_a_run_is_not_judged_on_other_data(finished, monkeypatch):
    monkeypatch.setattr(WalksTask, "digests", lambda task: {"corpus": "f" * 64})
    with pytest.raises(CheckpointMismatch, match="was trained on the corpus with SHA-256 None"):
        evaluate(finished)


def test_judging_changes_nothing_in_the_run(finished):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    evaluate(finished)
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_judged_again_a_run_gets_the_verdict_of_its_record(finished):
    verdict, recorded = evaluate(finished), json.loads((finished / "result.json").read_text())["gate"]
    assert verdict["step"] == 4
    assert verdict["criteria"] == recorded["criteria"]
    assert verdict["evidence"] == recorded["evidence"]


def test_a_conclusion_is_the_verdict_of_a_run_judged_again(finished, monkeypatch):
    seen = []

    def conclude(task, trained, work):
        seen.append(trained)
        return Evaluation(None, {"cost": 1.0}, ["a sample"])

    monkeypatch.setattr(WalksTask, "conclude", conclude)
    found = evaluate(finished)
    assert found == {"run": str(finished), "step": 4, "metrics": {"cost": 1.0}, "samples": ["a sample"]}
    assert (seen[0].evaluation["passed"], seen[0].epoch_losses) == (False, [])


def test_walks_are_written_a_line_each(finished):
    lines = list(generate(finished, GenerationOptions(num=3)))
    assert [len(line.split()) for line in lines] == [17, 17, 17]


def test_an_option_of_another_task_is_refused(finished):
    with pytest.raises(ConfigError, match=r"--top-k: 3 is no option of the task of this run, which is walks"):
        list(generate(finished, GenerationOptions(top_k=3)))


def test_more_walks_than_prompts_are_refused(finished):
    with pytest.raises(ConfigError, match="held-out prompts"):
        list(generate(finished, GenerationOptions(num=31)))


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is not a run directory"):
        find_run(tmp_path)


def test_a_run_without_a_checkpoint_is_told(finished, tmp_path):
    (tmp_path / "config.yaml").write_text((finished / "config.yaml").read_text())
    with pytest.raises(ConfigError, match="has no checkpoint yet"):
        find_run(tmp_path)


def test_checkpoints_of_another_run_are_refused(finished, tmp_path):
    (tmp_path / "config.yaml").write_text((finished / "config.yaml").read_text().replace("seed: 42", "seed: 7"))
    (tmp_path / "checkpoints").symlink_to(finished / "checkpoints")
    with pytest.raises(CheckpointError, match="was written under configuration"):
        find_run(tmp_path)


def test_a_checkpoint_tells_which_data_it_saw(finished):
    assert saved_data(find_run(finished).checkpoint) == {}
