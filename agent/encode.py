"""Conversations as token ids, for any tokenizer with a chat template; text never becomes control.

Tokenizers read special tokens inside content by default, so a customer who writes `<|im_end|>` could end their own
turn. Here the template is rendered once with stand-ins for the contents; what lies between the stand-ins is encoded
with special tokens, the contents without.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from schemas.traces import Message, Role

_ROLE_NAMES = {Role.CUSTOMER: "user", Role.AGENT: "assistant", Role.TOOL: "tool"}
_STAND_IN = re.compile("\x02(\\d+)\x03")


@dataclass(frozen=True, slots=True)
class Encoded:
    """One conversation as tokens.

    `ids`: the tokens. `prefix`: how many of them stand before the first message; all conversations with the same system
    prompt share them. `spans`: for every agent message, in order, `(start, end)`: its text and the token that ends the
    turn are `ids[start:end]`, and `ids[:start]` is exactly what the agent is prompted with.
    """

    ids: list[int]
    prefix: int
    spans: list[tuple[int, int]]

    def labels(self, ignore: int = -100) -> list[int]:
        """The agent's own tokens; `ignore` everywhere else."""
        labels = [ignore] * len(self.ids)
        for start, end in self.spans:
            labels[start:end] = self.ids[start:end]
        return labels

    @property
    def supervised(self) -> int:
        """How many tokens are the agent's own."""
        return sum(end - start for start, end in self.spans)

    def prompts(self) -> Encoded:
        """Without what stands behind the last agent turn's prompt."""
        return replace(self, ids=self.ids[:self.spans[-1][0]])

    def prompt_ends(self) -> list[int]:
        """Where every agent turn's prompt ends: its last token, counted from behind the prefix."""
        return [start - self.prefix - 1 for start, _ in self.spans]


class Encoder:
    """Encodes conversations with one tokenizer (any `transformers` fast tokenizer with a chat template)."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._control = cache(self._encode_control)

    def conversation(self, system: str, messages: Iterable[Message]) -> Encoded:
        """Encode a whole conversation.

        Raises:
            ValueError: the template does not render each message in its place, or does not end an agent's turn with a special token.
        """
        contents = [("system", system), *((_ROLE_NAMES[message.role], message.content) for message in messages)]
        rendered = self.tokenizer.apply_chat_template(
            [{"role": role, "content": f"\x02{number}\x03"} for number, (role, _) in enumerate(contents)], tokenize=False)
        pieces = _STAND_IN.split(rendered)
        if pieces[1::2] != [str(number) for number in range(len(contents))]:
            raise ValueError("the chat template does not render every message once and in order")
        ids, prefix, spans = list(self._control(pieces[0])), 0, []
        for (role, content), control in zip(contents, pieces[2::2], strict=True):
            start = len(ids)
            ids += self.text(content)
            after = self._control(control)
            if role == "assistant":
                if not after or after[0] not in self.tokenizer.all_special_ids:
                    raise ValueError("the chat template does not end an agent's turn with a special token")
                spans.append((start, len(ids) + 1))
            ids += after
            prefix = prefix or len(ids)
        return Encoded(ids, prefix, spans)

    def text(self, text: str) -> list[int]:
        """Tokens of a text in which nothing is special."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    def _encode_control(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)
