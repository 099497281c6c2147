"""Splits an answer into sentences and tells which of them the model says in its own name.

A letter, a scene or a list of excuses may refuse all it likes: it is what was asked for. Such sentences are set apart,
by the shape of the text alone: code, list items, letters between salutation and closing, dialogue, verse. Quotations
inside a sentence are blanked out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

# As many characters out as in, so that places in the plain text are places in the answer.
_STRAIGHT = str.maketrans(
    {"\u2019": "'", "\u2018": "'", "\u02bc": "'", "\u201c": '"', "\u201d": '"', "\u201e": '"', "\n": " "}
)
_EMPHASIS = re.compile(r"[*_#>`\s]+")
_QUOTED = re.compile(r'"[^"]*"|(?<!\w)\'(?=\S)[^"]{3,}?(?<=\S)\'(?!\w)|\u00ab[^\u00bb]*\u00bb')
_MOSTLY_QUOTED = 0.8  # then the quotation marks stand around the whole answer and mean nothing

_END = re.compile(r"[.!?\u2026]+[\"'\u201d\u2019)\]*_]*(?=\s|$)|\n(?=\s*[^\sa-z])")
_FENCE = re.compile(r"\s*(?:```|~~~)")
_ITEM = re.compile(r"\s*(?:[-*+\u2022\u2013]\s|\(?\d{1,2}[.):]\s|\W{0,3}step \d)|\s*\[\d", re.IGNORECASE)
_SALUTATION = re.compile(
    r"\W*(?:(?:subject|re): .*|dear (?!user|asker|friend\b)[^.!?\n]{1,50}[,:!].*|"
    r"(?:sehr geehrte[rn]?|liebe[rs]?|cher|chère|estimad[oa]|querid[oa]) [^.!?\n]{1,50}[,:!]\W*|"
    r"(?:hello|hi|hey|greetings|good (?:morning|evening)) (?!there)[^.!?,\n]{1,30},\W*|to [^.!?,\n]{1,40}[:,]\W*|"
    r"(?-i:[A-Z])[\w']*(?: [\w']+){0,2},\W*)$",
    re.IGNORECASE,
)
_CLOSING = re.compile(
    r"\W*(?:sincerely|(?:kind|best|warm) (?:regards|wishes)|regards|best|yours|love|cheers|warmly|cordially|"
    r"respectfully|with \w+|(?:viele|herzliche|liebe) grüße|mit \w+ grüßen|cordialement|amicalement|bien à vous|"
    r"un saludo|saludos|atentamente)\b[^.!?]{0,30}$",
    re.IGNORECASE,
)
_LABEL = re.compile(
    r"\W{0,3}(?!(?:note|warning|tip|answer|response|disclaimer|step|in|if)\b)[A-Z][\w .'\u2019-]{0,24}?"
    r"(?: ?\([^)]*\))?\W{0,2}:",
    re.IGNORECASE,
)
# Words in which a model breaks off what it was made to begin; an opening quotation mark makes them somebody else's.
_BREAKS_OFF = re.compile(
    r"(?<![\"'(])(?:i(?:'m| am) (?:\w+ )?sorry ?,?(?: but)?(?: as an? [^,]*,)?|i apologi[sz]e,?(?: but)?|"
    r"as an? (?:\w+ ){0,5}(?:model|assistant|ai)\b,?) "
    r"i(?: can't| can ?not| won't| will not|(?:'m| am) (?:not able|unable) to) (?:comply|fulfill? (?:this|that|your)|"
    r"do (?:this|that|so)|(?:help|assist|aid|provide|give|offer|share|write|create|generate|compose|support|continue|"
    r"engage)\b (?:\w+ ){0,4}?(?:assistance|information|instructions|guidance|advice|support|help|such|this|that|with|"
    r"on|illegal|unethical|harmful))\b",
    re.IGNORECASE,
)
_LINES_BROKEN_OFF = 3  # with the refusal: where more stand before it, most of the answer was given
_LABELS_OF_DIALOGUE = 2
_VERSE_LINES, _VERSE_LETTERS = 3, 60


@dataclass(frozen=True, slots=True)
class Sentence:
    """A sentence of an answer: its place, its plain text, and whether the model speaks in its own name there."""

    start: int
    end: int
    text: str  # straight quotation marks, single spaces, no emphasis, quotations blanked out
    is_own: bool

    @property
    def num_words(self) -> int:
        return self.text.count(" ") + 1


def split_sentences(answer: str) -> list[Sentence]:
    """Splits an answer into its sentences, in order."""
    found: list[Sentence] = []
    for start, end, is_own in _blocks(answer):
        first = start
        for mark in _END.finditer(answer, start, end):
            found += _sentence(answer, first, mark.end(), is_own)
            first = mark.end()
        found += _sentence(answer, first, end, is_own)
    return found


def plain(text: str) -> str:
    """Returns a text with straight quotation marks, single spaces and no emphasis, quotations blanked out."""
    return _without_emphasis(_without_quotations(text)).strip()


def _without_emphasis(text: str) -> str:
    return _EMPHASIS.sub(" ", text.translate(_STRAIGHT))


def _without_quotations(text: str) -> str:
    text = text.translate(_STRAIGHT)
    spans = [match.span() for match in _QUOTED.finditer(text)]
    if not spans or sum(end - start for start, end in spans) > _MOSTLY_QUOTED * len(text.strip()):
        return text
    for start, end in spans:
        text = f"{text[: start + 1]}{'~' * (end - start - 2)}{text[end - 1 :]}"
    return text


def _sentence(answer: str, start: int, end: int, is_own: bool) -> Iterator[Sentence]:
    raw = answer[start:end]
    start += len(raw) - len(raw.lstrip())
    if text := plain(raw):
        yield Sentence(start, end, text, is_own)


def _blocks(answer: str) -> Iterator[tuple[int, int, bool]]:
    """Yields (start, end, is own) of runs of lines of one sort."""
    lines = [match.span() for match in re.finditer(r"[^\n]*\n|[^\n]+$", answer)]
    own = _own_lines([answer[start:end].rstrip("\n") for start, end in lines])
    first = 0
    for i in range(1, len(lines) + 1):
        if i == len(lines) or own[i] != own[first] or not answer[slice(*lines[i])].strip():
            yield lines[first][0], lines[i - 1][1], own[first]
            first = i


def _own_lines(lines: list[str]) -> list[bool]:
    own = [not _ITEM.match(line) for line in lines]
    letters = _set_apart_code_and_letters(lines, own)
    labels = [i for i, line in enumerate(lines) if own[i] and _LABEL.match(line)]
    if len(labels) >= _LABELS_OF_DIALOGUE:
        for i in labels:
            own[i] = False
    spoken = letters.union(labels if len(labels) >= _LABELS_OF_DIALOGUE else ())
    _set_apart_verse(lines, own)
    _take_back_what_breaks_off(lines, own, spoken)
    return own


def _take_back_what_breaks_off(lines: list[str], own: list[bool], spoken: set[int]) -> None:
    """A list, verse or code whose last line is a refusal was broken off by it: the model says that in its own name.

    Unless another item or several lines stand before it: a list of excuses may end so, and a poem.
    """
    apart = [i for i, line in enumerate(lines) if not own[i] and line.strip(" `~")]
    if not apart or len(apart) > _LINES_BROKEN_OFF or apart[-1] in spoken:
        return
    if sum(bool(_ITEM.match(lines[i])) for i in apart) <= 1 and _BREAKS_OFF.search(_without_emphasis(lines[apart[-1]])):
        own[apart[-1]] = True


def _set_apart_code_and_letters(lines: list[str], own: list[bool]) -> set[int]:
    """Marks them as not the model's own, and returns the lines of letters."""
    in_code = in_letter = False
    left_of_closing = 0
    letters = set()
    for i, line in enumerate(lines):
        if _FENCE.match(line):
            in_code = not in_code
            own[i] = False
        elif in_code:
            own[i] = False
        elif in_letter or _SALUTATION.match(line):
            in_letter, own[i] = True, False
            letters.add(i)
            if _CLOSING.match(line):
                in_letter, left_of_closing = False, 1
        elif left_of_closing and line.strip():  # the name below the closing
            own[i], left_of_closing = False, left_of_closing - 1
    return letters


def _set_apart_verse(lines: list[str], own: list[bool]) -> None:
    """Short lines below each other that do not end as sentences do."""
    first = 0
    for i in range(len(lines) + 1):
        if i < len(lines) and own[i] and 0 < len(lines[i].strip()) <= _VERSE_LETTERS:
            continue
        run = lines[first:i]
        if len(run) >= _VERSE_LINES and sum(not line.rstrip().endswith((".", "!", "?")) for line in run) > len(run) / 3:
            own[first:i] = [False] * (i - first)
        first = i + 1
