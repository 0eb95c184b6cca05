"""One command from a corpus to a validated model: what it leaves, what it skips, every exit code by a real fault."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import venv
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from harness import ROOT, Shown, checkpoints, environment, in_terminal, metrics, record, run_dir
from texts import PIPELINE, pipeline, signalled_in_training, tiny_text
from web import Web, fails, gives, redirects, stalls, truncates

from accel_train.files.atomic import sha256_file
from accel_train.pipeline import prerequisites, reports
from accel_train.pipeline.command import main as pipeline_main
from accel_train.pipeline.command import parse_options
from accel_train.pipeline.run import Pipeline
from accel_train.process.work import pass_by
from accel_train.runs.record import record_schema as load_schema
from accel_train.tasks.text.builtin import builtin_text

SPANISH = (
    "Había una vez un pescador que vivía junto al río con su hijo y no tenía nada más que una red.\n" * 600
).encode()


def complaint(shown: Shown) -> str:
    """The one line of error; no traceback of ours."""
    assert 'File "' not in shown.err, shown.err
    lines = [line for line in shown.err.splitlines() if "error: " in line]
    assert len(lines) == 1, shown.err
    return lines[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Shown]:
    """The configuration, output directory and output of a pipeline that succeeded."""
    directory = tmp_path_factory.mktemp("finished")
    config, out = tiny_text(directory), directory / "out"
    shown = pipeline("--config", config, "--output-dir", out, fresh=True)
    assert shown.code == 0, shown.out + shown.err
    return config, out, shown


def copied(finished: tuple[Path, Path, Shown], directory: Path) -> tuple[Path, Path]:
    shutil.copytree(finished[1], directory / "out")
    return finished[0], directory / "out"


# -- success -------------------------------------------------------------------------------


def test_every_phase_is_headed_and_timed_and_the_artifacts_are_listed(finished: tuple[Path, Path, Shown]) -> None:
    _, _, shown = finished
    for number, phase in enumerate(("Prerequisites", "Corpus", "Tokenizer", "Training", "Validation"), 1):
        assert f"== {number}/5 {phase} " in shown.out
        assert f"{phase.lower()} in " in shown.out
    for name in (
        "model.safetensors",
        "tokenizer.json",
        "result.json",
        "training_metrics.json",
        "validation_report.json",
    ):
        assert any(line.endswith(name) and " kB " in line for line in shown.out.splitlines()), name
    assert "success in " in shown.out
    assert shown.out.count("skipped") == 0


def test_the_loss_is_told_in_nats_per_token_and_in_bits_per_byte(finished: tuple[Path, Path, Shown], here) -> None:
    _, out, shown = finished
    scalars = record(out)["metrics"]["scalars"]
    nats, bits = f"{scalars['final_val_loss']:.4f}", f"{scalars['val_bits_per_byte']:.4f}"
    assert f"validation loss {nats}  bits per byte {bits}" in shown.lines("epoch")[-1]
    assert f"; {bits} bits per byte (" in shown.lines("completed")[0]
    assert shown.lines("measured")[0].startswith(f"{nats} nats per token, {bits} bits per byte on the held-out text")
    listed = [line.split() for line in here("runs", out).out.splitlines()]
    assert listed[1][listed[0].index("BPB")] == f"{scalars['val_bits_per_byte']:.3f}"


def test_the_record_and_the_metrics_are_whole(finished: tuple[Path, Path, Shown]) -> None:
    _, out, _ = finished
    found = record(out)
    jsonschema.validate(found, load_schema())
    scalars = found["metrics"]["scalars"]
    for name in (
        "final_val_loss", "best_val_loss", "val_bits_per_byte", "overfit_gap", "latency_p95_ms", "rss_mb",
    ):  # fmt: skip
        assert isinstance(scalars[name], float), name
    below = [mark["training_seconds"] for mark in found["timing"]["evaluations"]]
    first = next(place for place, loss in enumerate(found["curves"]["val_loss"]) if loss < 5)
    assert scalars["seconds_to_val_loss_5"] == below[first] > 0
    assert len(found["curves"]["val_loss"]) == 3
    assert scalars["best_val_loss"] == min(found["curves"]["val_loss"])
    assert 0.1 < scalars["latency_p95_ms"] < 250
    assert 100 < scalars["rss_mb"] < 400

    kept = json.loads((out / "training_metrics.json").read_text())
    schema = Path(reports.__file__).with_name("training_metrics.schema.json").read_text(encoding="utf-8")
    jsonschema.validate(kept, json.loads(schema))
    assert [row["epoch"] for row in kept["epochs"]] == [1, 2, 3]
    assert [row["train_loss"] for row in kept["epochs"]] == pytest.approx(found["gate"]["evidence"]["epoch_losses"])
    assert [row["val_loss"] for row in kept["epochs"]] == found["curves"]["val_loss"]
    assert [row["val_bits_per_byte"] for row in kept["epochs"]] == found["curves"]["val_bits_per_byte"]
    assert [row["val_loss"] for row in kept["evaluations"]] == found["curves"]["val_loss"]
    assert all(row["training_seconds"] > 0 for row in kept["evaluations"])
    assert kept["hyperparameters"] == found["config"]
    for path in kept["models"].values():
        assert (Path(path) / "model.safetensors").is_file()
    report = json.loads((out / "validation_report.json").read_text())
    assert report["passed"]
    assert {row["metric"] for row in report["criteria"]} >= {"val_loss", "overfit_gap", "repetition", "rss_mb"}
    assert report["metrics"] == scalars


def test_the_log_is_for_machines_and_the_samples_for_people(finished: tuple[Path, Path, Shown]) -> None:
    out = finished[1]
    lines = [line for line in metrics(out) if "val_loss" in line]
    assert len(lines) == 3
    for line in lines:
        assert {"run_id", "config_hash", "git_commit", "step", "loss", "val_loss", "sample"} <= set(line)
        path = run_dir(out) / "samples" / f"step_{line['step']:07d}.txt"
        assert path.read_text().rstrip("\n") == line["sample"].rstrip("\n")
        assert line["sample"].startswith("The")
    assert (run_dir(out) / "samples" / "validation.txt").is_file()


def test_the_checkpoint_holds_the_vocabulary_and_says_what_it_is(finished: tuple[Path, Path, Shown]) -> None:
    last = checkpoints(finished[1])[-1]
    assert json.loads((last / "tokenizer.json").read_text())["model"]["type"] == "BPE"
    manifest = json.loads((last / "manifest.json").read_text())
    assert manifest["step"] == int(last.name.removeprefix("step_"))
    assert {"model.safetensors", "optimizer.bin", "config.yaml", "tokenizer.json"} <= set(manifest["files"])
    assert set(json.loads((last / "state.json").read_text())["data"]) == {"corpus", "tokenizer", "tokens"}


def test_again_every_phase_is_skipped(finished: tuple[Path, Path, Shown], tmp_path: Path) -> None:
    config, out = copied(finished, tmp_path)
    before = {
        path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name in {"result.json", "tokenizer.json"}
    }
    shown = pipeline("--config", config, "--output-dir", out)
    assert shown.code == 0, shown.out + shown.err
    assert [line.split()[0] for line in shown.out.splitlines() if line.startswith(("skipped", "verified"))] == [
        "skipped", "skipped", "skipped", "verified",
    ]  # fmt: skip
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_resume_goes_on_with_the_options_of_the_last_call(finished: tuple[Path, Path, Shown], tmp_path: Path) -> None:
    _, out = copied(finished, tmp_path)
    shown = pipeline("--output-dir", out, "--resume", "--skip-corpus", "--skip-tokenizer")
    assert shown.code == 0, shown.out + shown.err
    assert "is trained" in shown.out


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Shown]:
    """``(output directory, what a terminal showed)`` of a pipeline with every option, its corpus fetched."""
    directory = tmp_path_factory.mktemp("changed")
    config, out = tiny_text(directory, {"text": {"gate": {"val_loss_threshold": None}}}), directory / "out"
    options = ["--vocab-size", 300, "--epochs", 1, "--batch-size", 8, "--learning-rate", 0.02, "--max-seq-length", 16]
    options += ["--seed", 7, "--tokenizer", "unigram", "--config", config, "--output-dir", out]
    with Web(gives("".join(builtin_text(60_000, 0)).encode())) as web:
        line = ["env", f"PYTHON={sys.executable}", PIPELINE, "--corpus-url", web.url, *options]
        shown = in_terminal([str(each) for each in line])
    assert shown.code == 0, shown.out
    return out, shown


def test_options_change_the_configuration(changed: tuple[Path, Shown]) -> None:
    chosen = json.loads((changed[0] / "training_metrics.json").read_text())["hyperparameters"]
    assert chosen["text"]["vocab_size"] == 300
    assert chosen["text"]["tokenizer"] == "unigram"
    assert chosen["text"]["corpus"].startswith("http://127.0.0.1:")
    assert chosen["seed"] == 7
    assert chosen["model"]["max_seq_len"] == 16
    training = chosen["training"]
    assert (training["max_epochs"], training["batch_size"], training["learning_rate"]) == (1, 8, 0.02)


def test_a_terminal_shows_every_phase_once_and_a_bar_wherever_it_takes_time(changed: tuple[Path, Shown]) -> None:
    # What a carriage return leaves on the screen: the bars are drawn over, the lines stay.
    drawn = [part.strip() for line in changed[1].out.splitlines() for part in line.split("\r")]
    bars = [part for part in drawn if re.search(r"\d+%\||B/s\]$", part)]
    for what in ("download", "corpus: text checked", "tokenizer: text read", "tokens: text read"):
        assert any(bar.startswith(f"{what}: ") for bar in bars), (what, bars)
    assert any(re.match(r"epoch 1/1: 100%.* loss \d\.\d{4}, lr ", bar) for bar in bars), bars

    lines = [part for part in drawn if part and part not in bars]
    headings = [line.split()[2] for line in lines if line.startswith("== ")]
    assert headings == ["Prerequisites", "Corpus", "Tokenizer", "Training", "Validation"]
    timed = [match[1] for line in lines if (match := re.match(r"done +(\w+) in \d+\.\d s$", line))]
    assert timed == [heading.lower() for heading in headings]
    twice = [line for line, count in Counter(lines).items() if count > 1]
    assert not twice
    assert lines.index("artifacts") < lines.index(next(line for line in lines if line.startswith("success in ")))


def test_the_finished_model_writes_without_its_corpus(finished: tuple[Path, Path, Shown], tmp_path: Path, here) -> None:
    _, out = copied(finished, tmp_path)
    shutil.rmtree(out / "corpora")
    first = here("generate", run_dir(out), "--prompt", "El", "--max-tokens", 30)
    assert first.code == 0, first.err
    assert first.out.startswith("El")
    assert len(first.out) > 20
    assert here("generate", run_dir(out), "--prompt", "El", "--max-tokens", 30).out == first.out
    assert here("generate", run_dir(out), "--prompt", "El", "--max-tokens", 30, "--seed", 1).out != first.out
    assert here("generate", run_dir(out), "--prompt", "").code == 2


def test_a_finished_run_is_judged_again_with_the_same_figures(finished: tuple[Path, Path, Shown], here) -> None:
    out = finished[1]
    shown = here("evaluate", run_dir(out))
    assert shown.code == 0, shown.err
    again, scalars = json.loads(shown.out), record(out)["metrics"]["scalars"]
    assert again["passed"]
    assert again["metrics"]["val_loss"] == pytest.approx(scalars["final_val_loss"], rel=1e-5)
    assert again["metrics"]["repetition"] == pytest.approx(scalars["repetition"])


@pytest.mark.slow
def test_a_corpus_that_was_changed_since_is_not_taken_for_the_one_that_was_learned(tmp_path: Path) -> None:
    corpus, out = tmp_path / "mine.txt", tmp_path / "out"
    corpus.write_bytes(SPANISH)
    config = tiny_text(tmp_path, {"training": {"max_epochs": 1}, "text": {"gate": {"val_loss_threshold": None}}})
    options = ["--config", config, "--output-dir", out, "--corpus-path", corpus, "--vocab-size", 300]
    assert pipeline(*options).code == 0
    before = checkpoints(out)[-1] / "state.json"
    corpus.write_bytes(SPANISH + b"Y colorado.\n")
    shown = pipeline(*options)
    assert shown.code == 4, shown.out
    learned = json.loads(before.read_text())["data"]["corpus"]
    assert f"trained on the corpus with SHA-256 {learned}, here is the corpus with SHA-256 " in complaint(shown)
    assert sha256_file(corpus) in complaint(shown)
    evaluated = subprocess.run(
        [sys.executable, "-m", "accel_train.commands.main", "evaluate", str(run_dir(out))],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert evaluated.returncode == 1
    assert learned in evaluated.stderr


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ([], {"corpus_path": "{here}/a.txt", "seed": 7, "epochs": 2}),
        (["--seed", "0"], {"corpus_path": "{here}/a.txt", "seed": 0, "epochs": 2}),
        (["--corpus-path", "b.txt"], {"corpus_path": "{here}/b.txt", "seed": 7, "epochs": 2}),
        (["--corpus-url", "http://127.0.0.1:9/c"], {"corpus_url": "http://127.0.0.1:9/c", "seed": 7, "epochs": 2}),
    ],
)
def test_resume_takes_what_is_not_given_anew(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    given: list[str],
    kept: dict[str, Any],
) -> None:
    """All end in phase 2, for want of a corpus."""
    monkeypatch.chdir(tmp_path)
    assert here_pipeline(capsys, "--output-dir", "out", "--corpus-path", "a.txt", "--seed", 7, "--epochs", 2).code == 2
    assert here_pipeline(capsys, "--output-dir", "out", "--epochs", -1, "--resume").code == 1, "and stores nothing"
    config = tiny_text(tmp_path, {"text": {"download_attempts": 1}})
    assert here_pipeline(capsys, "--output-dir", "out", "--resume", "--config", config, *given).code == 2
    expected = {
        name: str(value).format(here=tmp_path) if name == "corpus_path" else value for name, value in kept.items()
    }
    assert json.loads((tmp_path / "out" / "pipeline.json").read_text()) == {**expected, "config": str(config)}


@pytest.mark.parametrize("content", ["5", "{", "[1]"])
def test_options_that_cannot_be_read_are_nothing_to_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    (tmp_path / "pipeline.json").write_text(content)
    shown = here_pipeline(capsys, "--output-dir", tmp_path, "--resume")
    assert shown.code == 1
    assert "there is nothing to resume in " in complaint(shown)


@pytest.mark.slow
def test_it_works_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an installed package: the model is used by another process, which has to find it too."""
    monkeypatch.chdir(tmp_path)
    config = tiny_text(tmp_path, {"training": {"max_epochs": 1}, "text": {"gate": {"val_loss_threshold": None}}})
    shown = pipeline("--config", config.name, "--output-dir", "out", PYTHONPATH=None)
    assert shown.code == 0, shown.out + shown.err
    assert "passed     rss_mb" in shown.out


