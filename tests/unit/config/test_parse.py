"""Options and YAML files become a configuration, or one line that names the option or the file at fault."""

import sys
from pathlib import Path

import pytest
from configs import experiment_config

from accel_train.config import parse
from accel_train.config.sections import EarlierRun, TrainingConfig
from accel_train.errors import ConfigError
from accel_train.tasks.registry import config_class

ROOT = Path(__file__).resolve().parents[3]


def parse_config(argv):
    """As the command line does it."""
    return parse.parse_config(argv, config_class)


@pytest.fixture
def write(tmp_path):
    def write(text, name="run.yaml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


# -- what is accepted ----------------------------------------------------------------------


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


def test_the_last_of_several_files_wins(write):
    first, second = write("seed: 3\nname: a\n", "a.yaml"), write("seed: 4\n", "b.yaml")

    config, _ = parse_config(["--config", first, "--config", second])

    assert config == experiment_config(seed=4, name="a")


def test_null_is_no_text_where_a_field_takes_null(write):
    path = write("name: mine\n")
    assert parse_config(["--config", path, "--name", "null"])[0].name is None
    assert parse_config(["--description", "null"])[0].description == "null"


def test_the_option_chooses_the_task_over_the_file(write):
    path = write("task: walks\n")
    config, _ = parse_config(["--config", path, "--task", "text", "--text.tokenizer", "char"])
    assert (config.section_name, config.section.tokenizer) == ("text", "char")


def test_the_file_chooses_the_task(write):
    config, _ = parse_config(["--config", write("task: text\ntext:\n  gate:\n    stop_on_pass: true\n")])
    assert config.text.gate.stop_on_pass is True


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


# -- what is refused -----------------------------------------------------------------------

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
    "value for a switch": (["--fresh=1"], "command line: '--fresh' takes no value"),
    "section in a section as a value": (
        ["--walks.graph", "3"],
        "walks.graph: '3' must be a section with fields of its own",
    ),
    "field of another task": (
        ["--text.corpus", "x"],
        "text.corpus: 'x' is not a field of the configuration; accel-train train --help lists them",
    ),
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
def test_a_wrong_option_is_one_line_and_exit_2(argv, line, capsys):
    with pytest.raises(ConfigError) as caught:
        parse_config(argv)
    assert (str(caught.value), caught.value.exit_code) == (line, 2)
    assert capsys.readouterr() == ("", "")


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
    "name of the class alone": (
        "section_name: walks\n",
        "section_name: 'walks' is not a field of the configuration; accel-train train --help lists them (in {file})",
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
def test_a_wrong_file_is_one_line_that_names_the_file(text, line, write):
    path = write(text)
    with pytest.raises(ConfigError) as caught:
        parse_config(["--config", path])
    message = str(caught.value)
    assert message.startswith(line.format(file=path))
    assert "\n" not in message


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


# -- limits, told where the value stands ---------------------------------------------------

LIMITS = [
    ("training.learning_rate", "0", "0 must be positive"),
    ("training.eval_interval", "0", "0 must be at least 1, or null"),
    ("training.max_grad_norm", "-1", "-1 must be positive, or null"),
    ("training.betas", "[0.9, 1.0]", "[0.9, 1.0] must lie in [0, 1)"),
    ("model.dropout", "1.0", "1.0 must lie in [0, 1)"),
    ("checkpoint.keep_last", "0", "0 must be at least 1"),
    ("start.lock_timeout", "-1", "-1 must not be negative"),
    ("walks.graph.p_in", "0.0", "0.0 must lie in (0, 1]"),
    ("walks.gate.rule_threshold", "1.5", "1.5 must lie in [0, 1]"),
    ("walks.rules.jump_lengths", "[4, 0]", "[4, 0] must be at least 1, or null"),
]
any_limit = pytest.mark.parametrize(("name", "text", "told"), LIMITS, ids=[row[0] for row in LIMITS])


@any_limit
def test_a_limit_that_an_option_breaks_is_told(name, text, told):
    with pytest.raises(ConfigError) as caught:
        parse_config([f"--{name}", text])
    assert str(caught.value) == f"{name}: {told}"


@any_limit
def test_a_limit_that_a_file_breaks_is_told_with_the_file(name, text, told, write):
    *sections, leaf = name.split(".")
    lines = [f"{'  ' * depth}{section}:" for depth, section in enumerate(sections)]
    path = write("\n".join([*lines, f"{'  ' * len(sections)}{leaf}: {text}"]))
    with pytest.raises(ConfigError) as caught:
        parse_config(["--config", path])
    assert str(caught.value) == f"{name}: {told} (in {path})"


# -- fields that moved ---------------------------------------------------------------------

MOVED = [
    ("walks", "graph.n", "walks.graph.n"),
    ("walks", "rules.jump_lengths", "walks.rules.jump_lengths"),
    ("walks", "gate.rule_threshold", "walks.gate.rule_threshold"),
    ("text", "gate.val_loss_threshold", "text.gate.val_loss_threshold"),
    ("walks", "training.init_from", "start.weights"),
    ("walks", "training.lock_timeout", "start.lock_timeout"),
]
any_move = pytest.mark.parametrize(("task", "before", "now"), MOVED, ids=[row[1] for row in MOVED])


@any_move
def test_an_option_that_moved_is_named_where_it_is_now(task, before, now):
    with pytest.raises(ConfigError) as caught:
        parse_config(["--task", task, f"--{before}", "3"])
    assert str(caught.value) == f"{before}: '3' is not a field of the configuration; did you mean {now}?"


@pytest.mark.parametrize("name", ["graph", "rules", "gate"])
def test_a_section_that_moved_is_named_where_it_is_now(name, write):
    path = write(f"{name}: {{}}\n")
    with pytest.raises(ConfigError) as caught:
        parse_config(["--config", path])
    told = f"is not a field of the configuration; did you mean walks.{name}? (in {path})"
    assert str(caught.value) == f"{name}: {{}} {told}"


@pytest.mark.parametrize(("before", "now"), [("init_from", "start.weights"), ("lock_timeout", "start.lock_timeout")])
def test_a_moved_field_in_a_file_is_named_with_the_file(before, now, write):
    path = write(f"training:\n  {before}: 3\n")
    with pytest.raises(ConfigError) as caught:
        parse_config(["--config", path])
    assert str(caught.value).endswith(f"did you mean {now}? (in {path})")


# -- a task of somebody's own --------------------------------------------------------------

OWN = """
from accel_train.config.fields import Count, section
from accel_train.tasks.base import Evaluation, Task

@section("own")
class Section:
    \"\"\"Things of my own.\"\"\"
    size: Count = 3
    \"\"\"How many things.\"\"\"

class Own(Task):
    name = "own"
    Config = Section
    vocab_size = 5
    def build(self, shared, work): return str(shared)
    def open(self, artifacts): return []
    def evaluate(self, model, losses, work): return Evaluation(None)
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A module with a task, importable for one test."""
    (tmp_path / "own_parsed_task.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "own_parsed_task"
    sys.modules.pop("own_parsed_task", None)


def test_an_own_task_has_a_section_with_options(own_module):
    config, _ = parse_config(["--task", f"{own_module}:Own", "--own.size", "7"])
    assert (config.task, config.section_name, config.section.size) == (f"{own_module}:Own", "own", 7)


def test_an_own_task_is_named_in_a_file(own_module, write):
    config, _ = parse_config(["--config", write(f"task: {own_module}:Own\nown:\n  size: 7\n")])
    assert config.own.size == 7


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--own.size", "0"], "own.size: 0 must be at least 1"),
        (["--own.size", "x"], "own.size: 'x' must be an integer"),
        (
            ["--own.sise", "4"],
            "own.sise: '4' is not a field of the configuration; did you mean own.size?",
        ),
        (
            ["--walks.num_walks", "4"],
            "walks.num_walks: '4' is not a field of the configuration; accel-train train --help lists them",
        ),
    ],
)
def test_a_wrong_option_of_an_own_task_is_one_line(own_module, arguments, line):
    with pytest.raises(ConfigError) as caught:
        parse_config(["--task", f"{own_module}:Own", *arguments])
    assert str(caught.value) == line


def test_help_of_an_own_task_shows_its_section_alone(own_module, capsys):
    with pytest.raises(SystemExit) as left:
        parse_config(["--task", f"{own_module}:Own", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert left.value.code == 0
    assert "own: Things of my own. --own.size N How many things. (default: 3)" in shown
    assert "--walks." not in shown


def test_help_of_a_built_in_task_shows_its_section_alone(capsys):
    with pytest.raises(SystemExit):
        parse_config(["--task", "text", "--help"])
    shown = capsys.readouterr().out
    assert "--text.gate.val_loss_threshold" in shown
    assert "--walks." not in shown


def test_the_printed_configuration_of_an_own_task_is_read_back(own_module, write, capsys):
    arguments = ["--task", f"{own_module}:Own", "--own.size", "7"]
    with pytest.raises(SystemExit):
        parse_config([*arguments, "--print_config"])
    assert parse_config(["--config", write(capsys.readouterr().out)]) == parse_config(arguments)


WRONG_TASKS = [
    ("walsk", "is not a task; did you mean walks?"),
    ("nowhere_at_all:Own", "cannot be imported: No module named 'nowhere_at_all'; is it installed or on PYTHONPATH?"),
    ("own_parsed_task:Absent", "names nothing: own_parsed_task has no 'Absent'"),
    ("own_parsed_task:Section", "is no accel_train.tasks.base.Task; derive the class from that"),
    (":Own", "names no module; write package.module:name"),
]
any_wrong_task = pytest.mark.parametrize(("task", "told"), WRONG_TASKS, ids=[row[0] for row in WRONG_TASKS])


@any_wrong_task
@pytest.mark.usefixtures("own_module")
def test_a_wrong_task_in_an_option_is_one_line(task, told):
    with pytest.raises(ConfigError) as caught:
        parse_config(["--task", task])
    assert str(caught.value) == f"task: {task!r} {told}"


@any_wrong_task
@pytest.mark.usefixtures("own_module")
def test_a_wrong_task_in_a_file_is_told_with_the_file(task, told, write):
    path = write(f"task: '{task}'\n")
    with pytest.raises(ConfigError) as caught:
        parse_config(["--config", path])
    assert str(caught.value) == f"task: {task!r} {told} (in {path})"


def test_a_task_that_is_no_text_is_told_with_the_file(write):
    path = write("task: 3\n")
    with pytest.raises(ConfigError) as caught:
        parse_config(["--config", path])
    assert str(caught.value) == f"task: 3 must be a text (in {path})"
