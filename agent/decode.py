"""Greedy decoding of every agent turn of many conversations, each conversation read and stored once.

The conversation's keys and values up to a turn are exactly what the agent is prompted with there. So all turns of a
conversation are decoded side by side, as branches of one tree: a step feeds the model the last token of every branch that
still runs, whatever conversation it belongs to, and what is guessed to follow it (`agent.drafts`), which stands as far as the
model picks the same. A turn that is decoded in several ways is one branch until they pick different tokens. A branch attends to
three parts, each with all those that share it in one product (Juravsky et al. 2024, "Hydragen"): what its conversation begins
with, a company's system prompt, kept once; its conversation up to its turn; and its own tokens.
When all branches of a conversation have ended, the next conversation takes its place (continuous batching; Yu et al. 2022, "Orca").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import AttentionInterface

from agent.drafts import CONTEXT, MOST, Drafts
from agent.encode import Encoded
from agent.prefill import Prefill
from agent.student import attention, entering_layer
from schemas.action import ActionName

ACTION_OPENING = '"action": "'
SLOTS_AT_ONCE = 16
"""By how many slots for branches their keys and values grow."""
ROWS_AT_ONCE = 16
KEYS_AT_ONCE = 32
"""Queries attend by multiples of so many to multiples of so many keys, the last ones in vain: oneDNN makes a kernel for every size that
it meets, which takes ten times as long as such a product."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What was decoded for one turn: the text, and the most likely action but `escalate`, None where no action was begun.

    `other` compares the logits of the first token of each name, at the place where the action was written. Names that begin
    with the same token are told apart by their order in `ActionName`.
    """

    text: str
    other: str | None


class Choice:
    """Picks the tokens of one turn. This one is plain greedy; `hopeless` says when a text needs no more."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def next_token(self, logits: torch.Tensor) -> int:
        """The next token, from logits of shape (V)."""
        return int(logits.argmax())

    def hopeless(self, tokens: Sequence[int]) -> bool:
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
        schema: what the text must fit.
    """

    def __init__(self, tokenizer: Any, engine: Any, schema: dict[str, Any]) -> None:
        from llguidance import LLMatcher

        super().__init__(tokenizer)
        compact: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        self._matcher = LLMatcher(engine, LLMatcher.grammar_from_json_schema(schema, defaults=compact))

    def next_token(self, logits: torch.Tensor) -> int:
        """The most likely allowed token."""
        allowed = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)[: logits.shape[0]] > 0
        token = int(logits.masked_fill(~allowed, float("-inf")).argmax())
        self._matcher.consume_token(token)
        return token

    def hopeless(self, tokens: Sequence[int]) -> bool:
        """Never: every token was allowed."""
        return False


@dataclass(slots=True, eq=False)
class _Tail:
    """Where `_Tails` keeps the keys and values of a branch's tokens."""

    slot: int


@dataclass(frozen=True, slots=True, eq=False)
class _Branch:
    """What is decoded for one turn, in one way or in several that have picked the same tokens so far."""

    turn: int
    start: int
    """How many tokens its prompt has."""
    choices: dict[int, Choice]
    """By way."""
    tail: _Tail
    before: tuple[int, ...]
    """The last tokens of its prompt, for drafts."""
    tokens: tuple[int, ...] = ()
    draft: tuple[int, ...] = ()
    """What may follow."""
    other: str | None = None

    @property
    def rows(self) -> int:
        """How many tokens a step feeds the model."""
        return 1 + len(self.draft)


_Layer = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of one layer: (KV, D, S), as a product with queries takes them, and (KV, S, D)."""
_Part = tuple[torch.Tensor, torch.Tensor]
"""Attention over some of the keys, (KV, R, D), and the logarithm of the sum of their scores' exponentials, (KV, R, 1)."""


def _keys_and_values(read: Any, tokens: slice, to: int = 1) -> _Layer:
    """Some tokens of a layer of a cache, and zeros up to a multiple."""
    keys, values = read.keys[0, :, tokens], read.values[0, :, tokens]
    more = -keys.shape[1] % to
    return pad(keys.transpose(1, 2), (0, more)).contiguous(), pad(values, (0, 0, 0, more)).contiguous()


