"""Write the comment for a pull request: what a revision does to the results, as Markdown on standard output.

    python -m stages.pr_comment BASE [REV] [--names BRANCH COMMIT]     REV is HEAD unless told; what is not committed is not shown

Gate and paired comparison come from `stages.gate` and `stages.compare`, the rest from `dvc … diff`. What one of them refuses stands in the
comment in its place.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from schemas.errors import InputError
from stages._stage import run
from stages.gate import INPUTS

EXACT = Path("metrics/eval_exact.json")
JUDGE = Path("metrics/eval_judge.json")
MARKER = "<!-- handoff: results of this pull request -->"
"""By this first line the workflow finds the comment that it updates."""
LIMIT = 65_536
"""GitHub's limit in characters; held in bytes of UTF-8, which are never fewer."""
LONG = 40
"""A table with more rows is folded."""
POINTS = 60
"""A plotted line has at most this many points."""


# Text from data and parameters is shown as code, in which GitHub sees no link, mention, image or HTML.

def code(value: Any) -> str:
    """One cell: the value on one line, at most 120 characters of it, literally."""
    text = " ".join(str(value).split())
    text = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
    text = text if len(text) <= 120 else text[:119] + "…"
    if text and not set("`|\\") & set(text):
        return f"`{text}`"
    return "<code>" + "".join(char if char.isalnum() or char == " " else f"&#{ord(char)};" for char in text) + "</code>"


