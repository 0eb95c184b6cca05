"""Files from a stranger, every digest of which holds: nothing in them is run, and what matters is refused."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faults import accel_train, check_finished_like, complaint, slow, train, undisturbed
from harness import Shown, checkpoints, run_dir

from accel_train.checkpoints.manifest import read_manifest, verify, write_manifest
from accel_train.files.sealed import read_seal, seal
from accel_train.files.shared import INDEX_FILE

PICKLE_REFUSED = "holds a pickle with more than plain values: not loaded, not run"
OTHER: dict[str, Any] = {"training": {"learning_rate": 0.001}, "name": "run"}
NAMED: dict[str, Any] = {"name": "run"}


class Payload:
    """Unpickled, it creates a file."""

    def __init__(self, created: Path) -> None:
        self._created = created

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self._created),)


def as_pickle(file: Path, created: Path) -> None:
    file.write_bytes(pickle.dumps(Payload(created)))


def as_torch_file(file: Path, created: Path) -> None:
    torch.save({"state": Payload(created)}, file)


def as_array(file: Path, created: Path) -> None:
    with file.open("wb") as opened:
        np.save(opened, np.array([Payload(created)], dtype=object), allow_pickle=True)


def as_yaml(file: Path, created: Path) -> None:
    file.write_text(f"seed: !!python/object/apply:os.mkdir ['{created}']\n")


def as_nonsense(file: Path, created: Path) -> None:
    file.write_text(json.dumps([str(created)]))


def reseal(checkpoint: Path, **changes: Any) -> None:
    """Make the manifest of ``checkpoint`` vouch for what is there now."""
    write_manifest(checkpoint, read_manifest(checkpoint) | changes)


def reseal_corpus(corpus: Path) -> None:
    seal(corpus, INDEX_FILE, read_seal(corpus, INDEX_FILE, 1))


def committed(results: Path) -> dict[str, bytes]:
    """Every file of every checkpoint; not the leavings of the killed launch, which the next one sweeps."""
    directory = run_dir(results) / "checkpoints"
    files = (path for checkpoint in directory.glob("step_*") for path in checkpoint.iterdir())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def in_checkpoint(results: Path, name: str, write: Callable[[Path, Path], None], created: Path) -> None:
    """Put a hostile file into the newest checkpoint; one of other weights takes the place of ours."""
    newest = checkpoints(results)[-1]
    if name == "pytorch_model.bin":
        (newest / "model.safetensors").unlink()
    write(newest / name, created)
    reseal(newest)
    assert verify(newest) == [], "every digest holds"


def in_corpus(results: Path, name: str, write: Callable[[Path, Path], None], created: Path) -> None:
    corpus = next((results / "corpora").glob("walks-*"))
    assert (corpus / name).exists()
    write(corpus / name, created)
    reseal_corpus(corpus)


def in_run(results: Path, name: str, write: Callable[[Path, Path], None], created: Path) -> None:
    assert (run_dir(results) / name).exists()
    write(run_dir(results) / name, created)


@pytest.mark.parametrize(
    ("write", "load"),
    [
        (as_pickle, lambda file: pickle.loads(file.read_bytes())),
        (as_torch_file, lambda file: torch.load(file, weights_only=False)),
        (as_pickle, lambda file: torch.load(file, weights_only=False)),
        (as_array, lambda file: np.load(file, allow_pickle=True)),
    ],
)
def test_the_payload_is_real(tmp_path: Path, write, load) -> None:
    write(tmp_path / "file", tmp_path / "created")
    assert not (tmp_path / "created").exists()
    with suppress(RuntimeError):  # torch looks for more behind a bare pickle, which has done its work by then
        load(tmp_path / "file")
    assert (tmp_path / "created").is_dir()


RESUMED = [
    (in_checkpoint, "optimizer.bin", as_pickle, 1, PICKLE_REFUSED),
    (in_checkpoint, "optimizer.bin", as_torch_file, 1, PICKLE_REFUSED),
    (in_checkpoint, "scheduler.bin", as_torch_file, 1, PICKLE_REFUSED),
    (in_checkpoint, "random_states_0.pkl", as_pickle, 1, "the random state of rank [0] was not restored"),
    (in_checkpoint, "random_states_0.pkl", as_torch_file, 1, "the random state of rank [0] was not restored"),
    (in_checkpoint, "model.safetensors", as_torch_file, 1, "cannot be loaded"),
    (in_checkpoint, "pytorch_model.bin", as_torch_file, 1, PICKLE_REFUSED),
    (in_checkpoint, "pytorch_model.bin", as_pickle, 1, PICKLE_REFUSED),
    (in_checkpoint, "custom_checkpoint_0.pkl", as_torch_file, 1, "cannot be loaded"),
    (in_checkpoint, "state.json", as_nonsense, 1, "state.json is not a training state"),
    (in_checkpoint, "losses.safetensors", as_pickle, 1, "cannot be loaded"),
    (in_corpus, "train.npy", as_array, 1, "train.npy is no array of numbers: not loaded, not run"),
    (in_corpus, "train.npy", as_pickle, 1, "train.npy is no array of numbers: not loaded, not run"),
    (in_corpus, "held_out.npy", as_array, 1, "held_out.npy is no array of numbers: not loaded, not run"),
    (in_run, "config.yaml", as_yaml, 2, "config.yaml"),
    (in_run, "result.json", as_nonsense, 2, "is not a record of a run"),
]
QUICK = ("optimizer.bin", as_torch_file)


def cases(rows: list[tuple[Any, ...]], quick: object = None) -> list[Any]:
    return [
        pytest.param(*row, marks=() if row[1:3] == quick else slow, id=f"{row[1]}-{row[2].__name__}") for row in rows
    ]


@pytest.mark.parametrize(("place", "name", "write", "code", "says"), cases(RESUMED, QUICK))
def test_a_resume_refuses_it(tmp_path: Path, killed_run, place, name, write, code: int, says: str) -> None:
    config, results = killed_run(0, tmp_path)
    created = tmp_path / "created"
    place(results, name, write, created)
    before = committed(results)

    output = train(config, 0, expect=code)

    assert says in complaint(output)
    assert not created.exists()
    assert committed(results) == before


@slow
@pytest.mark.parametrize("name", ["graph.npz", "blocks.npy", "rules.json"])
def test_files_for_people_are_never_read(tmp_path: Path, killed_run, name: str) -> None:
    expected = undisturbed(0, tmp_path)
    config, results = killed_run(0, tmp_path)
    in_corpus(results, name, as_array, tmp_path / "created")

    assert "found and verified" in train(config, 0), "the corpus is taken as it is"

    assert not (tmp_path / "created").exists()
    check_finished_like(results, expected)


READ = [
    (in_checkpoint, "model.safetensors", as_torch_file, 1, "model.safetensors cannot be loaded"),
    (in_checkpoint, "pytorch_model.bin", as_torch_file, 1, "model.safetensors cannot be loaded"),
    (in_checkpoint, "optimizer.bin", as_torch_file, 0, ""),
    (in_checkpoint, "custom_checkpoint_0.pkl", as_torch_file, 0, ""),
    (in_corpus, "held_out.npy", as_array, 1, "held_out.npy is no array of numbers"),
    (in_corpus, "train.npy", as_pickle, 1, "train.npy is no array of numbers"),
    (in_run, "config.yaml", as_yaml, 2, "config.yaml"),
]


def check_refused(shown: Shown, code: int, says: str) -> None:
    assert shown.code == code, shown
    if code:
        assert shown.out == ""
        assert says in complaint(shown.err)


@slow
@pytest.mark.parametrize(("place", "name", "write", "code", "says"), cases(READ))
@pytest.mark.parametrize("reader", ["evaluate", "generate"])
def test_readers_of_a_run_refuse_it(
    tmp_path: Path, killed_run, reader: str, place, name, write, code: int, says: str
) -> None:
    _, results = killed_run(0, tmp_path)
    place(results, name, write, tmp_path / "created")

    shown = accel_train(reader, run_dir(results))

    check_refused(shown, code, says)
    assert not (tmp_path / "created").exists()


@slow
@pytest.mark.parametrize(
    ("name", "code", "says"),
    [
        ("model.safetensors", 1, "model.safetensors cannot be loaded"),
        ("pytorch_model.bin", 2, "model.safetensors is missing"),
    ],
)
def test_a_run_does_not_start_from_it(tmp_path: Path, killed_run, name: str, code: int, says: str) -> None:
    config, results = killed_run(0, tmp_path)
    in_checkpoint(results, name, as_torch_file, tmp_path / "created")
    source, elsewhere = checkpoints(results)[-1], tmp_path / "new"

    output = train(config, 0, "--start.weights", str(source), "--output_dir", str(elsewhere), expect=code)

    assert says in complaint(output)
    assert not (tmp_path / "created").exists()
    assert not elsewhere.exists(), "refused before anything is written"


@slow
@pytest.mark.parametrize("foreign", ["another configuration", "a newer format"])
def test_a_checkpoint_that_is_not_for_this_run_is_refused_and_left_alone(
    tmp_path: Path, killed_run, foreign: str
) -> None:
    config, results = killed_run(0, tmp_path, NAMED)
    newest = checkpoints(results)[-1]
    if foreign == "a newer format":
        reseal(newest, format_version=2)
        says = [str(newest), "has format 2", "reads up to 1"]
    else:
        _, others = killed_run(0, tmp_path / "other", OTHER)
        other = checkpoints(others)[-1]
        ours, theirs = (read_manifest(path)["config_hash"][:8] for path in (newest, other))
        assert ours != theirs
        shutil.rmtree(newest)
        newest = shutil.copytree(other, newest.with_name(other.name), dirs_exist_ok=True)
        says = [str(newest), f"written under configuration {theirs}", f"this is {ours}"]
    before = committed(results)

    output = train(config, 0, expect=1)
    shown = [accel_train(reader, run_dir(results)) for reader in ("evaluate", "generate")]

    for said in says:
        assert said in complaint(output)
        for each in shown:
            check_refused(each, 1, said)
    assert committed(results) == before
