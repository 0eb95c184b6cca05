"""Which class a configuration's task names."""

import subprocess
import sys

import pytest
from configs import experiment_config

from accel_train.config.sections import ExperimentConfig
from accel_train.errors import ConfigError
from accel_train.tasks.registry import BUILT_IN, build_task, config_class, task_class
from accel_train.tasks.walks.task import WalksTask

MODULE = """
from dataclasses import dataclass
from accel_train.tasks.base import Evaluation, Task

class Nothing:
    pass

class Unnamed(Task):
    pass

@dataclass(frozen=True)
class Section:
    \"\"\"Own.\"\"\"
    size: int = 3

class Own(Task):
    name = "own"
    Config = Section
    vocab_size = 5
    def build(self, shared, work): return str(shared)
    def open(self, artifacts): return []
    def evaluate(self, model, losses, work): return Evaluation(None)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "own_module.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "own_module"
    sys.modules.pop("own_module", None)


@pytest.mark.parametrize("task", BUILT_IN)
def test_built_in_tasks_have_their_section(task):
    cls = config_class(task)
    assert issubclass(cls, ExperimentConfig)
    assert cls.section_name == task_class(task).name == task
    assert isinstance(getattr(cls(task=task), task), task_class(task).Config)


def test_build_task_gives_the_task_of_the_configuration():
    assert isinstance(build_task(experiment_config()), WalksTask)


def test_a_task_is_found_by_its_import_path(module):
    config = config_class(f"{module}:Own")(task=f"{module}:Own")
    assert (config.section.size, build_task(config).name) == (3, "own")


@pytest.mark.parametrize(
    ("task", "says"),
    [
        ("walsk", "did you mean walks"),
        ("nonsense", "walks, text, or package.module:Class"),
        ("no_such_module_here:Task", "cannot be imported"),
        ("own_module:Absent", "names nothing"),
        ("own_module:Nothing", "derive the class from that"),
        ("own_module:Unnamed", "has no name"),
    ],
)
def test_a_wrong_task_is_refused_with_the_reason(module, task, says):
    with pytest.raises(ConfigError, match="task") as caught:
        config_class(task)
    assert says in str(caught.value)


def test_sections_are_read_without_torch():
    script = (
        "import sys\n"
        "from accel_train.tasks.registry import config_class\n"
        "config_class('walks')(), config_class('text')()\n"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
