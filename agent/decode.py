"""Greedy decoding of every agent turn of many conversations, each conversation read and stored once.

The conversation's keys and values up to a turn are exactly what the agent is prompted with there. So all turns of a
conversation are decoded side by side, as branches of one tree: a step feeds the model one token of every branch that
still runs, and the attention mask lets a branch see the conversation up to its turn and its own tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from agent.encode import Encoded
from agent.student import read_rows, stack_rows
from schemas.action import ActionName


@dataclass(frozen=True, slots=True)
class Turn:
    """One agent turn to decode: which conversation of the group, and how many of its tokens come before the turn."""

    row: int
    start: int


@dataclass(frozen=True, slots=True)
class Reading:
    """Conversations that have been read.

    `turns`: their agent turns. `states`: the last hidden state of every turn's prompt, shape (N, H). `cache`: keys and values.
    """

    turns: list[Turn]
    states: torch.Tensor
    cache: Any


@dataclass(frozen=True, slots=True)
class Reply:
    """What was decoded for one turn: the text, and the most likely action but `escalate`, None where no action was begun.

    `other` compares the logits of the first token of each name, at the place where the action was written. Names that begin
    with the same token are told apart by their order in `ActionName`.
    """

    text: str
    other: str | None


ACTION_OPENING = '"action": "'


def read_turns(model: Any, group: Sequence[Encoded]) -> Reading:
    """Read a group of conversations that share their prefix, each token once for all turns."""
    prefix = group[0].prefix
    rows, mask = stack_rows([torch.tensor(encoded.ids[prefix:]) for encoded in group])
    with torch.inference_mode():
        hidden, cache = read_rows(model, torch.tensor([group[0].ids[:prefix]]), rows, mask)
    wanted = turns(group)
    return Reading(wanted, torch.stack([hidden[turn.row, turn.start - prefix - 1] for turn in wanted]), cache)


class _Slab(DynamicLayer):
    """Keys and values of one layer in a buffer of fixed size: appending copies nothing.

    Args:
        keys, values: what has been read, shape (B, H, S, D).
        room: how many more positions there may be.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, room: int) -> None:
        super().__init__()
        shape = (*keys.shape[:2], keys.shape[2] + room, keys.shape[3])
        self._keys, self._values, self._length = keys.new_empty(shape), values.new_empty(shape), keys.shape[2]
        self._keys[:, :, :self._length], self._values[:, :, :self._length] = keys, values
        self.is_initialized = True
        self.dtype, self.device = keys.dtype, keys.device

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Append, and return everything so far."""
        end = self._length + key_states.shape[-2]
        self._keys[:, :, self._length:end], self._values[:, :, self._length:end] = key_states, value_states
        self._length = end
        return self._keys[:, :, :end], self._values[:, :, :end]

    def get_seq_length(self) -> int:
        """How many positions are filled."""
        return self._length


class Choice:
    """Picks the next token of every running turn. This one is plain greedy; `ends` says when a text needs no more."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def next_tokens(self, turns: Sequence[int], logits: torch.Tensor) -> list[int]:
        """Token ids for the running turns; `turns` are their numbers in the group, `logits` has shape (len(turns), V)."""
        return logits.argmax(dim=-1).tolist()

    def hopeless(self, tokens: list[int]) -> bool:
        """Whether no continuation can make the text a valid step: it is prose. Stopping there changes no verdict."""
        if len(tokens) % 8:
            return False
        text = self._tokenizer.decode(tokens).lstrip()
        return bool(text) and not any(text.startswith(opening[:len(text)]) for opening in ("{", "```", "<think>"))


class SchemaChoice(Choice):
    """Greedy among the tokens that a JSON schema allows (llguidance).

    Args:
        tokenizer: the student's.
        engine: llguidance's view of that tokenizer.
        schema: what every text must fit.
        count: how many turns the group has.
    """

    def __init__(self, tokenizer: Any, engine: Any, schema: dict[str, Any], count: int) -> None:
        from llguidance import LLMatcher

        super().__init__(tokenizer)
        compact: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        grammar = LLMatcher.grammar_from_json_schema(schema, defaults=compact)
        self._matchers = [LLMatcher(engine, grammar) for _ in range(count)]

    def next_tokens(self, turns: Sequence[int], logits: torch.Tensor) -> list[int]:
        """The most likely allowed tokens."""
        chosen = []
        for turn, row in zip(turns, logits, strict=True):
            allowed = torch.frombuffer(bytearray(self._matchers[turn].compute_logit_bias()), dtype=torch.uint8)[: row.shape[0]] > 0
            token = int(row.masked_fill(~allowed, float("-inf")).argmax())
            self._matchers[turn].consume_token(token)
            chosen.append(token)
        return chosen

    def hopeless(self, tokens: list[int]) -> bool:
        """Never: every token was allowed."""
        return False


