"""What the pipeline looks at before it begins."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from configs import experiment_config

from accel_train.config.sections import CheckpointConfig, ModelConfig, StartConfig
from accel_train.errors import EXIT_PREREQUISITES, ConfigError, PhaseFailed
from accel_train.model import size
from accel_train.pipeline import prerequisites
from accel_train.pipeline.command import parse_options
from accel_train.pipeline.prerequisites import check_space, read_configuration, record_of, run_dir_of
from accel_train.runs.record import new_record, write_record
from accel_train.tasks.text.config import TextConfig
from accel_train.tasks.text.task import TextTask

# -- the configuration ---------------------------------------------------------------------


def test_the_built_in_corpus_has_an_example_of_its_own(capsys):
    config = read_configuration(parse_options([]))
    assert (config.task, config.section.corpus) == ("text", "builtin")
    assert "text_quick.yaml" in capsys.readouterr().out


@pytest.mark.parametrize("corpus", [["--corpus-path", "a.txt"], ["--corpus-url", "http://a/b"]])
def test_any_other_corpus_has_the_default_example(corpus, capsys):
    config = read_configuration(parse_options(corpus))
    assert config.section.corpus == corpus[1]
    assert "text_default.yaml" in capsys.readouterr().out


def test_options_win_over_the_file_and_are_told(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text("task: text\nseed: 3\ntraining:\n  max_epochs: 9\n")
    config = read_configuration(parse_options(["--config", str(path), "--epochs", "2"]))
    assert (config.seed, config.training.max_epochs) == (3, 2)
    assert f"{path}, with --training.max_epochs=2\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--epochs", "0"], "--epochs: 0 must be at least 1"),
        (["--learning-rate", "0"], "--learning-rate: 0.0 must be positive"),
        (["--vocab-size", "10"], "--vocab-size: 10 must be more than 260 (all bytes)"),
        (["--corpus-sha256", "abc"], "--corpus-sha256: 'abc' must be 64 hexadecimal digits"),
        (["--config", "/nowhere.yaml"], "--config: '/nowhere.yaml' does not exist; check the path"),
    ],
)
def test_a_wrong_value_is_told_by_its_option(arguments, line):
    with pytest.raises(PhaseFailed) as caught:
        read_configuration(parse_options(arguments))
    assert (str(caught.value), caught.value.exit_code) == (line, EXIT_PREREQUISITES)


def test_a_field_without_an_option_is_told_by_its_name(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("task: text\ntext:\n  gate:\n    val_loss_threshold: -1\n")
    with pytest.raises(PhaseFailed, match=r"^text\.gate\.val_loss_threshold: -1 must not be negative, or null \(in "):
        read_configuration(parse_options(["--config", str(path)]))


def test_a_configuration_of_another_task_is_refused(tmp_path):
    path = tmp_path / "walks.yaml"
    path.write_text("task: walks\n")
    with pytest.raises(PhaseFailed, match=r"walks\.yaml describes another task than text"):
        read_configuration(parse_options(["--config", str(path)]))


def test_another_task_is_told_before_options_that_it_lacks(tmp_path):
    path = tmp_path / "walks.yaml"
    path.write_text("task: walks\n")
    with pytest.raises(PhaseFailed, match="describes another task"):
        read_configuration(parse_options(["--config", str(path), "--tokenizer", "char"]))


# -- room on disk and in memory ------------------------------------------------------------


def config(out, **changes):
    values = {"text": TextConfig(builtin_bytes=1000), "output_dir": str(out), "name": "mine", **changes}
    return experiment_config(task="text", **values)


@pytest.fixture
def free(monkeypatch):
    """Sets the free bytes of the disk."""

    def set_free(count):
        monkeypatch.setattr(prerequisites.shutil, "disk_usage", lambda _path: SimpleNamespace(free=count))

    return set_free


def needed(chosen):
    copies = chosen.checkpoint.keep_last + 2
    weights = 12 * size.transformer_parameters(chosen.model, chosen.section.vocab_size)
    return copies * weights + 2 * 1000 + 50_000_000


def test_a_disk_with_just_enough_room_will_do(tmp_path, free, capsys):
    chosen = config(tmp_path)
    free(needed(chosen))
    check_space(chosen, tmp_path)
    assert f"MB free in {tmp_path}, about" in capsys.readouterr().out


def test_a_disk_with_a_byte_too_few_is_refused(tmp_path, free):
    chosen = config(tmp_path)
    free(needed(chosen) - 1)
    with pytest.raises(PhaseFailed, match=r"MB needed; free some, or choose another --output-dir") as caught:
        check_space(chosen, tmp_path)
    assert caught.value.exit_code == EXIT_PREREQUISITES


@pytest.mark.parametrize(
    "changes",
    [{"checkpoint": CheckpointConfig(keep_last=9)}, {"model": ModelConfig(d_model=256)}],
    ids=["checkpoints", "model"],
)
def test_more_checkpoints_or_a_larger_model_need_more(tmp_path, free, changes):
    free(needed(config(tmp_path)))
    with pytest.raises(PhaseFailed):
        check_space(config(tmp_path, **changes), tmp_path)


def test_a_large_corpus_needs_room_twice(tmp_path, free):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.txt").write_bytes(b"a" * 600)
    (corpus / "b.txt").write_bytes(b"b" * 401)
    (corpus / "c.bin").write_bytes(b"c" * 10_000)
    chosen = config(tmp_path, text=TextConfig(corpus=str(corpus)))
    free(needed(chosen) + 2)
    check_space(chosen, tmp_path)
    free(needed(chosen) + 1)
    with pytest.raises(PhaseFailed):
        check_space(chosen, tmp_path)


@pytest.mark.parametrize("place", ["mine/checkpoints", "corpora/corpus-x"])
def test_what_an_earlier_call_has_written_counts(tmp_path, free, place):
    chosen = config(tmp_path)
    (tmp_path / place).mkdir(parents=True)
    (tmp_path / place / "file").write_bytes(b"x" * 500)
    free(needed(chosen) - 500)
    check_space(chosen, tmp_path)


@pytest.mark.parametrize(("status", "refused"), [("completed", False), ("running", True)])
def test_a_finished_run_needs_no_more_room(tmp_path, free, status, refused):
    chosen = config(tmp_path)
    write_result(chosen, status)
    free(0)
    if refused:
        with pytest.raises(PhaseFailed):
            check_space(chosen, tmp_path)
    else:
        check_space(chosen, tmp_path)


def test_a_model_that_memory_will_hardly_hold_is_a_warning(tmp_path, free, monkeypatch, capsys):
    chosen = config(tmp_path)
    free(needed(chosen))
    monkeypatch.setattr(size.psutil, "virtual_memory", lambda: SimpleNamespace(available=1))
    monkeypatch.setattr(size.torch.cuda, "is_available", lambda: False)
    check_space(chosen, tmp_path)
    assert "training needs about" in capsys.readouterr().out


# -- the run -------------------------------------------------------------------------------


def write_result(chosen, status="running"):
    record = new_record(chosen, TextTask)
    record.status = status
    directory = run_dir_of(chosen)
    directory.mkdir(exist_ok=True)
    write_record(directory, record)
    return record


def test_a_named_run_lives_under_its_name(tmp_path):
    assert run_dir_of(config(tmp_path)) == tmp_path / "mine"


def test_weights_that_a_run_starts_from_are_part_of_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(prerequisites, "resolve_weights", lambda _config: (Path("w"), "digest"))
    plain = config(tmp_path, name=None)
    started = config(tmp_path, name=None, start=StartConfig(weights="somewhere"))
    assert run_dir_of(started) != run_dir_of(plain)


def test_weights_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"start\.weights"):
        run_dir_of(config(tmp_path, start=StartConfig(weights=str(tmp_path / "nowhere"))))


def test_the_record_of_a_run_is_read(tmp_path):
    written = write_result(config(tmp_path), "completed")
    found = record_of(tmp_path / "mine")
    assert (found.status, found.run_id) == ("completed", written.run_id)


@pytest.mark.parametrize("content", [None, "", "{", "[]"])
def test_a_record_that_cannot_be_read_is_none(tmp_path, content):
    if content is not None:
        (tmp_path / "result.json").write_text(content)
    assert record_of(tmp_path) is None