# -- 1: prerequisites ----------------------------------------------------------------------


def test_help_names_every_option_and_code() -> None:
    shown = pipeline("--help", fresh=True)
    assert shown.code == 0
    for option in (
        "corpus-path", "corpus-url", "vocab-size", "epochs", "batch-size", "learning-rate", "max-seq-length",
        "output-dir", "skip-corpus", "skip-tokenizer", "resume", "help",
    ):  # fmt: skip
        assert f"--{option}" in shown.out
    assert "75 interrupted" in shown.out


def here_pipeline(capsys: pytest.CaptureFixture[str], *arguments: object) -> Shown:
    """The pipeline in this process, for what ends before torch is imported."""
    capsys.readouterr()
    code = pipeline_main([str(argument) for argument in arguments])
    return Shown(code, *capsys.readouterr())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--epochs", "0"], "--epochs: 0 must be at least 1"),
        (["--epochs", "many"], "invalid int value: 'many'"),
        (["--vocab-size", "100"], "--vocab-size: 100 must be more than 260"),
        (["--learning-rate", "-1"], "--learning-rate: -1.0 must be positive"),
        (["--max-seq-length", "0"], "--max-seq-length: 0 must be at least 1"),
        (["--corpus-path", "a", "--corpus-url", "b"], "not allowed with"),
        (["--config", "missing.yaml"], "missing.yaml"),
        (["--nonsense"], "unrecognized arguments"),
        (["--resume"], "nothing to resume"),
        (["--seed", "-1"], "--seed: -1 must"),
        (["--output-dir", ""], "--output-dir: is empty"),
        (["--corpus-path", "espa\udcf1a.txt"], "is not a name in UTF-8"),
        (["--config", str(ROOT / "examples" / "walks_quick.yaml")], "describes another task than text"),
        (["--launcher", "accelerate 'x"], "No closing quotation; check it"),
        (["--launcher", "nosuch launch"], "--launcher: there is no command 'nosuch'"),
        (["--launcher", ""], "--launcher: there is no command ''"),
        (["--corpus-path", ""], "--corpus-path: is empty"),
        (["--corpus-url", "ftp://127.0.0.1/a.txt"], "must begin with http:// or https://"),
        (["--tokenizer", "char", "--vocab-size", "300"], "--vocab-size: 300 has no meaning for --tokenizer char"),
    ],
)
def test_a_wrong_option_is_named_before_work_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    shown = here_pipeline(capsys, "--output-dir", tmp_path / "out", *arguments)
    assert shown.code == 1
    assert says in complaint(shown)
    assert not (tmp_path / "out" / "corpora").exists()