def fenced(text: str) -> str:
    """A block that the text cannot close."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def defused(markdown: str) -> str:
    """Markdown that keeps its tables, headings and emphasis, and loses HTML, fences, links, images, bare addresses and mentions."""
    markdown = markdown.replace("<", "&lt;").replace("[", "\\[")
    markdown = re.sub(r"^(\s*)(?=```|~~~)", r"\1\\", markdown, flags=re.MULTILINE)
    return re.sub(r"[@#](?=\w)|:(?=//)|www(?=\.)", lambda found: f"{found[0]}\u200b", markdown)


@dataclass(frozen=True)
class Block:
    """A piece of the comment that is shortened line by line, at its end."""

    lines: list[str]
    before: str = ""
    after: str = ""

    def __str__(self) -> str:
        return "\n".join([*filter(None, [self.before]), *self.lines, *filter(None, [self.after])]) + "\n\n"


def size(text: str) -> int:
    return len(text.encode())


def fitted(head: str, blocks: Iterable[Block], foot: str, limit: int = LIMIT) -> str:
    """The comment: head, as much of the blocks as the limit leaves room for, foot; what was cut is said at the top."""
    note = f"**Cut to the {limit:,} characters of a comment.** `make pr-comment` prints everything.\n\n"
    room, body, cut = limit - size(head + note + foot), "", False
    for block in blocks:
        lines = list(block.lines)
        while lines and size(body + str(Block(lines, block.before, block.after))) > room:
            lines = lines[:-max(1, len(lines) // 20)]
        body += str(Block(lines, block.before, block.after)) if lines else ""
        cut |= len(lines) < len(block.lines)
    return head + (note if cut else "") + body + foot


def table(header: list[str], rows: list[list[str]], title: str = "", fold: bool = False) -> Block:
    """A table whose first column is text and whose others are numbers, folded if asked to or if long."""
    top = "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] + ["--:"] * (len(header) - 1)))
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    if fold or len(rows) > LONG:
        return Block(lines, f"<details><summary>{title}: {len(rows)}</summary>\n\n{top}", "\n</details>")
    return Block(lines, top)


def revision(name: str) -> str:
    """The short hash of a commit.

    Raises:
        InputError: there is no such commit here.
    """
    done = subprocess.run(["git", "rev-parse", "--verify", "--quiet", "--short", "--end-of-options", f"{name}^{{commit}}"],
                          capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"there is no commit '{name}' in this clone", "git fetch brings the remote's branches; git branch -a lists them")
    return done.stdout.strip()


def uncommitted() -> list[str]:
    """What the gate judges by and HEAD has otherwise."""
    found = subprocess.run(["git", "diff", "--name-only", "-z", "HEAD", "--", *INPUTS], capture_output=True, text=True, check=True)
    return found.stdout.rstrip("\0").split("\0") if found.stdout else []


def judged(module: str, *arguments: str) -> tuple[int, Block]:
    """Exit code and table of `stages.gate` or `stages.compare`; what they say on standard error if there is no table."""
    done = subprocess.run([sys.executable, "-m", module, *arguments, "--format", "markdown"], capture_output=True, text=True, check=False)
    if done.stdout.strip():
        return done.returncode, Block(defused(done.stdout.strip()).split("\n"))
    said = "\n".join(done.stderr.strip().splitlines()[-10:]) or f"exit code {done.returncode}, and not a word"
    return done.returncode, Block([fenced(said)], f"`python -m {module}` has no result:\n")


def differences(what: str, base: str, rev: str) -> tuple[dict[str, Any], list[Block]]:
    """What `dvc WHAT diff` finds, and a block with its complaint if it has one.

    DVC prints an empty object if nothing changed, leaves out of the comparison what one revision lacks, and fails on neither.
    """
    done = subprocess.run([sys.executable, "-m", "dvc", what, "diff", "--json", base, rev], capture_output=True, text=True, check=False)
    complaint = [Block([fenced(done.stderr.strip())])] if done.stderr.strip() else []
    try:
        return json.loads(done.stdout), complaint
    except json.JSONDecodeError:
        return {}, complaint or [Block([f"`dvc {what} diff` says nothing; exit code {done.returncode}."])]


def changed(diff: dict[str, Any], names: Iterable[str], files: Iterable[str], fold: str = "") -> Iterator[Block]:
    """A table of the values in these files that changed, with what the two revisions are called; none if none did."""
    rows = [[code(f"{Path(name).stem}: {key}"), _value(of.get("old")), _value(of.get("new")), f"{round(of['diff'], 4):+}" if "diff" in of else ""]
            for name in files for key, of in sorted(diff[name].items())]
    if rows:
        yield table(["file: value", *map(code, names), "change"], rows, fold or "Changed", bool(fold))


def _value(value: Any) -> str:
    if value is None:
        return "–"
    return str(round(value, 4)) if isinstance(value, int | float) and not isinstance(value, bool) else code(value)


def drawn(plots: dict[str, Any], names: dict[str, str]) -> Iterator[Block]:
    """Mermaid charts, which GitHub draws as images in a comment, of every plot of lines over numbers: one for each of its series.

    Args:
        plots: what `dvc plots diff --json` prints.
        names: revision -> what it is called in the titles.
    """
    for name, plot in ((name, plot) for name, found in sorted(plots.get("data", {}).items()) for plot in found):
        try:
            title, x, y, series = _series(name, plot)
        except (KeyError, ValueError, TypeError):
            yield Block([f"{code(name)} is no line over numbers; `dvc plots diff` draws it."])
            continue
        for source, lines in series.items():
            yield from _charts(f"{title}: {source}" if source else title, x, y, {names.get(rev, rev): points for rev, points in lines.items()})


def _series(name: str, plot: dict[str, Any]) -> tuple[str, str, str, dict[str, dict[str, np.ndarray]]]:
    """Title, titles of the axes, and source -> revision -> an array (2, points) in the order of x.

    A source is what the revisions share of a row's origin. DVC names in every row what varies in the plot: its file, its field, or both;
    where none does, the only source is the empty text. Where the plot is of marks, several may stand at one x, such as students of several
    seeds: their line is that of the means.

    Raises:
        KeyError, ValueError, TypeError: the plot is none of lines or marks over numbers.
    """
    spec = plot["content"]
    mean = spec.get("mark") and dict(spec["mark"]).get("type") == "point"
    x, y = _axis(spec, "x"), _axis(spec, "y")
    rows: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in spec["data"]["values"]:
        source = next((row[key] for key in ("filename::field", "filename", "field") if key in row), "")
        rows.setdefault(source, {}).setdefault(row["rev"], []).append((float(row[x["field"]]), float(row[y["field"]])))
    series = {source: {rev: (_means if mean else np.transpose)(sorted(of[rev])) for rev in plot["revisions"] if rev in of}
              for source, of in rows.items()}
    if not all(points.size >= 4 and np.isfinite(points).all() for lines in series.values() for points in lines.values()):
        raise ValueError(name)
    height = y.get("title") or y["field"]
    return spec.get("title", {}).get("text") or name, x.get("title") or x["field"], f"{height}, mean" if mean else height, series


def _means(points: list[tuple[float, float]]) -> np.ndarray:
    """An array (2, distinct x): the mean y at every x."""
    xs, ys = np.transpose(points)
    distinct, place = np.unique(xs, return_inverse=True)
    return np.stack([distinct, np.bincount(place, ys) / np.bincount(place)])


def _axis(spec: Any, axis: str) -> dict[str, Any]:
    """A Vega-Lite specification's encoding of an axis: its `field`, the column that is drawn, and its `title`."""
    for key, value in spec.items() if isinstance(spec, dict) else enumerate(spec):
        if key == axis and isinstance(value, dict) and isinstance(value.get("field"), str):
            return value
        if isinstance(value, dict | list):
            try:
                return _axis(value, axis)
            except KeyError:
                continue
    raise KeyError(axis)


def _charts(title: str, x: str, y: str, lines: dict[str, np.ndarray]) -> Iterator[Block]:
    """One series: a sentence if it is the same in both revisions, one chart if they cover the same x, else a chart each."""
    if len(lines) == 2 and len({points.tobytes() for points in lines.values()}) == 1:
        yield Block([f"{code(title)} is the same in both."])
    elif len({(points[0].min(), points[0].max()) for points in lines.values()}) == 1:
        colours = zip(("grey ", "blue ") if len(lines) == 2 else ("",), lines, strict=True)
        yield _chart(f"{code(title)}: {', '.join(f'{colour}{code(rev)}' for colour, rev in colours)}", x, y, lines)
    else:  # a Mermaid chart stretches every line to the ends of its one x axis
        heights = np.concatenate([points[1] for points in lines.values()])
        for rev, points in lines.items():
            yield _chart(f"{code(title)}: {code(rev)}", x, y, {rev: points}, heights)


