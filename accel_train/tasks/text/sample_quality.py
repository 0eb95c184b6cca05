"""What a sample is like: English or Spanish, by the words that only one of them has; and whether it repeats itself."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

Language = Literal["English", "Spanish"]
LANGUAGES: tuple[Language, ...] = ("English", "Spanish")

_WORDS: dict[Language, frozenset[str]] = {
    "English": frozenset(
        "the of and to that was it his her with as had not for at she be on you him by which have from they were this "
        "all but one so my would said or what been when will if we there an are who them could did their your is i "
        "into than then out upon little very how went like down no-one two three many".split()
    ),
    "Spanish": frozenset(
        "de que y el en la los por las con lo se su del una al es más pero le como si un porque ya sin muy fue qué ni "
        "era sus sobre este don tan dijo esta quien cuando todo ser había hay yo mi eso aquel señor vuestra merced "
        "donde así otro dos tres para nada día cerca junto uno ella él les aunque todos desde".split()
    ),
}
_WORD = re.compile(r"[^\W\d_]+")
_FEWEST = 2


def language_of(text: str) -> Language | None:
    """The language whose function words are more in ``text``; None when there are too few, or as many of both."""
    words = _WORD.findall(text.lower())
    counts = {language: sum(word in _WORDS[language] for word in words) for language in LANGUAGES}
    best = max(LANGUAGES, key=lambda language: counts[language])
    others = max(count for language, count in counts.items() if language != best)
    return best if counts[best] >= _FEWEST and counts[best] > others else None


def repetition(tokens: Sequence[int], run: int = 4) -> float:
    """Share of the runs of ``run`` tokens that stood earlier in ``tokens``: 0 in good prose, near 1 in a loop."""
    runs = [tuple(tokens[start : start + run]) for start in range(len(tokens) - run + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