def test_an_output_directory_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    shown = here_pipeline(capsys, "--output-dir", tmp_path / "file" / "out")
    assert shown.code == 1
    assert "cannot be written: Not a directory; choose another --output-dir" in complaint(shown)


@contextmanager
def small_disk(directory: Path, *options: str) -> Iterator[Path]:
    """A file system of its own, in memory."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount")
    disk = directory / "disk"
    disk.mkdir()
    line = ["mount", "-t", "tmpfs", "-o", *options, "tmpfs", str(disk)]
    if subprocess.run(line, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_without_room(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with small_disk(tmp_path, "size=1M") as disk:
        shown = here_pipeline(capsys, "--output-dir", disk / "out")
    assert shown.code == 1
    assert "1 MB free in " in complaint(shown)
    assert "free some, or choose another --output-dir" in complaint(shown)


def test_what_an_interrupted_pipeline_has_written_counts_as_room(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def usage(_: object) -> object:
        return shutil._ntuple_diskusage(10**9, 10**9, 10**6)

    monkeypatch.setattr(prerequisites.shutil, "disk_usage", usage)
    (tmp_path / "empty.txt").write_bytes(b"")
    options = ["--output-dir", tmp_path / "out", "--corpus-path", tmp_path / "empty.txt"]
    assert here_pipeline(capsys, *options).code == 1
    (tmp_path / "out" / "corpora").mkdir()
    with (tmp_path / "out" / "corpora" / "tokens").open("wb") as file:
        file.truncate(10**9)  # takes no room
    assert here_pipeline(capsys, *options).code == 3, "and gets as far as the corpus, which is empty"


def test_a_disk_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with small_disk(tmp_path, "ro") as disk:
        shown = here_pipeline(capsys, "--output-dir", disk / "out")
    assert shown.code == 1
    assert "cannot be written: Read-only file system; choose another --output-dir" in complaint(shown)


def test_a_finished_run_needs_no_room(finished: tuple[Path, Path, Shown], tmp_path: Path) -> None:
    with small_disk(tmp_path, "size=20M") as disk:
        config, out = copied(finished, disk)
        shown = pipeline("--config", config, "--output-dir", out)
    assert shown.code == 0, shown.out + shown.err
    assert " MB free in " in shown.out


def test_pipelines_may_share_an_output_directory(tmp_path: Path) -> None:
    """Files that both write: a writer must not take the other's temporary file away."""
    both = [Pipeline(parse_options(["--output-dir", str(tmp_path)]), pass_by, 0.0) for _ in range(2)]

    def write(pipeline: Pipeline) -> None:
        for _ in range(200):
            pipeline._keep_options()

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, both))
    assert json.loads((tmp_path / "pipeline.json").read_text()) == {}


