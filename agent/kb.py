"""The help centre: BM25 over the paragraphs of one company's articles."""

from __future__ import annotations

from typing import TYPE_CHECKING

from schemas.company import Article

if TYPE_CHECKING:
    import bm25s

PASSAGES = 2
PASSAGE_WORDS = 70
NOTHING_FOUND = "no article matches"


class KnowledgeBase:
    """Search one company's articles.

    Okapi BM25 in bm25s's default (Lucene) variant. A passage is one paragraph with its article's title; long ones are
    cut at `PASSAGE_WORDS` words, since every token of a tool result is read again at each later step.
    """

    def __init__(self, articles: list[Article]) -> None:
        self.passages = [(article.title, paragraph) for article in articles for paragraph in article.paragraphs]
        self._index: bm25s.BM25 | None = None

    def search(self, query: str) -> str:
        """The best passages as text, best first, one a line; `NOTHING_FOUND` if no word matches."""
        scores = self._scores(query)
        # Rounded, then by position: equal scores must rank alike on every machine.
        best = sorted(range(len(scores)), key=lambda i: (-round(scores[i], 4), i))[:PASSAGES]
        return "\n".join(_passage(*self.passages[i]) for i in best if scores[i] > 0) or NOTHING_FOUND

    def _scores(self, query: str) -> list[float]:
        import bm25s

        if self._index is None:
            self._index = bm25s.BM25()
            corpus = bm25s.tokenize([f"{title} {text}" for title, text in self.passages], stopwords="en", show_progress=False)
            self._index.index(corpus, show_progress=False)
        tokens = bm25s.tokenize([query], stopwords="en", return_ids=False, show_progress=False)[0]
        known = [token for token in tokens if token in self._index.vocab_dict]
        return [float(score) for score in self._index.get_scores(known)] if known else [0.0] * len(self.passages)


def _passage(title: str, text: str) -> str:
    words = text.split()
    cut = " ".join(words[:PASSAGE_WORDS]) + (" …" if len(words) > PASSAGE_WORDS else "")
    return f"{title}: {cut}"
