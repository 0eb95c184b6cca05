"""Tokens on disk: the same whatever the size of a shard, and checked when they are opened."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from accel_train.tasks.text.builtin import builtin_text
from accel_train.tasks.text.tokenizer import char_tokenizer, train_tokenizer
from accel_train.tasks.text.tokens import TOKENS_FILE, Tokens, shard_name, write_tokens

PIECES = list(builtin_text(200_000, 5))
TOKENIZER = train_tokenizer("bpe", PIECES, 500)
IDS = TOKENIZER.encode("".join(PIECES))


def written(directory: Path, **options: int) -> Path:
    write_tokens(directory, PIECES, TOKENIZER, "c" * 64, **options)
    return directory


@pytest.mark.parametrize("shard_tokens", [997, 10_000, 1 << 25])
def test_windows_are_the_tokens_whatever_the_shards(tmp_path: Path, shard_tokens: int) -> None:
    tokens = Tokens(written(tmp_path, shard_tokens=shard_tokens))
    assert len(tokens) == len(IDS)
    assert len(list(tmp_path.glob("*.bin"))) == -(-len(IDS) // shard_tokens)
    starts = np.array([0, 990, 991, 5, len(IDS) - 1200])
    found = tokens.windows(starts, 1200)
    assert found.dtype == np.int64
    for row, start in zip(found, starts, strict=True):
        assert row.tolist() == IDS[start : start + 1200]


def test_the_index_says_what_is_there(tmp_path: Path) -> None:
    index = Tokens(written(tmp_path)).index
    assert (index.tokens, index.bytes) == (len(IDS), len("".join(PIECES).encode()))
    assert (index.dtype, index.vocab_size, index.unknown) == ("uint16", 500, 0)
    assert (index.corpus_sha256, index.tokenizer_sha256) == ("c" * 64, TOKENIZER.digest)


def test_unknown_characters_are_counted(tmp_path: Path) -> None:
    assert write_tokens(tmp_path, ["aña", "ñ"], char_tokenizer(), "").unknown == 2


def test_a_large_vocabulary_takes_four_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = train_tokenizer("bpe", PIECES, 500)
    tokenizer.vocab_size = 2**16 + 1
    index = write_tokens(tmp_path, PIECES[:1], tokenizer, "")
    assert index.dtype == "uint32"
    assert Tokens(tmp_path).windows(np.array([0]), 5).tolist() == [IDS[:5]]


def test_another_process_is_sent_their_place_and_no_copy(tmp_path: Path) -> None:
    tokens = Tokens(written(tmp_path))
    sent = pickle.dumps(tokens)
    assert len(sent) < 500
    assert pickle.loads(sent).windows(np.array([7]), 50).tolist() == [IDS[7:57]]


def test_a_window_outside_is_an_error(tmp_path: Path) -> None:
    tokens = Tokens(written(tmp_path))
    for start in (-1, len(IDS) - 9):
        with pytest.raises(IndexError, match="leaves the stream"):
            tokens.windows(np.array([start]), 10)


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    shard = written(tmp_path, shard_tokens=10_000) / shard_name(1)
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(ValueError, match=f"{shard.name} holds 9999 tokens, not 10000"):
        Tokens(tmp_path)
    path = tmp_path / TOKENS_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 2}))
    with pytest.raises(ValueError, match="format version 2"):
        Tokens(tmp_path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="no index of tokens"):
        Tokens(tmp_path)


def test_what_the_corpus_raises_arrives(tmp_path: Path) -> None:
    def broken():
        yield from PIECES
        raise InterruptedError("half-way")

    with pytest.raises(InterruptedError, match="half-way"):
        write_tokens(tmp_path, broken(), TOKENIZER, "")
    assert not (tmp_path / TOKENS_FILE).exists(), "without an index it is no corpus"
