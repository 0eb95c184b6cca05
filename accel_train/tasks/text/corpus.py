"""A corpus as a stream of text: files are checked, digested and read piece by piece, never whole.

What is read is UTF-8, with or without a byte order mark, with line ends of any kind; what comes
out has neither. Pieces end where no tokenizer of this project would join what stands on both
sides, so that tokenizing piece by piece gives the tokens of the whole.
"""

from __future__ import annotations

import codecs
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from accel_train.errors import Interrupted
from accel_train.process.work import StopCheck, never

BLOCK_BYTES = 1 << 20
"""Bytes read at a time."""
PIECE_CHARACTERS = 1 << 16
"""Characters of a piece; part of what defines the tokens of a text without any space."""

_LONGEST_LINE = 1 << 20

_START, _END = re.compile(r"\*\*\* ?START OF (THE|THIS) PROJECT"), re.compile(r"\*\*\* ?END OF (THE|THIS) PROJECT")
_PLACE_TO_CUT = re.compile(r"(?=[ \n]\S)")
"""In front of the last space or newline before a word: what is left of the white space is one token either way."""


class UnusableCorpus(ValueError):
    """A corpus that cannot be used.

    Args:
        path: the file (or directory) at fault.
        rule: what is wrong, where, and what to do.
        is_content: the file is there, but what is in it is no text.
    """

    def __init__(self, path: Path, rule: str, *, is_content: bool = False) -> None:
        self.path, self.rule, self.is_content = path, rule, is_content
        super().__init__(f"{path} {rule}")


