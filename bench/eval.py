"""Agent turns of held-out conversations, by our decoder, by `generate`, and by llama.cpp's server, in turn.

The model is the student where its adapter is there, else the base. Ours reads a group of conversations and decodes all
their turns. `generate` takes some of those turns one by one, each with its whole prompt. llama.cpp's server takes all
turns of some of the conversations in their order, so that it reads a prompt only from where it differs from the last.
All three are greedy, end at a special token or at predict.max_new_tokens, and decode prose to its end.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench._measure import circumstances, ratio
from schemas.bench import EvalPart
from schemas.tables import Verified
from stages._stage import load_params, read_table

if TYPE_CHECKING:
    from agent.decode import Choice, TurnDecoder
    from agent.encode import Encoded

HELD_OUT = Path("data/verify/held_out.parquet")
ADAPTER = Path("models/qlora_train")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes."""
    parser.add_argument("--rounds", type=int, default=3, help="groups of conversations, one a round")
    parser.add_argument("--conversations", type=int, default=32, help="in a group")
    parser.add_argument("--max-new-tokens", type=int, default=0, help="where a turn is cut off; 0: as in params.yaml")
    parser.add_argument("--generate-turns", type=int, default=12, help="turns of a group that `generate` takes")
    parser.add_argument("--llama-conversations", type=int, default=4, help="conversations of a group that llama.cpp takes")
    parser.add_argument("--llama-weights", choices=("f32", "f16", "q8_0"), default="f16", help="how llama.cpp holds the weights")


@dataclass(frozen=True)
class Turn:
    """What a model is prompted with, as tokens, and what ours says there."""

    prompt: list[int]
    text: str


def ours(decoder: TurnDecoder, choice: Choice, group: list[Encoded]) -> tuple[list[list[Turn]], float]:
    """All turns of a group, conversation by conversation, and seconds."""
    started = time.monotonic()
    replies = dict(decoder.decode(group, [lambda: choice]))
    seconds = time.monotonic() - started
    return [[Turn(encoded.ids[:start], reply.text) for (start, _), reply in zip(encoded.spans, replies[number][0], strict=True)]
            for number, encoded in enumerate(group)], seconds


def generated(decoder: TurnDecoder, turns: list[Turn]) -> tuple[list[str], float]:
    """What `generate` says, turn by turn, and seconds."""
    import torch

    tokenizer, texts = decoder.tokenizer, []
    started = time.monotonic()
    with torch.inference_mode():
        for turn in turns:
            prompt = torch.tensor([turn.prompt])
            out = decoder.model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=decoder.max_new_tokens,
                                         do_sample=False, eos_token_id=tokenizer.all_special_ids, pad_token_id=tokenizer.all_special_ids[0])
            texts.append(tokenizer.decode(out[0, len(turn.prompt):], skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return texts, time.monotonic() - started


def measure(options: argparse.Namespace) -> EvalPart:
    """Rounds of all three, a group of conversations each.

    Raises:
        InputError: there are no held-out conversations.
    """
    here = circumstances()

    from agent.decode import Choice, TurnDecoder
    from agent.encode import Encoder
    from agent.student import StudentParams, load_base, load_student, load_tokenizer
    from bench._llama import LlamaMissing, completed, llama_server
    from stages._encoded import encode_table
    from stages.predict import PredictParams

    class ToTheEnd(Choice):
        def hopeless(self, tokens: Sequence[int]) -> bool:
            return False  # the others do not stop at prose either

    params, student = load_params("predict", PredictParams), load_params("student", StudentParams)
    tokenizer = load_tokenizer(student)
    trained = (ADAPTER / "adapter_config.json").is_file()
    model = load_student(student, ADAPTER) if trained else load_base(student).eval()
    decoder = TurnDecoder(model, tokenizer, options.max_new_tokens or params.max_new_tokens, params.turns_at_once)
    conversations = encode_table(read_table(HELD_OUT, Verified), Encoder(tokenizer))
    chance = random.Random(0)
    chosen = [chance.sample(conversations, min(options.conversations, len(conversations))) for _ in range(options.rounds)]

    speeds: dict[str, list[float]] = {"ours": [], "generate": [], "llama_cpp": []}
    counts: dict[str, list[int]] = {"ours": [], "generate": [], "llama_cpp": []}
    different: dict[str, list[int]] = {"generate": [], "llama_cpp": []}
    missing = {}
    server: Any = nullcontext(None)
    try:
        server = llama_server(model, student.weights, options.llama_weights)
    except LlamaMissing as why:
        missing["vs_llama_cpp"] = str(why)

    def note(name: str, turns: list[Turn], texts: list[str], seconds: float) -> None:
        speeds[name].append(len(turns) / seconds)
        counts[name].append(len(turns))
        if name != "ours":
            different[name].append(sum(turn.text != text for turn, text in zip(turns, texts, strict=True)))

    with server as url:
        # One conversation first: what is made once is made before the clock runs.
        warm, _ = ours(decoder, ToTheEnd(tokenizer), [chosen[0][0][2]])
        generated(decoder, warm[0][:1])
        for group in chosen:
            found, seconds = ours(decoder, ToTheEnd(tokenizer), [encoded for _, _, encoded in group])
            turns = [turn for conversation in found for turn in conversation]
            note("ours", turns, [], seconds)
            some = chance.sample(turns, min(options.generate_turns, len(turns)))
            note("generate", some, *generated(decoder, some))
            if url:
                some = [turn for conversation in found[:options.llama_conversations] for turn in conversation]
                note("llama_cpp", some, *completed(url, tokenizer, [turn.prompt for turn in some], decoder.max_new_tokens))

    def against(name: str) -> list[float]:
        return [a / b for a, b in zip(speeds["ours"], speeds[name], strict=True)]

    return EvalPart(
        **here, missing=missing, model="student" if trained else "base", conversations=options.conversations, turns=counts, turns_per_s=speeds,
        different=different, llama_weights=None if missing else options.llama_weights, vs_generate=ratio(against("generate")),
        vs_llama_cpp=None if missing else ratio(against("llama_cpp")))