def _attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None = None) -> _Part:
    """Attention of scaled queries, (KV, R, D); `mask`, which broadcasts to (KV, R, S), is added to the scores.

    Plain products: for the few rows of a step they take less time than torch's fused attention. The softmax is taken in float32.
    """
    scores = (query @ keys).float()
    if mask is not None:
        scores += mask
    top = scores.amax(dim=-1, keepdim=True)
    weights = torch.softmax(scores, dim=-1, out=scores)
    # The greatest weight is that of the top score: 1 / sum(exp(score - top)). torch.exp takes longer than a whole softmax.
    return weights.to(values.dtype) @ values, top - weights.amax(dim=-1, keepdim=True).log()


def _attend_by_rows(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None = None) -> _Part:
    """`_attend` for any number of queries, and a mask for the next multiple of ROWS_AT_ONCE."""
    rows = query.shape[1]
    out, total = _attend(pad(query, (0, 0, 0, -rows % ROWS_AT_ONCE)), keys, values, mask)
    return out[:, :rows], total[:, :rows]


def _joined(*sides: Sequence[_Part]) -> torch.Tensor:
    """Attention over the keys of all sides, (KV, R, D), each side in parts of the rows (online softmax; Milakov and Gimelshein 2018)."""
    whole = [[torch.cat(each, dim=1) for each in zip(*side, strict=True)] for side in sides]
    values, sums = (torch.stack(each) for each in zip(*whole, strict=True))
    return (values * sums.softmax(dim=0)).sum(dim=0)


@dataclass(frozen=True, slots=True, eq=False)
class _Prefix:
    """What conversations begin with: the `number`th such beginning, so many tokens, and their keys and values."""

    number: int
    tokens: int
    layers: list[_Layer]


class _Tree:
    """One conversation that is being decoded: keys and values behind its prefix.

    Args:
        number: which conversation.
        prefix: what it begins with.
        read: the cache that it was read into, prefix and all.
        branches: one a turn.
    """

    def __init__(self, number: int, prefix: _Prefix, read: Any, branches: list[_Branch]) -> None:
        self.number, self.prefix, self.going = number, prefix, branches
        self.replies: dict[tuple[int, int], Reply] = {}
        """By way and turn, as they end."""
        self._layers = [_keys_and_values(layer, slice(prefix.tokens, None), KEYS_AT_ONCE) for layer in read.layers]
        self._mask = torch.empty(0)

    @property
    def rows(self) -> int:
        """How many tokens a step feeds the model."""
        return sum(branch.rows for branch in self.going)

    def begin_step(self, heads: int) -> None:
        """Hide from every branch what comes after its prompt; `heads` queries share a head of keys."""
        starts = torch.tensor([branch.start - self.prefix.tokens for branch in self.going for _ in range(branch.rows)])
        after = torch.arange(self._layers[0][0].shape[-1]) >= starts[:, None]
        mask = torch.zeros(after.shape).masked_fill_(after, float("-inf")).repeat_interleave(heads, dim=0)
        self._mask = pad(mask, (0, 0, 0, -len(mask) % ROWS_AT_ONCE)).to(self._layers[0][1])

    def attend(self, query: torch.Tensor, layer: int) -> _Part:
        """Attention of the step's tokens over the conversation behind its prefix, up to their turns; queries as `_attend` takes them."""
        return _attend_by_rows(query, *self._layers[layer], self._mask)


