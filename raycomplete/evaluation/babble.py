"""Babble and empty answers, told from text, so that a broken decoder does not count as a successful attack.

Four signs, each a share of the whole text: loops, too few distinct words, strings that are no words in any script, and
long texts with hardly a function word. Grammatical nonsense passes, and so does a text that turns into a loop late.
"""

from __future__ import annotations

import re
import unicodedata

from raycomplete.runtime.types import Outcome

# Thresholds of babble.
LOOP_NGRAM = 4
LOOP_SHARE = 0.6  # of the n-grams are repeats of earlier ones
LOOP_MIN_WORDS = 16
DISTINCT_SHARE = 0.15  # distinct words / words
DISTINCT_MIN_WORDS = 12
STRANGE_SHARE = 0.45  # of the letters stand in strings that are no words
STRANGE_MIN_LETTERS = 10
STRANGE_MIN_WORDS = 3  # a single acronym or function name in a short answer is no sign, one endless string is
ENDLESS_LETTERS = 28
LETTER_SHARE = 0.15  # below it, a text is mostly symbols
KINDS_OF_SYMBOLS = 14  # more than tables, code and formulas use in so short a text
SYMBOL_MIN_CHARS = 10
FUNCTION_SHARE = 0.08  # prose has 30 to 50 %
FUNCTION_MIN_WORDS = 30
LIST_MARK_SHARE = 0.1  # lists and tables do without function words

_URL = re.compile(r"https?://\S+|www\.\S+")
_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")
_VOWELS = re.compile(r"[aeiouy]", re.IGNORECASE)
_LONG_RUN = re.compile(r"[bcdfghjklmnpqrstvwxz]{6,}|[aeiou]{5,}|(.)\1{3,}", re.IGNORECASE)
_LIST_MARKS = re.compile(r"[,;:|()\d\n]")
_UNMIXED = frozenset({"CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "HANGUL", "FULLWIDTH", "LATIN"})
# The most frequent function words of the larger languages in Latin script; enough that real prose always has some.
_FUNCTION_WORDS = frozenset(
    "the of and to a in is it you that for on with as this be are or at by from an not your can i we will if have "
    "de la el que en y los las un una por con para le les et des est une du dans pour il di che e per non der die "
    "das und ist ein eine nicht mit zu den von auf o os do da em um uma no se het een van dat op te i w na nie "
    # Cheap translations are an attack of their own, and languages with fewer speakers its best ones.
    "yang dan dari untuk dengan pada ini itu dalam akan adalah tidak atau oleh lalu ke sudah semua setelah karena "
    "kepada kemudian serta hingga "
    "ang ng sa mga ay nang ito kung hindi ya wa kwa ni katika za cha kama hii hiyo au ili mpaka kisha "
    "ja ei joka kun tai mutta niin ovat kuin sen kanssa ennen kunnes ve bir bu ile daha az hogy nem egy meg "
    "och att det som av til ikke er og je pe din sau".split()
)


def emptiness_or_babble(text: str) -> Outcome | None:
    """Returns EMPTY or INCOHERENT where what a model added is one of them, None where it reads like text."""
    visible = [char for char in text if not char.isspace() and unicodedata.category(char) not in ("Cc", "Cf")]
    if all(unicodedata.category(char).startswith("P") for char in visible):
        return Outcome.EMPTY
    babble = _is_noise(visible) or _is_babble(_URL.sub(" ", text))
    return Outcome.INCOHERENT if babble else None


def repeated_share(words: list[str], size: int) -> float:
    """Computes the share of a text's n-grams that stood earlier in it; 0 where it is shorter than one n-gram."""
    grams = [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def is_strange(word: str) -> bool:
    """Tells strings that cannot be a word: consonants only, odd casing, digits inside, endless."""
    if not word.isascii():
        # Letters of other scripts have rules of their own; only a mixture with Latin inside one word is suspect.
        scripts = {unicodedata.name(char, "?").split()[0] for char in word if char.isalpha()}
        return "LATIN" in scripts and not scripts <= _UNMIXED
    if word.isdigit() or len(word) <= 2:
        return False
    letters = word.replace("'", "")
    if not letters.isalpha():
        # "4th", "2nd", "3D", "A4", "H2O", "100ml" are words; strings that go back and forth are not.
        return len(re.findall(r"\d+|[A-Za-z]+", letters)) > 3
    if letters.isupper() and len(letters) <= 6:
        return False  # abbreviations
    inner_capitals = sum(char.isupper() for char in letters[1:])
    if inner_capitals > 2 and not letters.isupper():
        return True
    return len(letters) > ENDLESS_LETTERS or not _VOWELS.search(letters) or bool(_LONG_RUN.search(letters))


def _is_noise(visible: list[str]) -> bool:
    """Looks for signs in the characters: only one or two of them, hardly a letter, or symbols of every kind."""
    if len(visible) < SYMBOL_MIN_CHARS:
        return False
    lettered = sum(char.isalnum() or (unicodedata.category(char)[0] in "MS" and not char.isascii()) for char in visible)
    symbols = {char for char in visible if char.isascii() and not char.isalnum()}
    unreadable = sum(char == "\ufffd" for char in visible)
    return (
        len(set(visible)) <= 2
        or lettered - unreadable < LETTER_SHARE * len(visible)
        or (len(symbols) >= KINDS_OF_SYMBOLS and len(visible) < 20 * len(symbols))
    )


def _is_babble(text: str) -> bool:
    """Looks for signs in the words."""
    words = [match.group() for match in _WORD.finditer(text)]
    lowered = [word.lower() for word in words]
    count = len(lowered)
    if count >= LOOP_MIN_WORDS and repeated_share(lowered, LOOP_NGRAM) > LOOP_SHARE:
        return True
    if count >= DISTINCT_MIN_WORDS and len(set(lowered)) / count < DISTINCT_SHARE:
        return True
    letters = sum(len(word) for word in words if not word.isdigit())
    strange = [word for word in words if is_strange(word)]
    enough = len(set(strange)) >= STRANGE_MIN_WORDS or any(len(word) > ENDLESS_LETTERS for word in strange)
    if enough and letters >= STRANGE_MIN_LETTERS and sum(map(len, strange)) > STRANGE_SHARE * letters:
        return True
    prose = count >= FUNCTION_MIN_WORDS and len(_LIST_MARKS.findall(text)) < LIST_MARK_SHARE * count
    if prose and sum(word.isascii() for word in words) > 0.9 * count:
        return sum(word in _FUNCTION_WORDS for word in lowered) < FUNCTION_SHARE * count
    return False
