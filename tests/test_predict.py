"""Batched decoding from shared slices gives what decoding one turn at a time gives; with the real base model."""

import subprocess
import sys

import pytest
import torch

from agent.decode import Choice, SchemaChoice, TurnDecoder, groups, read_turns, turns
from schemas.action import ActionError, ActionName, action_json_schema, parse_action
from tests.students import ALL, SYSTEM, base, encoder, tokenizer

NEW = 24


class Patient(Choice):
    """Greedy to the end: never gives a text up."""

    def hopeless(self, tokens):
        return False


def encoded():
    return [encoder().conversation(SYSTEM, messages) for messages in ALL.values()]


def decode(choice, tokens=NEW):
    return TurnDecoder(base(), tokenizer(), tokens).decode(read_turns(base(), encoded()), choice)


@pytest.fixture(scope="module")
def decoded():
    return [reply.text for reply in decode(Patient(tokenizer()))]


def test_every_agent_turn_is_decoded(decoded):
    assert [(turn.row, turn.start) for turn in turns(encoded())] == [(row, start) for row, e in enumerate(encoded()) for start, _ in e.spans]
    assert len(decoded) == 7


def test_batched_decoding_equals_generate_one_by_one(decoded):
    for turn, text in zip(turns(encoded()), decoded, strict=True):
        prompt = torch.tensor([encoded()[turn.row].ids[:turn.start]])
        with torch.inference_mode():
            out = base().generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, do_sample=False,
                                  pad_token_id=tokenizer().pad_token_id)
        alone = tokenizer().decode(out[0, prompt.shape[1]:], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert text == alone, "a near-tie may flip with the order of additions; these do not"


def test_giving_up_on_prose_changes_no_verdict(decoded):
    for long, short in zip(decoded, (reply.text for reply in decode(Choice(tokenizer()))), strict=True):
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
    read, decoder = read_turns(base(), encoded()), TurnDecoder(base(), tokenizer(), 176)
    free = decoder.decode(read, Choice(tokenizer()))
    constrained = decoder.decode(read, SchemaChoice(tokenizer(), engine, schema, len(read.turns)))
    names = [name for name in ActionName if name != "escalate"]
    for turn, reply in zip(read.turns, constrained, strict=True):
        parse_action(reply.text)
        written = tokenizer()(reply.text.split('"action": "')[0] + '"action": "', add_special_tokens=False).input_ids
        with torch.inference_mode():
            logits = base()(torch.tensor([encoded()[turn.row].ids[:turn.start] + written])).logits[0, -1]
        begins = [tokenizer()('"action": "' + name, add_special_tokens=False).input_ids[4] for name in names]
        assert reply.other == names[int(logits[begins].argmax())]
    assert free != constrained
    assert decoder.decode(read, Choice(tokenizer())) == free, "what has been read can be decoded from again"


def test_groups_keep_companies_apart_and_lose_nothing():
    rows = [(company, f"{company}{i}", e) for i in range(5) for company in ("a", "b") for e in encoded()]
    cut = list(groups(rows, 4))
    assert sorted(name for group in cut for _, name, _ in group) == sorted(name for _, name, _ in rows)
    assert all(len({company for company, _, _ in group}) == 1 and len(group) <= 4 for group in cut)


@pytest.mark.parametrize("words", [[], ["teacher"], ["base", "student"]])
def test_predict_takes_base_or_student(words):
    done = subprocess.run([sys.executable, "-m", "stages.predict", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: predict takes one of") and "hint: " in done.stderr
