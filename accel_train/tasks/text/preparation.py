"""What a text experiment stands on: corpus, tokenizer and tokens, each made once and then shared.

Each is named by what it was made from: the corpus by its address, the tokenizer by the corpus's
digest, the tokens by corpus and tokenizer. So what is done is recognised by its content, not by a
file being there. A local corpus is used where it lies and never copied.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

from accel_train.config.sections import ExperimentConfig
from accel_train.data.windows import Ranges, count_windows, split_corpus
from accel_train.errors import ConfigError
from accel_train.files.atomic import canonical_json
from accel_train.files.shared import cached, damage
from accel_train.process.console import Meter
from accel_train.process.work import StopCheck, WorkContext, abandonable
from accel_train.tasks.text.builtin import BUILTIN, builtin_text
from accel_train.tasks.text.config import TextConfig
from accel_train.tasks.text.corpus import Corpus, UnusableCorpus, check_corpus, find_files
from accel_train.tasks.text.download import download, is_url
from accel_train.tasks.text.tokenizer import (
    CHAR_VOCAB_SIZE,
    TOKENIZER_FILE,
    TextTokenizer,
    VocabularyError,
    char_tokenizer,
    train_tokenizer,
)
from accel_train.tasks.text.tokens import Tokens, write_tokens

_Writer = Callable[[Path, WorkContext], None]

# Parts of the cache keys: raise one when the same input would give another result.
_BUILTIN_VERSION, _TOKENIZER_VERSION, _TOKENS_VERSION = 1, 1, 1
_BUILTIN_SEED = 0
"""The corpus is data: runs of different seeds share it."""
_CORPUS_FILE = "corpus.txt"
_SENSIBLE_BATCH = 16
"""A corpus that gives so many windows is not to blame for being smaller than a batch."""


def split(config: ExperimentConfig, tokens: int) -> tuple[Ranges, Ranges]:
    """Return which of ``tokens`` are for training and which for validation."""
    text: TextConfig = config.section
    return split_corpus(tokens, config.model.max_seq_len, text.held_out_fraction, text.split_by)


class Preparation:
    """Makes what is missing under the directory that all runs share, and verifies what is there.

    Args:
        config: of the text task.
    """

    def __init__(self, config: ExperimentConfig) -> None:
        self.config = config
        self._text: TextConfig = config.section
        self._corpus: Corpus | None = None
        self.built: set[str] = set()
        """Which of corpus, tokenizer and tokens were not there."""

    def check(self, work: WorkContext) -> None:
        """Read a local corpus once, and refuse one that is no text.

        Raises:
            ConfigError: it is missing, empty, binary or not UTF-8; names the byte.
            Interrupted: ``should_stop()`` turned true.
        """
        text = self._text
        if text.corpus == BUILTIN:
            for name in ("corpus_sha256", "corpus_bytes"):
                value = getattr(text, name)
                if value is not None:
                    raise ConfigError(
                        f"text.{name}", value, "has no meaning for the built-in corpus; name a corpus too"
                    )
        elif not is_url(text.corpus):
            self._corpus = self._checked(lambda: find_files(text.corpus), work)
            expected = (
                ("corpus_sha256", text.corpus_sha256 and text.corpus_sha256.lower(), self._corpus.sha256),
                ("corpus_bytes", text.corpus_bytes, self._corpus.size),
            )
            for name, wanted, found in expected:
                if wanted not in {None, found}:
                    rule = (
                        f"is not that of {text.corpus}, which is {found}; check the corpus and what is expected of it"
                    )
                    raise ConfigError(f"text.{name}", wanted, rule)

    def build(self, shared: Path, work: WorkContext) -> str:
        """Fetch or make the corpus, train the tokenizer, write the tokens; or verify and reuse them.

        Raises:
            ConfigError: the corpus does not support the vocabulary, or is too small.
            DownloadError: it could not be fetched.
            Interrupted: ``should_stop()`` turned true; nothing half-built is left.
        """
        corpus = self.build_corpus(shared, work)
        tokenizer = self.build_tokenizer(corpus, shared, work)
        return str(self.build_tokens(corpus, tokenizer, shared, work))

    def build_corpus(self, shared: Path, work: WorkContext) -> Corpus:
        """The corpus, checked: a local one where it lies, any other one under ``shared``."""
        text, key = self._text, self._corpus_key
        if key is not None:
            write = self._write_builtin if text.corpus == BUILTIN else self._fetch
            corpus = self._made(key, write, shared, work)
        else:
            corpus = self._corpus or self._checked(lambda: find_files(text.corpus), work)
            self._corpus = corpus
            work.say("corpus", f"{text.corpus}: {_size(corpus.size)} of text, SHA-256 {corpus.sha256[:16]}")
        return corpus

    @property
    def _corpus_key(self) -> str | None:
        """Name of a corpus that is kept under the shared directory; None for local files."""
        text = self._text
        if text.corpus == BUILTIN:
            return f"builtin-{text.builtin_bytes}-v{_BUILTIN_VERSION}"
        if not is_url(text.corpus):
            return None
        return f"download-{_short(canonical_json([text.corpus, text.corpus_sha256, text.corpus_bytes]))}"

    def missing_corpus(self, shared: Path) -> str | None:
        """Why a corpus has to be fetched or made; None when it is there and sound."""
        return None if self._corpus_key is None else _missing(shared / self._corpus_key)

    def missing_tokenizer(self, corpus: Corpus, shared: Path) -> str | None:
        """Why a tokenizer has to be trained; None when it is there and sound."""
        return None if self._text.tokenizer == "char" else _missing(shared / self._tokenizer_key(corpus))

    def _tokenizer_key(self, corpus: Corpus) -> str:
        text = self._text
        defines = [_TOKENIZER_VERSION, text.tokenizer, text.vocab_size, corpus.sha256, corpus.strip_gutenberg]
        return f"tokenizer-{_short(canonical_json(defines))}"

    def build_tokenizer(self, corpus: Corpus, shared: Path, work: WorkContext) -> TextTokenizer:
        """The tokenizer of ``corpus``, trained if it is not there."""
        text = self._text
        if text.tokenizer == "char":
            work.say("tokenizer", f"{CHAR_VOCAB_SIZE} characters")
            return char_tokenizer()

        def build(directory: Path) -> None:
            work.say("tokenizer", f"training {text.tokenizer} with a vocabulary of {text.vocab_size:,}")
            with Meter("tokenizer: text read", corpus.size, work.saying("tokenizer")) as meter:

                def train(is_abandoned: StopCheck) -> TextTokenizer:
                    return train_tokenizer(text.tokenizer, _counted(corpus, meter, is_abandoned), text.vocab_size)

                # Reading can be interrupted, merging cannot: the library is in it for as long as it takes.
                trained = abandonable(train, work.should_stop)
            (directory / TOKENIZER_FILE).write_text(trained.content, encoding="utf-8")

        try:
            directory, built = self._cached("tokenizer", shared, self._tokenizer_key(corpus), build, work)
        except VocabularyError as error:
            raise ConfigError(
                "text.vocab_size",
                error.wanted,
                f"is more than this corpus supports ({error.possible} at most); choose a smaller one or use more text",
            ) from error
        tokenizer = TextTokenizer.load(directory / TOKENIZER_FILE)
        work.say(
            "tokenizer", f"{text.tokenizer}, vocabulary of {tokenizer.vocab_size:,}, {built} as {_name(directory)}"
        )
        return tokenizer

    def build_tokens(self, corpus: Corpus, tokenizer: TextTokenizer, shared: Path, work: WorkContext) -> Path:
        """The directory with the tokens of ``corpus``, written if they are not there."""
        defines = [_TOKENS_VERSION, corpus.sha256, corpus.strip_gutenberg, tokenizer.digest]

        def build(directory: Path) -> None:
            with Meter("tokens: text read", corpus.size, work.saying("tokens")) as meter:
                pieces = _counted(corpus, meter, work.should_stop)
                write_tokens(directory, pieces, tokenizer, corpus.sha256)
            (directory / TOKENIZER_FILE).write_text(tokenizer.content, encoding="utf-8")

        directory, built = self._cached("tokens", shared, f"tokens-{_short(canonical_json(defines))}", build, work)
        index = Tokens(directory).index
        each = index.bytes / max(index.tokens, 1)
        work.say("tokens", f"{index.tokens:,} of {each:.2f} bytes each, {built} as {_name(directory)}")
        self._check_size(index.tokens)
        return directory

    def _check_size(self, tokens: int) -> None:
        context, batch = self.config.model.max_seq_len, self.config.training.batch_size
        train, val = split(self.config, tokens)
        counts = {
            "training": count_windows(train, context, self._text.stride),
            "validation": count_windows(val, context),
        }
        if _SENSIBLE_BATCH <= counts["training"] < batch:
            raise ConfigError(
                "training.batch_size",
                batch,
                f"is more than the {counts['training']} windows of {context} tokens that this corpus gives for "
                "training; choose a smaller one or use more text",
            )
        for part, needed in (("training", batch), ("validation", 1)):
            if counts[part] < needed:
                raise ConfigError(
                    "text.corpus",
                    self._text.corpus,
                    f"is too small: {tokens:,} tokens give {counts[part]} windows of model.max_seq_len = {context} "
                    f"for {part}, and {needed} are needed; use more text, a shorter context or a smaller batch",
                )

    def _made(self, key: str, write: _Writer, shared: Path, work: WorkContext) -> Corpus:
        """A corpus that is a file under ``shared``."""

        def build(directory: Path) -> None:
            path = directory / _CORPUS_FILE
            write(path, work)
            # Before it counts: what is no text must not be found next time.
            self._checked(lambda: (path,), work)

        directory, built = self._cached("corpus", shared, key, build, work)
        corpus = self._checked(lambda: (directory / _CORPUS_FILE,), work)
        work.say("corpus", f"{self._text.corpus}: {_size(corpus.size)} of text, {built} as {_name(directory)}")
        return corpus

    def _write_builtin(self, path: Path, work: WorkContext) -> None:
        size = self._text.builtin_bytes
        with (
            path.open("w", encoding="utf-8", newline="\n") as file,
            Meter("corpus: text made", size, work.saying("corpus")) as meter,
        ):
            for piece in builtin_text(size, _BUILTIN_SEED):
                work.check()
                file.write(piece)
                meter(len(piece.encode()))

    def _fetch(self, path: Path, work: WorkContext) -> None:
        text = self._text
        with Meter("download", text.corpus_bytes, work.saying("corpus")) as meter:
            download(
                text.corpus,
                path,
                sha256=text.corpus_sha256,
                size=text.corpus_bytes,
                timeout=text.download_timeout,
                attempts=text.download_attempts,
                should_stop=work.should_stop,
                progress=meter.reach,
                on_retry=work.saying("corpus"),
            )

    def _checked(self, find: Callable[[], tuple[Path, ...]], work: WorkContext) -> Corpus:
        text = self._text
        try:
            paths = find()
            size = sum(path.stat().st_size for path in paths)
            with Meter("corpus: text checked", size, work.saying("corpus")) as meter:
                return check_corpus(
                    paths, strip_gutenberg=text.strip_gutenberg, should_stop=work.should_stop, progress=meter
                )
        except UnusableCorpus as error:
            named = error.path.name == _CORPUS_FILE or str(error.path) == text.corpus
            rule = error.rule if named else f"{error.path} {error.rule}"
            raise ConfigError("text.corpus", text.corpus, rule) from error

    def _cached(
        self, name: str, shared: Path, key: str, build: Callable[[Path], None], work: WorkContext
    ) -> tuple[Path, str]:
        """The artifact's directory, and how it came to be there."""

        def note_and_build(directory: Path) -> None:
            self.built.add(name)
            build(directory)

        directory = cached(
            shared,
            key,
            note_and_build,
            work,
            name,
        )
        return directory, "built" if name in self.built else "found and verified"


def _missing(directory: Path) -> str | None:
    if not directory.is_dir():
        return f"{directory} does not exist"
    problem = damage(directory)
    return None if problem is None else f"{directory} is damaged: {problem}"


def _counted(corpus: Corpus, meter: Meter, should_stop: StopCheck) -> Iterator[str]:
    """The pieces of a corpus, each counted as it is taken."""
    for piece in corpus.pieces(should_stop):
        meter(len(piece.encode()))
        yield piece


def _short(defines: str) -> str:
    return hashlib.sha256(defines.encode()).hexdigest()[:16]


def _name(directory: Path) -> str:
    return f"{directory.parent.name}/{directory.name}"


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"
