"""List, size or prune the paid responses.

    python -m stages.cache list                         one line an endpoint and model
    python -m stages.cache size                         bytes on disk
    python -m stages.cache prune --older-than 30d       delete what is older (h, d or w)
    python -m stages.cache prune --model NAME           delete what a model answered; both together: what both pick
"""

from __future__ import annotations

import argparse
import re
import time
from collections import defaultdict
from datetime import UTC, datetime

from agent.responses import RESPONSES, Completion, Responses
from agent.spend import MILLION, dollars
from schemas.errors import InputError
from stages._stage import run, say


def age_s(text: str) -> float:
    """Seconds in an age such as `30d`, `12h` or `2w`.

    Raises:
        InputError: it is no such age.
    """
    match = re.fullmatch(r"(\d+)([hdw])", text)
    if not match:
        raise InputError(f"'{text}' is no age", "write a number and h, d or w, such as 30d")
    return int(match[1]) * {"h": 3600, "d": 86_400, "w": 604_800}[match[2]]


def paid(completions: list[Completion]) -> str:
    """Responses, tokens and dollars in words."""
    tokens = sum(completion.prompt_tokens + completion.completion_tokens for completion in completions)
    priced = [completion.cost_usd for completion in completions if completion.cost_usd is not None]
    unpriced = f", {len(completions) - len(priced)} without a price" if len(priced) < len(completions) else ""
    return f"{len(completions)} responses, {tokens / MILLION:.2f} M tokens, {dollars(sum(priced))}{unpriced}"


def listing(responses: Responses) -> list[str]:
    """One line an endpoint and model, with the days of the first and the last response."""
    groups: dict[tuple[str, str], list[Completion]] = defaultdict(list)
    for _, completion in responses.entries():
        groups[completion.base_url, completion.model].append(completion)
    return [f"{url} {model}: {paid(group)}, {_day(min(c.stored for c in group))} to {_day(max(c.stored for c in group))}"
            for (url, model), group in sorted(groups.items())]


def _day(stored: float) -> str:
    return datetime.fromtimestamp(stored, UTC).date().isoformat()


def main() -> None:
    parser = argparse.ArgumentParser(description="List, size or prune the paid responses.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list")
    commands.add_parser("size")
    prune = commands.add_parser("prune")
    prune.add_argument("--older-than", metavar="AGE")
    prune.add_argument("--model")
    options = parser.parse_args()
    responses = Responses(RESPONSES)
    if options.command == "list":
        say("\n".join(listing(responses)) or f"{RESPONSES} holds no response")
    elif options.command == "size":
        say(f"{responses.size() / MILLION:.1f} MB in {RESPONSES}")
    else:
        if options.older_than is None and options.model is None:
            raise InputError("prune deletes what was paid for, so it wants to know what", "give --older-than 30d, --model NAME, or both")
        before = time.time() - age_s(options.older_than) if options.older_than else float("inf")
        gone = responses.prune(lambda completion: completion.stored < before and options.model in (None, completion.model))
        say(f"deleted {paid(gone)}")


if __name__ == "__main__":
    run(main)
