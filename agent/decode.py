"""Greedy decoding of every agent turn of many conversations, each conversation read once.

The conversation's keys and values up to a turn are exactly what the agent is prompted with there, so all turns of a
conversation start from slices of one forward pass, and all turns of a group are decoded as one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from agent.encode import Encoded
from agent.student import read_rows


@dataclass(frozen=True, slots=True)
class Turn:
    """One agent turn to decode: which conversation of the group, and how many of its tokens come before the turn."""

    row: int
    start: int


class _Slab(DynamicLayer):
    """Keys and values of one layer in a buffer of fixed size: appending copies nothing."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, length: int) -> None:
        super().__init__()
        self._keys, self._values, self.length = keys, values, length
        self.is_initialized = True
        self.dtype, self.device = keys.dtype, keys.device

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        end = self.length + key_states.shape[-2]
        self._keys[:, :, self.length:end], self._values[:, :, self.length:end] = key_states, value_states
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]

    def get_seq_length(self) -> int:
        return self.length

    def keep(self, rows: torch.Tensor) -> None:
        self._keys, self._values = self._keys[rows], self._values[rows]


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
        schema: one for each turn of the group.
    """

    def __init__(self, tokenizer: Any, engine: Any, schemas: Sequence[dict[str, Any]]) -> None:
        from llguidance import LLMatcher

        super().__init__(tokenizer)
        compact: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        self._matchers = [LLMatcher(engine, LLMatcher.grammar_from_json_schema(schema, defaults=compact)) for schema in schemas]

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
    """Cut conversations into groups of one company and similar length."""
    ordered = sorted(conversations, key=lambda item: (item[0], len(item[2].ids)))
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

    @torch.inference_mode()
    def decode(self, group: list[Encoded], *choices: Callable[[list[Turn]], Choice]) -> list[tuple[list[Turn], list[str]]]:
        """Decode all agent turns of a group of conversations that share their prefix.

        Args:
            group: the conversations.
            choices: one for each way of decoding wanted; the conversations are read once for all of them.

        Returns:
            for each way, the turns and their texts, without the token that ends the turn.
        """
        turns = [Turn(row, start) for row, encoded in enumerate(group) for start, _ in encoded.spans]
        prefix = group[0].prefix
        length = max(len(encoded.ids) for encoded in group) - prefix
        rows, mask = torch.zeros(len(group), length, dtype=torch.long), torch.zeros(len(group), length, dtype=torch.long)
        for i, encoded in enumerate(group):
            rows[i, :len(encoded.ids) - prefix] = torch.tensor(encoded.ids[prefix:])
            mask[i, :len(encoded.ids) - prefix] = 1
        hidden, cache = read_rows(self.model, torch.tensor([group[0].ids[:prefix]]), rows, mask)
        last = torch.stack([hidden[turn.row, turn.start - prefix - 1] for turn in turns])
        logits = self.model.get_output_embeddings()(last).float()
        return [(turns, self._run(cache, turns, logits, choice(turns))) for choice in choices]

    def _run(self, read: Any, turns: list[Turn], logits: torch.Tensor, choice: Choice) -> list[str]:
        longest = max(turn.start for turn in turns)
        slabs = [self._slab(layer.keys, layer.values, turns, longest) for layer in read.layers]
        cache = Cache(layers=slabs)
        # Right-aligned: all rows append at the same column, padding stands on the left.
        mask = torch.zeros(len(turns), longest + self.max_new_tokens, dtype=torch.long)
        for i, turn in enumerate(turns):
            mask[i, longest - turn.start:] = 1
        positions = torch.tensor([[turn.start] for turn in turns])
        rows, running = list(range(len(turns))), set(range(len(turns)))
        texts: list[list[int]] = [[] for _ in turns]
        for step in range(self.max_new_tokens):
            alive = [i for i, turn in enumerate(rows) if turn in running]
            tokens = [0] * len(rows)
            for i, token in zip(alive, choice.next_tokens([rows[i] for i in alive], logits[alive]), strict=True):
                tokens[i] = token
                if token not in self._ends:
                    texts[rows[i]].append(token)
                if token in self._ends or choice.hopeless(texts[rows[i]]):
                    running.discard(rows[i])
            if not running or step + 1 == self.max_new_tokens:
                break
            if 2 * len(running) <= len(rows):
                # Dropping finished rows copies those that stay, so it waits until half are done.
                keep = torch.tensor([i for i in alive if rows[i] in running])
                mask, positions = mask[keep], positions[keep]
                rows, tokens = [rows[i] for i in keep], [tokens[i] for i in keep]
                for slab in slabs:
                    slab.keep(keep)
            out = self.model(input_ids=torch.tensor([[token] for token in tokens]), attention_mask=mask[:, : longest + step + 1],
                             position_ids=positions, cache=cache, use_cache=True)
            logits = out.logits[:, -1].float()
            positions = positions + 1
        return [self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False) for tokens in texts]

    def _slab(self, keys: torch.Tensor, values: torch.Tensor, turns: list[Turn], longest: int) -> _Slab:
        shape = (len(turns), keys.shape[1], longest + self.max_new_tokens, keys.shape[3])
        slab_keys, slab_values = keys.new_zeros(shape), values.new_zeros(shape)
        for i, turn in enumerate(turns):
            slab_keys[i, :, longest - turn.start:longest] = keys[turn.row, :, :turn.start]
            slab_values[i, :, longest - turn.start:longest] = values[turn.row, :, :turn.start]
        return _Slab(slab_keys, slab_values, longest)
