"""Prompts of a text model, and what it writes after them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accel_train.config.sections import ModelConfig
from accel_train.errors import ConfigError
from accel_train.model.transformer import TransformerLM
from accel_train.tasks.base import GenerationOptions
from accel_train.tasks.text.builtin import builtin_text
from accel_train.tasks.text.config import TextConfig
from accel_train.tasks.text.tokenizer import TextTokenizer, char_tokenizer, train_tokenizer
from accel_train.tasks.text.writing import judged_prompts, prompt_ids, spread, write

CHAR = char_tokenizer()
BPE = train_tokenizer("bpe", list(builtin_text(60_000, 3)), 400)
ENGLISH = "It was the best of times and they had all that was to be had"
SPANISH = "En un lugar de la Mancha vivía un hombre que no era de los más"


def model_of(tokenizer: TextTokenizer) -> TransformerLM:
    torch.manual_seed(0)
    return TransformerLM(ModelConfig(d_model=16, n_layers=1, n_heads=2, max_seq_len=32), tokenizer.vocab_size)


def written(tokenizer: TextTokenizer = CHAR, text: TextConfig | None = None, **options: Any) -> list[str]:
    given = GenerationOptions(**{"max_tokens": 12, **options})
    return list(write(model_of(tokenizer), tokenizer, text or TextConfig(tokenizer="char"), given))


class Held:
    """Windows with the texts that a test wants, in the place of held-out ones."""

    def __init__(self, texts: list[str], length: int) -> None:
        self.rows = torch.tensor([BPE.encode(text * 4)[: length + 1] for text in texts])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, ids: Any) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self.rows[torch.as_tensor(np.asarray(ids))]
        return rows[:, :-1], rows[:, 1:]


# -- places --------------------------------------------------------------------------------


@given(length=st.integers(0, 1000), count=st.integers(0, 50))
def test_places_are_spread_in_order_without_repeating(length: int, count: int) -> None:
    places = spread(length, count).tolist()
    assert len(places) == min(length, count)
    assert places == sorted(set(places))
    assert all(0 <= place < length for place in places)


@pytest.mark.parametrize(("length", "count", "places"), [(10, 5, [0, 2, 4, 6, 8]), (3, 9, [0, 1, 2]), (0, 4, [])])
def test_places_are_even(length: int, count: int, places: list[int]) -> None:
    assert spread(length, count).tolist() == places


# -- prompts -------------------------------------------------------------------------------


def test_a_space_at_the_end_is_the_next_subword_s() -> None:
    assert prompt_ids(BPE, "the ") == prompt_ids(BPE, "the")


def test_a_space_at_the_end_is_a_character() -> None:
    assert prompt_ids(CHAR, "the ") == [*CHAR.encode("the"), *CHAR.encode(" ")]


@pytest.mark.parametrize("tokenizer", [CHAR, BPE], ids=["char", "bpe"])
def test_a_prompt_of_spaces_alone_is_kept(tokenizer: TextTokenizer) -> None:
    assert tokenizer.decode(prompt_ids(tokenizer, "  ")) == "  "


def test_prompts_of_both_languages_are_as_many_as_asked() -> None:
    prompts, languages = judged_prompts(Held([ENGLISH, SPANISH] * 30, 40), BPE, 30)
    assert prompts.shape == (40, 30)
    assert languages == ["English"] * 20 + ["Spanish"] * 20


def test_a_prompt_is_the_beginning_of_a_window() -> None:
    held = Held([ENGLISH, SPANISH] * 30, 40)
    prompts, _ = judged_prompts(held, BPE, 30)
    assert torch.equal(prompts[0], held.rows[0, :30])
    assert torch.equal(prompts[20], held.rows[1, :30])


@pytest.mark.parametrize(("spanish", "both"), [(4, False), (5, True)])
def test_fewer_than_five_of_a_language_are_none(spanish: int, both: bool) -> None:
    _, languages = judged_prompts(Held([ENGLISH] * 30 + [SPANISH] * spanish, 40), BPE, 30)
    assert (set(languages) == {"English", "Spanish"}) is both
    assert (set(languages) == {None}) is not both


def test_prompts_without_a_language_are_spread_over_the_windows() -> None:
    prompts, languages = judged_prompts(Held([f"{number} 1234 xyz " * 20 for number in range(90)], 40), BPE, 30)
    assert languages == [None] * 40
    assert len({tuple(row) for row in prompts.tolist()}) > 30


# -- writing -------------------------------------------------------------------------------


def test_a_text_begins_with_its_prompt_and_ends_its_line() -> None:
    pieces = written(prompt="Once")
    assert pieces[0] == "Once"
    assert pieces[-1].endswith("\n")


def test_the_prompt_of_the_section_is_the_default() -> None:
    assert written(text=TextConfig(tokenizer="char", prompt="Mine"))[0] == "Mine"


@pytest.mark.parametrize(("asked", "tokens"), [(12, 12), (None, 200)])
def test_as_many_tokens_are_written_as_asked(monkeypatch: pytest.MonkeyPatch, asked: int | None, tokens: int) -> None:
    counts: list[int] = []

    def stream(_model: Any, _ids: Any, count: int, **_: Any) -> list[int]:
        counts.append(count)
        return CHAR.encode("x")

    monkeypatch.setattr("accel_train.tasks.text.writing.stream", stream)
    assert "".join(written(prompt="Once", max_tokens=asked)) == "Oncex\n"
    assert counts == [tokens]


def test_several_texts_begin_alike_and_go_on_apart() -> None:
    pieces = written(prompt="Once", num=2)
    first, second = (part for part in "".join(pieces).split("Once") if part)
    assert pieces.count("Once") == 2
    assert first != second


def test_a_seed_writes_the_same_text_again() -> None:
    assert written(seed=3) == written(seed=3) != written(seed=4)


@pytest.mark.parametrize("change", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-6}])
def test_without_chance_the_seed_changes_nothing(change: dict[str, Any]) -> None:
    assert written(seed=3, **change) == written(seed=4, **change)


@pytest.mark.parametrize("change", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-6}])
def test_the_section_says_how_to_sample_where_no_option_does(change: dict[str, Any]) -> None:
    assert written(text=TextConfig(tokenizer="char", **change)) == written(**change)


def test_a_temperature_of_zero_wins_over_the_section() -> None:
    assert written(text=TextConfig(tokenizer="char", temperature=1.5), temperature=0.0) == written(temperature=0.0)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ConfigError, match="--prompt: '' must not be empty"):
        written(prompt="")


def test_a_character_of_several_tokens_is_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is printed as it comes must never be half a character."""
    tokens = BPE.encode("ñ€x")
    assert len(tokens) > 3
    monkeypatch.setattr("accel_train.tasks.text.writing.stream", lambda *_, **__: iter(tokens))
    pieces = written(BPE, prompt="a")
    assert "".join(pieces) == "añ€x\n"
    assert not any("\ufffd" in piece for piece in pieces)


def test_bytes_that_are_no_character_are_not_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    half = BPE.encode("€")[0]
    monkeypatch.setattr("accel_train.tasks.text.writing.stream", lambda *_, **__: iter([half] * 4))
    assert len(written(BPE, prompt="a")) == 3, "prompt, four tokens without a character, end of the line"
