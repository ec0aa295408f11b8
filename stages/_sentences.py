"""When two texts say the same: whatever their capitals, marks and spaces."""

from __future__ import annotations

import re
import string

WORDS = 5
"""A sentence of at least this many words is somebody's; shorter ones are anybody's."""
_END = re.compile(r"[.!?…][\"”’)]*\s+|\n+")
"""With marks that `plain` takes away."""
_MARKS = str.maketrans("", "", string.punctuation + "…–—‘’“”")


def plain(text: str) -> str:
    """The words of a text in small letters, one space between them, no marks: `it's` is `its`."""
    return " ".join(text.lower().translate(_MARKS).split())


def sentences(text: str) -> list[str]:
    """The sentences of a text and the text itself, as `plain` has them, as far as they are long enough to be somebody's; each once."""
    # As `plain`, of all sentences at once: no line break is left in any.
    found = [" ".join(words) for line in "\n".join(_END.split(text)).lower().translate(_MARKS).split("\n") if (words := line.split())]
    return [sentence for sentence in dict.fromkeys([*found, " ".join(found)]) if sentence.count(" ") >= WORDS - 1]
