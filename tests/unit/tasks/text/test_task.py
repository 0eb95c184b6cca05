"""The text task: what is shared and reused, what is refused, and how a model is judged."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from configs import experiment_config
from torch import nn

from accel_train.config.sections import ModelConfig, TrainingConfig
from accel_train.errors import ConfigError, Interrupted
from accel_train.files.atomic import sha256_file
from accel_train.model.transformer import TransformerLM
from accel_train.process.work import SILENT, WorkContext
from accel_train.tasks.base import Trained
from accel_train.tasks.text import task as module
from accel_train.tasks.text.config import GateConfig, TextConfig
from accel_train.tasks.text.inference_cost import InferenceCost, InferenceError
from accel_train.tasks.text.task import TextTask
from accel_train.tasks.text.tokenizer import TOKENIZER_FILE

CONTEXT = 32


def config(**text: Any) -> Any:
    return experiment_config(
        task="text",
        text=TextConfig(**{"builtin_bytes": 60_000, "vocab_size": 400, "sample_tokens": 10, **text}),
        model=ModelConfig(d_model=16, n_layers=1, n_heads=2, max_seq_len=CONTEXT),
        training=TrainingConfig(batch_size=4),
    )


class Said(list):
    """What a task says."""

    def __call__(self, phase: str, what: str) -> None:
        self.append(f"{phase} {what}")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where corpora, tokenizers and tokens are made once for all tests that do not look at their making."""
    return tmp_path_factory.mktemp("shared")


def opened(directory: Path, chosen: Any = None) -> TextTask:
    task = TextTask(chosen or config())
    task.check(SILENT)
    task.open(task.build(directory, SILENT))
    return task


def model_of(task: TextTask, seed: int = 0) -> TransformerLM:
    torch.manual_seed(seed)
    return TransformerLM(task.config.model, task.vocab_size)