def test_a_reader_that_leaves_does_not_stop_it(finished: tuple[Path, Path, Shown], tmp_path: Path) -> None:
    config, out = copied(finished, tmp_path)
    (out / "validation_report.json").unlink()
    line = f'"{PIPELINE}" --config "{config}" --output-dir "{out}" | head -n 1; exit ${{PIPESTATUS[0]}}'
    env = environment(PYTHON=sys.executable)
    done = subprocess.run(["bash", "-c", line], env=env, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert "Error" not in done.stderr
    assert (out / "validation_report.json").exists()


def test_a_python_without_the_packages(tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    shown = pipeline(
        "--output-dir", tmp_path / "out", PYTHON=str(tmp_path / "bare" / "bin" / "python"), PYTHONPATH=None
    )
    assert shown.code == 1
    assert "has no package torch, accelerate" in complaint(shown)


@pytest.mark.parametrize(
    ("answer", "says"), [("Python 3.8.20", "Python 3.8.20 is older than 3.11"), (None, "there is no")]
)
def test_a_python_that_is_too_old_or_not_there(tmp_path: Path, answer: str | None, says: str) -> None:
    python = tmp_path / "python3.8"
    if answer is not None:
        # What an old interpreter answers to the two questions that it is asked.
        python.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "{answer}" && exit 0\nexit 1\n')
        python.chmod(python.stat().st_mode | stat.S_IXUSR)
    shown = pipeline("--output-dir", tmp_path / "out", PYTHON=str(python))
    assert shown.code == 1
    assert says in complaint(shown)


def test_a_warning_where_the_memory_will_hardly_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.txt").write_bytes(b"")
    huge = ["--batch-size", 100_000, "--max-seq-length", 4096, "--corpus-path", tmp_path / "empty.txt"]
    shown = here_pipeline(capsys, "--output-dir", tmp_path / "out", *huge)
    assert "warning    training needs about" in shown.out


# -- 2: corpus -----------------------------------------------------------------------------


@pytest.fixture
def impatient(tmp_path: Path) -> Path:
    return tiny_text(
        tmp_path, {"text": {"download_timeout": 0.5, "download_attempts": 2}, "training": {"max_epochs": 1}}
    )


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (fails(404), "the server answers 404"),
        (fails(500), "in 2 attempts: the server answers 500"),
        (stalls(), "no answer for 0.5 s"),
        (truncates(SPANISH, 100, etag=None), f"the connection ended after 100 of {len(SPANISH)} bytes"),
        (redirects(lambda request: request.path), "redirects in a circle"),
    ],
    ids=["404", "500", "time-out", "truncated", "circle"],
)
def test_a_corpus_that_cannot_be_fetched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], impatient: Path, answer: Any, says: str
) -> None:
    with Web(answer) as web:
        shown = here_pipeline(capsys, "--config", impatient, "--output-dir", tmp_path / "out", "--corpus-url", web.url)
    assert shown.code == 2, shown.err
    assert says in complaint(shown)
    assert not list((tmp_path / "out" / "corpora").glob("download-*"))
    assert not list((tmp_path / "out" / "corpora").glob(".tmp-*"))


