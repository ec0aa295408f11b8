"""Decoding all turns side by side gives what decoding one turn at a time gives; with the real base model."""

import threading
import time
from collections import defaultdict

import pytest
import torch

from agent import compiled
from agent.decode import Choice, SchemaChoice, TurnDecoder
from agent.drafts import CONTEXT, Drafts
from agent.prefill import Prefill
from agent.prepacked import _Prepacked
from schemas.action import ActionError, ActionName, action_json_schema, parse_action
from schemas.errors import InputError
from tests.students import ALL, SYSTEM, base, encoder, tokenizer

NEW = 24


class Patient(Choice):
    """Greedy to the end: never gives a text up."""

    def hopeless(self, tokens):
        return False


class Parting(Patient):
    """Greedy, but for some tokens: token number -> which of the most likely ones it picks there, from 0."""

    def __init__(self, ranks):
        super().__init__(tokenizer())
        self._ranks, self._number = ranks, -1

    def next_token(self, logits):
        self._number += 1
        return int(logits.topk(3).indices[self._ranks.get(self._number, 0)])


def encoded():
    return [encoder().conversation(SYSTEM, messages) for messages in ALL.values()]


def turns():
    """(tokens before the turn) of every agent turn, conversation by conversation."""
    return [e.ids[:start] for e in encoded() for start, _ in e.spans]


def decode(*ways, tokens=NEW, at_once=32):
    """What every way says at every turn."""
    found = dict(TurnDecoder(base(), tokenizer(), tokens, at_once).decode(encoded(), ways))
    assert found.keys() == set(range(len(ALL))), "every conversation comes out once"
    return [[reply for number in sorted(found) for reply in found[number][way]] for way in range(len(ways))]


def greedy():
    return Choice(tokenizer())


def patient():
    return Patient(tokenizer())


@pytest.fixture(scope="module")
def decoded():
    return [reply.text for reply in decode(patient)[0]]


def test_every_agent_turn_is_decoded(decoded):
    assert len(decoded) == len(turns()) == 7


