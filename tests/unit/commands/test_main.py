"""What the command line accepts, says and answers."""

import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from accel_train.commands.main import main, train_main
from accel_train.config import parse
from accel_train.config.identity import config_hash, experiment_id
from accel_train.config.sections import EarlierRun, TrainingConfig
from accel_train.errors import CheckpointError, ConfigError
from accel_train.runs.lock import RunLock
from accel_train.runs.record import new_record, write_record
from accel_train.tasks.registry import config_class, experiment_config
from accel_train.tasks.walks.task import WalksTask

ROOT = Path(__file__).resolve().parents[3]


def parse_config(argv):
    """As the command line does it."""
    return parse.parse_config(argv, config_class)


@pytest.fixture(autouse=True)
def outside_a_launcher(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)


@pytest.fixture
def write(tmp_path):
    def write(text, name="run.yaml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


@pytest.fixture
def experiment(monkeypatch):
    """A stand-in for the module that does the work; records its calls."""

    module = types.ModuleType("accel_train.runs.experiment")
    module.calls = []

    def run(config, *, earlier, command, reached):
        module.calls.append((config, earlier, command))
        return 75

    module.run = run
    monkeypatch.setitem(sys.modules, "accel_train.runs.experiment", module)
    return module


@pytest.fixture
def inference(monkeypatch):
    """A stand-in for the module that uses finished runs; records the options of ``generate``."""
    module = types.ModuleType("accel_train.runs.use")
    module.calls = []
    module.evaluate = lambda run_dir: {"run": str(run_dir), "passed": True, "metrics": {"loss": float("nan")}}

    def generate(_run_dir, options):
        module.calls.append(options.given())
        yield from ("Había", " una", " vez\n")

    module.generate = generate
    monkeypatch.setitem(sys.modules, "accel_train.runs.use", module)
    monkeypatch.setattr("accel_train.runs.use", module, raising=False)
    # The command is imported anew, here with the stand-in and after the test without it.
    sys.modules.pop("accel_train.commands.use", None)
    yield module
    sys.modules.pop("accel_train.commands.use", None)


# -- train: what is accepted ---------------------------------------------------------------


def test_no_options_give_the_defaults():
    assert parse_config([]) == (experiment_config(), EarlierRun())


def test_options_win_over_the_file_and_the_file_over_the_defaults(write):
    path = write("seed: 3\ntraining:\n  learning_rate: 1e-3\n  batch_size: 32\n")

    config, _ = parse_config(["--config", path, "--training.batch_size", "16"])

    assert config == experiment_config(seed=3, training=TrainingConfig(learning_rate=1e-3, batch_size=16))


def test_lists_and_nulls_become_tuples_and_none(write):
    path = write("walks:\n  rules:\n    jump_lengths: [4, 8]\ntraining:\n  max_grad_norm: null\n")

    config, _ = parse_config([f"--config={path}", "--training.betas", "[0.9, 0.95]", "--tags", "[a, b]"])

    assert config.walks.rules.jump_lengths == (4, 8)
    assert config.training.max_grad_norm is None
    assert config.training.betas == (0.9, 0.95)
    assert config.tags == ("a", "b")


def test_fresh_is_no_field_of_the_configuration():
    assert parse_config(["--fresh"]) == (experiment_config(), EarlierRun(fresh=True))


def test_what_to_do_about_damage_is_no_field_either_and_has_two_answers():
    assert parse_config(["--on_damage", "restart"]) == (experiment_config(), EarlierRun(on_damage="restart"))
    with pytest.raises(ConfigError, match=r"on_damage.*maybe"):
        parse_config(["--on_damage", "maybe"])


def test_printed_configuration_is_read_back(write, capsys):
    with pytest.raises(SystemExit) as left:
        parse_config(["--seed", "9", "--training.betas", "[0.5, 0.6]", "--print_config"])
    assert left.value.code == 0

    config, _ = parse_config(["--config", write(capsys.readouterr().out)])

    assert config == parse_config(["--seed", "9", "--training.betas", "[0.5, 0.6]"])[0]


def test_help_comes_from_the_docstrings(capsys):
    with pytest.raises(SystemExit) as left:
        parse_config(["--help"])
    shown = capsys.readouterr().out

    assert left.value.code == 0
    for text in ("Peak learning rate", "default: 0.0003", "Context length in tokens", "--fresh"):
        assert text in shown


def test_examples_are_valid():
    examples = sorted((ROOT / "examples").glob("*.yaml"))
    assert {"walks_quick.yaml", "walks_anchor.yaml"} <= {path.name for path in examples}
    for path in examples:
        parse_config(["--config", str(path)])


# -- train: what is refused ----------------------------------------------------------------

WRONG_OPTIONS = {
    "unknown field": (
        ["--training.learning_rte", "3"],
        "training.learning_rte: '3' is not a field of the configuration; did you mean training.learning_rate?",
    ),
    "unknown section": (
        ["--train.batch_size=4"],
        "train.batch_size: '4' is not a field of the configuration; did you mean training.batch_size?",
    ),
    "unknown field, nothing near": (
        ["--zzz", "1"],
        "zzz: '1' is not a field of the configuration; accel-train train --help lists them",
    ),
    "number": (["--training.learning_rate", "abc"], "training.learning_rate: 'abc' must be a number"),
    "integer": (["--seed", "1.5"], "seed: '1.5' must be an integer"),
    "float for integer": (["--training.max_epochs", "1e3"], "training.max_epochs: '1e3' must be an integer"),
    "bool for integer": (["--walks.graph.n=true"], "walks.graph.n: 'true' must be an integer"),
    "boolean": (["--walks.gate.stop_on_pass", "maybe"], "walks.gate.stop_on_pass: 'maybe' must be true or false"),
    "choice": (["--task", "foo"], "task: 'foo' is not a task; it is walks, text, or package.module:Class"),
    "pair": (["--training.betas", "[1]"], "training.betas: '[1]' must be a list of 2, each a number"),
    "list": (
        ["--walks.rules.jump_lengths", "[4,x]"],
        "walks.rules.jump_lengths: '[4,x]' must be null or a list such as [a, b], each an integer",
    ),
    "choice in a list": (
        ["--tracking.log_with", "[foo]"],
        "tracking.log_with: '[foo]' must be a list such as [a, b], each one of 'tensorboard', 'wandb', 'mlflow'",
    ),
    "section as a value": (["--training", "5"], "training: '5' must be a section with fields of its own"),
    "no value": (["--model.dropout"], "command line: '--model.dropout' needs a value"),
    "stray word": (["stray"], "command line: 'stray' is not an option; write --section.field VALUE"),
    "rule of the dataclass": (
        ["--walks.graph.n", "101"],
        "walks.graph.n: 101 is not divisible by walks.graph.K = 4; choose a multiple",
    ),
    "missing file": (["--config", "/nowhere.yaml"], "--config: '/nowhere.yaml' does not exist; check the path"),
    "directory": (["--config", "/"], "--config: '/' cannot be read: Is a directory"),
}


@pytest.mark.parametrize(("argv", "line"), WRONG_OPTIONS.values(), ids=WRONG_OPTIONS.keys())
def test_wrong_option_is_one_line_and_exit_2(argv, line, experiment, capsys):
    assert train_main(argv) == 2

    shown = capsys.readouterr()
    assert shown.err == f"accel-train: error: {line}\n"
    assert shown.out == ""
    assert experiment.calls == []


WRONG_FILES = {
    "unknown field": (
        "training:\n  learning_rte: 1\n",
        "training.learning_rte: 1 is not a field of the configuration; "
        "did you mean training.learning_rate? (in {file})",
    ),
    "unknown section": (
        "trainin:\n  batch_size: 1\n",
        "trainin: {{'batch_size': 1}} is not a field of the configuration; did you mean training? (in {file})",
    ),
    "type": ("training:\n  learning_rate: abc\n", "training.learning_rate: 'abc' must be a number (in {file})"),
    "section as a value": ("training: 5\n", "training: 5 must be a section with fields of its own (in {file})"),
    "rule of the dataclass": (
        "walks:\n  graph:\n    n: 101\n",
        "walks.graph.n: 101 is not divisible by walks.graph.K = 4; choose a multiple (in {file})",
    ),
    "YAML": (
        "training:\n  learning_rate: [0.5\nb: 3\n",
        "--config: '{file}' is not valid YAML: line 3, column 2: expected ',' or ']', but got ':'",
    ),
    "tab": ("training:\n\tbatch_size: 3\n", "--config: '{file}' is not valid YAML: line 2, column 1: "),
    "empty": ("", "--config: '{file}' holds no fields; write lines such as 'seed: 1'"),
    "list": ("- a\n", "--config: '{file}' holds no fields; write lines such as 'seed: 1'"),
    "binary": (b"\xff\xfe\x00", "--config: '{file}' is not UTF-8 text (byte 0); check the path"),
}


@pytest.mark.parametrize(("text", "line"), WRONG_FILES.values(), ids=WRONG_FILES.keys())
def test_wrong_file_is_one_line_that_names_the_file(text, line, write, experiment, capsys):
    path = write(text)

    assert train_main(["--config", path]) == 2

    shown = capsys.readouterr().err
    assert shown.startswith(f"accel-train: error: {line.format(file=path)}")
    assert shown.count("\n") == 1
    assert experiment.calls == []


def test_value_of_the_option_is_not_blamed_on_the_file(write):
    path = write("walks:\n  graph:\n    n: 100\n")
    with pytest.raises(ConfigError) as caught:
        parse_config(["--config", path, "--walks.graph.n", "101"])
    assert path not in str(caught.value)


def test_wrong_value_in_the_file_is_blamed_on_the_file_even_when_overridden(write):
    path = write("training:\n  learning_rate: abc\n")
    with pytest.raises(ConfigError, match="'abc' must be a number") as caught:
        parse_config(["--config", path, "--training.learning_rate", "0.1"])
    assert path in str(caught.value)


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_only_rank_0_speaks(rank, lines, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("accel_train.commands.main.LAST_WORDS_SECONDS", 0.01)
    assert train_main(["--seed", "x"]) == 2
    assert capsys.readouterr().err.count("\n") == lines


# -- train: what is run --------------------------------------------------------------------


def test_experiment_is_run_and_its_exit_code_returned(experiment):
    assert main(["train", "--seed", "5", "--fresh"]) == 75

    config, earlier, command = experiment.calls[0]
    assert (config.seed, earlier) == (5, EarlierRun(fresh=True))
    assert command == ["accel-train", "train", "--seed", "5", "--fresh"]


def test_configuration_that_the_experiment_refuses_is_one_line(experiment, capsys):
    def refuse(*_arguments, **_options):
        raise ConfigError("training.batch_size", 64, "is not divisible by 3 processes")

    experiment.run = refuse
    assert train_main([]) == 2
    assert capsys.readouterr().err == ("accel-train: error: training.batch_size: 64 is not divisible by 3 processes\n")


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


@pytest.mark.parametrize(
    "argv", [["--help"], ["train", "--help"], ["train", "--print_config"], ["train", "--seed", "x"]]
)
def test_help_and_errors_do_not_import_torch(argv):
    script = (
        "import sys\nfrom accel_train.commands.main import main\n"
        f"try:\n    code = main({argv!r})\nexcept SystemExit:\n    pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode == 0


# -- runs ----------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path):
    """Three runs: one passed, one missed, one interrupted."""
    config = experiment_config()
    for name, status, passed in (
        ("good", "completed", True),
        ("missed", "completed", False),
        ("cut", "running", False),
    ):
        record = new_record(config, WalksTask, experiment_id=experiment_id(config), config_hash=config_hash(config))
        record.status = status
        record.gate.passed = passed
        if passed:
            figures = {"final_edge_compliance": 0.9876, "final_rule_compliance": 0.8765, "epochs_trained": 4}
            record.metrics.scalars |= figures
        (tmp_path / name).mkdir()
        write_record(tmp_path / name, record)
    return tmp_path


def test_runs_are_a_table_with_aligned_columns(results, capsys):
    assert main(["runs", str(results)]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["ID", "STATUS", "EPOCHS", "GATE", "EDGE", "RULE", "AGE"]
    rows = {line.split()[0]: line for line in lines[1:]}
    assert rows.keys() == {"good", "missed", "cut"}
    assert rows["good"].split()[1:6] == ["completed", "4", "passed", "0.988", "0.876"]
    assert rows["cut"].split()[1] == "interrupted"
    assert {row.index(row.split()[1]) for row in rows.values()} == {lines[0].index("STATUS")}


def test_only_passed_runs_are_listed_on_demand(results, capsys):
    assert main(["runs", str(results), "--passed", "--json"]) == 0
    assert [run["id"] for run in json.loads(capsys.readouterr().out)] == ["good"]


@pytest.mark.parametrize(("name", "status", "code"), [("good", "completed", 0), ("cut", "interrupted", 75)])
def test_status_is_printed_and_is_the_exit_code(results, capsys, name, status, code):
    assert main(["runs", str(results), "--status", name]) == code
    assert capsys.readouterr().out == f"{status}\n"


def test_status_of_a_live_run(results, capsys):
    with RunLock(results / "cut", timeout=0):
        assert main(["runs", str(results), "--status", "cut", "--json"]) == 3
    assert json.loads(capsys.readouterr().out) == {"id": "cut", "status": "live"}


@pytest.mark.parametrize("argv", [["runs", "/nowhere"], ["runs", "/tmp", "--status", "no-such-run"]])
def test_unknown_run_or_directory_is_one_line_and_exit_2(argv, capsys):
    assert main(argv) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("accel-train: error: /")
    assert shown.err.count("\n") == 1
    assert shown.out == ""


def test_runs_do_not_import_torch(results):
    script = (
        "import sys\nfrom accel_train.commands.main import main\n"
        f"main(['runs', {str(results)!r}])\nsys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=False).returncode == 0


# -- evaluate, generate --------------------------------------------------------------------


def test_evaluation_is_printed_as_strict_json(inference, capsys):
    assert main(["evaluate", "results/x"]) == 0
    assert json.loads(capsys.readouterr().out) == {"run": "results/x", "passed": True, "metrics": {"loss": None}}


def test_text_is_printed_as_it_comes_with_the_options_that_were_given(inference, capsys):
    line = [
        "generate",
        "results/texts",
        "--prompt",
        "Había",
        "--max-tokens",
        "7",
        "--top-p",
        "0.9",
        "--temperature",
        "0",
    ]
    assert main(line) == 0
    assert capsys.readouterr().out == "Había una vez\n"
    assert inference.calls == [{"prompt": "Había", "max_tokens": 7, "top_p": 0.9, "temperature": 0.0}]


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--top-k", "0", "'0' is not a positive whole number"),
        ("--top-p", "1.5", "'1.5' is not a number above 0 to 1"),
        ("--top-p", "0", "'0' is not a number above 0 to 1"),
        ("--temperature", "-1", "'-1' is not a number at least 0"),
        ("--temperature", "hot", "'hot' is not a number at least 0"),
    ],
)
def test_a_wrong_option_of_generate_is_one_line(option, value, says, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["generate", "results/texts", f"{option}={value}"])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_damaged_checkpoints_are_a_failure(inference, capsys):
    def fail(_run_dir):
        raise CheckpointError("every checkpoint is damaged")

    inference.evaluate = fail
    assert main(["evaluate", "results/x"]) == 1
    assert capsys.readouterr().err == "accel-train: error: every checkpoint is damaged\n"


@pytest.mark.parametrize(
    "argv", [[], ["runz"], ["generate", "x", "--num", "0"], ["generate", "x", "--num", "a"], ["evaluate"]]
)
def test_wrong_command_line_is_one_line_and_exit_2(argv, capsys):
    with pytest.raises(SystemExit) as left:
        main(argv)
    assert left.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith("accel-train: error: ")
    assert shown.count("\n") == 1


def test_console_script_is_installed_beside_python():
    script = Path(sys.executable).parent / "accel-train"
    done = subprocess.run([script, "--help"], capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0
    assert "runs" in done.stdout