def test_a_corpus_with_another_digest(tmp_path: Path, capsys: pytest.CaptureFixture[str], impatient: Path) -> None:
    with Web(gives(SPANISH)) as web:
        options = ["--corpus-url", web.url, "--corpus-sha256", "0" * 64]
        shown = here_pipeline(capsys, "--config", impatient, "--output-dir", tmp_path / "out", *options)
    assert shown.code == 2
    assert "0" * 64 in complaint(shown)


def test_a_fetched_corpus_is_kept_and_the_server_not_asked_again(tmp_path: Path, impatient: Path) -> None:
    out = tmp_path / "out"
    with Web(truncates(SPANISH, 3000), gives(SPANISH)) as web:
        options = ["--config", impatient, "--output-dir", out, "--corpus-url", web.url, "--vocab-size", 300]
        first = pipeline(*options)
        asked = len(web.ranges)
    assert asked == 2
    assert first.code in {0, 5}, first.out + first.err
    kept = next((out / "corpora").glob("download-*/corpus.txt"))
    assert kept.read_bytes() == SPANISH
    # The server is gone.
    assert pipeline(*options, "--skip-corpus").code == first.code


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--corpus-path", "/no/missing.txt"], "--corpus-path/--corpus-url: /no/missing.txt does not exist"),
        (["--corpus-url", "http://127.0.0.1:9/España.txt"], "is no address"),
        (["--corpus-url", "http://[::1/a"], "is no address"),
        (["--corpus-url", "http://127.0.0.1:x/a"], "is no address"),
        (["--corpus-path", "x" * 5000], "File name too long"),
        (["--corpus-path", str(ROOT / "README.md"), "--corpus-sha256", "0" * 64], "is not that of"),
        (["--corpus-sha256", "0" * 64], "has no meaning for the built-in corpus"),
        (["--corpus-url", "http://127.0.0.1:9/a", "--skip-corpus"], "does not exist); leave out --skip-corpus"),
    ],
)
def test_a_corpus_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    shown = here_pipeline(capsys, "--output-dir", tmp_path / "out", *arguments)
    assert shown.code == 2
    assert says in complaint(shown)