@dataclass(frozen=True)
class Corpus:
    """Files that have been read once and found to be text."""

    paths: tuple[Path, ...]
    """Read in this order."""
    digests: tuple[str, ...]
    """SHA-256 (hex) of every file."""
    size: int
    """Bytes on disk."""
    strip_gutenberg: bool = False
    """Leave out what Project Gutenberg puts before and after its books."""

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of the only file; of several, of their digests one after the other."""
        return self.digests[0] if len(self.digests) == 1 else hashlib.sha256("".join(self.digests).encode()).hexdigest()

    def pieces(self, should_stop: StopCheck = never) -> Iterator[str]:
        """The text in pieces of at most :data:`PIECE_CHARACTERS`, with line feeds as its only line ends.

        Raises:
            UnusableCorpus: a file is not the one that was checked; told at its end at the latest.
            Interrupted: ``should_stop()`` turned true.
        """
        for path, expected in zip(self.paths, self.digests, strict=True):
            digest = hashlib.sha256()
            texts = _decoded(path, should_stop, digest.update)
            yield from _cut(_books(texts) if self.strip_gutenberg and _is_from_gutenberg(path, should_stop) else texts)
            if digest.hexdigest() != expected:
                raise UnusableCorpus(path, "was changed while it was read; let it be written to its end and try again")


def find_files(place: str) -> tuple[Path, ...]:
    """The files that ``text.corpus`` names: one file, or a directory's ``*.txt`` in alphabetical order.

    Raises:
        UnusableCorpus: there are none.
    """
    path = Path(place)
    if path.is_dir():
        found = tuple(sorted(each for each in path.glob("*.txt") if each.is_file()))
        if not found:
            raise UnusableCorpus(path, "is a directory without any *.txt file; name a text file or put some there")
        return found
    if not path.exists():
        raise UnusableCorpus(path, "does not exist; check the path")
    if not path.is_file():
        raise UnusableCorpus(path, "is neither a file nor a directory; name a text file")
    return (path,)


def check_corpus(
    paths: Sequence[Path],
    *,
    strip_gutenberg: bool = False,
    should_stop: StopCheck = never,
    progress: Callable[[int], None] = lambda _count: None,
) -> Corpus:
    """Read all files once: digest them, and refuse what is no text.

    Args:
        paths: the files.
        strip_gutenberg: handed on to the corpus.
        should_stop: asked between blocks.
        progress: receives the bytes of every block read.

    Raises:
        UnusableCorpus: a file is empty, binary, or not UTF-8; names the byte.
        Interrupted: ``should_stop()`` turned true.
    """
    digests, size = [], 0
    for path in paths:
        digest = hashlib.sha256()

        def note(block: bytes, digest: hashlib._Hash = digest) -> None:
            digest.update(block)
            progress(len(block))

        if not sum(len(text.strip()) for text in _decoded(path, should_stop, note)):
            what = "is empty" if not path.stat().st_size else "holds nothing but white space"
            raise UnusableCorpus(path, f"{what} ({path.stat().st_size} bytes); name a file with text", is_content=True)
        digests.append(digest.hexdigest())
        size += path.stat().st_size
    return Corpus(tuple(paths), tuple(digests), size, strip_gutenberg)


def _decoded(path: Path, should_stop: StopCheck, note: Callable[[bytes], None] = lambda _block: None) -> Iterator[str]:
    """The text of a file block by block, line ends unified, the byte order mark dropped."""
    offset, rest, held = 0, b"", ""
    try:
        with path.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                if should_stop():
                    raise Interrupted
                note(block)
                if offset == 0 and not rest:
                    offset = _mark_length(path, block)
                    block = block[offset:]
                rest += block
                text, used = _decode(path, rest, offset, final=False)
                offset, rest = offset + used, rest[used:]
                text = held + text
                # A CR may be the first half of a line end.
                held = "\r" if text.endswith("\r") else ""
                yield unify_line_ends(text[: len(text) - len(held)])
    except OSError as error:
        raise UnusableCorpus(path, f"cannot be read: {error.strerror}") from error
    text, _ = _decode(path, rest, offset, final=True)
    if held + text:
        yield unify_line_ends(held + text)


def _mark_length(path: Path, block: bytes) -> int:
    """Bytes of the byte order mark that a file begins with."""
    if block.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        rule = "is UTF-16, not UTF-8 (byte order mark at byte 0); convert it: iconv -f UTF-16 -t UTF-8"
        raise UnusableCorpus(path, rule, is_content=True)
    return len(codecs.BOM_UTF8) if block.startswith(codecs.BOM_UTF8) else 0


def _decode(path: Path, data: bytes, offset: int, *, final: bool) -> tuple[str, int]:
    """Text and the number of bytes it took; an incomplete character at the end waits for more unless ``final``."""
    nul = data.find(b"\0")
    try:
        text, used = codecs.utf_8_decode(data, "strict", final)
    except UnicodeDecodeError as error:
        if nul == -1 or error.start < nul:
            byte = data[error.start]
            rule = (
                f"is not UTF-8: byte 0x{byte:02x} at offset {offset + error.start} ({error.reason}); convert it, for "
                "example with iconv -f LATIN1 -t UTF-8, or name a text file"
            )
            raise UnusableCorpus(path, rule, is_content=True) from None
    if nul != -1:
        raise UnusableCorpus(path, f"is binary: byte 0x00 at offset {offset + nul}; name a text file", is_content=True)
    return text, used


def _is_from_gutenberg(path: Path, should_stop: StopCheck) -> bool:
    return any(_START.match(line) for line in _lines(_decoded(path, should_stop)))


def _books(texts: Iterator[str]) -> Iterator[str]:
    """What stands between the markers of Project Gutenberg."""
    inside = False
    for line in _lines(texts):
        if _START.match(line):
            inside = True
        elif _END.match(line):
            inside = False
        elif inside:
            yield line


def _lines(texts: Iterator[str]) -> Iterator[str]:
    """Lines with their ends; a line longer than a block comes in parts."""
    rest = ""
    for text in texts:
        *whole, rest = (rest + text).split("\n")
        yield from (f"{line}\n" for line in whole)
        if len(rest) > _LONGEST_LINE:
            yield rest
            rest = ""
    if rest:
        yield rest


def _cut(texts: Iterator[str]) -> Iterator[str]:
    """The same text in pieces of at most :data:`PIECE_CHARACTERS` that end before the space in front of a word."""
    waiting: list[str] = []
    count = 0
    for text in texts:
        waiting.append(text)
        count += len(text)
        if count >= BLOCK_BYTES:
            *whole, rest = _pieces("".join(waiting))
            yield from whole
            waiting, count = [rest], len(rest)
    yield from _pieces("".join(waiting))


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = _place(text, start)
        yield text[start:end]
        start = end


def _place(text: str, start: int) -> int:
    """Where the piece that begins at ``start`` ends."""
    end = start + PIECE_CHARACTERS
    if end >= len(text):
        return len(text)
    # Looked for in ever larger parts before the end, the last one first.
    for back in (256, 4096, PIECE_CHARACTERS):
        places = [found.start() for found in _PLACE_TO_CUT.finditer(text, max(start + 1, end - back), end + 1)]
        if places:
            return places[-1]
    return end


def unify_line_ends(text: str) -> str:
    """``text`` with CRLF and lone CR as LF."""
    return text.replace("\r\n", "\n").replace("\r", "\n")