def groups(conversations: Sequence[tuple[str, str, Encoded]], size: int) -> Iterator[list[tuple[str, str, Encoded]]]:
    """Cut conversations into groups of one company, with like numbers of turns and like lengths."""
    ordered = sorted(conversations, key=lambda item: (item[0], len(item[2].spans), len(item[2].ids)))
    start = 0
    while start < len(ordered):
        end = start + 1
        while end < len(ordered) and end - start < size and ordered[end][0] == ordered[start][0]:
            end += 1
        yield ordered[start:end]
        start = end


class TurnDecoder:
    """Decodes with one model.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer: its tokenizer.
        max_new_tokens: where a turn is cut off.
    """

    def __init__(self, model: Any, tokenizer: Any, max_new_tokens: int) -> None:
        self.model, self.tokenizer, self.max_new_tokens = model, tokenizer, max_new_tokens
        self._ends = frozenset(tokenizer.all_special_ids)
        # The first token of every name but `escalate`: what its encoding has beyond the opening alone.
        opening = tokenizer(ACTION_OPENING, add_special_tokens=False).input_ids
        self._others = {name.value: tokenizer(ACTION_OPENING + name, add_special_tokens=False).input_ids[len(opening)]
                        for name in ActionName if name is not ActionName.ESCALATE}

    @torch.inference_mode()
    def decode(self, read: Reading, choice: Choice) -> list[Reply]:
        """Decode all agent turns side by side from what has been read; what has been read can be decoded from again.

        Args:
            read: the conversations.
            choice: how to pick tokens.

        Returns:
            a reply for every turn, in the order of `read.turns`, without the token that ends it.
        """
        wanted, logits = read.turns, self.model.get_output_embeddings()(read.states).float()
        others: list[str | None] = [None] * len(wanted)
        count, rows = 1 + max(turn.row for turn in wanted), [turn.row for turn in wanted]
        widest = max(rows.count(row) for row in range(count))
        cache = Cache(layers=[_Slab(layer.keys, layer.values, widest * self.max_new_tokens) for layer in read.cache.layers])
        positions = torch.arange(read.cache.get_seq_length())
        # Which turn each appended position belongs to, column by column; -1 is padding.
        owner = torch.empty(count, 0, dtype=torch.long)
        texts: list[list[int]] = [[] for _ in wanted]
        running = list(range(len(wanted)))
        for step in range(self.max_new_tokens):
            for turn, row in zip(running, logits, strict=True):
                if others[turn] is None and self._opens_action(texts[turn]):
                    others[turn] = max(self._others, key=lambda name: float(row[self._others[name]]))
            tokens = choice.next_tokens(running, logits)
            for turn, token in zip(running, tokens, strict=True):
                if token not in self._ends:
                    texts[turn].append(token)
            going = [(turn, token) for turn, token in zip(running, tokens, strict=True)
                     if token not in self._ends and not choice.hopeless(texts[turn])]
            if not going or step + 1 == self.max_new_tokens:
                break
            running = [turn for turn, _ in going]
            slots, places = _pack(running, rows, count)
            owner = torch.cat([owner, slots], dim=1)
            ids, position_ids, starts = torch.zeros_like(slots), torch.zeros_like(slots), torch.zeros_like(slots)
            for (turn, token), place in zip(going, places, strict=True):
                ids[place], position_ids[place], starts[place] = token, wanted[turn].start + step, wanted[turn].start
            # A padding slot sees the first token, since attention to nothing is not a number.
            before = positions < starts.clamp(min=1)[..., None]
            own = (owner[:, None, :] == slots[..., None]) & (slots[..., None] >= 0)
            out = self.model(input_ids=ids, attention_mask=torch.cat([before, own], dim=2)[:, None], position_ids=position_ids,
                             cache=cache, use_cache=True)
            logits = torch.stack([out.logits[place] for place in places]).float()
        return [Reply(self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False), other) for tokens, other in zip(texts, others, strict=True)]

    def _opens_action(self, tokens: list[int]) -> bool:
        """Whether the action's name comes next."""
        return self.tokenizer.decode(tokens[-len(ACTION_OPENING):]).endswith(ACTION_OPENING)


def _pack(running: list[int], rows: list[int], count: int) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """Give every running turn a slot in its conversation's row: the turn in each slot, (count, W), and each turn's place."""
    taken = [0] * count
    places = []
    for turn in running:
        places.append((rows[turn], taken[rows[turn]]))
        taken[rows[turn]] += 1
    slots = torch.full((count, max(taken)), -1)
    for turn, place in zip(running, places, strict=True):
        slots[place] = turn
    return slots, places


def turns(group: Sequence[Encoded]) -> list[Turn]:
    """All agent turns of a group, conversation by conversation."""
    return [Turn(row, start) for row, encoded in enumerate(group) for start, _ in encoded.spans]