# -- 3: tokenizer --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty (0 bytes)"),
        (b"MZ\x90\x00\x03", "is not UTF-8: byte 0x90 at offset 2"),
        (b"text\x00text", "is binary: byte 0x00 at offset 4"),
        (b"The cat sat on the mat.\n" * 500, "--vocab-size: 8000 is more than this corpus supports"),
    ],
    ids=["empty", "binary", "with zeros", "too small"],
)
def test_a_corpus_that_cannot_be_tokenized(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, says: str
) -> None:
    path = tmp_path / "mine.txt"
    path.write_bytes(content)
    shown = here_pipeline(capsys, "--output-dir", tmp_path / "out", "--corpus-path", path)
    assert shown.code == 3, shown.err
    assert says in complaint(shown)
    assert not list((tmp_path / "out" / "corpora").glob("tokens-*"))


@pytest.mark.parametrize(("pattern", "code"), [("builtin-*/corpus.txt", 2), ("tokenizer-*/tokenizer.json", 3)])
def test_what_is_damaged_is_not_there(
    finished: tuple[Path, Path, Shown], tmp_path: Path, capsys: pytest.CaptureFixture[str], pattern: str, code: int
) -> None:
    config, out = copied(finished, tmp_path)
    path = next((out / "corpora").glob(pattern))
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    options = ["--config", config, "--output-dir", out, "--skip-corpus", "--skip-tokenizer"]
    shown = here_pipeline(capsys, *options)
    assert shown.code == code
    assert f"({path.parent} is damaged: {path.name} does not match its SHA-256)" in complaint(shown)


