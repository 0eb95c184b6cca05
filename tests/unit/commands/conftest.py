"""Stand-ins for what the commands call, and files to read."""

import sys
import types

import pytest


@pytest.fixture(autouse=True)
def outside_a_launcher(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)


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
