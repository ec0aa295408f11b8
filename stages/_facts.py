"""Numbers, prices, dates and quoted titles in a text, for asking where a reply has them from."""

from __future__ import annotations

import re
from itertools import pairwise

_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_GROUPED = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_DECIMAL_COMMA = re.compile(r"\d+,\d{1,2}")
_MONTH = r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)"
_DATE = re.compile(rf"\b(?:\d{{1,2}}(?:st|nd|rd|th)?(?: of)? ({_MONTH})|({_MONTH}) \d{{1,2}})\b", re.IGNORECASE)
_QUOTED = re.compile(r"[“\"]([^”\"\n]*)[”\"]|‘([^’\n]*)’")
_WORDS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
          "nineteen twenty").split()
_NUMBER_WORDS = {word: str(number) for number, word in enumerate(_WORDS)} | {
    "thirty": "30", "forty": "40", "fifty": "50", "sixty": "60", "seventy": "70", "eighty": "80", "ninety": "90", "hundred": "100",
    "once": "1", "twice": "2", "first": "1", "second": "2", "third": "3", "fourth": "4", "fifth": "5"}


def numbers(text: str) -> set[str]:
    """Numbers written in digits, normalised: `£1,200.00` and `1200` are alike, `12,50` is 12.5; a time or a date gives its parts."""
    return {_normal(match[0]) for match in _NUMBER.finditer(text)}


def number_words(text: str) -> set[str]:
    """Numbers written out (`three`, `twice`), as digits. Only sources are read so: a customer may say "three", the agent answer 3."""
    words = re.findall(r"[a-z]+", text.lower())
    found = {_NUMBER_WORDS[word] for word in words if word in _NUMBER_WORDS}
    tens = {word: value for word, value in _NUMBER_WORDS.items() if len(value) == 2 and value.endswith("0") and value > "10"}
    return found | {tens[ten][0] + _NUMBER_WORDS[unit] for ten, unit in pairwise(words)
                    if ten in tens and len(_NUMBER_WORDS.get(unit, "00")) == 1}


def months(text: str) -> set[str]:
    """Months that are part of a date, by their first three letters."""
    return {(match[1] or match[2]).lower()[:3] for match in _DATE.finditer(text)}


def unsupported(message: str, sources: list[str]) -> str | None:
    """The first number, date or quoted title in `message` that no source has; None if all are covered."""
    known = set[str]().union(*(numbers(text) | number_words(text) for text in sources))
    if missing := sorted(numbers(message) - known):
        return f"the number {missing[0]}"
    everything = " ".join(" ".join(sources).lower().split())
    for month in sorted(months(message)):
        if not re.search(rf"\b{month}|-\d\d-|/\d", everything):
            return f"a date in {month}"
    for match in _QUOTED.finditer(message):
        title = " ".join((match[1] or match[2] or "").lower().split()).strip(" .,!?")
        if " " in title and title not in everything:
            return f"the quotation '{title}'"
    return None


def _normal(number: str) -> str:
    if _GROUPED.fullmatch(number):
        number = number.replace(",", "")
    elif _DECIMAL_COMMA.fullmatch(number):
        number = number.replace(",", ".")
    whole, _, decimals = number.partition(".")
    decimals = decimals.rstrip("0")
    return (whole.lstrip("0") or "0") + (f".{decimals}" if decimals else "")
