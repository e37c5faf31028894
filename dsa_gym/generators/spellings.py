"""Ways of typing: whole texts turned into one odd spelling each.

A backbone that was trained on plain text has to be adapted to each of them, and no one adaptation serves them all:
they give a population of personas what real populations have, inputs that pull shared parameters in different
directions.
"""

from __future__ import annotations

import re
from collections.abc import Callable

_WORD = re.compile(r"[A-Za-z]+")
_INNER_VOWELS = re.compile(r"(?<=[A-Za-z])[aeiouAEIOU](?=[A-Za-z])")
_PHONETIC = (
    (r"\byou\b", "u"),
    (r"\bare\b", "r"),
    (r"\bto(?:o)?\b", "2"),
    (r"\bfor\b", "4"),
    (r"\band\b", "n"),
    (r"ph", "f"),
    (r"ck?(?![eihy])", "k"),
    (r"th", "d"),
    (r"ing\b", "in"),
    (r"s\b", "z"),
)


def _without_vowels(text: str) -> str:
    return _WORD.sub(lambda word: _INNER_VOWELS.sub("", word[0]) if len(word[0]) > 3 else word[0], text)


def _phonetic(text: str) -> str:
    for pattern, new in _PHONETIC:
        text = re.sub(pattern, new, text, flags=re.IGNORECASE)
    return text


def _archaic(text: str) -> str:
    text = re.sub(r"(?<=[A-Za-z])i(?=[A-Za-z])", "y", text)
    return re.sub(r"\b([A-Za-z]{2,}[bcdfgklmnprt])\b", r"\1e", text)


def _swapped(text: str) -> str:
    return re.sub(r"(?<![A-Za-z])([A-Za-z])([A-Za-z])([A-Za-z])(?=[A-Za-z])", r"\1\3\2", text)


SPELLINGS: dict[str, Callable[[str], str]] = {
    "capitals": str.upper,
    "without_vowels": _without_vowels,
    "phonetic": _phonetic,
    "stretched": lambda text: re.sub(r"([aeiou])(?=\w)", r"\1\1", text),
    "dotted": lambda text: text.replace(" ", ".."),
    "archaic": _archaic,
    "swapped": _swapped,
}
"""Name to a function from text to text; each is deterministic and leaves a non-empty text non-empty."""
