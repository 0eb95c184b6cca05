"""A user's mistake is one line that names field, value and cure; exit code 2; nothing is written."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from harness import (
    TINY,
    kill_tree,
    launch,
    metrics,
    run,
    run_dir,
    wait_for,
    write_config,
)

from accel_train.commands.main import train_main

WRONG_FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown field": (
        {"training": {"learning_rte": 0.1}},
        "training.learning_rte: 0.1 is not a field .*did you mean training.learning_rate",
    ),
    "wrong type": ({"training": {"learning_rate": "fast"}}, "training.learning_rate: 'fast' must be a number"),
    "n not divisible by K": (
        {"walks": {"graph": {"n": 21}}},
        "walks.graph.n: 21 is not divisible by walks.graph.K = 2; choose a multiple",
    ),
    "jump longer than the context": (
        {"walks": {"rules": {"jump_lengths": [2, 17]}, "gate": {"unscorable_rules": "error"}}},
        r"walks.rules.jump_lengths: 17 is a jump longer than the context \(model.max_seq_len = 16\).*shorten the jump",
    ),
    "batch not divisible by accumulation": (
        {"training": {"gradient_accumulation_steps": 5}},
        "training.batch_size: 12 is not divisible by training.gradient_accumulation_steps = 5",
    ),
    "dataset smaller than one batch": (
        {"walks": {"num_walks": 11}},
        "walks.num_walks: 11 gives 11 training samples, fewer than training.batch_size = 12; use more walks",
    ),
    "heads that do not divide the width": (
        {"model": {"n_heads": 3}},
        "model.n_heads: 3 does not divide model.d_model = 16; choose a divisor",
    ),
    "walks shorter than the context": (
        {"walks": {"walk_length": 16}},
        r"walks.walk_length: 16 is shorter than model.max_seq_len \+ 1 = 17; use longer walks",
    ),
    "graph that cannot be connected": (
        {"walks": {"graph": {"p_in": 0.001, "p_out": 0.002}}},
        "walks.graph.p_in: 0.001 with walks.graph.p_out = 0.002 gave no strongly connected graph "
        ".*raise walks.graph.p_in or walks.graph.p_out",
    ),
    "gate that cannot be passed": (
        {"walks": {"gate": {"rule_threshold": 1.0}}},
        "walks.gate.rule_threshold: 1.0 can never be exceeded; choose a value below 1",
    ),
    "unknown hook": (
        {"hooks": {"update": ["nosuch"]}},
        "hooks.update: 'nosuch' is no hook; use one of identity, or package.module:factory",
    ),
    "hook that cannot be imported": (
        {"hooks": {"forward": ["no_such_package:factory"]}},
        "hooks.forward: 'no_such_package:factory' cannot be imported: .*is it installed or on PYTHONPATH",
    ),
    "weights that lead nowhere": (
        {"start": {"weights": "/nowhere"}},
        "start.weights: '/nowhere' is not a directory; name a ",
    ),
}


def as_train(arguments: list[str]) -> int:
    """What ``scripts/train.py`` calls."""
    return train_main(arguments[1:])


@pytest.mark.parametrize(("change", "line"), WRONG_FIELDS.values(), ids=WRONG_FIELDS.keys())
def test_a_wrong_field_is_one_line_and_leaves_nothing(tmp_path: Path, here, change, line: str) -> None:
    config = write_config(tmp_path / "c.yaml", TINY, change)
    argv = ["train", "--config", config, "--output_dir", tmp_path / "results"]
    shown = here(*argv)
    assert (shown.code, shown.out) == (2, "")
    assert re.fullmatch(f"accel-train: error: {line}.*\n", shown.err), shown.err
    assert here(*argv, entry=as_train) == shown
    assert list(tmp_path.iterdir()) == [config]


def test_a_file_that_does_not_parse_is_named_with_its_line(tmp_path: Path, here) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("training:\n  betas: [0.9\nseed: 1\n")
    shown = here("train", "--config", config, "--output_dir", tmp_path / "results")
    assert (shown.code, shown.out) == (2, "")
    assert shown.err.startswith(f"accel-train: error: --config: '{config}' is not valid YAML: line 3, ")
    assert shown.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [config]


def test_weights_of_another_shape_are_refused_before_anything_is_written(tmp_path: Path, here) -> None:
    source, results = tmp_path / "source", tmp_path / "results"
    short = {"training": {"max_steps": 1}, "checkpoint": {"every_steps": None}}
    assert here("train", "--config", write_config(tmp_path / "c.yaml", TINY, short), "--output_dir", source).code == 0
    wider = write_config(tmp_path / "d.yaml", TINY, short, {"model": {"d_model": 32}})
    shown = here("train", "--config", wider, "--output_dir", results, "--start.weights", run_dir(source))
    assert (shown.code, shown.out) == (2, "")
    assert shown.err.count("\n") == 1
    assert re.search(r"start.weights: '.*' does not fit this model; make the model sections agree", shown.err)
    assert len(shown.err) < 1000, "the line is for people"
    assert not results.exists()


# The tests may run as root, whom no permission bits stop: a file in the way and a file system that
# takes no directories do, and both are to be had everywhere.
@pytest.mark.parametrize(
    ("where", "rule"),
    [
        ("{tmp_path}/file/results", "is not a directory: {tmp_path}/file is a file"),
        ("/proc/results", r"is not writable|cannot be written \(/proc/results.*; choose another directory"),
    ],
)
def test_an_output_directory_that_cannot_be_written(tmp_path: Path, here, where: str, rule: str) -> None:
    (tmp_path / "file").touch()
    where, rule = where.format(tmp_path=tmp_path), rule.format(tmp_path=re.escape(str(tmp_path)))
    config = write_config(tmp_path / "c.yaml", TINY)
    shown = here("train", "--config", config, "--output_dir", where)
    assert (shown.code, shown.out) == (2, "")
    assert re.fullmatch(f"accel-train: error: output_dir: '{where}' .*({rule}).*\n", shown.err), shown.err
    assert not Path(where).exists()


def test_an_output_directory_on_a_read_only_file_system(tmp_path: Path, here) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("mounting takes root")
    try:
        config = write_config(tmp_path / "c.yaml", TINY)
        shown = here("train", "--config", config, "--output_dir", disk / "results")
        assert (shown.code, shown.out) == (2, "")
        expected = f"output_dir: '{disk}/results' is not writable ({disk}); choose another"
        assert shown.err == f"accel-train: error: {expected}\n"
    finally:
        subprocess.run(["umount", disk], check=True)


def test_the_script_says_it_in_one_line_too(tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", TINY, {"output_dir": str(tmp_path / "results")})
    output = run(config, 0, "--hooks.update", "[nosuch]", expect=2)
    assert re.fullmatch("accel-train: error: hooks.update: 'nosuch' is no hook.*\n", output)
    assert list(tmp_path.iterdir()) == [config]


@pytest.fixture
def slow_rank_0(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PYTHONPATH that holds rank 0 back: when the others leave first, the launcher ends it."""
    directory = tmp_path_factory.mktemp("slow")
    delay = "import os, time\nif os.environ.get('RANK') == '0':\n    time.sleep(1)\n"
    (directory / "sitecustomize.py").write_text(delay)
    return str(directory)


