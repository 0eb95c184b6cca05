"""A seeded grammar of English and Spanish sentences: a bilingual corpus of any size, with no network.

Chapters of one language take turns. Nouns have gender, number and a place in the story that is
told (a paragraph keeps its two characters), articles and adjectives agree, verbs are conjugated:
enough for a small model to have something to learn, and for its samples to show whether it did.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from importlib import resources

BUILTIN = "builtin"
"""Value of ``text.corpus`` that asks for this corpus."""

_WORDS = json.loads(resources.files(__package__).joinpath("builtin_words.json").read_text(encoding="utf-8"))
_EN, _ES = _WORDS["english"], _WORDS["spanish"]

_SENTENCES, _PARAGRAPHS = (3, 7), (3, 6)
_BLOCK = 1 << 16
_NAMED = 0.4
"""How many of the people have a name, which hardly anybody else has: a corpus of any size has new words."""


def builtin_text(size: int, seed: int) -> Iterator[str]:
    """About ``size`` bytes of UTF-8 in pieces of some 64 KiB; the same for the same arguments.

    Args:
        size: bytes; the last paragraph may exceed it.
        seed: of everything random.
    """
    draw = random.Random(seed)
    made, pending, waiting = 0, [], 0
    chapter = 0
    while made < size:
        language = _english if chapter % 2 == 0 else _spanish
        chapter += 1
        for _ in range(draw.randint(*_PARAGRAPHS)):
            paragraph = _paragraph(draw, language) + "\n"
            length = len(paragraph.encode())
            pending.append(paragraph)
            made, waiting = made + length, waiting + length
            if made >= size:
                break
        pending.append("\n")
        made, waiting = made + 1, waiting + 1
        if waiting >= _BLOCK:
            yield "".join(pending)
            pending, waiting = [], 0
    yield "".join(pending)


_Sentence = Callable[[], str]
_Language = Callable[[random.Random], _Sentence]


def _paragraph(draw: random.Random, language: _Language) -> str:
    sentence = language(draw)
    return " ".join(sentence() for _ in range(draw.randint(*_SENTENCES)))


def _english(draw: random.Random) -> _Sentence:
    """A maker of sentences about two people."""
    pick = draw.choice

    def hero(person: str) -> str:
        if draw.random() < _NAMED:
            return f"{pick(_EN['titles'])} {_name(draw, _EN['names'])}"
        return f"the {pick(_EN['adjectives'])} {person}"

    heroes = [hero(person) for person in draw.sample(_EN["people"], 2)]

    def thing() -> str:
        shape, noun = draw.randrange(4), pick(_EN["things"])
        if shape == 0:
            return f"the {noun}"
        adjective = pick(_EN["adjectives"])
        if shape == 1:
            return f"the {adjective} {noun}"
        if shape == 2:
            return f"{'an' if adjective[0] in 'aeiou' else 'a'} {adjective} {noun}"
        return f"{pick(('two', 'three', 'many', 'all the'))} {adjective} {noun}{'es' if noun.endswith('s') else 's'}"

    def clause() -> str:
        who, verb, shape = pick(heroes), pick(_EN["verbs"]), draw.randrange(5)
        past = f"{verb}d" if verb.endswith("e") else f"{verb[:-1]}ied" if verb.endswith("ry") else f"{verb}ed"
        if shape == 0:
            return f"{who} {past} {thing()} {pick(_EN['places'])}"
        if shape == 1:
            return f"{who} {past} {thing()} {pick(_EN['adverbs'])}"
        if shape == 2:
            return f"{who} will {verb} {thing()}"
        if shape == 3:
            return f"{who} and {heroes[0] if who == heroes[1] else heroes[1]} {past} {thing()}"
        return f"{who} did not {verb} {thing()} {pick(_EN['places'])}"

    def sentence() -> str:
        shape = draw.randrange(4)
        if shape == 0:
            return f"{pick(_EN['times'])}, {clause()}."
        if shape == 1:
            return _capital(f"{clause()}, {pick(('and', 'but', 'because', 'so'))} {clause()}.")
        if shape == 2:
            return f"“{_capital(clause())},” said {pick(heroes)}."
        return _capital(f"{clause()}.")

    return sentence


def _spanish(draw: random.Random) -> _Sentence:
    """A maker of sentences about two people."""
    pick = draw.choice

    def hero(name: str) -> str:
        if draw.random() < _NAMED:
            return f"{pick(_ES['titles'])} {_name(draw, _ES['names'])}"
        feminine = name.endswith("o") and draw.random() < 0.5
        noun, adjective = (name[:-1] + "a" if feminine else name), pick(_ES["adjectives"]) + ("a" if feminine else "o")
        return f"{'la' if feminine else 'el'} {noun} {adjective}"

    heroes = [hero(name) for name in draw.sample(_ES["people"], 2)]

    def thing() -> str:
        feminine = draw.random() < 0.5
        noun = pick(_ES["things_f"] if feminine else _ES["things_m"])
        shape, ending = draw.randrange(4), "a" if feminine else "o"
        if shape == 0:
            return f"{'la' if feminine else 'el'} {noun}"
        adjective = pick(_ES["adjectives"]) + ending
        if shape == 1:
            return f"{'la' if feminine else 'el'} {noun} {adjective}"
        if shape == 2:
            return f"{'una' if feminine else 'un'} {noun} {adjective}"
        plural = noun + "s" if noun[-1] in "aeiouáé" else _plural(noun)
        several = ("las", "dos", "muchas", "tres") if feminine else ("los", "dos", "muchos", "tres")
        return f"{pick(several)} {plural} {adjective}s"

    def clause() -> str:
        who, stem, shape = pick(heroes), pick(_ES["verbs"]), draw.randrange(5)
        if shape == 0:
            return f"{who} {stem}aba {thing()} {pick(_ES['places'])}"
        if shape == 1:
            return f"{who} {stem}a {thing()} {pick(_ES['adverbs'])}"
        if shape == 2:
            return f"{who} {stem}ará {thing()}"
        if shape == 3:
            return f"{who} y {heroes[0] if who == heroes[1] else heroes[1]} {stem}aron {thing()}"
        return f"{who} no {stem}aba {thing()} {pick(_ES['places'])}"

    def sentence() -> str:
        shape = draw.randrange(4)
        if shape == 0:
            return f"{pick(_ES['times'])}, {clause()}."
        if shape == 1:
            return _capital(f"{clause()}, {pick(('y', 'pero', 'porque', 'así que'))} {clause()}.")
        if shape == 2:
            return f"—{_capital(clause())} —dijo {pick(heroes)}."
        return _capital(f"{clause()}.")

    return sentence


def _name(draw: random.Random, syllables: list[list[str]]) -> str:
    return "".join(draw.choice(each) for each in syllables)


def _plural(noun: str) -> str:
    """The plural of a Spanish noun that ends in a consonant: an accent on its last syllable is lost."""
    for accented, plain in (("ón", "on"), ("ín", "in"), ("án", "an")):
        if noun.endswith(accented):
            return noun.removesuffix(accented) + plain + "es"
    return noun + "es"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
