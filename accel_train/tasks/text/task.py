"""Text: a model that continues a text, judged by its loss, its samples and its cost.

The loss is measured on a part of the corpus that no training window touches. What says little
in the course of training (samples, milliseconds, megabytes) is judged once, at the end.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Subset

from accel_train.config.sections import ExperimentConfig, canonical_json
from accel_train.data.permutation import Ids
from accel_train.data.windows import WindowDataset
from accel_train.errors import ConfigError
from accel_train.files.atomic import sha256_file
from accel_train.files.shared import INDEX_FILE
from accel_train.model import size as memory
from accel_train.model.generation import generate
from accel_train.process.fault_points import SILENT, Observer
from accel_train.tasks.base import Evaluation, Say, StopCheck, Trained
from accel_train.tasks.criteria import Criterion, Op, Verdict, judge
from accel_train.tasks.text.inference_cost import DeploymentError, measure_apart
from accel_train.tasks.text.preparation import Preparation, split
from accel_train.tasks.text.repetition import repetition
from accel_train.tasks.text.sample_quality import LANGUAGES, Language, language_of
from accel_train.tasks.text.tokenizer import CHAR_VOCAB_SIZE, TOKENIZER_FILE, TextTokenizer
from accel_train.tasks.text.tokens import Tokens

_PROBE_WINDOWS = 256
_PROMPTS_PER_LANGUAGE, _FEWEST_PROMPTS = 20, 5
_PROMPT_TOKENS, _CONTINUATION_TOKENS = 24, 64
_WINDOWS_LOOKED_AT = 400
_SAMPLE, _JUDGED = range(2)


class TextTask:
    """Learn to continue a text."""

    def __init__(self, config: ExperimentConfig, observer: Observer = SILENT) -> None:
        self.config = config
        self.preparation = Preparation(config, observer)
        self._context = config.model.max_seq_len
        self._artifacts = Path()
        self._tokens: Tokens | None = None
        self._tokenizer: TextTokenizer | None = None
        self._train: WindowDataset | None = None
        self._val: WindowDataset | None = None
        self._bytes_per_token: float | None = None

    @property
    def vocab_size(self) -> int:
        """What the configuration asks for, or the fixed size of the character tokenizer."""
        return CHAR_VOCAB_SIZE if self.config.text.tokenizer == "char" else self.config.text.vocab_size

    @property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer; after :meth:`open` or :meth:`use_tokenizer`."""
        assert self._tokenizer is not None, "open() comes first"
        return self._tokenizer

    def use_tokenizer(self, path: Path) -> None:
        """Take the tokenizer from a checkpoint: whoever only generates needs no corpus.

        Raises:
            TokenizerError: it is none.
            OSError: it cannot be read.
        """
        self._tokenizer = TextTokenizer.load(path)

    # -- data ------------------------------------------------------------------------------

    def check(self, say: Say, should_stop: StopCheck) -> None:
        """Refuse a corpus that is no text and a gate that cannot be passed; warn where memory is short.

        Raises:
            ConfigError: the corpus is missing, empty, binary or not UTF-8, or a threshold cannot be met.
            Interrupted: ``should_stop()`` turned true.
        """
        for warning in memory.warnings(self.config, self.vocab_size):
            say("warning", warning)
        gate = self.config.gate
        if gate.val_loss_threshold == 0:
            raise ConfigError("gate.val_loss_threshold", 0.0, "can never be met; choose a positive value or null")
        self.preparation.check(say, should_stop)

    def build(self, shared: Path, say: Say, should_stop: StopCheck) -> str:
        """Fetch or make the corpus, train the tokenizer, write the tokens; or verify and reuse them."""
        return self.preparation.build(shared, say, should_stop)

    def open(self, artifacts: str) -> WindowDataset:
        """The training windows, memory-mapped; also opens the held-out ones."""
        self._artifacts = Path(artifacts)
        self._tokens = Tokens(self._artifacts)
        self._tokenizer = TextTokenizer.load(self._artifacts / TOKENIZER_FILE)
        train, val = split(self.config, len(self._tokens))
        self._train = WindowDataset(self._tokens, self._context, train, self.config.text.stride)
        self._val = WindowDataset(self._tokens, self._context, val)
        return self._train

    @property
    def _windows(self) -> tuple[WindowDataset, WindowDataset]:
        assert self._train is not None, "open() comes first"
        assert self._val is not None
        return self._train, self._val

    def _held_out(self) -> Ids:
        """Ids of the windows that are validated on."""
        _, val = self._windows
        batches = self.config.text.val_batches
        return _spread(len(val), len(val) if batches is None else batches * self.config.training.batch_size)

    def validation(self) -> dict[str, Any]:
        """``val``: the held-out windows; ``probe``: training windows, to compare with in the same mode."""
        train, val = self._windows
        held_out = self._held_out()
        return {
            "val": Subset(val, held_out.tolist()),
            "probe": Subset(train, _spread(len(train), min(_PROBE_WINDOWS, len(held_out))).tolist()),
        }

    def digests(self) -> dict[str, str]:
        """SHA-256 (hex) of corpus, tokenizer and tokens."""
        assert self._tokens is not None, "open() comes first"
        index = json.loads((self._artifacts / INDEX_FILE).read_text(encoding="utf-8"))
        shards = {name: entry["sha256"] for name, entry in index["files"].items() if name.endswith(".bin")}
        return {
            "corpus": self._tokens.index.corpus_sha256,
            "tokenizer": self.tokenizer.digest,
            "tokens": hashlib.sha256(canonical_json(shards).encode()).hexdigest(),
        }

    def files(self) -> dict[str, bytes]:
        """The tokenizer, without which the weights mean nothing."""
        return {TOKENIZER_FILE: self.tokenizer.content.encode()}

    # -- the gate --------------------------------------------------------------------------

    def preflight(self, say: Say) -> dict[str, Any]:
        """What the held-out part is, and what a model that only counts would reach on it."""
        assert self._tokens is not None, "open() comes first"
        train, _ = self._windows
        index, threshold = self._tokens.index, self.config.gate.val_loss_threshold
        held_out = self._held_out()
        counting = self._counting_loss()
        warnings = []
        unknown = index.unknown / max(index.tokens, 1)
        if unknown > 0.01:
            warnings.append(
                f"{_percent(unknown)} of the corpus is unknown to the tokenizer: no sample will be like it; "
                "use text.tokenizer bpe or unigram"
            )
        if threshold is not None and counting < threshold:
            warnings.append(
                f"a model that only knows how frequent each token is already reaches a loss of {counting:.3f} < "
                f"gate.val_loss_threshold = {threshold:g}: passing would prove little"
            )
        say(
            "preflight",
            f"{len(train):,} windows of {self._context} tokens for training, {len(held_out):,} held out "
            f"({self.config.text.split_by}); no token is in both",
        )
        say(
            "preflight",
            f"knowing only how frequent each token is gives a loss of {counting:.3f} nats per token, "
            f"{counting / self._nats_per_bit():.3f} bits per byte",
        )
        _, prompted = self._judged_prompts()
        asked = self._criteria(
            final=True,
            languages=[each for each in LANGUAGES if each in prompted],
            epochs=self.config.training.max_epochs,
        )
        named = [f"{c.metric} {c.op} {c.threshold:g}" for c in asked]
        say("preflight", f"the gate asks {' and '.join(named) or 'nothing'}")
        for warning in warnings:
            say("warning", warning)
        return {
            "reachable": True,
            "corpus": asdict(index),
            "windows": {"train": len(train), "validation": len(held_out)},
            "counting_loss": counting,
            "counting_bits_per_byte": counting / self._nats_per_bit(),
            "warnings": warnings,
        }

    def _counting_loss(self) -> float:
        """Cross-entropy on the held-out windows of the token frequencies of (some) training windows."""
        train, val = self._windows
        seen = np.ones(self.vocab_size)
        _, targets = train.__getitems__(_spread(len(train), 4096))
        seen += np.bincount(targets.numpy().ravel(), minlength=self.vocab_size)
        held_out = self._held_out()
        _, targets = val.__getitems__(held_out[_spread(len(held_out), 1024)])
        return float(-np.log(seen / seen.sum())[targets.numpy().ravel()].mean())

    def _nats_per_bit(self) -> float:
        """Nats per token divided by this are bits per byte of the held-out text."""
        if self._bytes_per_token is None:
            _, val = self._windows
            lengths, ids = self.tokenizer.byte_lengths(), self._held_out()
            total = sum(
                int(lengths[val.__getitems__(part)[1].numpy()].sum())
                for part in np.array_split(ids, len(ids) // 512 + 1)
            )
            self._bytes_per_token = total / (len(ids) * self._context)
        return math.log(2) * self._bytes_per_token

    def _criteria(self, *, final: bool, languages: Sequence[Language] = (), epochs: int = 2) -> list[Criterion]:
        """What is asked in the course of training, or at the end of so many whole epochs."""
        gate = self.config.gate
        asked: list[tuple[str, Op, float | None]] = [
            ("val_loss", "<", gate.val_loss_threshold),
            ("overfit_gap", "<", gate.overfit_gap_threshold),
        ]
        if final:
            asked += [
                ("loss_rises", "<=", gate.loss_rises_threshold if epochs > 1 else None),
                ("repetition", "<", gate.repetition_threshold),
                ("latency_p95_ms", "<=", gate.latency_p95_ms_threshold),
                ("rss_mb", "<=", gate.rss_mb_threshold),
            ]
            if len(languages) == len(LANGUAGES):
                asked.append(("language", ">=", gate.language_threshold))
        return [Criterion(metric, op, float(threshold)) for metric, op, threshold in asked if threshold is not None]

    def evaluate(self, model: nn.Module, losses: Mapping[str, float], should_stop: StopCheck) -> Evaluation:
        """Bits per byte, overfit gap and a sample; a verdict only where it may end training.

        Raises:
            Interrupted: ``should_stop()`` turned true.
        """
        val = losses["val"]
        metrics: dict[str, float | None] = {
            "val_loss": val,
            "val_bits_per_byte": val / self._nats_per_bit(),
            "probe_loss": losses["probe"],
            "overfit_gap": val - losses["probe"],
        }
        samples = [self.sample(model, should_stop)]
        if not self.config.stop_on_pass:
            return Evaluation(None, metrics, samples)
        return Evaluation(judge(self._criteria(final=False), metrics), samples=samples)

    def sample(self, model: nn.Module, should_stop: StopCheck = lambda: False) -> str:
        """The prompt and its continuation: the same random numbers every time."""
        prompt = self.prompt_ids(self.config.text.prompt)
        rows = self._continue(model, torch.tensor([prompt]), self.config.text.sample_tokens, _SAMPLE, should_stop)
        return self.tokenizer.decode(rows[0].tolist())

    def prompt_ids(self, prompt: str) -> list[int]:
        """The ids of a text that is to be continued.

        Subwords carry the space in front of them: one at the end of a prompt would make the model
        write a second.
        """
        is_char = self.tokenizer.kind == "char"
        return self.tokenizer.encode(prompt if is_char else prompt.rstrip(" ") or prompt)

    def _continue(
        self, model: nn.Module, prompts: torch.Tensor, count: int, stream: int, should_stop: StopCheck
    ) -> torch.Tensor:
        text = self.config.text
        device = next(model.parameters()).device
        seed = int(np.random.SeedSequence([self.config.seed, stream]).generate_state(1, np.uint64)[0] >> 1)
        return generate(
            model,
            prompts.to(device),
            prompts.shape[1] + count,
            temperature=text.temperature,
            top_k=text.top_k,
            top_p=text.top_p,
            generator=torch.Generator(device=device).manual_seed(seed),
            should_stop=should_stop,
        ).cpu()

    def conclude(self, trained: Trained, should_stop: StopCheck) -> Evaluation:
        """Judge the finished model: its losses, its samples in every language of the corpus, its cost.

        Raises:
            Interrupted: ``should_stop()`` turned true.
        """
        prompts, languages = self._judged_prompts()
        found = sorted({language for language in languages if language is not None})
        rows = self._continue(trained.model, prompts, _CONTINUATION_TOKENS, _JUDGED, should_stop)
        continuations = rows[:, prompts.shape[1] :].tolist()
        texts = [self.tokenizer.decode(each) for each in continuations]
        begun = [self.tokenizer.decode(each) for each in prompts.tolist()]
        # Twelve characters are about as much as four subwords.
        run = 12 if self.config.text.tokenizer == "char" else 4
        metrics: dict[str, float | None] = dict(trained.evaluation.get("metrics", {}))
        if len(trained.epoch_losses) > 1:
            metrics["loss_rises"] = float(sum(b > a for a, b in itertools.pairwise(trained.epoch_losses)))
        metrics["repetition"] = max(repetition(each, run) for each in continuations)
        evidence: dict[str, Any] = {
            "weights_sha256": sha256_file(trained.checkpoint / "model.safetensors"),
            "repetitions": [repetition(each, run) for each in continuations],
            "epoch_losses": trained.epoch_losses,
            "languages": found,
            "samples": [
                {"language": language, "prompt": prompt, "continuation": text, "found": language_of(text)}
                for language, prompt, text in zip(languages, begun, texts, strict=True)
            ],
        }
        if len(found) == len(LANGUAGES):
            metrics["language"] = sum(map(_is_in, texts, languages)) / len(texts)
        reasons = []
        try:
            deployment = measure_apart(trained.checkpoint, should_stop)
            metrics |= {"latency_p95_ms": deployment.latency_p95_ms, "rss_mb": deployment.rss_mb}
            evidence["deployment"] = asdict(deployment)
        except DeploymentError as error:
            metrics |= {"latency_p95_ms": None, "rss_mb": None}
            reasons.append(str(error))
        verdict: Verdict = judge(
            self._criteria(
                final=True,
                languages=[language for language in LANGUAGES if language in found],
                epochs=len(trained.epoch_losses),
            ),
            metrics,
            evidence=evidence,
            too_thin=reasons,
        )
        return Evaluation(verdict, samples=[f"{b} | {t}" for b, t in zip(begun, texts, strict=True)])

    def _judged_prompts(self) -> tuple[torch.Tensor, list[Language | None]]:
        """Beginnings of held-out windows ``(prompts, time)``: of each language, or of any where there are not both."""
        _, val = self._windows
        length = max(1, min(_PROMPT_TOKENS, self._context // 2))
        inputs, _ = val.__getitems__(_spread(len(val), _WINDOWS_LOOKED_AT))
        languages = [language_of(self.tokenizer.decode(row[:length].tolist())) for row in inputs]
        counts = Counter(languages)
        if any(counts[language] < _FEWEST_PROMPTS for language in LANGUAGES):
            chosen = _spread(len(inputs), len(LANGUAGES) * _PROMPTS_PER_LANGUAGE).tolist()
            return inputs[chosen, :length], [None] * len(chosen)
        chosen = []
        for language in LANGUAGES:
            places = [place for place, found in enumerate(languages) if found == language]
            chosen += [places[i] for i in _spread(len(places), _PROMPTS_PER_LANGUAGE)]
        return inputs[chosen, :length], [languages[place] for place in chosen]


def _is_in(text: str, language: Language | None) -> bool:
    return language_of(text) == language


def _spread(length: int, count: int) -> Ids:
    """At most ``count`` places in ``range(length)``, evenly spread, in order."""
    count = min(length, count)
    return np.arange(count, dtype=np.int64) * length // max(count, 1)


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
