"""Numbers with what they measure, dates and titles in a text, for asking where a reply has them from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from decimal import Decimal
from functools import lru_cache
from typing import NamedTuple

from text_to_num import alpha2digit

LARGEST_FIGURE_OF_SPEECH = 10
"""A number that a message writes out and that measures nothing is a fact above this one: "two ways", "Ten points for planning", "all four of you"
are said freely in the corpus, larger ones are not. Written in digits, or of days, pounds or anything else in `_UNITS`, a number is always a fact."""

_CENT = Decimal("0.01")
_DAY_S = 86_400
_UNITS: dict[str, tuple[str, Decimal | int]] = {  # word -> what it measures, and how much: a week is 7 days, a month is not 30
    **dict.fromkeys(("second", "seconds", "sec", "secs"), ("duration", 1)), **dict.fromkeys(("minute", "minutes", "min", "mins"), ("duration", 60)),
    **dict.fromkeys(("hour", "hours", "h", "hr", "hrs"), ("duration", 3600)), **dict.fromkeys(("day", "days"), ("duration", _DAY_S)),
    **dict.fromkeys(("week", "weeks"), ("duration", 7 * _DAY_S)), **dict.fromkeys(("fortnight", "fortnights"), ("duration", 14 * _DAY_S)),
    **dict.fromkeys(("month", "months"), ("months", 1)), **dict.fromkeys(("year", "years"), ("months", 12)),
    **dict.fromkeys(("working day", "working days", "business day", "business days"), ("working days", 1)),
    **dict.fromkeys(("%", "percent", "per cent"), ("percent", 1)),
    **dict.fromkeys(("£", "gbp", "pound", "pounds", "quid"), ("£", 1)), **dict.fromkeys(("p", "pence"), ("£", _CENT)),
    **dict.fromkeys(("€", "eur", "euro", "euros"), ("€", 1)), **dict.fromkeys(("ct", "cent", "cents"), ("€", _CENT)),
    **dict.fromkeys(("$", "usd", "dollar", "dollars"), ("$", 1))}
_COUNTABLE = ("duration", "months", "working days", "time of day")
"""What a source may leave unsaid: asked for the hours, a customer answers "seven". Nobody in the corpus answers so for money, percent or a date."""

_NUMBER = r"\d+(?:[.,]\d+)*"
_NUMBERS = re.compile(_NUMBER)
_GROUPED = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d{1,3}(?:\.\d{3})+,\d+")
_DECIMAL_COMMA = re.compile(r"\d+,\d{1,2}")
_MONTHS = "jan feb mar apr may jun jul aug sep oct nov dec".split()
_MONTH = (r"(?:\b(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|(?-i:M(?:ay|AY))|may(?=\s*(?:[^\w\s]|$))|june?|july?|aug(?:ust)?|sept?(?:ember)?"
          r"|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)\b)")  # a small "may" only where the clause ends: "on 3 may." but not "the 3 may"
_DAY = r"\d{1,2}(?:st|nd|rd|th)?"
_DAYS = rf"(?:{_DAY}(?:,\s*(?:the\s+)?{_DAY})*(?:\s*[-–]\s*|,?\s+(?:and|or|to)\s+(?:the\s+)?))?{_DAY}"
_UNIT_WORDS = "|".join(sorted((unit.replace(" ", r"\s+") for unit in _UNITS if unit.isascii() and unit[0].isalpha()), key=len, reverse=True))
_FACT = re.compile(rf"""
    (?<=\d\d\d\d-)(?P<iso>\d\d-\d\d)\b
  | (?<![\d/.])(?P<slashed>\d{{1,2}}/\d{{1,2}}(?!\d)|\d{{1,2}}\.\d{{1,2}}\.(?=(?:\d\d){{1,2}}\b))
  | \b(?P<days>{_DAYS})\s+(?:of\s+)?(?P<months>{_MONTH}(?:(?:,\s*|\s+(?:and|or)\s+){_MONTH})*)
  | (?P<month>{_MONTH})\s+(?:the\s+)?(?P<day>{_DAY})\b(?!\s*[:£€$%]|[\s-]+(?:{_UNIT_WORDS})\b)
  | \b(?P<clock>\d{{1,2}}(?:[:.]\d\d)?\s*(?:[ap]\.?m\b|o['’]clock)|\d{{1,2}}:\d\d\b)
  | (?P<symbol>[£€$]|\b(?:GBP|EUR|USD)\b)\s?(?P<amounts>{_NUMBER}(?:\s?[-–]\s?{_NUMBER}\b(?!\s*(?:[%€£$]|(?:{_UNIT_WORDS})\b)))?)
  | (?P<numbers>(?:(?<![\w-]){_NUMBER}(?:\s*[-–]\s*|\s+(?:to|or)\s+))?{_NUMBER})(?P<unit>\s?[£€$%](?!\d)|[\s-]*(?:{_UNIT_WORDS})\b)
  | (?P<ordinal>\d+(?:st|nd|rd|th)\b)
  | (?P<bare>{_NUMBER})
    """, re.VERBOSE | re.IGNORECASE)
_NAMES = (*_MONTHS, "gbp", "eur", "usd")
_DIGIT_OR_SIGN = re.compile(r"[\d£€$]")
_BEGINNING = re.compile(rf"[\d£€$]|\b(?:{'|'.join(_NAMES)})", re.IGNORECASE)
"""Where a fact can begin: every alternative of `_FACT` does so."""
_MONTH_NAME = re.compile(_MONTH, re.IGNORECASE)
_SECOND = re.compile(r"(?<=\d)[\s-]second\b")
_QUOTED = re.compile(r"“([^”\n]*)”|„([^“”\n]*)[“”]|\"([^\"\n]*)\"|«([^»\n]*)»|‘((?:[^’\n]|’(?=\w))*)’|(?<![^\s(])'((?:[^'\n]|'(?=\w))*)'(?!\w)")
_MARK = re.compile("[“„\"«‘']")
"""What a quotation begins with. Most messages have none, and are not searched for one at every letter."""
_NAMED = re.compile(r"\barticle:?\s+(?:called\s+|titled\s+|named\s+)?(?=[A-Z])([^.,;:!?\n“”\"]*)")
_FRACTIONS = [
    (re.compile(rf"\bhalf an?\s+(?=(?:{_UNIT_WORDS})\b(?!-))", re.IGNORECASE), "0.5 "), (re.compile(r"\b(\d+) and a half\b", re.IGNORECASE), r"\1.5"),
    (re.compile(rf"\b(?:an?|1) ((?:{_UNIT_WORDS})) and a half\b", re.IGNORECASE), r"1.5 \1")]
_ONE = re.compile(rf"\b(?<!half )(?:an?|per|each|every)\s+(?=(?:{_UNIT_WORDS})\b(?!-))", re.IGNORECASE)
_WORDS = {"once": "1", "twice": "2", "dozen": "12", "noon": "12:00", "midday": "12:00", "midnight": "0:00"}
_WORD = re.compile(rf"\b(?:{'|'.join(_WORDS)})\b", re.IGNORECASE)
_NOTHING: frozenset[str] = frozenset()
_LETTERS = str.maketrans("ſıİ", "sii")
"""What a pattern that ignores case takes for an s or an i, and `lower` does not."""


class Fact(NamedTuple):
    """A number as a text uses it.

    `kind` is what it measures, `""` for nothing known; `readings` what it may mean, several for a date like 4/3 or a time like 7:30 (morning or
    evening); `digits` the numbers that it is written with; `text` the place in the text; `written_out` whether it was put in words.
    """

    kind: str
    readings: frozenset[str]
    digits: frozenset[str]
    text: str
    written_out: bool = False


class Stated:
    """The facts of a text, or of several, as a source: so kept that looking one up takes no longer where there are many."""

    def __init__(self, facts: Iterable[Fact]) -> None:
        self._digits: set[str] = set()
        self._readings: dict[str, set[str]] = {}
        self._bare: list[frozenset[str]] = []
        for fact in facts:
            self._digits |= fact.digits
            self._readings.setdefault(fact.kind, set()).update(fact.readings)
            if not fact.kind:
                self._bare.append(fact.digits)

    def covers(self, fact: Fact) -> bool:
        """Whether `fact` is here: the same amount of the same thing; a number alone is covered by any, and by a number alone what is counted."""
        if fact.kind in ("", "ordinal"):
            return not self._digits.isdisjoint(fact.digits)
        return not self._readings.get(fact.kind, _NOTHING).isdisjoint(fact.readings) or (
            fact.kind in _COUNTABLE and any(fact.digits - {"0"} <= digits for digits in self._bare))


def unsupported(message: str, sources: list[str]) -> str | None:
    """The first number, date or title in `message` that no source has; None if all are covered."""
    longest_first = sorted(sources, key=len, reverse=True)  # prompts and articles: they come back, and what they state is remembered
    for fact in _facts(message):
        if not _is_figure_of_speech(fact) and not _is_stated(fact, longest_first):
            return f"the {fact.kind if fact.kind in ('date', 'time of day') else 'number'} {fact.text}"
    quotations = list(_QUOTED.finditer(message)) if _MARK.search(message) else []
    articles = list(_NAMED.finditer(message)) if "article" in message else []
    if not quotations and not articles:
        return None
    everything = " ".join(filter(None, map(_spaced, sources)))
    for match in quotations:
        title = _plain(match[match.lastindex or 0])
        if title and not _stands_in(title, everything):
            return f"the quotation '{title}'"
    for match in articles:
        title = _plain(match[1])
        if not _stands_in(title, everything) and not any(title.startswith(f"{name} ") for source in sources for name in _titles(source)):
            return f"the article '{title}'"
    return None


def _is_stated(fact: Fact, sources: list[str]) -> bool:
    """Whether a source covers it; those that have its digits are read first, since the others will hardly be needed."""
    others = []
    for source in sources:
        if any(map(source.__contains__, fact.digits)):
            if _stated(source).covers(fact):
                return True
        else:
            others.append(source)
    return any(_stated(source).covers(fact) for source in others)


def _is_figure_of_speech(fact: Fact) -> bool:
    return fact.written_out and (fact.kind == "ordinal" or (fact.kind == "" and Decimal(min(fact.digits)) <= LARGEST_FIGURE_OF_SPEECH))


@lru_cache(maxsize=1024)
def _stated(source: str) -> Stated:
    """The facts of a source. "A month" is 1 month there, and "the 21st" is a day of every month that the same source names."""
    if not source.isascii():
        source = source.translate(_LETTERS)
    lower = source.lower()
    if any(map(lower.__contains__, _WORDS)):
        source = _WORD.sub(lambda word: _WORDS[word[0].lower()], source)
    found = list(_facts(source, articles=True))
    if any(fact.kind == "ordinal" for fact in found):
        months = {_month(match[0]) for match in _MONTH_NAME.finditer(source)}
        found += [Fact(*_date(number, month), fact.text) for fact in found if fact.kind == "ordinal" for number in fact.digits for month in months]
    return Stated(found)


def _facts(text: str, articles: bool = False) -> Iterator[Fact]:
    """Every number in `text`, written in digits or out; with `articles` also the 1 of "a month" and "per month"."""
    if not text.isascii():
        text = text.translate(_LETTERS)
    in_digits = _digits(text)
    if "second" in text:
        text = _SECOND.sub(" seconds", text)  # which would be taken for the 2nd
    text = alpha2digit(text, "en", -1)
    if "half" in text.lower():
        for pattern, number in _FRACTIONS:
            text = pattern.sub(number, text)
    if articles:
        text = _ONE.sub("1 ", text)
    for match in _found(text):
        place = " ".join(match[0].split())
        for kind, readings, digits in _read(match, in_digits):
            yield Fact(kind, readings, digits, place, written_out=not digits <= in_digits)


def _found(text: str) -> Iterator[re.Match[str]]:
    """What `_FACT.finditer` finds, in a third of the time: it looks only where a fact can begin, at digits, signs and names."""
    lower, end = text.lower(), 0
    for start in (_BEGINNING if any(map(lower.__contains__, _NAMES)) else _DIGIT_OR_SIGN).finditer(text):
        if start.start() >= end and (match := _FACT.match(text, start.start())):
            yield match
            end = match.end()


def _read(match: re.Match[str], in_digits: frozenset[str]) -> Iterator[tuple[str, frozenset[str], frozenset[str]]]:
    """Kind, readings and digits of what a match of `_FACT` states; several where it lists several."""
    kind = match.lastgroup
    if kind == "iso":
        month, day = match[0].split("-")
        yield _date(day, int(month))
    elif kind == "slashed":
        first, second = re.findall(r"\d+", match[0])
        days = [(day, int(month)) for day, month in ((first, second), (second, first)) if int(day) <= 31 and 1 <= int(month) <= 12]
        readings = frozenset[str]().union(*(_date(*day)[1] for day in days)) if match[0] != "24/7" else None
        yield ("date", readings, _digits(match[0])) if readings else ("", _digits(match[0]), _digits(match[0]))
    elif kind == "months":
        for month in _MONTH_NAME.findall(match["months"]):
            for day in re.findall(r"\d+", match["days"]):
                yield _date(day, _month(month))
    elif kind == "day":
        if not match["day"].isdigit() or _digits(match["day"]) <= in_digits:  # else it is "the January one"
            yield _date(re.sub(r"\D", "", match["day"]), _month(match["month"]))
    elif kind == "clock":
        yield "time of day", _clock(match[0]), _digits(match[0])
    elif kind in ("ordinal", "bare"):
        digits = _digits(match[0])
        yield "ordinal" if kind == "ordinal" else "", digits, digits
    else:
        measured, factor = _UNITS[" ".join((match["unit"] or match["symbol"]).lower().replace("-", " ").split())]
        for number in sorted(_digits(match[0])):
            if number.count(".") < 2:
                yield measured, frozenset({_normal(f"{Decimal(number) * factor:f}")}), frozenset({number})


def _date(day: str, month: int) -> tuple[str, frozenset[str], frozenset[str]]:
    return "date", frozenset({f"{int(day)}.{month}"}), _digits(day)


def _clock(text: str) -> frozenset[str]:
    hour, *minute = re.findall(r"\d+", text)
    half = re.search(r"[ap](?=\.?m)", text.lower())
    if half:
        hours = {int(hour) % 12 + 12 * (half[0] == "p")}
    else:
        hours = {int(hour)} if hour[0] == "0" or int(hour) > 12 else {int(hour) % 12, int(hour) % 12 + 12}
    return frozenset(f"{h}:{minute[0] if minute else '00'}" for h in hours)


def _month(name: str) -> int:
    return 1 + _MONTHS.index(name[:3].lower())


def _plain(text: str) -> str:
    return _spaced(text).strip(" .,!?")


@lru_cache(maxsize=1024)
def _spaced(text: str) -> str:
    return " ".join(text.lower().replace("’", "'").split())


@lru_cache(maxsize=1024)
def _titles(source: str) -> list[str]:
    """What stands before a colon in its lines, as the passages of a search begin."""
    return [title for line in source.splitlines() if ": " in line and (title := _plain(line.partition(": ")[0]))]


def _stands_in(title: str, text: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(title)}(?!\w)", text) is not None


def _digits(text: str) -> frozenset[str]:
    return frozenset(map(_normal, _NUMBERS.findall(text)))


def _normal(number: str) -> str:
    """A number as Decimal reads it, without needless zeros: `1,200.00` and `1.200,00` are 1200, `12,50` is 12.5."""
    if number.isdigit():
        return number.lstrip("0") or "0"
    if _GROUPED.fullmatch(number):
        number = number.replace(".", "").replace(",", ".") if number.rfind(",") > number.rfind(".") > 0 else number.replace(",", "")
    elif _DECIMAL_COMMA.fullmatch(number):
        number = number.replace(",", ".")
    whole, _, decimals = number.partition(".")
    decimals = decimals.rstrip("0")
    return (whole.lstrip("0") or "0") + (f".{decimals}" if decimals else "")