@pytest.mark.parametrize(
    ("change", "env", "line"),
    [
        (
            {"training": {"batch_size": 13}},
            {},
            "training.batch_size: 13 is not divisible by 2 processes x 1 accumulation steps; choose a multiple of 2",
        ),
        (
            {"walks": {"graph": {"p_in": 0.001, "p_out": 0.001}}},  # found by rank 0 alone
            {},
            "walks.graph.p_in: 0.001 with walks.graph.p_out = 0.001 gave no strongly connected graph",
        ),
        pytest.param(
            {},
            {"ACCELERATE_USE_CPU": None},
            "WORLD_SIZE: 2 processes were launched but each sees 1: they did not find each other; on CPU set "
            "ACCELERATE_USE_CPU=true and launch with --multi_gpu --num_processes N",
            marks=pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="with a GPU they do find each other"),
        ),
    ],
    ids=["batch of unequal parts", "graph", "processes that did not find each other"],
)
def test_two_processes_say_it_once(
    tmp_path: Path, slow_rank_0: str, change, env: dict[str, str | None], line: str
) -> None:
    config = write_config(tmp_path / "c.yaml", TINY, change, {"output_dir": str(tmp_path / "results")})
    output = run(config, 2, expect=1, PYTHONPATH=slow_rank_0, **env)  # 1 is the launcher's own code
    assert output.count(f"accel-train: error: {line}") == 1
    assert output.count(line) == 1
    assert output.count("exitcode  : 2 ") >= 1
    assert list(tmp_path.iterdir()) == [config]


def test_a_run_directory_in_use_names_the_process_that_uses_it(tmp_path: Path, here) -> None:
    results = tmp_path / "results"
    endless = {"output_dir": str(results), "training": {"max_epochs": 10_000}}
    config = write_config(tmp_path / "c.yaml", TINY, endless)
    process = launch(config, 0)
    try:
        wait_for(lambda: process.poll() is not None or _logged(results), "the first steps")
        before = (run_dir(results) / "config.yaml").read_bytes()
        shown = here("train", "--config", config, "--start.lock_timeout", 0.2)
        assert shown.code == 75
        assert "waiting for process" in shown.lines("lock")[0]
        assert shown.err.count("\n") == 1
        assert f"is in use by process {process.pid} on host {os.uname().nodename}" in shown.err
        assert "then run the same command again" in shown.err
        assert (run_dir(results) / "config.yaml").read_bytes() == before
        assert here("runs", results, "--status", run_dir(results).name).code == 3

        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 75
        assert here("runs", results, "--status", run_dir(results).name).code == 75
    finally:
        if process.poll() is None:
            kill_tree(process.pid)
        process.communicate()


def _logged(results: Path) -> bool:
    try:
        return bool(metrics(results))
    except (AssertionError, FileNotFoundError):
        return False


def test_an_unknown_run_is_one_line(tmp_path: Path, here) -> None:
    for command in ("evaluate", "generate"):
        shown = here(command, tmp_path / "none")
        assert (shown.code, shown.out) == (2, "")
        assert re.fullmatch("accel-train: error: RUN: '.*' is not a run directory .*\n", shown.err)