def _plain(text: str) -> str:
    return re.sub(r"[^\w .,:%()+/~^-]", " ", text)[:80]


def _decimal(value: float, digits: int = 4) -> str:
    """A number to so many significant digits and without an exponent, which Mermaid does not read."""
    return np.format_float_positional(value, digits, fractional=False, trim="-")


def _chart(title: str, x: str, y: str, lines: dict[str, np.ndarray], heights: np.ndarray | None = None) -> Block:
    """One chart under its title, which Mermaid would cut; its y axis covers `heights`, so that two charts may have the same.

    Mermaid spreads the points of a line evenly over the x axis, so each line is drawn through values at even steps.
    """
    heights = np.concatenate([points[1] for points in lines.values()]) if heights is None else heights
    (xs, _), *_ = lines.values()
    return Block(["\n".join([
        f"{title}\n\n```mermaid", """%%{init: {"themeVariables": {"xyChart": {"plotColorPalette": "#8b949e, #0969da"}}}}%%""", "xychart-beta",
        f'    x-axis "{_plain(x)}" {_decimal(xs.min(), 6)} --> {_decimal(xs.max(), 6)}',
        f'    y-axis "{_plain(y)}" {_decimal(heights.min())} --> {_decimal(heights.max())}',
        *(f"    line [{', '.join(map(_decimal, _even(points)))}]" for points in lines.values()), "```"])])


def _even(points: np.ndarray) -> np.ndarray:
    """The y of a line at even steps of x: its own points if they are even and at most `POINTS`, else `POINTS` on the straight lines between them."""
    steps = np.diff(points[0])
    if len(points[0]) <= POINTS and np.allclose(steps, steps[0], rtol=1e-6, atol=0):
        return points[1]
    return np.interp(np.linspace(points[0][0], points[0][-1], POINTS), *points)


def sections(base: str, rev: str, names: tuple[str, str]) -> Iterator[Block]:
    """The comment's parts, what decides first and what is long last; `names` is what the revisions are called in them."""
    if revision(rev) != revision("HEAD"):
        yield Block([f"### Gate: not asked\n\nIt judges what is checked out, and that is not {code(rev)}."])
    elif changed_here := uncommitted():
        yield Block([f"### Gate: not asked\n\nIt judges what is checked out, and there {', '.join(map(code, changed_here))} "
                     f"{'is' if len(changed_here) == 1 else 'are'} not as committed."])
    else:
        state, gate = judged("stages.gate", "--base", base)
        yield Block([f"### Gate: {'passed' if state == 0 else 'not passed'}"])
        yield gate
    yield Block(["### Paired comparison"])
    yield judged("stages.compare", base, rev)[1]

    metrics, complaint = differences("metrics", base, rev)
    rates = [path.as_posix() for path in (EXACT, JUDGE) if path.as_posix() in metrics]
    yield Block(["### Rates on the held-out companies"])
    yield from complaint
    yield from changed(metrics, names, rates) if rates else [Block(["No rate changed."])]

    params, complaint = differences("params", base, rev)
    yield Block(["### Parameters"])
    yield from complaint
    yield from changed(params, names, sorted(params)) if params else [Block(["No parameter changed."])]

    plots, complaint = differences("plots", base, rev)
    yield Block(["### Plots"])
    yield from complaint
    yield from drawn(plots, dict(zip((base, rev), names, strict=True)))
    yield from changed(metrics, names, sorted(set(metrics) - set(rates)), fold="Other metrics that changed")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the comment for a pull request.")
    parser.add_argument("base", metavar="BASE")
    parser.add_argument("rev", metavar="REV", nargs="?", default="HEAD")
    parser.add_argument("--names", metavar=("BRANCH", "COMMIT"), nargs=2,
                        help="what to call them, where REV is a merge that no clone has: the branch, and the commit that was merged into it")
    options = parser.parse_args()
    base, rev = revision(options.base), revision(options.rev)
    names = tuple(options.names or (options.base, options.rev))
    merge = f"{code(names[1])} merged into it" if options.names else f"{code(names[1])} ({rev})"
    head = f"{MARKER}\n## Results: {code(names[0])} ({base}) → {merge}\n\n"
    foot = f"<sub>Written by `make pr-comment BASE={base}`"
    if run_id := os.environ.get("GITHUB_RUN_ID"):
        foot += f" in [this run]({os.environ['GITHUB_SERVER_URL']}/{os.environ['GITHUB_REPOSITORY']}/actions/runs/{run_id}), which keeps DVC's plots"
    print(fitted(head, sections(options.base, options.rev, names), f"{foot}.</sub>"))


if __name__ == "__main__":
    run(main)
