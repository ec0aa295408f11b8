"""Greedy decoding of every agent turn of many conversations, each conversation read and stored once.

The conversation's keys and values up to a turn are exactly what the agent is prompted with there. So all turns of a
conversation are decoded side by side, as branches of one tree: a step feeds the model one token of every branch that
still runs, whatever conversation it belongs to, and the attention mask lets a branch see its conversation up to its turn and
its own tokens. A turn that is decoded in several ways is one branch until they pick different tokens. What conversations begin
with, a company's system prompt, is kept once, and all their branches attend to it in one product (Juravsky et al. 2024, "Hydragen").
When all branches of a conversation have ended, the next conversation takes its place (continuous batching; Yu et al. 2022, "Orca").
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from transformers import AttentionInterface

from agent.encode import Encoded
from agent.prefill import Prefill
from agent.student import attention, entering_layer
from schemas.action import ActionName

ACTION_OPENING = '"action": "'


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


@dataclass(frozen=True, slots=True, eq=False)
class _Branch:
    """What is decoded for one turn, in one way or in several that have picked the same tokens so far."""

    turn: int
    start: int
    """How many tokens its prompt has."""
    choices: dict[int, Choice]
    """By way."""
    names: tuple[int, ...]
    """Whose tokens it sees: those of the branches that it parted from, and its own, which come last."""
    tokens: tuple[int, ...] = ()
    other: str | None = None


_Layer = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of one layer: (KV, D, S), as a product with queries takes them, and (KV, S, D)."""
_Part = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Attention over some of the keys: values summed by weights that are not normalised, (KV, R, D); the weights' sum and the score whose weight is 1."""


def _keys_and_values(read: Any, tokens: slice, room: int) -> _Layer:
    """Some tokens of a layer of a cache, at the beginning of buffers with room for more."""
    pad = torch.nn.functional.pad
    return pad(read.keys[0, :, tokens].transpose(1, 2), (0, room)).contiguous(), pad(read.values[0, :, tokens], (0, 0, 0, room))


def _attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None = None) -> _Part:
    """Attention of scaled queries, (KV, R, D); `mask`, (R, S), is added to the scores.

    Plain products: for the few rows of a step they take less time than torch's fused attention. The softmax is taken in float32.
    """
    scores = (query @ keys if mask is None else torch.baddbmm(mask, query, keys)).float()
    top = scores.amax(dim=-1, keepdim=True)
    weights = scores.sub_(top).exp_()
    return weights.to(values.dtype) @ values, weights.sum(dim=-1, keepdim=True), top


def _joined(parts: Sequence[_Part], others: Sequence[_Part]) -> torch.Tensor:
    """Attention over the keys of both, (KV, R, D), each in parts of the rows (online softmax; Milakov and Gimelshein 2018)."""
    (one, one_sum, one_top), (two, two_sum, two_top) = ((torch.cat(each, dim=1) for each in zip(*side, strict=True)) for side in (parts, others))
    top = torch.maximum(one_top, two_top)
    first, second = (one_top - top).exp(), (two_top - top).exp()
    return (one * first + two * second) / (one_sum * first + two_sum * second)


@dataclass(frozen=True, slots=True, eq=False)
class _Prefix:
    """What conversations begin with: the `number`th such beginning, so many tokens, and their keys and values."""

    number: int
    tokens: int
    layers: list[_Layer]


class _Tree:
    """One conversation that is being decoded: keys and values behind its prefix, then those of its branches' tokens as they come.

    Args:
        number: which conversation.
        prefix: what it begins with.
        read: the cache that it was read into, prefix and all.
        branches: one a turn.
        room: how many tokens the branches may have together.
    """

    def __init__(self, number: int, prefix: _Prefix, read: Any, branches: list[_Branch], room: int) -> None:
        self.number, self.prefix, self.going = number, prefix, branches
        self.replies: dict[tuple[int, int], Reply] = {}
        """By way and turn, as they end."""
        self._names = itertools.count(len(branches))
        self._read = self._filled = read.get_seq_length() - prefix.tokens
        self._layers = [_keys_and_values(layer, slice(prefix.tokens, None), room) for layer in read.layers]
        # Which branch each token behind what was read belongs to.
        self._owner = torch.empty(room, dtype=torch.long)
        self._mask = torch.empty(0)

    def parted(self, branch: _Branch) -> _Branch:
        """A branch that sees what `branch` does, and goes its own way from here."""
        return replace(branch, names=(*branch.names, next(self._names)))

    def begin_step(self, heads: int) -> None:
        """Make room for one more token of every branch that goes on; `heads` queries share a head of keys."""
        start, self._filled = self._filled, self._filled + len(self.going)
        most = max(len(branch.names) for branch in self.going)
        # Filled up with a name that stands there already.
        names = torch.tensor([branch.names[:1] * (most - len(branch.names)) + branch.names for branch in self.going])
        self._owner[start - self._read:self._filled - self._read] = names[:, -1]
        before = torch.arange(self._read) < torch.tensor([branch.start - self.prefix.tokens for branch in self.going])[:, None]
        own = (self._owner[:self._filled - self._read, None] == names[:, None]).any(dim=-1)
        seen = torch.cat([before, own], dim=1)
        mask = torch.zeros(seen.shape).masked_fill_(~seen, float("-inf")).repeat_interleave(heads, dim=0)
        self._mask = mask.to(self._layers[0][1])

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: int) -> _Part:
        """Attention of the step's tokens over what stands behind the prefix: the conversation up to their turns, and their branches.

        Args:
            query: (KV, N x heads, D), scaled.
            key: (KV, N, D), kept.
            value: (KV, N, D), kept.
            layer: counted from 0.
        """
        keys, values = self._layers[layer]
        here = slice(self._filled - len(self.going), self._filled)
        keys[:, :, here], values[:, here] = key.transpose(1, 2), value
        return _attend(query, keys[:, :, :self._filled], values[:, :self._filled], self._mask)


