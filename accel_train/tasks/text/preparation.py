"""What a text experiment stands on: corpus, tokenizer and tokens, each made once and then shared.

Each is named by what it was made from: the corpus by its address, the tokenizer by the corpus's
digest, the tokens by corpus and tokenizer. So what is done is recognised by its content, not by a
file being there. A local corpus is used where it lies and never copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from accel_train.config import fields
from accel_train.config.sections import ExperimentConfig
from accel_train.data.windows import Ranges, count_windows, split_corpus
from accel_train.errors import ConfigError
from accel_train.files.atomic import sha256_json
from accel_train.files.shared import cached, damage
from accel_train.process.console import Meter
from accel_train.process.work import StopCheck, WorkContext, abandonable
from accel_train.tasks.text.builtin import BUILTIN, builtin_text
from accel_train.tasks.text.config import TextConfig
from accel_train.tasks.text.corpus import Corpus, UnusableCorpus, check_corpus, find_files
from accel_train.tasks.text.download import download, is_url
from accel_train.tasks.text.tokenizer import TOKENIZER_FILE, TextTokenizer, VocabularyError, train_tokenizer
from accel_train.tasks.text.tokens import Tokens, write_tokens

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
                rule = "has no meaning for the built-in corpus; name a corpus too"
                fields.check(value is None, f"text.{name}", value, rule)
        elif not is_url(text.corpus):
            self._corpus = corpus = self._checked(text.corpus, work)
            sha256 = text.corpus_sha256 and text.corpus_sha256.lower()
            for name, wanted, found in (
                ("corpus_sha256", sha256, corpus.sha256),
                ("corpus_bytes", text.corpus_bytes, corpus.size),
            ):
                rule = f"is not that of {text.corpus}, which is {found}; check the corpus and what is expected of it"
                fields.check(wanted in {None, found}, f"text.{name}", wanted, rule)

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
        if key is None:
            self._corpus = corpus = self._corpus or self._checked(text.corpus, work)
            origin = f"SHA-256 {corpus.sha256[:16]}"
        else:
            write = self._write_builtin if text.corpus == BUILTIN else self._fetch

            def build(directory: Path) -> None:
                write(directory / _CORPUS_FILE, work)
                # Before it counts: what is no text must not be found next time.
                self._checked(directory / _CORPUS_FILE, work)

            directory, origin = self._cached("corpus", shared, key, build, work)
            corpus = self._checked(directory / _CORPUS_FILE, work)
        size = f"{corpus.size / 1e6:.1f} MB" if corpus.size >= 1e6 else f"{corpus.size / 1e3:.0f} kB"
        work.say("corpus", f"{text.corpus}: {size} of text, {origin}")
        return corpus

    @property
    def _corpus_key(self) -> str | None:
        """Name of a corpus that is kept under the shared directory; None for local files."""
        text = self._text
        if text.corpus == BUILTIN:
            return f"builtin-{text.builtin_bytes}-v{_BUILTIN_VERSION}"
        if not is_url(text.corpus):
            return None
        return f"download-{sha256_json([text.corpus, text.corpus_sha256, text.corpus_bytes])[:16]}"

    def missing_corpus(self, shared: Path) -> str | None:
        """Why a corpus has to be fetched or made; None when it is there and sound."""
        return None if self._corpus_key is None else _missing(shared / self._corpus_key)

    def missing_tokenizer(self, corpus: Corpus, shared: Path) -> str | None:
        """Why a tokenizer has to be trained; None when it is there and sound."""
        return None if self._text.tokenizer == "char" else _missing(shared / self._tokenizer_key(corpus))

    def _tokenizer_key(self, corpus: Corpus) -> str:
        text = self._text
        defines = [_TOKENIZER_VERSION, text.tokenizer, text.vocab_size, corpus.sha256, corpus.strip_gutenberg]
        return f"tokenizer-{sha256_json(defines)[:16]}"

    def build_tokenizer(self, corpus: Corpus, shared: Path, work: WorkContext) -> TextTokenizer:
        """The tokenizer of ``corpus``, trained if it is not there."""
        text = self._text
        if text.tokenizer == "char":
            characters = train_tokenizer("char", (), text.vocab_size)
            work.say("tokenizer", f"{characters.vocab_size} characters")
            return characters

        def build(directory: Path) -> None:
            work.say("tokenizer", f"training {text.tokenizer} with a vocabulary of {text.vocab_size:,}")
            with Meter("tokenizer: text read", corpus.size, work.saying("tokenizer")) as meter:

                def train(is_abandoned: StopCheck) -> TextTokenizer:
                    return train_tokenizer(text.tokenizer, _counted(corpus, meter, is_abandoned), text.vocab_size)

                # Reading can be interrupted, merging cannot: the library is in it for as long as it takes.
                trained = abandonable(train, work.should_stop)
            (directory / TOKENIZER_FILE).write_text(trained.content, encoding="utf-8")

        try:
            directory, origin = self._cached("tokenizer", shared, self._tokenizer_key(corpus), build, work)
        except VocabularyError as error:
            rule = f"is more than this corpus supports ({error.possible} at most); choose a smaller one or more text"
            raise ConfigError("text.vocab_size", error.wanted, rule) from error
        tokenizer = TextTokenizer.load(directory / TOKENIZER_FILE)
        work.say("tokenizer", f"{text.tokenizer}, vocabulary of {tokenizer.vocab_size:,}, {origin}")
        return tokenizer

    def build_tokens(self, corpus: Corpus, tokenizer: TextTokenizer, shared: Path, work: WorkContext) -> Path:
        """The directory with the tokens of ``corpus``, written if they are not there."""
        defines = [_TOKENS_VERSION, corpus.sha256, corpus.strip_gutenberg, tokenizer.digest]

        def build(directory: Path) -> None:
            with Meter("tokens: text read", corpus.size, work.saying("tokens")) as meter:
                pieces = _counted(corpus, meter, work.should_stop)
                write_tokens(directory, pieces, tokenizer, corpus.sha256)
            (directory / TOKENIZER_FILE).write_text(tokenizer.content, encoding="utf-8")

        directory, origin = self._cached("tokens", shared, f"tokens-{sha256_json(defines)[:16]}", build, work)
        index = Tokens(directory).index
        work.say("tokens", f"{index.tokens:,} of {index.bytes / max(index.tokens, 1):.2f} bytes each, {origin}")
        self._check_size(index.tokens)
        return directory

    def _check_size(self, tokens: int) -> None:
        context, batch = self.config.model.max_seq_len, self.config.training.batch_size
        train, val = split(self.config, tokens)
        training, validation = count_windows(train, context, self._text.stride), count_windows(val, context)
        rule = (
            f"is more than the {training} windows of {context} tokens that this corpus gives for training; choose a "
            "smaller one or use more text"
        )
        fields.check(not _SENSIBLE_BATCH <= training < batch, "training.batch_size", batch, rule)
        for part, count, needed in (("training", training, batch), ("validation", validation, 1)):
            rule = (
                f"is too small: {tokens:,} tokens give {count} windows of model.max_seq_len = {context} for {part}, "
                f"and {needed} are needed; use more text, a shorter context or a smaller batch"
            )
            fields.check(count >= needed, "text.corpus", self._text.corpus, rule)

    def _write_builtin(self, path: Path, work: WorkContext) -> None:
        size = self._text.builtin_bytes
        meter = Meter("corpus: text made", size, work.saying("corpus"))
        with path.open("w", encoding="utf-8", newline="\n") as file, meter:
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

    def _checked(self, place: str | Path, work: WorkContext) -> Corpus:
        named, strip = self._text.corpus, self._text.strip_gutenberg
        try:
            paths = find_files(str(place))
            size = sum(path.stat().st_size for path in paths)
            with Meter("corpus: text checked", size, work.saying("corpus")) as meter:
                return check_corpus(paths, strip_gutenberg=strip, should_stop=work.should_stop, progress=meter)
        except UnusableCorpus as error:
            is_named = error.path.name == _CORPUS_FILE or str(error.path) == named
            rule = error.rule if is_named else f"{error.path} {error.rule}"
            raise ConfigError("text.corpus", named, rule) from error

    def _cached(
        self, name: str, shared: Path, key: str, build: Callable[[Path], None], work: WorkContext
    ) -> tuple[Path, str]:
        """The artifact's directory, and how it came to be there."""

        def note_and_build(directory: Path) -> None:
            self.built.add(name)
            build(directory)

        directory = cached(shared, key, note_and_build, work, name)
        how = "built" if name in self.built else "found and verified"
        return directory, f"{how} as {directory.parent.name}/{directory.name}"


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