@pytest.fixture
def deployed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Checkpoints that were measured; what a process of its own would have found."""
    asked: list[Path] = []

    def measured(checkpoint: Path, _should_stop: Any) -> InferenceCost:
        asked.append(checkpoint)
        return InferenceCost(1.0, 2.0, 250.0, 1, 100)

    monkeypatch.setattr(module, "measure_apart", measured)
    return asked


def trained(task: TextTask, directory: Path, **changes: Any) -> Trained:
    (directory / "model.safetensors").write_bytes(b"weights")
    evaluation = {"metrics": {"val_loss": 3.0, "overfit_gap": 0.1}}
    return Trained(
        **{
            "model": model_of(task),
            "checkpoint": directory,
            "evaluation": evaluation,
            "epoch_losses": [5.0, 4.0],
            **changes,
        }
    )


# -- preparation ---------------------------------------------------------------------------


def test_a_second_run_finds_everything_and_another_seed_shares_it(tmp_path: Path) -> None:
    first = TextTask(config())
    artifacts = first.build(tmp_path, SILENT)
    assert first.preparation.built == {"corpus", "tokenizer", "tokens"}
    said = Said()
    second = TextTask(dataclasses.replace(config(), seed=7))
    assert second.build(tmp_path, WorkContext(said)) == artifacts
    assert second.preparation.built == set()
    assert len([line for line in said if "found and verified" in line]) == 3


@pytest.mark.parametrize(
    ("change", "made_again"),
    [
        ({"vocab_size": 401}, {"tokenizer", "tokens"}),
        ({"tokenizer": "char"}, {"tokens"}),
        ({"builtin_bytes": 70_000}, {"corpus", "tokenizer", "tokens"}),
        ({"val_fraction": 0.2}, set()),
    ],
)
def test_only_what_depends_on_a_change_is_made_again(tmp_path: Path, change: dict[str, Any], made_again: set) -> None:
    TextTask(config()).build(tmp_path, SILENT)
    other = TextTask(config(**change))
    other.build(tmp_path, SILENT)
    assert other.preparation.built == made_again


def test_damaged_tokens_are_written_again(tmp_path: Path) -> None:
    artifacts = Path(TextTask(config()).build(tmp_path, SILENT))
    shard = artifacts / "tokens-00000.bin"
    content = shard.read_bytes()
    shard.write_bytes(content[:1000] + bytes([content[1000] ^ 1]) + content[1001:])
    again = TextTask(config())
    again.build(tmp_path, SILENT)
    assert again.preparation.built == {"tokens"}
    assert shard.read_bytes() == content


def test_a_local_corpus_is_used_where_it_lies(tmp_path: Path, shared: Path) -> None:
    corpus = tmp_path / "mine.txt"
    corpus.write_text("The quick brown fox jumps over the lazy dog.\n" * 200)
    task = opened(shared / "shared", config(corpus=str(corpus), tokenizer="char"))
    assert not list((tmp_path / "shared").rglob("corpus.txt"))
    assert task.digests()["corpus"] == sha256_file(corpus)
    assert set(task.digests()) == {"corpus", "tokenizer", "tokens"}
    assert task.files()[TOKENIZER_FILE].decode() == task.tokenizer.content


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("missing.txt", None, "does not exist"),
        ("empty.txt", b"", "is empty (0 bytes)"),
        ("binary.txt", b"abc\x00def", "is binary: byte 0x00 at offset 3"),
        ("latin.txt", b"caf\xe9", "is not UTF-8: byte 0xe9 at offset 3"),
    ],
)
def test_a_corpus_that_is_no_text_is_refused_before_anything_is_written(
    tmp_path: Path, name: str, content: bytes | None, says: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        TextTask(config(corpus=str(path))).check(SILENT)
    assert caught.value.field == "text.corpus"
    assert says in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_vocabulary_that_the_corpus_does_not_support_is_refused_with_the_largest_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"text\.vocab_size: 9000 is more than this corpus supports \(\d+ at most\)"):
        TextTask(config(vocab_size=9000)).build(tmp_path, SILENT)
    assert not list(tmp_path.glob("tokenizer-*"))


@pytest.mark.parametrize(("size", "part"), [(300, "training"), (900, "validation")])
def test_a_corpus_too_small_for_a_batch_or_a_window_is_refused(tmp_path: Path, size: int, part: str) -> None:
    small = config(builtin_bytes=size, tokenizer="char")
    small = dataclasses.replace(small, model=dataclasses.replace(small.model, max_seq_len=256))
    with pytest.raises(ConfigError, match=f"for {part}"):
        TextTask(small).build(tmp_path, SILENT)


def test_a_stop_in_any_phase_leaves_nothing_half_built(tmp_path: Path) -> None:
    corpus = tmp_path / "mine.txt"
    corpus.write_text("The quick brown fox jumps over the lazy dog.\n" * 2000)
    chosen = config(corpus=str(corpus), vocab_size=270)
    with pytest.raises(Interrupted):
        TextTask(chosen).check(WorkContext(should_stop=lambda: True))
    for asked in range(3):
        answers = iter([False] * asked)
        with pytest.raises(Interrupted):
            TextTask(chosen).build(
                tmp_path / f"{asked}", WorkContext(should_stop=lambda answers=answers: next(answers, True))
            )
        assert not list((tmp_path / f"{asked}").glob(".tmp-*"))


# -- data ----------------------------------------------------------------------------------


def test_training_and_validation_share_no_token(shared: Path) -> None:
    task = opened(shared)
    train, val = task._train, task._val
    taken = [set(), set()]
    for dataset, seen in ((train, taken[0]), (val, taken[1])):
        place = np.searchsorted(dataset._first, np.arange(len(dataset)), side="right") - 1
        starts = dataset._starts[place] + (np.arange(len(dataset)) - dataset._first[place]) * dataset.stride
        for start in starts:
            seen.update(range(start, start + CONTEXT + 1))
    assert not taken[0] & taken[1]
    assert 0.05 < len(taken[1]) / (len(taken[0]) + len(taken[1])) < 0.15


def test_a_fixed_number_of_batches_is_spread_over_the_held_out_part(shared: Path) -> None:
    whole, some = opened(shared), opened(shared, config(val_batches=3))
    assert len(whole.validation()["val"]) == len(whole._val)
    indices = some.validation()["val"].indices
    assert len(indices) == 3 * 4
    assert indices == sorted(set(indices))
    assert indices[-1] > 0.8 * len(some._val)


def test_bits_per_byte_are_those_of_the_held_out_text(shared: Path) -> None:
    task = opened(shared)
    _, targets = task._val.__getitems__(np.arange(len(task._val)))
    text = b"".join(
        task.tokenizer._tokenizer.id_to_token(int(t)).encode("latin1", "replace") for t in targets.flatten()
    )
    found = task.evaluate(model_of(task), {"val": 2.0, "probe": 1.5}, SILENT).metrics
    assert found["val_bits_per_byte"] == pytest.approx(2.0 * targets.numel() / math.log(2) / len(text))
    assert found["overfit_gap"] == pytest.approx(0.5)


def test_stride_lets_windows_overlap(shared: Path) -> None:
    apart, overlapping = (opened(shared, config(stride=stride)) for stride in (None, CONTEXT // 2))
    first, second = apart._train[0][0], apart._train[1][0]
    assert overlapping._train[1][0].tolist() == [*first[CONTEXT // 2 :], *second[: CONTEXT // 2]]
    assert len(overlapping._val) == len(apart._val), "what is held out is not counted twice"


GUTENBERG = (
    "Catalogue\n*** START OF THE PROJECT GUTENBERG EBOOK A STORY ***\n"
    + "The fox ran over the hill, and the dog lay in the sun.\n" * 60
    + "*** END OF THE PROJECT GUTENBERG EBOOK A STORY ***\nLicence\n"
)


@pytest.mark.parametrize("strip", [False, True])
def test_the_frame_of_a_gutenberg_text_is_removed_where_that_is_asked_for(
    tmp_path: Path, shared: Path, strip: bool
) -> None:
    corpus = tmp_path / "story.txt"
    corpus.write_text(GUTENBERG)
    task = opened(shared / "shared", config(corpus=str(corpus), tokenizer="char", strip_gutenberg=strip))
    text = task.tokenizer.decode(task._tokens.windows(np.array([0]), len(task._tokens))[0].tolist())
    assert ("Licence" in text) is not strip
    assert text.count("The fox") == 60


@pytest.mark.parametrize("change", [{"sample_tokens": 11}, {"temperature": 0.2}, {"top_k": 2}, {"top_p": 0.05}])
def test_how_a_sample_is_drawn_is_as_configured(shared: Path, change: dict[str, Any]) -> None:
    usual, other = opened(shared), opened(shared, config(**change))
    assert usual.sample(model_of(usual)) != other.sample(model_of(other))


def test_a_sample_goes_on_from_the_configured_prompt(shared: Path) -> None:
    task = opened(shared, config(prompt="El pescador"))
    assert task.sample(model_of(task)).startswith("El pescador")


# -- the gate ------------------------------------------------------------------------------


def test_the_preflight_says_what_counting_reaches_and_what_is_asked(shared: Path) -> None:
    said = Said()
    found = opened(shared).preflight(WorkContext(said))
    assert found["reachable"]
    assert 3 < found["counting_loss"] < math.log(400)
    assert any("the gate asks val_loss < 5" in line and "language >= 0.7" in line for line in said)


def test_the_preflight_warns_of_a_gate_that_counting_passes_and_of_unknown_characters(shared: Path) -> None:
    found = opened(shared, config(tokenizer="char")).preflight(SILENT)
    assert any("passing would prove little" in warning for warning in found["warnings"])
    assert any("unknown to the tokenizer" in warning for warning in found["warnings"])


def test_a_threshold_that_cannot_be_met_is_refused() -> None:
    impossible = config(gate=GateConfig(val_loss_threshold=0.0))
    with pytest.raises(ConfigError, match="can never be met"):
        TextTask(impossible).check(SILENT)


def test_an_evaluation_measures_and_samples_without_judging(shared: Path) -> None:
    task = opened(shared)
    model = model_of(task)
    before = torch.get_rng_state()
    first = task.evaluate(model, {"val": 2.0, "probe": 1.5}, SILENT)
    assert first.verdict is None
    assert first.samples[0].startswith("The")
    assert task.evaluate(model, {"val": 2.0, "probe": 1.5}, SILENT) == first, "the same random numbers every time"
    assert torch.equal(torch.get_rng_state(), before)
    assert "passed" not in first.to_dict()


def test_where_the_gate_may_stop_training_it_judges_the_losses_alone(shared: Path) -> None:
    task = opened(shared, config(gate=GateConfig(stop_on_pass=True)))
    verdict = task.evaluate(model_of(task), {"val": 2.0, "probe": 1.9}, SILENT).verdict
    assert verdict is not None
    assert verdict.passed
    assert [row["metric"] for row in verdict.criteria] == ["val_loss", "overfit_gap"]


def test_the_last_judgement_asks_everything(tmp_path: Path, shared: Path, deployed: list[Path]) -> None:
    task = opened(shared)
    found = task.conclude(trained(task, tmp_path), SILENT)
    asked = {row["metric"]: row["passed"] for row in found.verdict.criteria}
    assert set(asked) == {
        "val_loss", "overfit_gap", "loss_rises", "repetition", "latency_p95_ms", "rss_mb", "language",
    }  # fmt: skip
    assert asked["latency_p95_ms"]
    assert not asked["language"], "a model that was never trained speaks no language"
    assert deployed == [tmp_path]
    languages = [sample["language"] for sample in found.verdict.evidence["samples"]]
    assert languages == sorted(languages)
    assert 5 <= languages.count("English") <= languages.count("Spanish") == 20
    assert len(found.samples) == len(languages)


class Looping(nn.Module):
    """Writes the same two tokens for ever."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return 1e4 * nn.functional.one_hot(300 + (tokens + 1) % 2, self.vocab_size).float()


