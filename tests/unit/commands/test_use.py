"""``accel-train evaluate`` and ``accel-train generate``."""

import json
import sys
import types

import pytest

from accel_train.commands.main import main
from accel_train.errors import CheckpointError


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


def test_a_generated_sequence_is_asked_for_by_number(inference, capsys):
    assert main(["generate", "results/walks", "--num", "3", "--seed", "0"]) == 0
    assert capsys.readouterr().out == "Había una vez\n"
    assert inference.calls == [{"num": 3, "seed": 0}]


def test_damaged_checkpoints_are_a_failure(inference, capsys):
    def fail(_run_dir):
        raise CheckpointError("every checkpoint is damaged")

    inference.evaluate = fail
    assert main(["evaluate", "results/x"]) == 1
    assert capsys.readouterr().err == "accel-train: error: every checkpoint is damaged\n"
