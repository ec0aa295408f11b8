"""Greedy decoding of every agent turn of many conversations, each conversation read and stored once.

The conversation's keys and values up to a turn are exactly what the agent is prompted with there. So all turns of a
conversation are decoded side by side, as branches of one tree: a step feeds the model one token of every branch that
still runs, whatever conversation it belongs to, and the attention mask lets a branch see its conversation up to its turn and
its own tokens. When all branches of a conversation have ended, the next conversation takes its place (continuous batching;
Yu et al. 2022, "Orca").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from agent.encode import Encoded
from agent.prefill import Prefill
from agent.student import attention
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

    def hopeless(self, tokens: list[int]) -> bool:
        """Never: every token was allowed."""
        return False


@dataclass(slots=True, eq=False)
class _Branch:
    """One turn that is decoded in one way. `start`: how many tokens its prompt has."""

    start: int
    choice: Choice
    tokens: list[int] = field(default_factory=list)
    other: str | None = None


class _Tree:
    """One conversation that is being decoded: keys and values of its prompt, then those of its branches' tokens as they come.

    Args:
        number: which conversation.
        read: the cache that it was read into.
        branches: for every way, one branch a turn.
        room: how many tokens the branches may have together.
    """

    def __init__(self, number: int, read: Any, branches: list[list[_Branch]], room: int) -> None:
        self.number, self.branches = number, branches
        self._prompt = self._filled = read.get_seq_length()
        self._layers = [tuple(_with_room(part[0], room) for part in (layer.keys, layer.values)) for layer in read.layers]
        # Which branch each token behind the prompt belongs to.
        self._owner = torch.empty(room, dtype=torch.long)
        self._mask = torch.empty(0)
        self.going: list[_Branch] = []

    def begin_step(self) -> None:
        """Make room for one more token of every branch that goes on."""
        start, self._filled = self._filled, self._filled + len(self.going)
        names = torch.tensor([id(branch) for branch in self.going])
        self._owner[start - self._prompt:self._filled - self._prompt] = names
        before = torch.arange(self._prompt) < torch.tensor([branch.start for branch in self.going])[:, None]
        self._mask = torch.cat([before, self._owner[:self._filled - self._prompt] == names[:, None]], dim=1)[None, None]

    def attend(self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Attention of the step's tokens, (1, heads, N, D) each, over the conversation and their own branches: (1, N, heads, D)."""
        keys, values = self._layers[module.layer_idx]
        keys[:, self._filled - len(self.going):self._filled], values[:, self._filled - len(self.going):self._filled] = key[0], value[0]
        return sdpa_attention_forward(module, query, keys[None, :, :self._filled], values[None, :, :self._filled], self._mask, **kwargs)[0]


def _with_room(read: torch.Tensor, room: int) -> torch.Tensor:
    """Keys or values, (heads, S, D), at the beginning of a buffer of S + room."""
    buffer = read.new_empty(read.shape[0], read.shape[1] + room, read.shape[2])
    buffer[:, :read.shape[1]] = read
    return buffer


def _tree_attention(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None,
                    trees: list[_Tree], **kwargs: Any) -> tuple[torch.Tensor, None]:
    """Attention of tokens that come in one line, (1, heads, N, D), tree by tree, each over its own keys and values.

    All else in the model takes the tokens as they come, so that nothing is computed for padding.
    """
    counts = [len(tree.going) for tree in trees]
    parts = zip(trees, *(states.split(counts, dim=2) for states in (query, key, value)), strict=True)
    return torch.cat([tree.attend(module, *states, **kwargs) for tree, *states in parts], dim=1), None


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

    Raises:
        InputError: as `Prefill`.
    """

    def __init__(self, model: Any, tokenizer: Any, max_new_tokens: int, at_once: int) -> None:
        self.model, self.tokenizer, self.max_new_tokens, self.at_once = model, tokenizer, max_new_tokens, at_once
        self._prefill = Prefill(model)
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
                states, cache = self._prefill(conversations[number])
                branches = [[_Branch(start, way()) for start, _ in conversations[number].spans] for way in ways]
                trees.append(_Tree(number, cache, branches, sum(map(len, branches)) * self.max_new_tokens))
                logits = self.model.get_output_embeddings()(states).float()
                trees[-1].going = [branch for of_way in branches for branch, here in zip(of_way, logits, strict=True) if self._goes_on(branch, here)]
            for tree in [tree for tree in trees if not tree.going]:
                trees.remove(tree)
                yield tree.number, [[Reply(self.tokenizer.decode(branch.tokens, clean_up_tokenization_spaces=False), branch.other)
                                     for branch in of_way] for of_way in tree.branches]
            if trees:
                following = iter(self._step(trees))
                for tree in trees:
                    tree.going = [branch for branch in tree.going if self._goes_on(branch, next(following))]

    def _goes_on(self, branch: _Branch, logits: torch.Tensor) -> bool:
        """Give a branch its next token; whether it needs another one."""
        if branch.other is None and self.tokenizer.decode(branch.tokens[-len(ACTION_OPENING):]).endswith(ACTION_OPENING):
            branch.other = max(self._others, key=lambda name: float(logits[self._others[name]]))
        token = branch.choice.next_token(logits)
        if token in self._ends:
            return False
        branch.tokens.append(token)
        return len(branch.tokens) < self.max_new_tokens and not branch.choice.hopeless(branch.tokens)

    def _step(self, trees: list[_Tree]) -> torch.Tensor:
        """Feed the last token of every branch that goes on: the logits of what comes next, (N, V)."""
        for tree in trees:
            tree.begin_step()
        going = [branch for tree in trees for branch in tree.going]
        last = torch.tensor([[branch.tokens[-1] for branch in going]])
        positions = torch.tensor([[branch.start + len(branch.tokens) - 1 for branch in going]])
        with attention(self.model, "handoff_trees"):
            return self.model(input_ids=last, position_ids=positions, use_cache=False, trees=trees).logits[0].float()