def _tree_attention(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None,
                    trees: list[_Tree], scaling: float | None = None, **kwargs: Any) -> tuple[torch.Tensor, None]:
    """Attention of tokens that come in one line, (1, heads, N, D), tree by tree, each over its own keys and values.

    All else in the model takes the tokens as they come, so that nothing is computed for padding. Neighbours with the same
    prefix attend to it in one product.
    """
    kv, size, layer = key.shape[1], query.shape[-1], module.layer_idx
    heads = query.shape[1] // kv
    # Rows by token, then by head, so that a tree's are neighbours.
    rows = query[0].unflatten(0, (kv, heads)).transpose(1, 2).reshape(kv, -1, size) * (size ** -0.5 if scaling is None else scaling)
    counts = [len(tree.going) for tree in trees]
    of_trees = zip(rows.split([count * heads for count in counts], dim=1), key[0].split(counts, dim=1), value[0].split(counts, dim=1), strict=True)
    own = [tree.attend(*states, layer) for tree, states in zip(trees, of_trees, strict=True)]
    prefixes = [(prefix, sum(len(tree.going) for tree in alike)) for prefix, alike in groupby(trees, key=lambda tree: tree.prefix)]
    of_prefixes = rows.split([count * heads for _, count in prefixes], dim=1)
    shared = [_attend(states, *prefix.layers[layer]) for (prefix, _), states in zip(prefixes, of_prefixes, strict=True)]
    return _joined(own, shared).to(query.dtype).unflatten(1, (-1, heads)).transpose(0, 1).reshape(1, query.shape[2], -1, size), None


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
        while waiting or trees:
            while waiting and sum(len(tree.going) for tree in trees) < self.at_once:
                number = waiting.pop()
                states, cache = self._read(number, conversations[number])
                branches = [_Branch(turn, start, {at: way() for at, way in enumerate(ways)}, (turn,))
                            for turn, (start, _) in enumerate(conversations[number].spans)]
                room = len(branches) * len(ways) * self.max_new_tokens
                tree = _Tree(number, self._prefix(conversations[number], cache), cache, branches, room)
                self._grow(tree, iter(self.model.get_output_embeddings()(states).float().cpu()))
                trees = sorted([*trees, tree], key=lambda tree: tree.prefix.number)
            for tree in [tree for tree in trees if not tree.going]:
                trees.remove(tree)
                yield tree.number, [[tree.replies[way, turn] for turn in range(len(conversations[tree.number].spans))] for way in range(len(ways))]
            if trees:
                following = iter(self._step(trees))
                for tree in trees:
                    self._grow(tree, following)

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
            self._prefixes[ids] = _Prefix(len(self._prefixes), len(ids), [_keys_and_values(layer, slice(len(ids)), 0) for layer in read.layers])
        return self._prefixes[ids]

    def _grow(self, tree: _Tree, logits: Iterator[torch.Tensor]) -> None:
        """Give every branch of a tree its next token; it parts where its ways do, and ends where they end."""
        tree.going = [grown for branch in tree.going for grown in self._grown(tree, branch, next(logits))]

    def _grown(self, tree: _Tree, branch: _Branch, logits: torch.Tensor) -> Iterator[_Branch]:
        """What goes on from a branch."""
        if branch.other is None and self.tokenizer.decode(branch.tokens[-len(ACTION_OPENING):]).endswith(ACTION_OPENING):
            branch = replace(branch, other=max(self._others, key=lambda name: float(logits[self._others[name]])))
        picked: dict[int, dict[int, Choice]] = {}
        for way, choice in branch.choices.items():
            picked.setdefault(choice.next_token(logits), {})[way] = choice
        for token, choices in picked.items():
            tokens = branch.tokens if token in self._ends else (*branch.tokens, token)
            ended = token in self._ends or len(tokens) == self.max_new_tokens
            going = {way: choice for way, choice in choices.items() if not (ended or choice.hopeless(tokens))}
            for way in choices.keys() - going.keys():
                tree.replies[way, branch.turn] = Reply(self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False), branch.other)
            if going:
                yield replace(branch if len(picked) == 1 else tree.parted(branch), choices=going, tokens=tokens)

    def _step(self, trees: list[_Tree]) -> torch.Tensor:
        """Feed the last token of every branch that goes on: the logits of what comes next, (N, V), where the tokens are chosen: on the CPU."""
        config, device = self.model.config.get_text_config(), self.model.device
        for tree in trees:
            tree.begin_step(config.num_attention_heads // config.num_key_value_heads)
        going = [branch for tree in trees for branch in tree.going]
        last = torch.tensor([[branch.tokens[-1] for branch in going]], device=device)
        positions = torch.tensor([[branch.start + len(branch.tokens) - 1 for branch in going]], device=device)
        with attention(self.model, "handoff_trees"):
            return self.model(input_ids=last, position_ids=positions, use_cache=False, trees=trees).logits[0].float().cpu()
