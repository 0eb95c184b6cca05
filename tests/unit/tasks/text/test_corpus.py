"""Reading text piece by piece: what is refused, where, and that nothing depends on the pieces."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from accel_train.errors import Interrupted
from accel_train.tasks.text import corpus as module
from accel_train.tasks.text.builtin import builtin_text
from accel_train.tasks.text.corpus import Corpus, UnusableCorpus, check_corpus, find_files, unify_line_ends
from accel_train.tasks.text.tokenizer import train_tokenizer


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 7)
    monkeypatch.setattr(module, "PIECE_CHARACTERS", 16)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def checked(path: Path, **options: bool) -> Corpus:
    return check_corpus([path], **options)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"\xef\xbb\xbfWith a mark", "With a mark"),
        (b"one\r\ntwo\rthree\nfour\r", "one\ntwo\nthree\nfour\n"),
        ("¿Señor?\r\n€ \N{GRINNING FACE}".encode(), "¿Señor?\n€ \N{GRINNING FACE}"),
        (b"\xef\xbb\xbfabcd\r\nefgh\r\nijkl\r\n", "abcd\nefgh\nijkl\n"),
    ],
)
@pytest.mark.usefixtures("small_blocks")
def test_marks_and_line_ends_vanish(tmp_path: Path, content: bytes, text: str) -> None:
    corpus = checked(write(tmp_path / "a.txt", content))
    assert "".join(corpus.pieces()) == text
    assert corpus.sha256 == hashlib.sha256(content).hexdigest()
    assert corpus.size == len(content)


@pytest.mark.usefixtures("small_blocks")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1))
def test_pieces_add_up_to_the_text(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "a.txt", b"x" + text.encode())
    expected = ("x" + text).replace("\r\n", "\n").replace("\r", "\n")
    pieces = list(checked(path).pieces())
    assert "".join(pieces) == expected
    assert max(map(len, pieces)) <= 16


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_tokens_do_not_depend_on_the_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind) -> None:
    text = "".join(builtin_text(40_000, 1)) + "\n\n   indented\n\n\n" * 50
    corpus = checked(write(tmp_path / "a.txt", text.encode()))
    tokenizer = train_tokenizer(kind, [text], 500)
    monkeypatch.setattr(module, "PIECE_CHARACTERS", 100)
    pieces = list(corpus.pieces())
    assert len(pieces) > 300
    assert tokenizer.encode_many(pieces).tolist() == tokenizer.encode(text)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty (0 bytes)"),
        (b"\xef\xbb\xbf", "holds nothing but white space (3 bytes)"),
        (b" \n\t\r\n", "holds nothing but white space (5 bytes)"),
        (b"text" * 5 + b"\x00more", "is binary: byte 0x00 at offset 20"),
        (b"caf\xe9 con leche", "is not UTF-8: byte 0xe9 at offset 3"),
        (b"\xef\xbb\xbfcaf\xe9 con leche", "byte 0xe9 at offset 6"),
        (b"x" * 30 + b"\xe2\x82", "byte 0xe2 at offset 30"),
        ("text".encode("utf-16"), "is UTF-16, not UTF-8"),
        (b"\x7fELF\x02\x01\x01\x00\xff", "is binary: byte 0x00 at offset 7"),
    ],
)
@pytest.mark.parametrize("blocks", ["small", "large"])
def test_what_is_no_text_is_refused_with_the_place(
    tmp_path: Path, request: pytest.FixtureRequest, content: bytes, says: str, blocks: str
) -> None:
    if blocks == "small":
        request.getfixturevalue("small_blocks")
    with pytest.raises(UnusableCorpus) as caught:
        checked(write(tmp_path / "a.txt", content))
    assert says in str(caught.value)
    assert str(tmp_path / "a.txt") in str(caught.value)


def test_a_directory_is_its_text_files_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.md"):
        write(tmp_path / name, f"{name}\n".encode())
    paths = find_files(str(tmp_path))
    assert [path.name for path in paths] == ["a.txt", "b.txt"]
    both = check_corpus(paths)
    assert "".join(both.pieces()) == "a.txt\nb.txt\n"
    assert both.sha256 != check_corpus(paths[::-1]).sha256


@pytest.mark.parametrize(
    ("name", "says"), [("missing.txt", "does not exist"), ("empty", "without any *.txt file"), ("/dev/null", "neither")]
)
def test_a_place_without_text_is_refused(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnusableCorpus) as caught:
        find_files(str(tmp_path / name))
    assert says in str(caught.value)


MARK = "*** {} OF THE PROJECT GUTENBERG EBOOK A ***"
BOOK = f"Preface\n{MARK.format('START')}\n{{}}\n{MARK.format('END')}\nLicence\n"


@pytest.mark.usefixtures("small_blocks")
def test_front_and_back_matter_goes_on_request(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", (BOOK.format("First\nbook") + BOOK.format("Second")).encode())
    assert "".join(checked(path, strip_gutenberg=True).pieces()) == "First\nbook\nSecond\n"
    assert "Licence" in "".join(checked(path).pieces())
    other = write(tmp_path / "b.txt", b"No markers here\n")
    assert "".join(checked(other, strip_gutenberg=True).pieces()) == "No markers here\n"


@pytest.mark.usefixtures("small_blocks")
def test_reading_can_be_stopped(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"some words " * 100)
    corpus = checked(path)
    with pytest.raises(Interrupted):
        check_corpus([path], should_stop=lambda: True)
    pieces = corpus.pieces(should_stop=lambda: True)
    with pytest.raises(Interrupted):
        list(pieces)


def test_a_file_that_changes_after_it_was_checked_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"some words")
    corpus = checked(path)
    path.write_bytes(b"other text")
    with pytest.raises(UnusableCorpus, match="was changed while it was read"):
        list(corpus.pieces())


def test_every_byte_is_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "é".encode() * 1000)
    counts: list[int] = []
    check_corpus([path], progress=counts.append)
    assert sum(counts) == 2000


def test_line_ends_of_all_systems_become_one() -> None:
    assert unify_line_ends("dos\r\nmac\runix\n\r\n\r") == "dos\nmac\nunix\n\n\n"
