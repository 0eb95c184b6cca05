"""The section of the text task: corpus, tokenizer, samples and gate."""

from __future__ import annotations

import re
from dataclasses import field
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Lt

from accel_train.config import fields
from accel_train.config.sections import ExperimentConfig, check_path


@fields.section("text.gate")
class GateConfig:
    """What the finished model is asked; null in a threshold: the figure is reported only."""

    stop_on_pass: bool = False
    """End training when the validation loss and the overfit gap pass."""
    val_loss_threshold: fields.NotNegative | None = 5.0
    """Validation loss (nats per token) must be below this."""
    overfit_gap_threshold: fields.NotNegative | None = 0.5
    """Validation loss less training loss, both measured on the final model, must be below this."""
    repetition_threshold: fields.NotNegative | None = 0.5
    """No sample may repeat its own runs of four tokens more often than this."""
    language_threshold: fields.Fraction | None = 0.7
    """Share of samples that go on in the language of their prompt; judged when the corpus holds English and Spanish."""
    loss_rises_threshold: fields.CountOrZero | None = 0
    """The mean training loss may rise from one epoch to the next this many times."""
    latency_p95_ms_threshold: fields.NotNegative | None = 250.0
    """The 95th percentile of the milliseconds that a token takes must not exceed this."""
    rss_mb_threshold: fields.NotNegative | None = 400.0
    """Megabytes that a process may need that only loads the model and generates."""


@fields.section("text")
class TextConfig:
    """The text corpus, its tokenizer, and how the model is tried on it."""

    corpus: str = "builtin"
    """Path of a text file or a directory of *.txt files, http(s) URL, or `builtin` (a generated bilingual corpus)."""
    corpus_sha256: str | None = None
    """SHA-256 (hex) that the corpus must have; null: not checked."""
    corpus_bytes: fields.Count | None = None
    """Size that a downloaded corpus must have; null: not checked."""
    builtin_bytes: fields.Count = 500_000
    """Size of the built-in corpus."""
    strip_gutenberg: bool = False
    """Leave out what Project Gutenberg puts before and after its books."""
    tokenizer: Literal["char", "bpe", "unigram"] = "bpe"
    """Kind of tokenizer."""
    vocab_size: Annotated[int, Ge(1)] = 8000
    """Vocabulary size of a trained tokenizer; characters have a fixed one."""
    val_fraction: Annotated[float, Gt(0), Lt(1)] | None = None
    """Part held out for validation; null: 0.05 for characters, 0.1 for subwords."""
    split: Literal["tail", "blocks"] | None = None
    """How the held-out part is cut; null: tail for characters, blocks for subwords."""
    stride: fields.Count | None = None
    """Tokens from one training window to the next; null: model.max_seq_len, so that windows do not overlap."""
    val_batches: fields.Count | None = None
    """Validate on this many batches, spread evenly; null: on the whole held-out part."""
    prompt: str = "The"
    """Prompt of the sample that every evaluation writes."""
    sample_tokens: fields.Count = 100
    """Length of the sample."""
    temperature: fields.NotNegative = 1.0
    """Temperature of the sample; 0 takes the most likely token."""
    top_k: fields.Count | None = None
    """Sample from the `top_k` most likely tokens; null: from all."""
    top_p: fields.PositiveFraction | None = None
    """Sample from the fewest tokens whose probabilities add up to `top_p`; null: from all."""
    download_timeout: fields.Positive = fields.neutral(default=30.0)
    """Seconds that a server may be silent."""
    download_attempts: fields.Count = fields.neutral(default=5)
    """Connections tried before a download is given up."""
    gate: GateConfig = field(default_factory=GateConfig)
    """The gate."""

    def __post_init__(self) -> None:
        fields.check(bool(self.corpus.strip()), "text.corpus", self.corpus, "must name a file, a URL, or 'builtin'")
        digest = self.corpus_sha256
        plain = digest is None or re.fullmatch(r"[0-9a-fA-F]{64}", digest) is not None
        fields.check(plain, "text.corpus_sha256", digest, "must be 64 hexadecimal digits")
        if self.tokenizer != "char":
            # Special tokens and the 256 bytes come first.
            fields.check(self.vocab_size > 260, "text.vocab_size", self.vocab_size, "must be more than 260 (all bytes)")
            fields.check(self.vocab_size <= 2**20, "text.vocab_size", self.vocab_size, "must be at most 1048576")
        fields.check(bool(self.prompt), "text.prompt", self.prompt, "must not be empty")

    def check(self, _config: ExperimentConfig) -> None:
        """Refuse a corpus whose name no record could hold."""
        check_path("text.corpus", self.corpus)

    @property
    def slug(self) -> str:
        """What the name of a run says of this section."""
        return "char" if self.tokenizer == "char" else f"{self.tokenizer}{self.vocab_size}"

    @property
    def held_out_fraction(self) -> float:
        """``val_fraction`` with its default resolved."""
        return self.val_fraction or (0.05 if self.tokenizer == "char" else 0.1)

    @property
    def split_by(self) -> Literal["tail", "blocks"]:
        """``split`` with its default resolved."""
        return self.split or ("tail" if self.tokenizer == "char" else "blocks")
