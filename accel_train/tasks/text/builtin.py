"""A seeded grammar of English and Spanish sentences: a bilingual corpus of any size, with no network.

Chapters of one language take turns. Nouns have gender, number and a place in the story that is
told (a paragraph keeps its two characters), articles and adjectives agree, verbs are conjugated:
enough for a small model to have something to learn, and for its samples to show whether it did.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

BUILTIN = "builtin"
"""Value of ``text.corpus`` that asks for this corpus."""

_EN_PEOPLE = (
    "baker|doctor|farmer|fisherman|gardener|girl|king|lawyer|merchant|miller|neighbour|painter|pilot|poet|queen|"
    "sailor|shepherd|singer|soldier|stranger|student|teacher|traveller|widow|writer|boy|captain|servant|judge|cook"
).split("|")
_EN_THINGS = (
    "apple|basket|bell|boat|book|bottle|bridge|candle|carpet|chair|clock|coat|coin|cup|door|drum|flower|garden|glass|"
    "hammer|harp|hat|horse|house|key|kite|ladder|lamp|letter|lock|map|mirror|needle|painting|paper|pillow|plate|ring|"
    "river|road|rope|ship|shoe|song|spoon|star|stone|story|table|tree|wall|wheel|window|wing"
).split("|")
_EN_ADJECTIVES = (
    "old|young|quiet|happy|tired|clever|poor|rich|tall|small|brave|gentle|proud|strange|lonely|honest|careful|cheerful|"
    "green|white|dark|heavy|light|broken|golden|silver|wooden|empty|beautiful|ancient|simple|secret|warm|cold|bright"
).split("|")
_EN_VERBS = (
    "paint|clean|open|remember|carry|discover|follow|watch|repair|borrow|return|collect|visit|touch|count|select|"
    "answer|protect|describe|gather|polish|order|mention|admire|examine|guard|lift|pull|push|accept|offer|present"
).split("|")
_EN_PLACES = (
    "in the market|near the harbour|behind the church|under the bridge|on the hill|by the river|in the garden|"
    "at the old mill|beside the fountain|in the kitchen|on the road to the village|at the edge of the forest|"
    "in the library|outside the city|on the island|across the valley"
).split("|")
_EN_TIMES = (
    "In the morning|At midnight|Last winter|One evening|After the storm|Before dawn|Every summer|Long ago|That day|"
    "On Sunday|During the feast|Some years later|At the end of the week|When the rain stopped"
).split("|")
_EN_ADVERBS = "slowly|quietly|carefully|often|again|gladly|in silence|with great care|without a word|at once".split("|")

_EN_TITLES = "Mr.|Mrs.|Captain|Lady|Doctor|Sir".split("|")
_EN_NAMES = (
    "Ash|Black|Brad|Car|Crom|Dal|Dar|El|Fair|Fen|Glen|Had|Har|Hol|Ken|Lang|Lin|Mar|Mel|Nor|Oak|Pem|Rad|Ros|Shel|Stan|"
    "Thorn|Wal|Wes|Wood".split("|"),
    "a|e|er|ing|le|lin|low|mor|ning|or|ring|ster|ti|wen|wick|y".split("|"),
    "bourne|bridge|by|combe|dale|field|ford|gate|ham|hurst|land|ley|more|shaw|stead|ton|wall|well|wood|worth".split(
        "|"
    ),
)

_ES_TITLES = "don|el señor|el capitán|el doctor|maese|fray".split("|")
_ES_NAMES = (
    "Al|Ar|Bal|Bar|Cal|Cas|Cer|Del|Fer|Gal|Gar|Her|Lar|Luz|Man|Mar|Men|Mon|Nar|Or|Pal|Per|Quin|Ram|Sal|San|Tor|Val|Vil|Zam".split(
        "|"
    ),
    "a|be|ca|cu|da|do|ga|go|la|li|ma|mi|na|ne|ra|ro|ta|ti|va|ve".split("|"),
    "bal|cedo|da|dón|jada|lar|lejo|llo|nares|nero|ño|quera|rano|rín|rrez|sco|tero|ales|ván|zar".split("|"),
)

_ES_PEOPLE = (
    "panadero|médico|campesino|pescador|jardinero|abogado|molinero|vecino|pintor|piloto|marinero|pastor|cantor|soldado|"
    "extranjero|maestro|viajero|escritor|muchacho|niño|capitán|criado|cocinero|carpintero|zapatero|hermano|abuelo|amigo"
).split("|")
_ES_THINGS_M = (
    "barco|libro|puente|reloj|abrigo|vaso|jardín|martillo|sombrero|caballo|espejo|cuadro|papel|plato|anillo|río|camino|"
    "zapato|cuento|árbol|muro|cesto|tambor|candado|mapa|secreto|pan|vino|cuaderno|tesoro"
).split("|")
_ES_THINGS_F = (
    "manzana|campana|botella|vela|alfombra|silla|moneda|taza|puerta|flor|casa|llave|cometa|escalera|lámpara|carta|aguja|"
    "almohada|cuerda|canción|cuchara|estrella|piedra|mesa|rueda|ventana|historia|espada|guitarra|montaña"
).split("|")
_ES_ADJECTIVES = (
    "viej|tranquil|content|cansad|list|ric|alt|pequeñ|orgullos|extrañ|solitari|honrad|cuidados|blanc|oscur|pesad|liger|"
    "rot|dorad|platead|vací|hermos|antigu|sencill|secret|tibi|frí|nuev|perdid|famos|buen|generos|negr|roj|sabi"
).split("|")
_ES_VERBS = (
    "pint|limpi|record|llev|encontr|mir|repar|compr|regal|visit|toc|cont|contest|cuid|dibuj|junt|orden|nombr|admir|"
    "examin|guard|levant|empuj|acept|present|dej|am|busc|esper|entreg|prepar|salud"
).split("|")
_ES_PLACES = (
    "en el mercado|cerca del puerto|detrás de la iglesia|bajo el puente|en la colina|junto al río|en el jardín|"
    "en el viejo molino|al lado de la fuente|en la cocina|camino de la aldea|a la orilla del bosque|en la biblioteca|"
    "fuera de la ciudad|en la isla|al otro lado del valle"
).split("|")
_ES_TIMES = (
    "Por la mañana|A medianoche|El invierno pasado|Una tarde|Después de la tormenta|Antes del alba|Cada verano|"
    "Hace mucho tiempo|Aquel día|El domingo|Durante la fiesta|Algunos años después|Al final de la semana|"
    "Cuando dejó de llover"
).split("|")
_ES_ADVERBS = (
    "despacio|en silencio|con cuidado|a menudo|otra vez|con gusto|sin decir nada|en seguida|poco a poco".split("|")
)

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
            return f"{pick(_EN_TITLES)} {_name(draw, _EN_NAMES)}"
        return f"the {pick(_EN_ADJECTIVES)} {person}"

    heroes = [hero(person) for person in draw.sample(_EN_PEOPLE, 2)]

    def thing() -> str:
        shape, noun = draw.randrange(4), pick(_EN_THINGS)
        if shape == 0:
            return f"the {noun}"
        adjective = pick(_EN_ADJECTIVES)
        if shape == 1:
            return f"the {adjective} {noun}"
        if shape == 2:
            return f"{'an' if adjective[0] in 'aeiou' else 'a'} {adjective} {noun}"
        return f"{pick(('two', 'three', 'many', 'all the'))} {adjective} {noun}{'es' if noun.endswith('s') else 's'}"

    def clause() -> str:
        who, verb, shape = pick(heroes), pick(_EN_VERBS), draw.randrange(5)
        past = f"{verb}d" if verb.endswith("e") else f"{verb[:-1]}ied" if verb.endswith("ry") else f"{verb}ed"
        if shape == 0:
            return f"{who} {past} {thing()} {pick(_EN_PLACES)}"
        if shape == 1:
            return f"{who} {past} {thing()} {pick(_EN_ADVERBS)}"
        if shape == 2:
            return f"{who} will {verb} {thing()}"
        if shape == 3:
            return f"{who} and {heroes[0] if who == heroes[1] else heroes[1]} {past} {thing()}"
        return f"{who} did not {verb} {thing()} {pick(_EN_PLACES)}"

    def sentence() -> str:
        shape = draw.randrange(4)
        if shape == 0:
            return f"{pick(_EN_TIMES)}, {clause()}."
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
            return f"{pick(_ES_TITLES)} {_name(draw, _ES_NAMES)}"
        feminine = name.endswith("o") and draw.random() < 0.5
        noun, adjective = (name[:-1] + "a" if feminine else name), pick(_ES_ADJECTIVES) + ("a" if feminine else "o")
        return f"{'la' if feminine else 'el'} {noun} {adjective}"

    heroes = [hero(name) for name in draw.sample(_ES_PEOPLE, 2)]

    def thing() -> str:
        feminine = draw.random() < 0.5
        noun = pick(_ES_THINGS_F if feminine else _ES_THINGS_M)
        shape, ending = draw.randrange(4), "a" if feminine else "o"
        if shape == 0:
            return f"{'la' if feminine else 'el'} {noun}"
        adjective = pick(_ES_ADJECTIVES) + ending
        if shape == 1:
            return f"{'la' if feminine else 'el'} {noun} {adjective}"
        if shape == 2:
            return f"{'una' if feminine else 'un'} {noun} {adjective}"
        plural = noun + "s" if noun[-1] in "aeiouáé" else _plural(noun)
        several = ("las", "dos", "muchas", "tres") if feminine else ("los", "dos", "muchos", "tres")
        return f"{pick(several)} {plural} {adjective}s"

    def clause() -> str:
        who, stem, shape = pick(heroes), pick(_ES_VERBS), draw.randrange(5)
        if shape == 0:
            return f"{who} {stem}aba {thing()} {pick(_ES_PLACES)}"
        if shape == 1:
            return f"{who} {stem}a {thing()} {pick(_ES_ADVERBS)}"
        if shape == 2:
            return f"{who} {stem}ará {thing()}"
        if shape == 3:
            return f"{who} y {heroes[0] if who == heroes[1] else heroes[1]} {stem}aron {thing()}"
        return f"{who} no {stem}aba {thing()} {pick(_ES_PLACES)}"

    def sentence() -> str:
        shape = draw.randrange(4)
        if shape == 0:
            return f"{pick(_ES_TIMES)}, {clause()}."
        if shape == 1:
            return _capital(f"{clause()}, {pick(('y', 'pero', 'porque', 'así que'))} {clause()}.")
        if shape == 2:
            return f"—{_capital(clause())} —dijo {pick(heroes)}."
        return _capital(f"{clause()}.")

    return sentence


def _name(draw: random.Random, syllables: tuple[list[str], ...]) -> str:
    return "".join(draw.choice(each) for each in syllables)


def _plural(noun: str) -> str:
    """The plural of a Spanish noun that ends in a consonant: an accent on its last syllable is lost."""
    for accented, plain in (("ón", "on"), ("ín", "in"), ("án", "an")):
        if noun.endswith(accented):
            return noun.removesuffix(accented) + plain + "es"
    return noun + "es"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