class _Tails:
    """Keys and values of the tokens of all branches that go on, a slot each, without a gap.

    Args:
        room: how many tokens a branch may have.
        like: a layer of a cache, for the shape of its heads, the type and the device.
        layers: how many there are.
    """

    def __init__(self, room: int, like: Any, layers: int) -> None:
        _, kv, _, size = like.keys.shape
        self._held: list[_Tail] = []
        self._keys = [like.keys.new_zeros(0, kv, size, room) for _ in range(layers)]
        self._values = [like.values.new_zeros(0, kv, room, size) for _ in range(layers)]
        self._slots = self._places = self._ends = self._mask = torch.empty(0)

    def new(self) -> _Tail:
        """A slot for a branch without tokens."""
        tail = _Tail(len(self._held))
        self._held.append(tail)
        if len(self._held) > len(self._keys[0]):
            for states in (self._keys, self._values):
                states[:] = [pad(each, (0, 0) * 3 + (0, SLOTS_AT_ONCE)) for each in states]
        return tail

    def copy(self, tail: _Tail) -> _Tail:
        """A slot for a branch that begins with the tokens of another."""
        new = self.new()
        self._move(tail.slot, new.slot)
        return new

    def release(self, tail: _Tail) -> None:
        """Give a slot up; the last one takes its place."""
        last = self._held.pop()
        if last is not tail:
            self._move(last.slot, tail.slot)
            last.slot, self._held[tail.slot] = tail.slot, last

    def _move(self, old: int, new: int) -> None:
        for states in (*self._keys, *self._values):
            states[new] = states[old]

    def begin_step(self, going: Sequence[_Branch], heads: int) -> None:
        """Make room for the step's tokens of every branch, in the order in which they come; `heads` queries share a head of keys."""
        kv, room, device = self._keys[0].shape[1], self._keys[0].shape[3], self._keys[0].device
        rows = [(branch.tail.slot, place, len(branch.tokens) + place) for branch in going for place in range(branch.rows)]
        slots, places, lengths = (torch.tensor(each) for each in zip(*rows, strict=True))
        longest = int(lengths.max())
        seen = min(longest + -longest % KEYS_AT_ONCE, room)
        mask = torch.zeros(len(self._keys[0]), 1, 1 + MOST, 1, seen)
        mask[slots, :, places] = mask[slots, :, places].masked_fill(torch.arange(seen) >= lengths[:, None, None, None], float("-inf"))
        self._mask = mask.expand(-1, kv, -1, heads, -1).flatten(0, 1).flatten(1, 2).to(self._keys[0])
        self._slots, self._places, self._ends = slots.to(device), places.to(device), (lengths - 1).to(device)

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: int) -> _Part:
        """Attention of the step's tokens over those of their branches.

        Args:
            query: (KV, N x heads, D), scaled.
            key: (KV, N, D), kept.
            value: (KV, N, D), kept.
            layer: counted from 0.
        """
        keys, values = self._keys[layer], self._values[layer]
        keys[self._slots, :, :, self._ends] = key.transpose(0, 1)
        values[self._slots, :, self._ends] = value.transpose(0, 1)
        kv, seen = len(query), self._mask.shape[-1]
        by_token = query.unflatten(1, (len(self._slots), -1)).transpose(0, 1)
        heads = by_token.shape[2]
        # Every slot has room for a whole draft: what nobody asked for is not read.
        by_slot = query.new_zeros(len(keys), kv, 1 + MOST, heads, query.shape[-1])
        by_slot[self._slots, :, self._places] = by_token
        by_slot = by_slot.flatten(0, 1).flatten(1, 2)
        found = _attend(by_slot, keys.flatten(0, 1)[:, :, :seen], values.flatten(0, 1)[:, :seen], self._mask)
        out, total = (each.unflatten(1, (-1, heads)).unflatten(0, (-1, kv))[self._slots, :, self._places].transpose(0, 1).flatten(1, 2)
                      for each in found)
        return out, total


def _tree_attention(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None,
                    trees: list[_Tree], tails: _Tails, scaling: float | None = None, **kwargs: Any) -> tuple[torch.Tensor, None]:
    """Attention of tokens that come in one line, (1, heads, N, D), tree by tree.

    All else in the model takes the tokens as they come, so that nothing is computed for padding. Neighbours with the same
    prefix attend to it in one product.
    """
    kv, size, layer = key.shape[1], query.shape[-1], module.layer_idx
    heads = query.shape[1] // kv
    # Rows by token, then by head, so that a tree's are neighbours.
    rows = query[0].unflatten(0, (kv, heads)).transpose(1, 2).reshape(kv, -1, size) * (size ** -0.5 if scaling is None else scaling)
    counts = [tree.rows for tree in trees]
    own = [tree.attend(states, layer) for tree, states in zip(trees, rows.split([count * heads for count in counts], dim=1), strict=True)]
    prefixes = [(prefix, sum(tree.rows for tree in alike)) for prefix, alike in groupby(trees, key=lambda tree: tree.prefix)]
    of_prefixes = rows.split([count * heads for _, count in prefixes], dim=1)
    shared = [_attend_by_rows(states, *prefix.layers[layer]) for (prefix, _), states in zip(prefixes, of_prefixes, strict=True)]
    tokens = tails.attend(rows, key[0], value[0], layer)
    return _joined(own, shared, [tokens]).to(query.dtype).unflatten(1, (-1, heads)).transpose(0, 1).reshape(1, query.shape[2], -1, size), None


AttentionInterface.register("handoff_trees", _tree_attention)