def test_decoding_side_by_side_equals_generate_one_by_one(decoded):
    for before, text in zip(turns(), decoded, strict=True):
        prompt = torch.tensor([before], device=base().device)
        with torch.inference_mode():
            out = base().generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, do_sample=False,
                                  pad_token_id=tokenizer().pad_token_id)
        alone = tokenizer().decode(out[0, prompt.shape[1]:], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert text == alone, "a near-tie may flip with the order of additions; these do not"


def test_what_runs_beside_a_turn_changes_nothing(decoded):
    assert [reply.text for reply in decode(patient, at_once=1)[0]] == decoded, "one conversation after the other"
    greedily, patiently = decode(greedy, patient, at_once=3)
    assert [reply.text for reply in patiently] == decoded
    assert greedily == decode(greedy)[0]


def test_ways_that_part_say_what_each_says_alone(decoded):
    """One parts at once, two at the same token, and those two from each other later."""
    ways = [patient, *(lambda ranks=ranks: Parting(ranks) for ranks in ({0: 1}, {5: 1}, {5: 1, 9: 2}))]
    alone = [decode(way)[0] for way in ways]
    assert decode(*ways) == alone == decode(*ways, at_once=2)
    assert len({tuple(reply.text for reply in replies) for replies in alone}) == len(ways), "they do part"
    assert [reply.text for reply in alone[0]] == decoded


def test_ways_that_agree_are_computed_once(monkeypatch):
    fed = []
    step = TurnDecoder._step

    def counted(self, trees, tails):
        fed.append(sum(len(tree.going) for tree in trees))
        return step(self, trees, tails)

    monkeypatch.setattr(TurnDecoder, "_step", counted)
    one = decode(patient)
    rows = sum(fed)
    fed.clear()
    assert decode(patient, patient) == [one[0], one[0]]
    assert sum(fed) == rows
    fed.clear()
    decode(patient, lambda: Parting({NEW - 4: 1}))
    assert rows < sum(fed) <= rows + 4 * len(turns()), "and apart from where they part"


def test_what_follows_the_same_few_tokens_is_guessed():
    drafts = Drafts()
    drafts.learn([*range(CONTEXT), 50, 51, 52])
    assert drafts.guess([9, *range(CONTEXT)], 2) == (50, 51)
    assert drafts.guess(range(CONTEXT), 9) == (50, 51, 52), "as far as anything is known"
    assert drafts.guess(range(CONTEXT), 0) == drafts.guess(range(1, CONTEXT + 1), 9) == drafts.guess([0], 9) == ()
    drafts.learn([*range(CONTEXT), 60])
    assert drafts.guess(range(CONTEXT), 9) == (60,), "what came last"


@pytest.mark.parametrize("right", [True, False])
def test_drafts_change_no_text_only_how_many_steps_it_takes(decoded, right, monkeypatch):
    """All right for the first of ways that part, or all wrong."""
    fed, step = [], TurnDecoder._step

    def counted(self, trees, tails):
        fed.append(max(len(branch.tokens) + len(branch.draft) for tree in trees for branch in tree.going))
        return step(self, trees, tails)

    def guess(self, ids, most):
        said = list(ids[CONTEXT:])
        if not right:
            return tuple(range(100, 100 + most))
        return next((tuple(text[len(said):][:most]) for text in texts if text[:len(said)] == said), ())

    monkeypatch.setattr(TurnDecoder, "_step", counted)
    texts = [tokenizer()(text, add_special_tokens=False).input_ids for text in decoded]
    ways = [patient, lambda: Parting({5: 1}), lambda: Parting({5: 1, 9: 2})]
    monkeypatch.setattr(Drafts, "guess", lambda self, ids, most: ())
    plain = decode(*ways)
    assert len(fed) == NEW - 1 and [reply.text for reply in plain[0]] == decoded
    monkeypatch.setattr(Drafts, "guess", guess)
    assert decode(*ways) == plain
    assert max(fed) < NEW, "nothing is guessed that could not be kept"
    fed.clear()
    decode(patient)
    assert len(fed) < NEW / 2 if right else len(fed) == NEW - 1


def test_a_decoder_can_be_used_again_and_leaves_the_model_as_it_was(decoded):
    decoder, before = TurnDecoder(base(), tokenizer(), NEW, 64), base().config._attn_implementation
    for _ in range(2):
        found = dict(decoder.decode(encoded(), [patient]))
        assert [reply.text for number in sorted(found) for reply in found[number][0]] == decoded
    assert base().config._attn_implementation == before


def test_without_a_compiler_the_texts_are_the_same(decoded, monkeypatch):
    ways = [patient, lambda: Parting({5: 1}), lambda: Parting({5: 1, 9: 2})]
    with_compiler = decode(*ways)
    monkeypatch.setattr(compiled, "library", lambda: None)
    assert decode(*ways) == with_compiler
    assert [reply.text for reply in with_compiler[0]] == decoded


@pytest.mark.parametrize("kv", [1, 2, 4])
def test_any_number_of_heads_may_share_keys(kv):
    from transformers import AutoModelForCausalLM, LlamaConfig
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer()), hidden_size=256, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=kv)
    model = AutoModelForCausalLM.from_config(config).eval()
    found = dict(TurnDecoder(model, tokenizer(), 6, 32).decode(encoded(), [patient]))
    texts = [reply.text for number in sorted(found) for reply in found[number][0]]
    for before, text in zip(turns(), texts, strict=True):
        prompt = torch.tensor([before])
        with torch.inference_mode():
            out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False,
                                 eos_token_id=tokenizer().all_special_ids, pad_token_id=tokenizer().pad_token_id)
        assert text == tokenizer().decode(out[0, prompt.shape[1]:], skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.fixture
def cores(monkeypatch):
    """Three cores, whatever is here, each of which takes what little there is."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    monkeypatch.setattr("agent.decode.TURNS_A_CORE", 1)
    yield 3
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)


def test_which_tokens_share_a_step_does_not_depend_on_which_core_is_faster(cores, monkeypatch):
    """And so the texts do not either, where a near-tie is decided by rounding."""
    step, slow, steps = TurnDecoder._step, set(), defaultdict(list)

    def waiting(self, trees, tails):
        if max(tree.number for tree in trees) in slow:
            time.sleep(0.05)
        steps[id(self)].append([(tree.number, [(branch.turn, branch.tokens, branch.draft) for branch in tree.going]) for tree in trees])
        return step(self, trees, tails)

    monkeypatch.setattr(TurnDecoder, "_step", waiting)
    found = []
    conversations = encoded() * 3
    for numbers in ([], range(len(ALL)), range(0, len(conversations), len(ALL))):
        slow = set(numbers)
        steps.clear()
        list(TurnDecoder(base(), tokenizer(), 6, cores).decode(conversations, [greedy]))
        found.append(sorted(steps.values()))
    assert len(found[0]) > 1 and found[0] == found[1] == found[2]


def test_cores_that_decode_apart_say_what_one_says(decoded, cores, monkeypatch):
    threads, step = set(), TurnDecoder._step

    def counted(self, trees, tails):
        threads.add((threading.get_ident(), torch.get_num_threads(), self.at_once))
        return step(self, trees, tails)

    monkeypatch.setattr(TurnDecoder, "_step", counted)
    decoder, before = TurnDecoder(base(), tokenizer(), NEW, cores, layer=15), base().config._attn_implementation
    for _ in range(2):
        found = dict(decoder.decode(encoded(), [patient]))
        assert [reply.text for number in sorted(found) for reply in found[number][0]] == decoded
    assert {(count, at_once) for _, count, at_once in threads} == {(1, 1)} and len({name for name, *_ in threads}) > 1
    assert decoder.states.keys() == set(range(len(ALL))), "the states of all of them"
    assert base().config._attn_implementation == before and decoder.at_once == cores
    assert all(type(module) is not _Prepacked for module in base().modules())


def test_what_enters_a_layer_is_kept_of_every_turns_prompt():
    decoder = TurnDecoder(base(), tokenizer(), 4, 2, layer=15)
    assert len(list(decoder.decode(encoded(), [greedy]))) == len(ALL)
    kept = [state for number in sorted(decoder.states) for state in decoder.states[number]]
    for before, state in zip(turns(), kept, strict=True):
        with torch.inference_mode():
            alone = base()(torch.tensor([before], device=base().device), output_hidden_states=True).hidden_states[15][0, -1].cpu()
        assert torch.allclose(state, alone, atol=1e-3)
    assert not base().model.layers[15]._forward_pre_hooks


def test_nothing_to_decode_is_no_error():
    assert list(TurnDecoder(base(), tokenizer(), NEW, 64).decode([], [greedy])) == []


def test_a_model_whose_memory_is_no_list_of_keys_is_refused():
    from transformers import AutoModelForCausalLM, Qwen2Config
    tiny = AutoModelForCausalLM.from_config(Qwen2Config(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        use_sliding_window=True, sliding_window=8, max_window_layers=1))
    with pytest.raises(InputError, match="sliding-window attention"):
        Prefill(tiny)


def test_giving_up_on_prose_changes_no_verdict(decoded):
    for long, short in zip(decoded, (reply.text for reply in decode(greedy)[0]), strict=True):
        assert long.startswith(short)
        if long != short:
            with pytest.raises(ActionError):
                parse_action(long)


@pytest.mark.parametrize("text, hopeless", [
    ("Sure, here is the answer you asked for, in full", True), ('{"thought": "a", "action": "reply", "args"', False),
    ("```json\n{\"thought\": \"because it is so\"", False), ("<think>well, let me see what to do here", False),
    ("\n\n \n{\"thought\": \"and so on", False)])
def test_only_prose_is_hopeless(text, hopeless):
    tokens = tokenizer()(text, add_special_tokens=False).input_ids
    choice = Choice(tokenizer())
    assert any(choice.hopeless(tokens[:n]) for n in range(1, len(tokens) + 1)) is hopeless


def test_under_the_schema_even_the_base_model_writes_valid_steps():
    import llguidance.hf
    engine = llguidance.hf.from_tokenizer(tokenizer())
    schema = action_json_schema(bounded=True)
    free, constrained = decode(greedy, lambda: SchemaChoice(tokenizer(), engine, schema), tokens=176)
    names = [name for name in ActionName if name != "escalate"]
    for before, reply in zip(turns(), constrained, strict=True):
        parse_action(reply.text)
        written = tokenizer()(reply.text.split('"action": "')[0] + '"action": "', add_special_tokens=False).input_ids
        with torch.inference_mode():
            logits = base()(torch.tensor([before + written], device=base().device)).logits[0, -1]
        begins = [tokenizer()('"action": "' + name, add_special_tokens=False).input_ids[4] for name in names]
        assert reply.other == names[int(logits[begins].argmax())]
    assert free != constrained
