"""A seeded grammar of English and Spanish sentences: a bilingual corpus of any size, with no network.

Chapters of one language take turns. Nouns have gender, number and a place in the story that is
told (a paragraph keeps its two characters), articles and adjectives agree, verbs are conjugated:
enough for a small model to have something to learn, and for its samples to show whether it did.
"""

from __future__ import annotations

import itertools
import json
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator
from importlib import resources
from typing import Any, ClassVar

BUILTIN = "builtin"
"""Value of ``text.corpus`` that asks for this corpus."""

_WORDS = json.loads(resources.files(__package__).joinpath("builtin_words.json").read_text(encoding="utf-8"))

_SENTENCES, _PARAGRAPHS = (3, 7), (3, 6)
_BLOCK = 1 << 16
_AT_THE_END = ("places", "adverbs", None, None, "places")
"""What ends a clause of each of the five shapes."""
_NAMED = 0.4
"""How many of the people have a name, which hardly anybody else has: a corpus of any size has new words."""


def builtin_text(size: int, seed: int) -> Iterator[str]:
    """About ``size`` bytes of UTF-8 in pieces of some 64 KiB; the same for the same arguments.

    Args:
        size: bytes; the last paragraph may exceed it.
        seed: of everything random.
    """
    draw, made, waiting = random.Random(seed), 0, ""
    languages = itertools.cycle((_English, _Spanish))
    while made < size:
        language = next(languages)
        for _ in range(draw.randint(*_PARAGRAPHS)):
            paragraph = language(draw).paragraph() + "\n"
            waiting += paragraph
            made += len(paragraph.encode())
            if made >= size:
                break
        waiting += "\n"
        made += 1
        if len(waiting.encode()) >= _BLOCK:
            yield waiting
            waiting = ""
    yield waiting


class _Language(ABC):
    """A paragraph about two people.

    Args:
        draw: of everything random.
    """

    words: ClassVar[dict[str, Any]]
    also: ClassVar[str]
    """Joins two people."""
    links: ClassVar[tuple[str, ...]]
    """Join two clauses."""
    quotation: ClassVar[str]

    def __init__(self, draw: random.Random) -> None:
        self.draw, self.pick = draw, draw.choice
        self.heroes = [self.hero(person) for person in draw.sample(self.words["people"], 2)]

    @abstractmethod
    def somebody(self, person: str) -> str:
        """Such as "the old captain"."""

    @abstractmethod
    def thing(self) -> str:
        """What something is done to."""

    @abstractmethod
    def forms(self, verb: str) -> tuple[str, ...]:
        """The verb as each of the five shapes of a clause has it; the fourth is a plural."""

    def hero(self, person: str) -> str:
        if self.draw.random() < _NAMED:
            return f"{self.pick(self.words['titles'])} {''.join(self.pick(each) for each in self.words['names'])}"
        return self.somebody(person)

    def clause(self) -> str:
        who, verb, shape = self.pick(self.heroes), self.pick(self.words["verbs"]), self.draw.randrange(5)
        if shape == 3:
            who = f"{who} {self.also} {self.heroes[0] if who == self.heroes[1] else self.heroes[1]}"
        clause, kind = f"{who} {self.forms(verb)[shape]} {self.thing()}", _AT_THE_END[shape]
        return clause if kind is None else f"{clause} {self.pick(self.words[kind])}"

    def sentence(self) -> str:
        shape = self.draw.randrange(4)
        if shape == 0:
            return f"{self.pick(self.words['times'])}, {self.clause()}."
        clause = self.clause()
        clause = clause[0].upper() + clause[1:]
        if shape == 1:
            return f"{clause}, {self.pick(self.links)} {self.clause()}."
        return self.quotation.format(clause, self.pick(self.heroes)) if shape == 2 else f"{clause}."

    def paragraph(self) -> str:
        return " ".join(self.sentence() for _ in range(self.draw.randint(*_SENTENCES)))


class _English(_Language):
    words, also, links, quotation = _WORDS["english"], "and", ("and", "but", "because", "so"), "“{},” said {}."

    def somebody(self, person: str) -> str:
        return f"the {self.pick(self.words['adjectives'])} {person}"

    def thing(self) -> str:
        shape, noun = self.draw.randrange(4), self.pick(self.words["things"])
        if shape == 0:
            return f"the {noun}"
        adjective = self.pick(self.words["adjectives"])
        if shape == 1:
            return f"the {adjective} {noun}"
        if shape == 2:
            return f"{'an' if adjective[0] in 'aeiou' else 'a'} {adjective} {noun}"
        several = self.pick(("two", "three", "many", "all the"))
        return f"{several} {adjective} {noun}{'es' if noun.endswith('s') else 's'}"

    def forms(self, verb: str) -> tuple[str, ...]:
        past = f"{verb}d" if verb.endswith("e") else f"{verb[:-1]}ied" if verb.endswith("ry") else f"{verb}ed"
        return past, past, f"will {verb}", past, f"did not {verb}"


class _Spanish(_Language):
    words, also, links, quotation = _WORDS["spanish"], "y", ("y", "pero", "porque", "así que"), "—{} —dijo {}."

    def somebody(self, person: str) -> str:
        feminine = person.endswith("o") and self.draw.random() < 0.5
        adjective = self.pick(self.words["adjectives"])
        return f"la {person[:-1]}a {adjective}a" if feminine else f"el {person} {adjective}o"

    def thing(self) -> str:
        feminine = self.draw.random() < 0.5
        noun = self.pick(self.words["things_f" if feminine else "things_m"])
        shape, ending = self.draw.randrange(4), "a" if feminine else "o"
        if shape == 0:
            return f"{'la' if feminine else 'el'} {noun}"
        adjective = self.pick(self.words["adjectives"]) + ending
        if shape == 1:
            return f"{'la' if feminine else 'el'} {noun} {adjective}"
        if shape == 2:
            return f"{'una' if feminine else 'un'} {noun} {adjective}"
        several = self.pick(("las", "dos", "muchas", "tres") if feminine else ("los", "dos", "muchos", "tres"))
        return f"{several} {noun + 's' if noun[-1] in 'aeiouáé' else _plural(noun)} {adjective}s"

    def forms(self, verb: str) -> tuple[str, ...]:
        return f"{verb}aba", f"{verb}a", f"{verb}ará", f"{verb}aron", f"no {verb}aba"


def _plural(noun: str) -> str:
    """The plural of a Spanish noun that ends in a consonant: an accent on its last syllable is lost."""
    for accented, plain in (("ón", "on"), ("ín", "in"), ("án", "an")):
        if noun.endswith(accented):
            return noun.removesuffix(accented) + plain + "es"
    return noun + "es"
