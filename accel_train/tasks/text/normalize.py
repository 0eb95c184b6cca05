"""Text as the tokenizers see it: line ends, and the alphabet of the character tokenizer."""

from __future__ import annotations

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
"""Stands for a character outside the alphabet."""

ALPHABET = "\t\n" + "".join(map(chr, range(32, 127)))
"""What the character tokenizer knows: tab, newline and printable ASCII."""

_KNOWN = frozenset(ALPHABET)


def normalize_text(text: str) -> str:
    """``text`` with every character outside :data:`ALPHABET` replaced by :data:`UNKNOWN`.

    Its length does not change, and normalizing twice is normalizing once.
    """
    return "".join([character if character in _KNOWN else UNKNOWN for character in text])


def unify_line_ends(text: str) -> str:
    """``text`` with CRLF and lone CR as LF."""
    return text.replace("\r\n", "\n").replace("\r", "\n")