class _Prepacked(torch.nn.Module):
    """A linear layer whose weights oneDNN has laid out for its kernels: on a few dozen rows, half again as fast as laying them out at every use."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self._weight, self._bias = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None), linear.bias

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(states, self._weight, self._bias, "none", [], "")
        return out


@contextmanager
def _prepacked(model: Any) -> Iterator[None]:
    """Let the model's plain linear layers be prepacked, where that is possible, for the time of a `with` block."""
    plain = {name: module for name, module in model.named_modules() if type(module) is torch.nn.Linear
             and module.weight.device.type == "cpu" and module.weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()}
    for name, module in plain.items():
        model.set_submodule(name, _Prepacked(module))
    try:
        yield
    finally:
        for name, module in plain.items():
            model.set_submodule(name, module)


class TurnDecoder:
    """Decodes with one model.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer: its tokenizer.
        max_new_tokens: where a turn is cut off.
        at_once: a further conversation is begun while fewer turns than this run.
        layer: what enters this layer, counted from 0, is kept; None for none.

    Attributes:
        states: for every conversation that was begun, by number, what entered the layer at the end of each turn's prompt, (turns, H), on the CPU.

    Raises:
        InputError: as `Prefill`.
    """

    def __init__(self, model: Any, tokenizer: Any, max_new_tokens: int, at_once: int, layer: int | None = None) -> None:
        self.model, self.tokenizer, self.max_new_tokens, self.at_once, self.layer = model, tokenizer, max_new_tokens, at_once, layer
        self.states: dict[int, torch.Tensor] = {}
        self._prefill = Prefill(model)
        self._prefixes: dict[tuple[int, ...], _Prefix] = {}
        self._drafts = Drafts()
        self._ends = frozenset(tokenizer.all_special_ids)
        # The first token of every name but `escalate`: what its encoding has beyond the opening alone.
        opening = tokenizer(ACTION_OPENING, add_special_tokens=False).input_ids
        self._others = {name.value: tokenizer(ACTION_OPENING + name, add_special_tokens=False).input_ids[len(opening)]
                        for name in ActionName if name is not ActionName.ESCALATE}

    @torch.inference_mode()
    def decode(self, conversations: Sequence[Encoded], ways: Sequence[Callable[[], Choice]]) -> Iterator[tuple[int, list[list[Reply]]]]:
        """Decode all agent turns.

        Args:
            conversations: what to decode; those with most turns are begun first, so that the last ones to end are short.
            ways: how to pick tokens: for every turn and way a `Choice` is made.

        Yields:
            a conversation's number and, when all its turns have ended, for every way the replies in the order of the turns,
            without the token that ends them.
        """
        with _prepacked(self.model):
            yield from self._decode(conversations, ways)

    def _decode(self, conversations: Sequence[Encoded], ways: Sequence[Callable[[], Choice]]) -> Iterator[tuple[int, list[list[Reply]]]]:
        waiting = sorted(range(len(conversations)), key=lambda number: (len(conversations[number].spans), len(conversations[number].ids)))
        trees: list[_Tree] = []
        tails: _Tails | None = None
        while waiting or trees:
            while waiting and sum(len(tree.going) for tree in trees) < self.at_once:
                number = waiting.pop()
                states, cache = self._read(number, conversations[number])
                tails = tails or _Tails(self.max_new_tokens, cache.layers[0], len(cache.layers))
                ids = conversations[number].prompts().ids
                self._drafts.learn(ids)
                branches = [_Branch(turn, start, {at: way() for at, way in enumerate(ways)}, tails.new(), tuple(ids[start - CONTEXT:start]))
                            for turn, (start, _) in enumerate(conversations[number].spans)]
                tree = _Tree(number, self._prefix(conversations[number], cache), cache, branches)
                self._grow(tree, tails, iter(self.model.get_output_embeddings()(states).float().cpu()))
                trees = sorted([*trees, tree], key=lambda tree: tree.prefix.number)
            for tree in [tree for tree in trees if not tree.going]:
                trees.remove(tree)
                yield tree.number, [[tree.replies[way, turn] for turn in range(len(conversations[tree.number].spans))] for way in range(len(ways))]
            if trees and tails:
                following = iter(self._step(trees, tails))
                for tree in trees:
                    self._grow(tree, tails, following)

    def _read(self, number: int, encoded: Encoded) -> tuple[torch.Tensor, Any]:
        """Read a conversation, as `Prefill` does."""
        if self.layer is None:
            return self._prefill(encoded)
        with entering_layer(self.model, self.layer) as seen:
            read = self._prefill(encoded)
        self.states[number] = seen[-1][0, encoded.prompt_ends()].cpu()
        return read

    def _prefix(self, encoded: Encoded, read: Any) -> _Prefix:
        """What a conversation that was read begins with; made of the first one that begins so."""
        ids = tuple(encoded.ids[:encoded.prefix])
        if ids not in self._prefixes:
            self._prefixes[ids] = _Prefix(len(self._prefixes), len(ids), [_keys_and_values(layer, slice(len(ids))) for layer in read.layers])
        return self._prefixes[ids]

    def _grow(self, tree: _Tree, tails: _Tails, logits: Iterator[torch.Tensor]) -> None:
        """Give every branch of a tree its next tokens; it parts where its ways do, and ends where they end."""
        tree.going = [replace(grown, draft=self._draft(grown, right))
                      for branch in tree.going for grown, right in self._checked(tree, tails, branch, logits)]

    def _draft(self, branch: _Branch, right: int) -> tuple[int, ...]:
        """What may follow a branch, of whose last draft so many tokens were right; never beyond the last token that it may have."""
        return self._drafts.guess((*branch.before, *branch.tokens), min(MOST, right + 1, self.max_new_tokens - len(branch.tokens) - 1))

    def _checked(self, tree: _Tree, tails: _Tails, branch: _Branch, logits: Iterator[torch.Tensor]) -> list[tuple[_Branch, int]]:
        """What goes on from a branch and its draft, as far as that is right, and how far it was; logits of what comes behind each token."""
        right, read = 0, [next(logits) for _ in range(branch.rows)]
        grown = self._grown(tree, tails, branch, read[0])
        while right < len(branch.draft) and [each.tokens[-1] for each in grown] == [branch.draft[right]]:
            right += 1
            grown = self._grown(tree, tails, grown[0], read[right])
        return [(each, right) for each in grown]

    def _grown(self, tree: _Tree, tails: _Tails, branch: _Branch, logits: torch.Tensor) -> list[_Branch]:
        """What goes on from a branch."""
        if branch.other is None and self.tokenizer.decode(branch.tokens[-len(ACTION_OPENING):]).endswith(ACTION_OPENING):
            branch = replace(branch, other=max(self._others, key=lambda name: float(logits[self._others[name]])))
        picked: dict[int, dict[int, Choice]] = {}
        for way, choice in branch.choices.items():
            picked.setdefault(choice.next_token(logits), {})[way] = choice
        parted: list[_Branch] = []
        for token, choices in picked.items():
            self._drafts.learn((*branch.before, *branch.tokens, token)[-CONTEXT - 1:])
            tokens = branch.tokens if token in self._ends else (*branch.tokens, token)
            ended = token in self._ends or len(tokens) == self.max_new_tokens
            going = {way: choice for way, choice in choices.items() if not (ended or choice.hopeless(tokens))}
            for way in choices.keys() - going.keys():
                tree.replies[way, branch.turn] = Reply(self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False), branch.other)
            if going:
                tail = tails.copy(branch.tail) if parted else branch.tail
                parted.append(replace(branch, choices=going, tokens=tokens, tail=tail))
        if not parted:
            tails.release(branch.tail)
        return parted

    def _step(self, trees: list[_Tree], tails: _Tails) -> torch.Tensor:
        """Feed the last token of every branch that goes on, and its draft.

        Returns:
            for each of these tokens the logits of what comes next, (N, V), where the tokens are chosen: on the CPU.
        """
        config, device = self.model.config.get_text_config(), self.model.device
        heads = config.num_attention_heads // config.num_key_value_heads
        for tree in trees:
            tree.begin_step(heads)
        going = [branch for tree in trees for branch in tree.going]
        tails.begin_step(going, heads)
        last = torch.tensor([[token for branch in going for token in (branch.tokens[-1], *branch.draft)]], device=device)
        positions = torch.tensor([[branch.start + len(branch.tokens) - 1 + place for branch in going for place in range(branch.rows)]], device=device)
        with attention(self.model, "handoff_trees"):
            return self.model(input_ids=last, position_ids=positions, use_cache=False, trees=trees, tails=tails).logits[0].float().cpu()
