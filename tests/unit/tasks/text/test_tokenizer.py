"""Round trips, ids that transformers gives too, sizes, digests, and training that can be repeated."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from accel_train.errors import TokenizerError
from accel_train.tasks.text.builtin import builtin_text
from accel_train.tasks.text.tokenizer import (
    ALPHABET,
    CHAR_VOCAB_SIZE,
    SPECIAL_TOKENS,
    UNKNOWN,
    TextTokenizer,
    VocabularyError,
    char_tokenizer,
    normalize_text,
    train_tokenizer,
)

CORPUS = list(builtin_text(60_000, 3))
TRAINED = {kind: train_tokenizer(kind, CORPUS, 400) for kind in ("bpe", "unigram")}
ALL = {"char": char_tokenizer(), **TRAINED}

any_tokenizer = pytest.mark.parametrize("kind", list(ALL))
trained_tokenizer = pytest.mark.parametrize("kind", list(TRAINED))
texts = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(
    ["<pad>", "a<unk>b", "<bos> <eos>", "<PAD><UNK>", "¿Qué tal, señor?", "\r\n \n\n  x ", "\N{GRINNING FACE}\x00"]
)


@trained_tokenizer
@given(text=texts)
def test_a_trained_tokenizer_gives_every_text_back(kind: str, text: str) -> None:
    tokenizer = TRAINED[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.special_ids), "a special token that is written out is plain text"


@given(text=texts)
def test_the_character_tokenizer_gives_back_what_it_knows(text: str) -> None:
    tokenizer = ALL["char"]
    assert tokenizer.decode(tokenizer.encode(text)) == normalize_text(text)
    assert len(tokenizer.encode(text)) == len(text)


def test_the_ids_of_characters_are_fixed() -> None:
    assert CHAR_VOCAB_SIZE == 99
    assert ALL["char"].vocab_size == 99
    assert ALL["char"].encode(ALPHABET) == list(range(2, 99))
    assert ALL["char"].encode("é\r") == [1, 1]
    assert json.loads(ALL["char"].content)["model"]["vocab"]["<PAD>"] == 0
    assert json.loads(ALL["char"].content)["model"]["vocab"]["<UNK>"] == 1


@any_tokenizer
@given(text=texts)
def test_transformers_gives_the_same_ids(kind: str, text: str) -> None:
    fast = _as_transformers(kind)
    ids = fast(text, add_special_tokens=False)["input_ids"]
    assert ids == ALL[kind].encode(text)


_fast: dict[str, PreTrainedTokenizerFast] = {}


def _as_transformers(kind: str) -> PreTrainedTokenizerFast:
    if kind not in _fast:
        import tempfile

        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "tokenizer.json"
            path.write_text(ALL[kind].content, encoding="utf-8")
            _fast[kind] = PreTrainedTokenizerFast(tokenizer_file=str(path), split_special_tokens=True)
    return _fast[kind]


@any_tokenizer
@given(pieces=st.lists(texts, max_size=5))
def test_many_texts_at_once_give_the_ids_of_each(kind: str, pieces: list[str]) -> None:
    tokenizer = ALL[kind]
    expected = [number for piece in pieces for number in tokenizer.encode(piece)]
    found = tokenizer.encode_many(pieces)
    assert found.dtype == np.uint16
    assert found.tolist() == expected


@any_tokenizer
def test_save_and_load_change_nothing(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(ALL[kind].content, encoding="utf-8")
    loaded = TextTokenizer.load(path)
    assert loaded.content == ALL[kind].content
    assert (loaded.kind, loaded.vocab_size, loaded.digest) == (kind, ALL[kind].vocab_size, ALL[kind].digest)
    assert loaded.encode("Había una vez") == ALL[kind].encode("Había una vez")


@trained_tokenizer
def test_training_twice_gives_the_same_file(kind: str) -> None:
    assert train_tokenizer(kind, CORPUS, 400).content == TRAINED[kind].content


@trained_tokenizer
def test_the_special_tokens_come_first_and_the_size_is_what_was_asked(kind: str) -> None:
    vocabulary = json.loads(TRAINED[kind].content)["model"]["vocab"]
    names = list(vocabulary) if isinstance(vocabulary, dict) else [piece for piece, _ in vocabulary]
    assert tuple(names[:4]) == SPECIAL_TOKENS
    assert len(names) == TRAINED[kind].vocab_size == 400


@trained_tokenizer
@given(text=texts)
def test_byte_lengths_add_up_to_the_text(kind: str, text: str) -> None:
    tokenizer = TRAINED[kind]
    assert tokenizer.byte_lengths()[tokenizer.encode(text)].sum() == len(text.encode())


def test_an_unknown_character_has_no_bytes() -> None:
    assert ALL["char"].byte_lengths()[ALL["char"].encode("año")].tolist() == [1, 0, 1]


@trained_tokenizer
def test_more_than_the_text_gives_is_refused_with_what_it_gives(kind: str) -> None:
    with pytest.raises(VocabularyError) as caught:
        train_tokenizer(kind, CORPUS, 30_000)
    assert caught.value.wanted == 30_000
    assert 260 < caught.value.possible < 30_000
    assert train_tokenizer("bpe", CORPUS, 1000).vocab_size == 1000


def test_fewer_than_all_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 260"):
        train_tokenizer("bpe", CORPUS, 259)


def test_what_the_corpus_raises_arrives_as_it_is() -> None:
    def broken():
        yield "some text"
        raise InterruptedError("half-way")

    with pytest.raises(InterruptedError, match="half-way"):
        train_tokenizer("bpe", broken(), 400)


@pytest.mark.parametrize("content", ["", "{}", "not json", '{"model": {"type": "BPE"}}'])
def test_what_is_no_tokenizer_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is no tokenizer"):
        TextTokenizer.load(path)


def test_large_vocabularies_need_four_bytes() -> None:
    tokenizer = TextTokenizer(ALL["bpe"].content)
    tokenizer.vocab_size = 2**16
    assert tokenizer.dtype is np.uint16
    tokenizer.vocab_size = 2**16 + 1
    assert tokenizer.dtype is np.uint32


# -- the alphabet of characters -----------------------------------------------------------


def test_the_alphabet_is_tab_newline_and_printable_ascii() -> None:
    assert list(map(ord, ALPHABET)) == [9, 10, *range(32, 127)]


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("", ""),
        ("Plain text,\n\twith a tab.", "Plain text,\n\twith a tab."),
        ("\x00\x1f\x7f\r", UNKNOWN * 4),
        ("año", f"a{UNKNOWN}o"),
        ("\N{GRINNING FACE}", UNKNOWN),
    ],
)
def test_everything_else_becomes_the_unknown_character(text: str, normalized: str) -> None:
    assert normalize_text(text) == normalized


@given(st.text())
def test_normalizing_keeps_the_length_and_is_done_after_once(text: str) -> None:
    once = normalize_text(text)
    assert len(once) == len(text)
    assert normalize_text(once) == once
