"""``accel-train train``: what is run, what is refused before anything is run, and how it is told."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from accel_train.commands.main import main, train_main
from accel_train.config.sections import EarlierRun
from accel_train.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]

OWN = """
from accel_train.config.fields import section
from accel_train.tasks.base import Task

@section("own")
class Section:
    size: int = 3

class Own(Task):
    name = "own"
    Config = Section
    vocab_size = 5
    def build(self, shared, work): ...
    def open(self, artifacts): ...
    def evaluate(self, model, losses, work): ...
"""


def test_experiment_is_run_and_its_exit_code_returned(experiment):
    assert main(["train", "--seed", "5", "--fresh"]) == 75

    config, earlier, command = experiment.calls[0]
    assert (config.seed, earlier) == (5, EarlierRun(fresh=True))
    assert command == ["accel-train", "train", "--seed", "5", "--fresh"]


WRONG = {
    "unknown option": (
        ["--training.learning_rte", "3"],
        "training.learning_rte: '3' is not a field of the configuration; did you mean training.learning_rate?",
    ),
    "moved option": (
        ["--graph.n", "100"],
        "graph.n: '100' is not a field of the configuration; did you mean walks.graph.n?",
    ),
    "limit": (["--training.learning_rate", "0"], "training.learning_rate: 0 must be positive"),
    "fields that do not fit": (
        ["--walks.graph.n", "101"],
        "walks.graph.n: 101 is not divisible by walks.graph.K = 4; choose a multiple",
    ),
    "task": (["--task", "foo"], "task: 'foo' is not a task; it is walks, text, or package.module:Class"),
    "stray word": (["stray"], "command line: 'stray' is not an option; write --section.field VALUE"),
    "missing file": (["--config", "/nowhere.yaml"], "--config: '/nowhere.yaml' does not exist; check the path"),
}


@pytest.mark.parametrize(("argv", "line"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_option_is_told_before_anything_is_run(argv, line, experiment, capsys):
    assert train_main(argv) == 2

    shown = capsys.readouterr()
    assert shown.err == f"accel-train: error: {line}\n"
    assert shown.out == ""
    assert experiment.calls == []


def test_a_wrong_file_is_told_before_anything_is_run(tmp_path, experiment, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("training: 5\n")
    assert train_main(["--config", str(path)]) == 2
    told = f"training: 5 must be a section with fields of its own (in {path})"
    assert capsys.readouterr().err == f"accel-train: error: {told}\n"
    assert experiment.calls == []


def test_an_own_task_is_run_by_its_import_path(tmp_path, monkeypatch, experiment):
    (tmp_path / "own_train_task.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["train", "--task", "own_train_task:Own", "--own.size", "7"]) == 75
    assert experiment.calls[0][0].section.size == 7


def test_configuration_that_the_experiment_refuses_is_one_line(experiment, capsys):
    def refuse(*_arguments, **_options):
        raise ConfigError("training.batch_size", 64, "is not divisible by 3 processes")

    experiment.run = refuse
    assert train_main([]) == 2
    assert capsys.readouterr().err == ("accel-train: error: training.batch_size: 64 is not divisible by 3 processes\n")


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_only_rank_0_speaks(rank, lines, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("accel_train.commands.main.LAST_WORDS_SECONDS", 0.01)
    assert train_main(["--seed", "x"]) == 2
    assert capsys.readouterr().err.count("\n") == lines


def test_script_works_from_anywhere(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "train.py", "--walks.graph.n", "101"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert (
        done.stderr
        == "accel-train: error: walks.graph.n: 101 is not divisible by walks.graph.K = 4; choose a multiple\n"
    )


def test_script_runs_the_package_beside_it_whatever_is_installed(tmp_path):
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "train.py", tmp_path / "scripts")
    commands = tmp_path / "accel_train" / "commands"
    commands.mkdir(parents=True)
    (commands.parent / "__init__.py").touch()
    (commands / "__init__.py").touch()
    (commands / "main.py").write_text("def train_main():\n    return 42\n")

    done = subprocess.run([sys.executable, tmp_path / "scripts" / "train.py"], cwd="/", check=False, timeout=60)

    assert done.returncode == 42


def without_torch(argv, directory):
    """Whether the command leaves torch alone; also what it printed."""
    script = (
        "import sys\nfrom accel_train.commands.main import main\n"
        f"try:\n    code = main({argv!r})\nexcept SystemExit:\n    pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=directory, capture_output=True, text=True, check=False)
    return done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--help"], "COMMAND"),
        (["train", "--help"], "--walks.graph.n"),
        (["train", "--task", "text", "--help"], "--text.tokenizer"),
        (["train", "--task", "own_train_task:Own", "--help"], "--own.size"),
        (["train", "--print_config"], "num_walks: 20000"),
        (["train", "--seed", "x"], "must be an integer"),
        (["train", "--graph.n", "100"], "did you mean walks.graph.n?"),
        (["pipeline", "--help"], "--corpus-path"),
    ],
)
def test_help_and_errors_do_not_import_torch(argv, says, tmp_path):
    (tmp_path / "own_train_task.py").write_text(OWN)
    left_alone, shown = without_torch(argv, tmp_path)
    assert left_alone
    assert says in shown
