"""A sealed directory is complete under its name or absent, and any damage to it is found."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from accel_train.files.atomic import sha256_json
from accel_train.files.sealed import (
    BrokenSeal,
    NewerSeal,
    commit,
    damaged_files,
    leftovers,
    read_seal,
    retire,
    seal,
    set_aside,
    temporary_path,
)

SEAL = "seal.json"
HEADER = {"format_version": 1, "step": 3}
CONTENTS = {"a.bin": b"content", "sub/b.txt": b"more", "sub/deep/c": b""}

names = st.from_regex(r"\A[a-z]{1,8}(/[a-z]{1,8}){0,2}\Z")
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def fill(directory: Path, contents: dict[str, bytes]) -> Path:
    for name, content in contents.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    return directory


@pytest.fixture
def directory(tmp_path):
    fill(tmp_path / "sealed", CONTENTS)
    seal(tmp_path / "sealed", SEAL, HEADER)
    return tmp_path / "sealed"


def problems(directory: Path, *, full: bool = True) -> list[str]:
    try:
        return damaged_files(directory, read_seal(directory, SEAL, 1)["files"], full=full)
    except BrokenSeal as error:
        return [str(error)]


def write_seal(directory: Path, content: object) -> None:
    """Write a seal whose own digest holds, whatever it says."""
    (directory / SEAL).write_text(json.dumps({**content, "self_sha256": sha256_json(content)}))


@given(st.dictionaries(names, st.binary(max_size=64), max_size=5))
def test_sealed_files_verify_and_are_named_by_relative_path(contents):
    assume(not any(other.startswith(f"{name}/") for name in contents for other in contents))
    with tempfile.TemporaryDirectory() as parent:
        directory = fill(Path(parent), contents)

        seal(directory, SEAL, HEADER)

        assert read_seal(directory, SEAL, 1).keys() == {*HEADER, "files"}
        assert read_seal(directory, SEAL, 1)["files"].keys() == contents.keys()
        assert problems(directory) == []


def test_seal_bytes_are_those_of_the_contract(tmp_path):
    """One-space indent, sorted keys, no newline at the end; the digest is over canonical JSON without itself."""
    fill(tmp_path, {"a": b"x"})
    seal(tmp_path, SEAL, HEADER)

    text = (tmp_path / SEAL).read_text()

    content = json.loads(text)
    assert text == json.dumps(content, indent=1, sort_keys=True)
    stated = content.pop("self_sha256")
    assert stated == sha256_json(content)


def test_sealing_again_leaves_the_old_seal_out(directory):
    before = (directory / SEAL).read_bytes()
    seal(directory, SEAL, HEADER)
    assert (directory / SEAL).read_bytes() == before


@given(st.data())
def test_any_changed_byte_of_a_file_is_named(data):
    with tempfile.TemporaryDirectory() as parent:
        directory = fill(Path(parent), CONTENTS)
        seal(directory, SEAL, HEADER)
        name = data.draw(st.sampled_from([name for name, content in CONTENTS.items() if content]))
        content = bytearray(CONTENTS[name])
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
        (directory / name).write_bytes(content)

        assert problems(directory) == [f"{name} does not match its SHA-256"]
        assert problems(directory, full=False) == [], "sizes alone do not tell"


def test_any_truncation_of_the_seal_is_damage(directory):
    content = (directory / SEAL).read_bytes()
    for size in range(len(content)):
        (directory / SEAL).write_bytes(content[:size])
        assert problems(directory), size


@given(st.data())
def test_any_changed_byte_of_the_seal_is_damage(data):
    """Only white space may turn into other white space: then the seal says the same."""
    with tempfile.TemporaryDirectory() as parent:
        directory = fill(Path(parent), CONTENTS)
        seal(directory, SEAL, HEADER)
        before = (directory / SEAL).read_bytes()
        content = bytearray(before)
        position = data.draw(st.integers(0, len(content) - 1))
        content[position] ^= data.draw(st.integers(1, 255))
        (directory / SEAL).write_bytes(content)

        is_space = all(byte in b" \t\r\n" for byte in (before[position], content[position]))
        assert bool(problems(directory)) != is_space


@given(json_values)
def test_any_json_under_the_seal_is_damage(value):
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / SEAL).write_text(json.dumps(value))
        assert len(problems(Path(directory))) == 1


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff\xfe", b'{"self_sha256": "\\ud800"}', b'{"a": 1e999}'])
def test_a_seal_that_is_not_sound_json_is_damage(tmp_path, content):
    (tmp_path / SEAL).write_bytes(content)
    with pytest.raises(BrokenSeal, match=r"seal\.json"):
        read_seal(tmp_path, SEAL, 1)


def test_a_missing_seal_is_damage(tmp_path):
    assert problems(tmp_path) == [f"{tmp_path / SEAL} cannot be read (No such file or directory)"]


ENTRY = {"size": 1, "sha256": "0"}
HOSTILE = {
    "absolute name": {"/etc/passwd": ENTRY},
    "name that leads out": {"sub/../../secret": ENTRY},
    "name with a null byte": {"a\0b": ENTRY},
    "entry without digest": {"a.bin": {"size": 1}},
    "entry that is a list": {"a.bin": [1]},
    "list of names": ["a.bin"],
}


@pytest.mark.parametrize("files", HOSTILE.values(), ids=HOSTILE.keys())
def test_files_that_no_writer_names_are_damage(directory, files):
    write_seal(directory, {**HEADER, "files": files})
    assert problems(directory) == [f"{directory / SEAL} has no usable field 'files'"]


@pytest.mark.parametrize(("version", "kind"), [(2, NewerSeal), (0, BrokenSeal), ("1", BrokenSeal), (None, BrokenSeal)])
def test_another_format_version_is_not_read(directory, version, kind):
    write_seal(directory, {"format_version": version, "files": "of a shape that only that version knows"})
    with pytest.raises(BrokenSeal) as caught:
        read_seal(directory, SEAL, 1)
    assert type(caught.value) is kind


def make_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


HARM = {
    "is missing": Path.unlink,
    "has 3 bytes instead of 7": lambda file: os.truncate(file, 3),
    "is not a file": make_pipe,
    "does not match its SHA-256": lambda file: file.write_bytes(b"CONTENT"),
}


@pytest.mark.parametrize(("problem", "harm"), HARM.items(), ids=HARM.keys())
def test_damage_to_a_file_is_told_in_words(directory, problem, harm):
    harm(directory / "a.bin")
    assert problems(directory) == [f"a.bin {problem}"]


def test_several_damaged_files_are_all_named(directory):
    (directory / "a.bin").unlink()
    (directory / "sub" / "b.txt").unlink()
    assert problems(directory) == ["a.bin is missing", "sub/b.txt is missing"]


def test_files_that_the_seal_does_not_name_are_ignored(directory):
    (directory / ".DS_Store").write_text("a file manager was here")
    assert problems(directory) == []


def test_commit_gives_the_name(tmp_path):
    path = tmp_path / "key"
    temporary = temporary_path(path)
    fill(temporary, CONTENTS)

    commit(temporary, path)

    assert [each.name for each in tmp_path.iterdir()] == ["key"]
    assert (path / "a.bin").read_bytes() == CONTENTS["a.bin"]


def test_commit_never_replaces_a_directory(directory):
    temporary = temporary_path(directory)
    fill(temporary, {"a.bin": b"other"})
    with pytest.raises(OSError, match="not empty"):
        commit(temporary, directory)
    assert problems(directory) == []


@given(st.from_regex(r"\A[a-z0-9_-]{1,20}\Z"))
def test_leftovers_are_found_under_the_name_of_the_complete_one(name):
    with tempfile.TemporaryDirectory() as directory:
        parent = Path(directory)
        fill(parent / name, CONTENTS)
        temporary = temporary_path(parent / name)
        temporary.mkdir()

        retired = retire(parent / name)

        assert leftovers(parent) == sorted([(name, temporary), (name, retired)])
        assert not (parent / name).exists()


def test_what_is_set_aside_keeps_its_content_and_is_no_leftover(directory):
    set_aside(directory)

    (aside,) = directory.parent.iterdir()
    assert aside.name.startswith(".damaged-sealed-")
    assert problems(aside) == []
    assert leftovers(directory.parent) == []


def test_names_aside_are_all_different(directory):
    again = directory.with_name("again")
    shutil.copytree(directory, again)
    set_aside(directory)
    again.rename(directory)
    set_aside(directory)
    assert len(list(directory.parent.iterdir())) == 2
