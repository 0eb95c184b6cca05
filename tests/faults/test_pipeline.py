"""SIGKILL in every phase of the pipeline: the same command finishes with the same bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import warm
from faults import fault, slow
from harness import checkpoints, environment, record
from texts import tiny_text

from accel_train import observer

SCRIPT = Path(__file__).with_name("faulty_pipeline.py")
CORPUS, TOKENIZER, TOKENS = 1, 2, 3
CASES = [
    *[
        (point, number)
        for point in (observer.CORPUS_BEGUN, observer.CORPUS_BUILT)
        for number in (CORPUS, TOKENIZER, TOKENS)
    ],
    (observer.STEP_DONE, 70),
    (observer.EVALUATION_BEGUN, 2),
    (observer.COMMIT_SEALED, 3),
    (observer.RECORD_WRITTEN_ASIDE, 2),
    (observer.CONCLUSION_BEGUN, 1),
]
QUICK = {(observer.CORPUS_BUILT, TOKENS), (observer.CONCLUSION_BEGUN, 1)}


def pipeline(directory: Path, *, expect: int | None = 0, **env: str) -> str:
    config, output = tiny_text(directory), directory / "output.txt"
    line = [str(SCRIPT), "--config", str(config), "--output-dir", str(directory / "out")]
    code = warm.run_ranks(line, [environment(**env)], output, timeout=150)
    printed = output.read_text()
    assert expect is None or code == expect, printed
    return printed


def bits(out: Path) -> dict[str, object]:
    """What must not depend on a kill: weights, tokenizer, tokens, curves, samples, what the judgement rests on."""
    final, found = checkpoints(out)[-1], record(out)
    evidence = {name: value for name, value in found["gate"]["evidence"].items() if name != "deployment"}
    return {
        "checkpoint": final.name,
        "weights": (final / "model.safetensors").read_bytes(),
        "tokenizer": (final / "tokenizer.json").read_bytes(),
        "tokens": [path.read_bytes() for path in sorted((out / "corpora").rglob("*.bin"))],
        "samples": [path.read_text() for path in sorted(final.parents[1].glob("samples/*"))],
        "curves": found["curves"],
        "evidence": evidence,
        "fingerprint": found["provenance"]["data_fingerprint"],
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    directory = tmp_path_factory.mktemp("undisturbed")
    pipeline(directory)
    return bits(directory / "out")


@pytest.mark.parametrize(("point", "number"), [pytest.param(*c, marks=() if c in QUICK else slow) for c in CASES])
def test_a_pipeline_killed_in_any_phase_ends_with_the_same_bits(
    tmp_path: Path, undisturbed: dict[str, object], point: str, number: int
) -> None:
    mark = tmp_path / "killed"
    output = pipeline(tmp_path, expect=None, FAULT=fault(point, mark, number=number))
    assert mark.exists(), f"{point} was never reached: {output}"
    again = pipeline(tmp_path)
    assert "success in " in again
    assert bits(tmp_path / "out") == undisturbed
    assert not list((tmp_path / "out" / "corpora").glob(".tmp-*"))
    assert json.loads((tmp_path / "out" / "validation_report.json").read_text())["passed"]
