"""Greedy decoding of every agent turn of many conversations, each conversation read and stored once.

The conversation's keys and values up to a turn are exactly what the agent is prompted with there. So all turns of a
conversation are decoded side by side, as branches of one tree: a step feeds the model the last token of every branch that
still runs, whatever conversation it belongs to, and what is guessed to follow it (`agent.drafts`), which stands as far as the
model picks the same. A turn that is decoded in several ways is one branch until they pick different tokens. A branch attends to
three parts, two of them together with all that share them (Juravsky et al. 2024, "Hydragen"): what its conversation begins with,
a company's system prompt, kept once; its conversation up to its turn; and its own tokens.
When all branches of a conversation have ended, the next conversation takes its place (continuous batching; Yu et al. 2022, "Orca").
On a CPU every core takes conversations of its own, with the same weights: most of what a step computes is too small to be shared
out among cores.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Self

import torch
from torch.nn.functional import pad

from agent.drafts import CONTEXT, MOST, Drafts
from agent.encode import Encoded
from agent.fused import fused
from agent.prefill import Prefill
from agent.prepacked import prepacked
from agent.side_by_side import side_by_side
from agent.student import attention, entering_layer
from agent.tree_attention import Layer, Part, Seen, lay_out
from schemas.action import ActionName

ACTION_OPENING = '"action": "'
TURNS_A_CORE = 32
"""Cores take conversations of their own only if each decodes so many turns at once; fewer would not be worth reading the weights for."""
SLOTS_AT_ONCE = 16
"""By how many slots for branches their keys and values grow."""


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


def _layers(read: Any, tokens: slice) -> list[Layer]:
    """Some tokens of a cache."""
    return [lay_out(layer.keys[:, :, tokens], layer.values[:, :, tokens]) for layer in read.layers]


@dataclass(frozen=True, slots=True, eq=False)
class _Prefix:
    """What conversations begin with: the `number`th such beginning, so many tokens, and their keys and values."""

    number: int
    tokens: int
    layers: list[Layer]


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
        self.layers = _layers(read, slice(prefix.tokens, None))


class _Tails:
    """Keys and values of the tokens of all branches that go on, a slot each, without a gap.

    Args:
        room: how many tokens a branch may have.
        like: a layer of a cache, for the shape of its heads, the type and the device.
        layers: how many there are.
    """

    def __init__(self, room: int, like: Any, layers: int) -> None:
        self._held: list[_Tail] = []
        empty = (states.new_zeros(0, states.shape[1], room, states.shape[3]) for states in (like.keys, like.values))
        keys, values = lay_out(*empty)
        self.layers = [(keys, values)] * layers

    def new(self) -> _Tail:
        """A slot for a branch without tokens."""
        tail = _Tail(len(self._held))
        self._held.append(tail)
        if len(self._held) > len(self.layers[0][1]):
            self.layers = [(pad(keys, (0, 0) * 4 + (0, SLOTS_AT_ONCE)), pad(values, (0, 0) * 3 + (0, SLOTS_AT_ONCE))) for keys, values in self.layers]
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
        for held in self.layers:
            for states in held:
                states[new] = states[old]


_Fed = tuple[_Tree, _Branch, int]
"""A token of a step: whose it is, and how many tokens its branch has with it."""


class _Step:
    """The last token of every branch that goes on and its draft, and what they attend to.

    Args:
        trees: those with the same prefix are neighbours.
        tails: of all their branches.
        heads: how many queries share a head of keys: a token has a row for each.
    """

    def __init__(self, trees: Sequence[_Tree], tails: _Tails, heads: int) -> None:
        fed = [(tree, branch, len(branch.tokens) + place) for tree in trees for branch in tree.going for place in range(branch.rows)]

        def rows(ends: Iterable[int]) -> torch.Tensor:
            return torch.tensor(list(ends)).repeat_interleave(heads)

        def runs(key: Callable[[_Fed], int]) -> Iterator[tuple[_Fed, int, int]]:
            """Neighbours of the same key: the first one, and where their rows begin and end."""
            end = 0
            for _, alike in groupby(fed, key):
                run = list(alike)
                first, end = end, end + heads * len(run)
                yield run[0], first, end

        starts, prefixes = rows(branch.start - tree.prefix.tokens for tree, branch, _ in fed), rows(tree.prefix.tokens for tree, *_ in fed)
        branches = list(runs(lambda each: each[1].tail.slot))
        slots = [branch.tail.slot for (_, branch, _), *_ in branches]
        self._parts = [
            [(tree.layers, Seen(tree.layers, [0], [first, end], starts)) for (tree, *_), first, end in runs(lambda each: each[0].number)],
            [(tree.prefix.layers, Seen(tree.prefix.layers, [0], [first, end], prefixes))
             for (tree, *_), first, end in runs(lambda each: each[0].prefix.number)],
            [(tails.layers, Seen(tails.layers, slots, [0, *(end for *_, end in branches)], rows(length for *_, length in fed)))],
        ]
        places = [(branch.tail.slot, length - 1) for _, branch, length in fed]
        self._tails, self._places = tails, torch.tensor(places, device=tails.layers[0][1].device).T

    def parts(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> list[Part]:
        """What is attended to in a layer, counted from 0, with the keys and values of the step's own tokens, (KV, N, D): they are kept."""
        keys, values = self._tails.layers[layer]
        slots, places = self._places
        keys[slots, :, places // keys.shape[-1], :, places % keys.shape[-1]] = key.transpose(0, 1)
        values[slots, :, places] = value.transpose(0, 1)
        return [[(layers[layer], seen) for layers, seen in part] for part in self._parts]


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

    def decode(self, conversations: Sequence[Encoded], ways: Sequence[Callable[[], Choice]]) -> Iterator[tuple[int, list[list[Reply]]]]:
        """Decode all agent turns.

        Args:
            conversations: what to decode; those with most turns are begun first, so that the last ones to end are short.
            ways: how to pick tokens: for every turn and way a `Choice` is made.

        Yields:
            a conversation's number and, when all its turns have ended, for every way the replies in the order of the turns,
            without the token that ends them.
        """
        order = sorted(range(len(conversations)), key=lambda number: (len(conversations[number].spans), len(conversations[number].ids)), reverse=True)
        cores = torch.get_num_threads() if self.model.device.type == "cpu" else 1
        with prepacked(self.model), fused(self.model):
            if cores > 1 and self.at_once // cores >= TURNS_A_CORE:
                # Dealt out beforehand: if a core took what is next, how fast the others are would say which tokens share a step, and a step
                # of another size may round otherwise and tip a near-tie.
                shares = [self._share(self.at_once // cores) for _ in range(cores)]
                yield from side_by_side([share._decode(conversations, order[core::cores], ways) for core, share in enumerate(shares)])
            else:
                yield from self._decode(conversations, order, ways)

    def _share(self, at_once: int) -> Self:
        """This decoder, with the same weights and no drafts yet, for a share of the turns at once."""
        share = copy.copy(self)
        # A model attends by the function that its configuration names, and that is another one for reading than for steps.
        share.model = copy.deepcopy(self.model, {id(held): held for held in (*self.model.parameters(), *self.model.buffers())})
        share.at_once, share._prefill, share._prefixes, share._drafts = at_once, Prefill(share.model), {}, Drafts()
        return share

    @torch.inference_mode()
    def _decode(self, conversations: Sequence[Encoded], numbers: Sequence[int],
                ways: Sequence[Callable[[], Choice]]) -> Iterator[tuple[int, list[list[Reply]]]]:
        """Decode some of the conversations."""
        trees: list[_Tree] = []
        tails: _Tails | None = None
        waiting = list(reversed(numbers))
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
            self._prefixes[ids] = _Prefix(len(self._prefixes), len(ids), _layers(read, slice(len(ids))))
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
        step = _Step(trees, tails, config.num_attention_heads // config.num_key_value_heads)
        going = [branch for tree in trees for branch in tree.going]
        last = torch.tensor([[token for branch in going for token in (branch.tokens[-1], *branch.draft)]], device=device)
        positions = torch.tensor([[branch.start + len(branch.tokens) - 1 + place for branch in going for place in range(branch.rows)]], device=device)
        with attention(self.model, "handoff_trees"):
            return self.model(input_ids=last, position_ids=positions, use_cache=False, step=step).logits[0].float().cpu()
