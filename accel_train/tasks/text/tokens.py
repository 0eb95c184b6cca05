"""A corpus as numbers on disk: shards of token ids, read by memory map.

    tokens.json                   dtype, counts, digests of corpus and tokenizer
    tokens-00000.bin, ...         ids one after the other, little-endian uint16 or uint32

The stream is cut into shards of equal size, so the place of a token is a division; no shard ends
a sentence, and a window may lie across two. Writing needs the memory of a few pieces of text,
whatever the size of the corpus: 200 MB of it take 317 MB, the libraries included (docs/benchmarks.md).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from accel_train.files.atomic import naming
from accel_train.tasks.text.tokenizer import TextTokenizer

TOKENS_FILE = "tokens.json"
SHARD_TOKENS = 1 << 25
"""Tokens of a shard: 64 MiB of uint16."""
_FORMAT_VERSION = 1
_PIECES_AT_ONCE = 16


@dataclass(frozen=True)
class TokenIndex:
    """What ``tokens.json`` says."""

    tokens: int
    """Number of tokens."""
    bytes: int
    """Bytes of UTF-8 that they stand for, as :meth:`TextTokenizer.byte_lengths` counts."""
    unknown: int
    """How many of them are the unknown token."""
    dtype: Literal["uint16", "uint32"]
    shard_tokens: int
    """Tokens of every shard but the last."""
    corpus_sha256: str
    tokenizer_sha256: str
    vocab_size: int
    format_version: int = _FORMAT_VERSION


def write_tokens(
    directory: Path,
    pieces: Iterable[str],
    tokenizer: TextTokenizer,
    corpus_sha256: str,
    *,
    shard_tokens: int = SHARD_TOKENS,
) -> TokenIndex:
    """Tokenize ``pieces`` into shards in ``directory``, then write the index.

    While one batch of pieces is written the next is tokenized, in as many threads as the machine has cores.

    Raises:
        OSError: the disk is full; names the file.
        Exception: whatever ``pieces`` raises.
    """
    lengths = tokenizer.byte_lengths()
    count = size = unknown = 0
    with ThreadPoolExecutor(1, thread_name_prefix="tokenize") as thread:
        for ids in _ahead(thread, tokenizer, iter(pieces)):
            _append(directory, ids, count, shard_tokens)
            count += len(ids)
            size += int(lengths[ids].sum())
            unknown += int((ids == 1).sum())
    index = TokenIndex(
        tokens=count,
        bytes=size,
        unknown=unknown,
        dtype="uint16" if tokenizer.dtype is np.uint16 else "uint32",
        shard_tokens=shard_tokens,
        corpus_sha256=corpus_sha256,
        tokenizer_sha256=tokenizer.digest,
        vocab_size=tokenizer.vocab_size,
    )
    (directory / TOKENS_FILE).write_text(json.dumps(asdict(index), indent=1) + "\n", encoding="utf-8")
    return index


def _ahead(thread: ThreadPoolExecutor, tokenizer: TextTokenizer, pieces: Iterator[str]) -> Iterator[npt.NDArray[Any]]:
    """The ids of all pieces, some pieces at a time, one step ahead of whoever takes them."""
    running = None
    while batch := list(islice(pieces, _PIECES_AT_ONCE)):
        following = thread.submit(tokenizer.encode_many, batch)
        if running is not None:
            yield running.result()
        running = following
    if running is not None:
        yield running.result()


def _append(directory: Path, ids: npt.NDArray[Any], place: int, shard_tokens: int) -> None:
    """Write ``ids`` from ``place`` in the stream on; a full shard is followed by the next."""
    little = ids.astype(ids.dtype.newbyteorder("<"), copy=False)
    while len(little):
        number, used = divmod(place, shard_tokens)
        path, part = directory / shard_name(number), little[: shard_tokens - used]
        with naming(path), path.open("ab" if used else "wb") as file:
            file.write(part.tobytes())
        place, little = place + len(part), little[len(part) :]


def shard_name(number: int) -> str:
    """Such as ``tokens-00003.bin``."""
    return f"tokens-{number:05d}.bin"


class Tokens:
    """The token ids of a corpus, memory-mapped: what is not asked for is never read.

    Args:
        directory: where :func:`write_tokens` wrote.

    Raises:
        ValueError: the files do not fit the index, or it is of another version.
        OSError: a file cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        path = directory / TOKENS_FILE
        try:
            self.index = TokenIndex(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is no index of tokens: {error}") from error
        if self.index.format_version != _FORMAT_VERSION:
            raise ValueError(f"{path} has format version {self.index.format_version}, not {_FORMAT_VERSION}")
        dtype = np.dtype(self.index.dtype).newbyteorder("<")
        size = self.index.shard_tokens
        self._shards: list[npt.NDArray[Any]] = []
        for number in range(-(-self.index.tokens // size)):
            shard = directory / shard_name(number)
            self._shards.append(np.memmap(shard, dtype=dtype, mode="r"))
            expected = min(size, self.index.tokens - number * size)
            if len(self._shards[-1]) != expected:
                raise ValueError(f"{shard} holds {len(self._shards[-1])} tokens, not {expected}")

    def __len__(self) -> int:
        return self.index.tokens

    def __reduce__(self) -> tuple[type[Tokens], tuple[Path]]:
        # To a data worker that is not forked goes the place of the tokens, not a copy of them.
        return Tokens, (self._directory,)

    def windows(self, starts: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.int64]:
        """The ``length`` tokens from each of ``starts`` on, ``(windows, length)`` int64.

        Raises:
            IndexError: a window leaves the stream.
        """
        if starts.size and (starts.min() < 0 or starts.max() + length > len(self)):
            raise IndexError(f"a window of {length} tokens leaves the stream of {len(self)}")
        size = self.index.shard_tokens
        places = starts[:, None] + np.arange(length)
        if len(self._shards) == 1:
            return np.array(self._shards[0][places], dtype=np.int64)
        result = np.empty(places.shape, dtype=np.int64)
        shards = places // size
        for number in np.unique(shards):
            here = shards == number
            result[here] = self._shards[number][places[here] - number * size]
        return result