def test_a_batch_that_is_larger_than_the_corpus_is_to_blame(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_text(tmp_path)
    shown = here_pipeline(capsys, "--config", config, "--output-dir", tmp_path / "out", "--batch-size", 5000)
    assert shown.code == 3
    assert "--batch-size: 5000 is more than the " in complaint(shown)


def test_a_tokenizer_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = here_pipeline(capsys, "--output-dir", tmp_path / "out", "--skip-tokenizer")
    assert shown.code == 3
    assert "there is no tokenizer to go on with" in complaint(shown)


# -- 4: training ---------------------------------------------------------------------------


def test_training_that_diverges(tmp_path: Path) -> None:
    config = tiny_text(tmp_path, {"training": {"max_grad_norm": None}})
    shown = pipeline("--config", config, "--output-dir", tmp_path / "out", "--learning-rate", "1e30")
    assert shown.code == 4, shown.out + shown.err
    assert "training stopped at step " in shown.err
    assert "the loss or a gradient is not finite" in shown.err
    assert "the same command would come to the same: lower the --learning-rate" in shown.err.splitlines()[-1]
    assert "warning    a learning rate of 1e+30 is far above the usual" in shown.out
    assert record(tmp_path / "out")["status"] == "failed"


def test_training_without_enough_memory(tmp_path: Path) -> None:
    """A real limit on the address space, and a step that needs more."""
    config = tiny_text(tmp_path, {"text": {"builtin_bytes": 1_000_000}, "model": {"d_ff": 500_000}})
    limited = f"ulimit -v 12000000; exec {PIPELINE} --config {config} --output-dir {tmp_path / 'out'} --batch-size 2048"
    done = subprocess.run(
        ["bash", "-c", limited],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 4, done.stdout + done.stderr
    assert "out of memory" in done.stderr
    assert "use a smaller training.batch_size" in done.stderr
    assert "use a smaller --batch-size" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_signal_in_training_and_the_same_command_goes_on(finished: tuple[Path, Path, Shown], tmp_path: Path) -> None:
    config, reference, _ = finished
    out = tmp_path / "out"
    output = signalled_in_training(out, signal.SIGTERM, "--config", config, "--output-dir", out)
    assert record(out)["status"] == "preempted", output
    again = pipeline("--config", config, "--output-dir", out)
    assert again.code == 0, again.out + again.err
    final = checkpoints(out)[-1] / "model.safetensors"
    assert final.read_bytes() == (checkpoints(reference)[-1] / "model.safetensors").read_bytes()
    assert record(out)["curves"] == record(reference)["curves"]


def test_a_launcher_that_starts_nothing(finished: tuple[Path, Path, Shown], tmp_path: Path) -> None:
    """What the record says of an earlier launch is not its fault."""
    config, out = copied(finished, tmp_path)
    path = run_dir(out) / "result.json"
    earlier = json.loads(path.read_text()) | {"status": "preempted", "reason": "stopped after step 40 (SIGTERM)"}
    path.write_text(json.dumps(earlier))
    shown = pipeline("--config", config, "--output-dir", out, "--launcher", "false")
    assert shown.code == 4
    assert "--launcher: false ended with code 1 before training began" in complaint(shown)
    assert "SIGTERM" not in complaint(shown)


# -- 5: validation -------------------------------------------------------------------------


def test_a_model_that_misses_a_criterion(tmp_path: Path) -> None:
    config = tiny_text(tmp_path, {"text": {"gate": {"val_loss_threshold": 0.5}}, "training": {"max_epochs": 1}})
    shown = pipeline("--config", config, "--output-dir", tmp_path / "out")
    assert shown.code == 5, shown.out + shown.err
    assert "the model does not pass: val_loss is" in complaint(shown)
    assert "MISSED     val_loss" in shown.out
    report = json.loads((tmp_path / "out" / "validation_report.json").read_text())
    assert not report["passed"]
    assert record(tmp_path / "out")["status"] == "completed"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "state.json"])
def test_a_model_that_was_damaged_since(finished: tuple[Path, Path, Shown], tmp_path: Path, name: str) -> None:
    config, out = copied(finished, tmp_path)
    path = checkpoints(out)[-1] / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x80
    path.write_bytes(content)
    shown = pipeline("--config", config, "--output-dir", out)
    assert shown.code == 5, shown.out + shown.err
    assert f"the trained model is damaged: {path.parent}: {name}" in complaint(shown)
