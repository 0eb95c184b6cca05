"""Tokenizers: characters, byte-level BPE and byte-level unigram, each in one ``tokenizer.json``.

All three are pipelines of Hugging Face's ``tokenizers`` library, so ``PreTrainedTokenizerFast`` of
transformers loads the file and gives the same ids. The trained ones work on bytes: there is no
text that they cannot encode and give back. A special token that is written out in a text is
plain text to :meth:`TextTokenizer.encode`.

Training is reproducible: the same text gives the same file, byte for byte. For unigram that
takes a repair, since the library hands out the scores of rare bytes in the order of a hash map.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from accel_train.errors import TokenizerError

Kind = Literal["char", "bpe", "unigram"]

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
"""Stands for a character outside the alphabet."""

ALPHABET = "\t\n" + "".join(map(chr, range(32, 127)))
"""What the character tokenizer knows: tab, newline and printable ASCII."""

_KNOWN = frozenset(ALPHABET)

TOKENIZER_FILE = "tokenizer.json"
SPECIAL_TOKENS = ("<pad>", "<unk>", "<bos>", "<eos>")
"""Ids 0 to 3 of a trained tokenizer."""
CHAR_SPECIAL_TOKENS = ("<PAD>", "<UNK>")
"""Ids 0 and 1 of the character tokenizer."""
CHAR_VOCAB_SIZE = len(CHAR_SPECIAL_TOKENS) + len(ALPHABET)
SMALLEST_VOCAB = len(SPECIAL_TOKENS) + 256
"""Special tokens and the 256 bytes: a trained vocabulary has more."""

_BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
_SCORE_DIGITS = 9


class VocabularyError(ValueError):
    """The text does not support a vocabulary of the size that was asked for.

    Args:
        wanted: the size asked for.
        possible: the largest that the text gives.
    """

    def __init__(self, wanted: int, possible: int) -> None:
        self.wanted, self.possible = wanted, possible
        super().__init__(f"a vocabulary of {wanted} was asked for, and the text gives {possible} at most")


class TextTokenizer:
    """A tokenizer, its identity, and its way to NumPy.

    Args:
        content: the text of a ``tokenizer.json``.

    Raises:
        TokenizerError: it is not one.
    """

    def __init__(self, content: str) -> None:
        try:
            self._tokenizer = Tokenizer.from_str(content)
            kind = json.loads(content)["model"]["type"]
        except Exception as error:  # the library raises bare Exceptions
            raise TokenizerError(f"is no tokenizer ({error})") from error
        self.kind: Kind = {"WordLevel": "char", "BPE": "bpe", "Unigram": "unigram"}.get(kind, "")  # type: ignore[assignment]
        if not self.kind:
            raise TokenizerError(f"is a tokenizer of kind {kind}, which this program does not make")
        self._tokenizer.encode_special_tokens = True
        self.content = content
        self.vocab_size: int = self._tokenizer.get_vocab_size()
        self.digest = hashlib.sha256(content.encode()).hexdigest()
        """SHA-256 (hex) of the file."""
        self._is_char = self.kind == "char"
        special = CHAR_SPECIAL_TOKENS if self._is_char else SPECIAL_TOKENS
        self.special_ids: tuple[int, ...] = tuple(range(len(special)))
        if self._is_char:
            self._id_of = np.full(128, CHAR_SPECIAL_TOKENS.index("<UNK>"), dtype=np.uint16)
            self._id_of[[ord(character) for character in ALPHABET]] = np.arange(len(special), CHAR_VOCAB_SIZE)

    @classmethod
    def load(cls, path: Path) -> TextTokenizer:
        """The tokenizer in ``path``.

        Raises:
            TokenizerError: it is not one; names the file.
            OSError: it cannot be read.
        """
        try:
            return cls(path.read_text(encoding="utf-8"))
        except (TokenizerError, UnicodeDecodeError) as error:
            raise TokenizerError(f"{path} {error}") from error

    @property
    def dtype(self) -> type[np.uint16] | type[np.uint32]:
        """The smallest type of NumPy that holds every id."""
        return np.uint16 if self.vocab_size <= 2**16 else np.uint32

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``."""
        if self._is_char:
            return list(self._characters(text).tolist())
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_many(self, texts: Sequence[str]) -> npt.NDArray[Any]:
        """The ids of ``texts`` one after the other, ``(tokens,)`` of :attr:`dtype`; in parallel threads."""
        if self._is_char:
            return self._characters("".join(texts))
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        parts = [np.array(each.ids, dtype=self.dtype) for each in encoded]
        return np.concatenate(parts) if parts else np.empty(0, self.dtype)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; special tokens vanish, except the unknown character of the character tokenizer."""
        if self._is_char:
            known = len(self.special_ids)
            return "".join([UNKNOWN if each == 1 else ALPHABET[each - known] for each in ids if each])
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def byte_lengths(self) -> npt.NDArray[np.int64]:
        """Bytes of UTF-8 that each id stands for, ``(vocab_size,)``; 0 for special tokens.

        So the unknown character has none: what it cost to predict counts, what it stood for does not, and
        bits per byte come out too high rather than too low.
        """
        lengths = np.ones(self.vocab_size, dtype=np.int64)
        if not self._is_char:
            for token, number in self._tokenizer.get_vocab(with_added_tokens=True).items():
                lengths[number] = len(token)  # each byte is written as one character
        lengths[list(self.special_ids)] = 0
        return lengths

    def _characters(self, text: str) -> npt.NDArray[np.uint16]:
        # "surrogatepass": a lone surrogate is one more unknown character.
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        return self._id_of[np.minimum(points, 127)]


def normalize_text(text: str) -> str:
    """``text`` with every character outside :data:`ALPHABET` replaced by :data:`UNKNOWN`.

    Its length does not change, and normalizing twice is normalizing once.
    """
    return "".join([character if character in _KNOWN else UNKNOWN for character in text])


def char_tokenizer() -> TextTokenizer:
    """The character tokenizer: ``<PAD>``, ``<UNK>``, then :data:`ALPHABET`."""
    vocabulary = {token: number for number, token in enumerate([*CHAR_SPECIAL_TOKENS, *ALPHABET])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<UNK>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return TextTokenizer(tokenizer.to_str(pretty=True))


def train_tokenizer(kind: Kind, texts: Iterable[str], vocab_size: int) -> TextTokenizer:
    """Train a tokenizer.

    Args:
        kind: ``char`` needs no training and reads nothing.
        texts: pieces of the corpus, in any number; never held all at once.
        vocab_size: ids, the special ones included.

    Raises:
        VocabularyError: the text gives fewer.
        Exception: whatever ``texts`` raises.
    """
    if kind == "char":
        return char_tokenizer()
    if vocab_size < SMALLEST_VOCAB:
        raise ValueError(f"vocab_size = {vocab_size} must be at least {SMALLEST_VOCAB}: special tokens and all bytes")
    tokenizer = Tokenizer(models.BPE() if kind == "bpe" else models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    options: dict[str, Any] = {"special_tokens": [*SPECIAL_TOKENS], "initial_alphabet": _BYTES, "show_progress": False}
    trainer = trainers.BpeTrainer if kind == "bpe" else partial(trainers.UnigramTrainer, unk_token="<unk>")
    tokenizer.train_from_iterator(texts, trainer=trainer(vocab_size=vocab_size, **options))
    content = tokenizer.to_str(pretty=False)
    trained = TextTokenizer(_repaired(content) if kind == "unigram" else content)
    if trained.vocab_size != vocab_size:
        raise VocabularyError(vocab_size, trained.vocab_size)
    return trained


def _repaired(content: str) -> str:
    """A unigram tokenizer without the traces of hash maps: their order is in rare bytes' scores and in last digits."""
    values = json.loads(content)
    vocabulary: list[list[Any]] = values["model"]["vocab"]
    special, pieces = vocabulary[: len(SPECIAL_TOKENS)], vocabulary[len(SPECIAL_TOKENS) :]
    # Bytes that training has dropped come back below all others, in arbitrary order.
    lowest = min((score for piece, score in pieces if len(piece) > 1), default=0.0)
    rare = sorted(piece for piece, score in pieces if len(piece) == 1 and score < lowest)
    scores = sorted((score for piece, score in pieces if piece in set(rare)), reverse=True)
    kept = [(piece, score) for piece, score in pieces if piece not in set(rare)]
    renewed = [(piece, round(score, _SCORE_DIGITS)) for piece, score in [*kept, *zip(rare, scores, strict=True)]]
    renewed.sort(key=lambda each: (-each[1], each[0]))
    values["model"]["vocab"] = [*special, *map(list, renewed)]
    return json.dumps(values, ensure_ascii=False)