@pytest.mark.usefixtures("deployed")
def test_a_model_that_is_stuck_does_not_pass(tmp_path: Path, shared: Path) -> None:
    task = opened(shared)
    verdict = task.conclude(trained(task, tmp_path, model=Looping(task.vocab_size)), SILENT).verdict
    assert verdict.metrics["repetition"] > 0.9
    assert "repetition is" in verdict.failure_reason


@pytest.mark.usefixtures("deployed")
@pytest.mark.parametrize(("losses", "rises"), [([5, 4, 3], 0), ([5, 4, 4.5, 3, 3.1], 2)])
def test_epochs_in_which_the_loss_rose_are_counted(
    tmp_path: Path, shared: Path, losses: list[float], rises: int
) -> None:
    task = opened(shared)
    verdict = task.conclude(trained(task, tmp_path, epoch_losses=losses), SILENT).verdict
    assert verdict.metrics["loss_rises"] == rises


@pytest.mark.usefixtures("deployed")
def test_one_epoch_says_nothing_of_rises_and_is_not_asked(tmp_path: Path, shared: Path) -> None:
    task = opened(shared)
    verdict = task.conclude(trained(task, tmp_path, epoch_losses=[5.0]), SILENT).verdict
    assert "loss_rises" not in [row["metric"] for row in verdict.criteria]


@pytest.mark.usefixtures("deployed")
def test_a_corpus_of_one_language_is_not_asked_for_two(tmp_path: Path, shared: Path) -> None:
    corpus = tmp_path / "mine.txt"
    corpus.write_text("It was the best of times, it was the worst of times, and they all said so.\n" * 400)
    task = opened(shared, config(corpus=str(corpus), vocab_size=280))
    verdict = task.conclude(trained(task, tmp_path), SILENT).verdict
    assert "language" not in [row["metric"] for row in verdict.criteria]
    assert verdict.evidence["languages"] == []


def test_a_model_that_cannot_be_used_does_not_pass(
    tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> InferenceCost:
        raise InferenceError("it could not be loaded")

    monkeypatch.setattr(module, "measure_apart", failing)
    task = opened(shared)
    verdict = task.conclude(trained(task, tmp_path), SILENT).verdict
    assert verdict.metrics["rss_mb"] is None
    assert "it could not be loaded" in verdict.failure_reason
