"""SIGKILL and a full disk in every phase of the pipeline: the same command finishes with the same bits."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import texts
import warm
from faults import Mount, fault, filled, slow
from harness import ROOT, checkpoints, environment, record, wait_for
from texts import signalled_in_training, tiny_text
from web import Web, gives, stalls

from accel_train.process import fault_points

SCRIPT = Path(__file__).with_name("faulty_pipeline.py")
CORPUS, TOKENIZER, TOKENS = 1, 2, 3
CASES = [
    (fault_points.CORPUS_BEGUN, CORPUS),
    *[(fault_points.CORPUS_BUILT, number) for number in (CORPUS, TOKENIZER, TOKENS)],
    (fault_points.STEP_DONE, 70),
    (fault_points.EVALUATION_BEGUN, 2),
    (fault_points.COMMIT_SEALED, 3),
    (fault_points.RECORD_WRITTEN_ASIDE, 2),
    (fault_points.CONCLUSION_BEGUN, 1),
    (fault_points.REPORT_BEGUN, 1),
    (fault_points.REPORT_BEGUN, 4),
]
QUICK = (fault_points.CONCLUSION_BEGUN, 1)


def pipeline(directory: Path, *options: object, out: Path | None = None, expect: int | None = 0, **env: str) -> str:
    """Run the pipeline of a tiny text in a forked process; returns the output."""
    config, output = tiny_text(directory), directory / "output.txt"
    output.unlink(missing_ok=True)
    line = [SCRIPT, "--config", config, "--output-dir", out or directory / "out", *options]
    code = warm.run_ranks([*map(str, line)], [environment(**env)], output, timeout=150)
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
def undisturbed_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("undisturbed")
    pipeline(directory)
    return directory / "out"


@pytest.fixture(scope="module")
def undisturbed(undisturbed_out: Path) -> dict[str, object]:
    return bits(undisturbed_out)


@pytest.mark.parametrize(("point", "number"), [pytest.param(*c, marks=() if c == QUICK else slow) for c in CASES])
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


@slow
@pytest.mark.parametrize(
    ("point", "number"),
    [
        (fault_points.CORPUS_BEGUN, CORPUS),
        (fault_points.CORPUS_BEGUN, TOKENIZER),
        (fault_points.CORPUS_BEGUN, TOKENS),
        (fault_points.CONCLUSION_BEGUN, 1),
    ],
)
def test_a_pipeline_that_is_told_to_stop_in_any_phase_leaves_with_75_and_goes_on(
    tmp_path: Path, undisturbed: dict[str, object], point: str, number: int
) -> None:
    mark = tmp_path / "told"
    injected = fault(point, mark, number=number, do="run", command="kill -TERM $PPID")
    output = pipeline(tmp_path, expect=75, FAULT=injected)
    assert mark.exists()
    assert "run the same command again" in output
    assert not list((tmp_path / "out" / "corpora").glob(".tmp-*"))
    pipeline(tmp_path)
    assert bits(tmp_path / "out") == undisturbed


@slow
def test_a_pipeline_killed_in_a_download_ends_with_the_same_bits(
    tmp_path: Path, undisturbed_out: Path, undisturbed: dict[str, object]
) -> None:
    """The corpus is the built-in one, from a server that falls silent in the middle of it."""
    content = next((undisturbed_out / "corpora").glob("builtin-*/corpus.txt")).read_bytes()
    half, out = len(content) // 2, tmp_path / "out"
    with Web(stalls(content[:half], announced=len(content)), gives(content)) as web:
        options = ["--config", tiny_text(tmp_path), "--output-dir", out, "--corpus-url", web.url]
        process = subprocess.Popen([sys.executable, str(SCRIPT), *map(str, options)], env=environment())

        def arrived() -> bool:
            return [path.stat().st_size for path in out.glob("corpora/.tmp-*/corpus.txt")] == [half]

        wait_for(arrived, "half of the corpus")
        process.kill()
        process.wait()
        assert not list(out.glob("corpora/download-*"))
        pipeline(tmp_path, "--corpus-url", web.url)
        assert web.ranges == [None, None], "what came before the kill is not trusted"
    assert bits(out) == undisturbed


@slow
@pytest.mark.parametrize(
    ("point", "number", "code"),
    [
        (fault_points.CORPUS_BEGUN, CORPUS, 2),
        (fault_points.CORPUS_BEGUN, TOKENIZER, 3),
        (fault_points.SAVE_BEGUN, 3, 4),
        (fault_points.REPORT_BEGUN, 1, 5),
    ],
)
def test_a_disk_that_becomes_full_in_any_phase(
    tmp_path: Path, mount: Mount, undisturbed: dict[str, object], point: str, number: int, code: int
) -> None:
    disk, mark = tmp_path / "disk", tmp_path / "filled"
    disk.mkdir()
    mount(disk, "-t", "tmpfs", "-o", "size=100M", "tmpfs")
    injected = fault(point, mark, number=number, do="run", command=filled(disk))
    output = pipeline(tmp_path, out=disk / "out", expect=code, FAULT=injected)
    assert mark.exists()
    assert "Traceback" not in output
    assert "No space left on device" in output
    (disk / "ballast").unlink()
    pipeline(tmp_path, out=disk / "out")
    assert bits(disk / "out") == undisturbed


@slow
def test_another_corpus_than_that_of_the_checkpoint_is_refused(tmp_path: Path) -> None:
    """Both are named by their digests; with the old one back, the run goes on."""
    corpus, mark, out = tmp_path / "mine.txt", tmp_path / "killed", tmp_path / "out"
    text = "".join(f"The {number} sheep went home over the hill, and nobody saw them.\n" for number in range(1500))
    corpus.write_text(text)
    options = ["--corpus-path", corpus, "--vocab-size", 300]
    pipeline(tmp_path, *options, expect=None, FAULT=fault(fault_points.STEP_DONE, mark, number=70))
    assert mark.exists()
    saved = json.loads((checkpoints(out)[-1] / "state.json").read_text())["data"]

    corpus.write_text(text.replace("home", "away"))
    output = pipeline(tmp_path, *options, expect=4)
    assert f"corpus with SHA-256 {saved['corpus']}, here is the corpus with SHA-256 " in output
    assert "Traceback" not in output

    corpus.write_text(text)
    pipeline(tmp_path, *options, expect=None)
    found = record(out)
    assert (found["status"], len(found["provenance"]["resumes"])) == ("completed", 1)


@slow
def test_ctrl_c_in_training_and_the_same_command_goes_on(tmp_path: Path, undisturbed: dict[str, object]) -> None:
    """The terminal sends it to every process of the pipeline."""
    out = tmp_path / "out"
    signalled_in_training(out, signal.SIGINT, "--config", tiny_text(tmp_path), "--output-dir", out)
    assert record(out)["status"] == "preempted"
    pipeline(tmp_path)
    assert bits(out) == undisturbed


@slow
def test_training_on_two_processes_is_preempted_and_goes_on(tmp_path: Path) -> None:
    config, out = tiny_text(tmp_path), tmp_path / "out"
    # Found beside the interpreter: no environment needs to be activated.
    launcher = f"accelerate launch --config_file {ROOT / 'accelerate_config.yaml'} --multi_gpu --num_processes 2"
    options = ["--config", config, "--output-dir", out, "--launcher", f"{launcher} --main_process_port 0"]
    output = signalled_in_training(out, signal.SIGTERM, *options)
    assert record(out)["status"] == "preempted", output
    again = texts.pipeline(*options, fresh=True)
    assert again.code == 0, again.out + again.err
    assert record(out)["provenance"]["world_sizes"] == [2, 2]
