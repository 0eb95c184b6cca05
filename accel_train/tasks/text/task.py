"""Text: a model that continues a text, judged by its loss, its samples and its cost.

The loss is measured on a part of the corpus that no training window touches. What says little
in the course of training (samples, milliseconds, megabytes) is judged once, at the end.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import nn
from torch.utils.data import Subset

from accel_train.config.sections import ExperimentConfig
from accel_train.data.permutation import Ids
from accel_train.data.windows import WindowDataset
from accel_train.errors import ConfigError
from accel_train.files.atomic import sha256_file, sha256_json
from accel_train.files.shared import INDEX_FILE
from accel_train.model import size
from accel_train.model.generation import generate
from accel_train.process.work import StopCheck, WorkContext, never
from accel_train.tasks.base import Evaluation, GenerationOptions, Task, Trained
from accel_train.tasks.criteria import Criterion, Op, judge
from accel_train.tasks.text.config import TextConfig
from accel_train.tasks.text.figures import draw_validation
from accel_train.tasks.text.inference_cost import InferenceError, measure_apart
from accel_train.tasks.text.preparation import Preparation, split
from accel_train.tasks.text.sample_quality import LANGUAGES, Language, language_of, repetition
from accel_train.tasks.text.tokenizer import CHAR_VOCAB_SIZE, TOKENIZER_FILE, TextTokenizer
from accel_train.tasks.text.tokens import Tokens
from accel_train.tasks.text.writing import judged_prompts, prompt_ids, spread, write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PROBE_WINDOWS = 256
_PROMPT_TOKENS, _CONTINUATION_TOKENS = 24, 64
_SAMPLE, _JUDGED = range(2)
_NAMED_LOSS = 5


class TextTask(Task):
    """Learn to continue a text."""

    name = "text"
    Config = TextConfig
    headline: ClassVar = {"val_loss": "validation loss", "val_bits_per_byte": "bits per byte"}
    columns: ClassVar = {"LOSS": "final_val_loss", "BPB": "val_bits_per_byte"}
    curves = ("val_loss", "val_bits_per_byte", "probe_loss", "overfit_gap")
    own_scalars = frozenset(
        {"val_bits_per_byte", "overfit_gap", "loss_rises", "repetition", "language", "latency_p95_ms", "rss_mb"}
    )
    advice: ClassVar = {
        "val_loss": "train longer (--epochs) or on more text",
        "overfit_gap": "use more text, fewer --epochs, or more model.dropout (--config)",
        "loss_rises": "lower the --learning-rate or use a larger --batch-size",
        "repetition": "train longer (--epochs) or on more text, or sample with a higher text.temperature (--config)",
        "language": "train longer (--epochs) or on more text of both languages",
        "latency_p95_ms": "use a smaller model (--config), or a machine that does nothing else",
        "rss_mb": "use a smaller model or --vocab-size",
    }
    generation_options = frozenset({"num", "prompt", "max_tokens", "temperature", "top_k", "top_p", "seed"})

    def __init__(self, config: ExperimentConfig) -> None:
        super().__init__(config)
        self._text: TextConfig = config.section
        self.preparation = Preparation(config)
        self._context = config.model.max_seq_len
        # After open().
        self._artifacts: Path
        self._tokens: Tokens
        self._train: WindowDataset
        self._val: WindowDataset
        self.tokenizer: TextTokenizer
        """After :meth:`open` or :meth:`prepare_generation`."""

    @property
    def vocab_size(self) -> int:
        """What the configuration asks for, or the fixed size of the character tokenizer."""
        return CHAR_VOCAB_SIZE if self._text.tokenizer == "char" else self._text.vocab_size

    # -- data ------------------------------------------------------------------------------

    def check(self, work: WorkContext) -> None:
        """Refuse a corpus that is no text and a gate that cannot be passed; warn where memory is short.

        Raises:
            ConfigError: the corpus is missing, empty, binary or not UTF-8, or a threshold cannot be met.
            Interrupted: ``should_stop()`` turned true.
        """
        for warning in size.warnings(self.config.model, self.config.training, self.vocab_size):
            work.say("warning", warning)
        gate = self._text.gate
        if gate.val_loss_threshold == 0:
            raise ConfigError("text.gate.val_loss_threshold", 0.0, "can never be met; choose a positive value or null")
        self.preparation.check(work)

    def build(self, shared: Path, work: WorkContext) -> str:
        """Fetch or make the corpus, train the tokenizer, write the tokens; or verify and reuse them."""
        return self.preparation.build(shared, work)

    def open(self, artifacts: str) -> WindowDataset:
        """The training windows, memory-mapped; also opens the held-out ones."""
        self._artifacts = Path(artifacts)
        self._tokens = Tokens(self._artifacts)
        self.tokenizer = TextTokenizer.load(self._artifacts / TOKENIZER_FILE)
        train, val = split(self.config, len(self._tokens))
        self._train = WindowDataset(self._tokens, self._context, train, self._text.stride)
        self._val = WindowDataset(self._tokens, self._context, val)
        return self._train

    def _held_out(self) -> Ids:
        """Ids of the windows that are validated on."""
        total, batches = len(self._val), self._text.val_batches
        return spread(total, total if batches is None else batches * self.config.training.batch_size)

    def validation(self) -> dict[str, Any]:
        """``val``: the held-out windows; ``probe``: training windows, to compare with in the same mode."""
        held_out = self._held_out()
        probe = spread(len(self._train), min(_PROBE_WINDOWS, len(held_out)))
        return {"val": Subset(self._val, held_out.tolist()), "probe": Subset(self._train, probe.tolist())}

    def digests(self) -> dict[str, str]:
        """SHA-256 (hex) of corpus, tokenizer and tokens."""
        index = json.loads((self._artifacts / INDEX_FILE).read_text(encoding="utf-8"))
        shards = {name: entry["sha256"] for name, entry in index["files"].items() if name.endswith(".bin")}
        return {
            "corpus": self._tokens.index.corpus_sha256,
            "tokenizer": self.tokenizer.digest,
            "tokens": sha256_json(shards),
        }

    def files(self) -> dict[str, bytes]:
        """The tokenizer, without which the weights mean nothing."""
        return {TOKENIZER_FILE: self.tokenizer.content.encode()}

    # -- the gate --------------------------------------------------------------------------

    def preflight(self, work: WorkContext) -> dict[str, Any]:
        """What the held-out part is, and what a model that only counts would reach on it."""
        index, threshold = self._tokens.index, self._text.gate.val_loss_threshold
        held_out = self._held_out()
        counting = self._counting_loss()
        warnings = []
        unknown = index.unknown / max(index.tokens, 1)
        if unknown > 0.01:
            warnings.append(
                f"{100 * unknown:.3g} % of the corpus is unknown to the tokenizer: no sample will be like it; "
                "use text.tokenizer bpe or unigram"
            )
        if threshold is not None and counting < threshold:
            warnings.append(
                f"a model that only knows how frequent each token is already reaches a loss of {counting:.3f} < "
                f"text.gate.val_loss_threshold = {threshold:g}: passing would prove little"
            )
        work.say(
            "preflight",
            f"{len(self._train):,} windows of {self._context} tokens for training, {len(held_out):,} held out "
            f"({self._text.split_by}); no token is in both",
        )
        work.say(
            "preflight",
            f"knowing only how frequent each token is gives a loss of {counting:.3f} nats per token, "
            f"{counting / self._nats_per_bit:.3f} bits per byte",
        )
        _, prompted = self._judged_prompts()
        asked = self._criteria(final=True, bilingual=None not in prompted, epochs=self.config.training.max_epochs)
        named = [f"{c.metric} {c.op} {c.threshold:g}" for c in asked]
        work.say("preflight", f"the gate asks {' and '.join(named) or 'nothing'}")
        for warning in warnings:
            work.say("warning", warning)
        return {
            "reachable": True,
            "corpus": asdict(index),
            "windows": {"train": len(self._train), "validation": len(held_out)},
            "counting_loss": counting,
            "counting_bits_per_byte": counting / self._nats_per_bit,
            "warnings": warnings,
        }

    def _counting_loss(self) -> float:
        """Cross-entropy on the held-out windows of the token frequencies of (some) training windows."""
        _, targets = self._train.__getitems__(spread(len(self._train), 4096))
        seen = 1.0 + np.bincount(targets.numpy().ravel(), minlength=self.vocab_size)
        held_out = self._held_out()
        _, targets = self._val.__getitems__(held_out[spread(len(held_out), 1024)])
        return float(-np.log(seen / seen.sum())[targets.numpy().ravel()].mean())

    @functools.cached_property
    def _nats_per_bit(self) -> float:
        """Nats per token divided by this are bits per byte of the held-out text."""
        lengths, ids = self.tokenizer.byte_lengths(), self._held_out()
        total = sum(
            int(lengths[self._val.__getitems__(part)[1].numpy()].sum())
            for part in np.array_split(ids, len(ids) // 512 + 1)
        )
        return math.log(2) * (total / (len(ids) * self._context))

    def _criteria(self, *, final: bool, bilingual: bool = False, epochs: int = 2) -> list[Criterion]:
        """What is asked in the course of training, or at the end of so many whole epochs."""
        gate = self._text.gate
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
                ("language", ">=", gate.language_threshold if bilingual else None),
            ]
        return [Criterion(metric, op, float(threshold)) for metric, op, threshold in asked if threshold is not None]

    def evaluate(self, model: nn.Module, losses: Mapping[str, float], work: WorkContext) -> Evaluation:
        """Bits per byte, overfit gap and a sample; a verdict only where it may end training.

        Raises:
            Interrupted: ``should_stop()`` turned true.
        """
        val = losses["val"]
        metrics: dict[str, float | None] = {
            "val_loss": val,
            "val_bits_per_byte": val / self._nats_per_bit,
            "probe_loss": losses["probe"],
            "overfit_gap": val - losses["probe"],
        }
        samples = [self.sample(model, work.should_stop)]
        if not self.stops_on_pass:
            return Evaluation(None, metrics, samples)
        return Evaluation(judge(self._criteria(final=False), metrics), samples=samples)

    def sample(self, model: nn.Module, should_stop: StopCheck = never) -> str:
        """The prompt and its continuation: the same random numbers every time."""
        prompt = prompt_ids(self.tokenizer, self._text.prompt)
        rows = self._continue(model, torch.tensor([prompt]), self._text.sample_tokens, _SAMPLE, should_stop)
        return self.tokenizer.decode(rows[0].tolist())

    def _continue(
        self, model: nn.Module, prompts: torch.Tensor, count: int, stream: int, should_stop: StopCheck
    ) -> torch.Tensor:
        text = self._text
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

    def conclude(self, trained: Trained, work: WorkContext) -> Evaluation:
        """Judge the finished model: its losses, its samples in every language of the corpus, its cost.

        Raises:
            Interrupted: ``should_stop()`` turned true.
        """
        prompts, languages = self._judged_prompts()
        bilingual = None not in languages
        rows = self._continue(trained.model, prompts, _CONTINUATION_TOKENS, _JUDGED, work.should_stop)
        continuations = rows[:, prompts.shape[1] :].tolist()
        texts = [self.tokenizer.decode(each) for each in continuations]
        spoken = [language_of(text) for text in texts]
        begun = [self.tokenizer.decode(each) for each in prompts.tolist()]
        # Twelve characters are about as much as four subwords.
        run = 12 if self._text.tokenizer == "char" else 4
        metrics: dict[str, float | None] = dict(trained.evaluation.get("metrics", {}))
        if len(trained.epoch_losses) > 1:
            metrics["loss_rises"] = float(sum(b > a for a, b in itertools.pairwise(trained.epoch_losses)))
        repetitions = [repetition(each, run) for each in continuations]
        metrics["repetition"] = max(repetitions)
        evidence: dict[str, Any] = {
            "weights_sha256": sha256_file(trained.checkpoint / "model.safetensors"),
            "repetitions": repetitions,
            "epoch_losses": trained.epoch_losses,
            "languages": sorted(LANGUAGES) if bilingual else [],
            "samples": [
                {"language": language, "prompt": prompt, "continuation": text, "found": found}
                for language, prompt, text, found in zip(languages, begun, texts, spoken, strict=True)
            ],
        }
        if bilingual:
            metrics["language"] = sum(a == b for a, b in zip(spoken, languages, strict=True)) / len(texts)
        reasons = []
        try:
            cost = measure_apart(trained.checkpoint, work.should_stop)
            metrics |= {"latency_p95_ms": cost.latency_p95_ms, "rss_mb": cost.rss_mb}
            evidence["deployment"] = asdict(cost)
        except InferenceError as error:
            metrics |= {"latency_p95_ms": None, "rss_mb": None}
            reasons.append(str(error))
        asked = self._criteria(final=True, bilingual=bilingual, epochs=len(trained.epoch_losses))
        verdict = judge(asked, metrics, evidence=evidence, too_thin=reasons)
        return Evaluation(verdict, samples=[f"{b} | {t}" for b, t in zip(begun, texts, strict=True)])

    def _judged_prompts(self) -> tuple[torch.Tensor, list[Language | None]]:
        return judged_prompts(self._val, self.tokenizer, max(1, min(_PROMPT_TOKENS, self._context // 2)))

    # -- the record and the model in use ---------------------------------------------------

    def scalars(
        self, evaluations: Sequence[Mapping[str, Any]], seconds: Sequence[Mapping[str, float]]
    ) -> dict[str, Any]:
        """Return the lowest validation loss, and the seconds of training until it first was below 5."""
        found = {each["step"]: each["metrics"]["val_loss"] for each in evaluations}
        losses = {step: loss for step, loss in found.items() if loss is not None}
        if not losses:
            return {}
        reached = next((step for step, loss in losses.items() if loss < _NAMED_LOSS), math.inf)
        took = next((mark["training_seconds"] for mark in seconds if mark["step"] >= reached), None)
        return {"best_val_loss": min(losses.values()), f"seconds_to_val_loss_{_NAMED_LOSS}": took}

    def draw(self, axes: Axes, record: Mapping[str, Any]) -> None:
        """Draw the losses on held-out and on training windows."""
        draw_validation(axes, record)

    def prepare_generation(self, checkpoint: Path, shared: Path) -> None:
        """Take the tokenizer from the checkpoint: whoever only generates needs no corpus.

        Raises:
            TokenizerError: it is none.
            OSError: it cannot be read.
        """
        self.tokenizer = TextTokenizer.load(checkpoint / TOKENIZER_FILE)

    def generate(self, model: nn.Module, options: GenerationOptions) -> Iterator[str]:
        """Continue a prompt ``options.num`` times, piece by piece as it is written.

        Raises:
            ConfigError: the prompt is empty.
        """
        return write(model, self.tokenizer, self._text, options)
