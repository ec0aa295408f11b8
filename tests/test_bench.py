"""The benchmark measures what it says and writes a valid file, at sizes that take no time; how fast anything is, is not tested."""

import json
import subprocess
import sys
from argparse import ArgumentParser
from contextlib import nullcontext

import polars as pl
import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from agent.compiled import TILE, library
from agent.encode import Encoded
from agent.student import backbone
from bench import repro, tables, trl_student
from bench._copies import many_scenarios
from bench._flop import READ_BY_OTHERS, _linear, linear_flop
from bench._measure import RESULTS, ProcessFailed, add_result, ratio, read_results, this_machine, watch
from bench._traces import TICKET, grow
from schemas.action import parse_action
from schemas.bench import BenchMetrics, Machine, TablesPart
from schemas.company import Kind
from schemas.errors import InputError
from stages import predict
from stages._batches import Collator, Example
from stages.eval_exact import gold_turns
from stages.qlora_train import adapted, supervised_nll
from tests.helpers import PARAMS, inside, played, real, traces, workspace
from tests.layout import ROOT
from tests.students import STUDENT, tokenizer

GYM = real("gym")


def options(module, *words):
    parser = ArgumentParser()
    module.add_arguments(parser)
    return parser.parse_args(words)


def bench(*words):
    return subprocess.run([sys.executable, "-m", "bench", *words], capture_output=True, text=True, check=False)


def written():
    return BenchMetrics.model_validate(json.loads(RESULTS.read_text(encoding="utf-8")))


def real_traces(count=4):
    """A few real conversations of a training and of a held-out company."""
    return traces(*((company.slug, scenario.id, 0, played(company, scenario))
                    for company in (GYM, real("travel")) for scenario in company.scenarios[:count]))


@pytest.fixture
def space(tmp_path):
    workspace(tmp_path)
    with inside(tmp_path):
        yield tmp_path


def put_traces(folder, table):
    (folder / tables.TRACES).parent.mkdir(parents=True)
    table.write_parquet(folder / tables.TRACES)


def test_a_ratio_comes_with_its_spread():
    assert ratio([2.0, 4.0, 1.0]).model_dump() == {"median": 2.0, "low": 1.0, "high": 4.0, "rounds": [2.0, 4.0, 1.0]}


def test_a_process_is_watched_to_its_end_and_its_memory_is_its_own(tmp_path):
    (tmp_path / "work.py").write_text("import sys; print('done'); x = bytearray(int(sys.argv[1]) * 2**20)")
    (small, said), (large, _) = (watch("work", size, cwd=tmp_path, limit_s=60) for size in ("0", "200"))
    assert said == "done" and small.peak_mb < 60 and 190 < large.peak_mb - small.peak_mb < 210


@pytest.mark.parametrize(("code", "why", "limit_s"), [
    ("raise SystemExit('no such thing')", "exit code 1: no such thing", 60), ("while True: pass", "stopped", 2)])
def test_a_process_that_fails_says_why(tmp_path, code, why, limit_s):
    (tmp_path / "work.py").write_text(code)
    with pytest.raises(ProcessFailed, match=why):
        watch("work", cwd=tmp_path, limit_s=limit_s)


def empty_part(commit):
    return TablesPart(commit=commit, load=0.0, sizes=[])


def test_a_part_leaves_the_others_where_they_are(tmp_path):
    path = tmp_path / "bench.json"
    minutes = {name: 1.0 for name in ("install", "data", "train", "evaluate", "judge")}
    add_result("repro", repro.ReproPart(commit="a", load=0.0, minutes=minutes, total=5.0, stages_s={}), path)
    add_result("tables", empty_part("b"), path)
    results = add_result("tables", empty_part("c"), path)
    assert read_results(path) == results.details
    assert (results.details.repro.commit, results.details.tables.commit, results.repro_minutes, results.train_vs_trl) == ("a", "c", 5.0, None)


@pytest.mark.parametrize(("content", "why"), [("{", "no results"), ('{"train_vs_trl": 2.0}', "no results"), (None, "another machine")])
def test_a_file_that_cannot_be_added_to_is_refused_and_left(tmp_path, content, why):
    path = tmp_path / "bench.json"
    elsewhere = Machine(**{**this_machine().model_dump(), "cpu": "abacus"})
    path.write_text(content or BenchMetrics.of(read_results(path), elsewhere).model_dump_json())
    before = path.read_text()
    with pytest.raises(InputError, match=why):
        add_result("tables", empty_part("a"), path)
    assert path.read_text() == before


def test_copies_of_traces_are_whole_and_no_duplicates():
    base = real_traces()
    per_copy = int((base["role"] == "agent").sum())
    grown = grow(base, 3 * per_copy)
    assert len(grown) == 3 * len(base) and (grown["role"] == "agent").sum() == 3 * per_copy
    openings = grown.filter(pl.col("index") == 0)
    assert openings["content"].n_unique() == grown["conversation_id"].n_unique() == 3 * base["conversation_id"].n_unique()
    part = grow(base, 5)
    lengths = dict(base.group_by("scenario").len().iter_rows())
    assert 5 <= (part["role"] == "agent").sum() < per_copy
    assert all(lengths[name] == length for name, length in part.group_by("scenario").len().iter_rows())


def test_no_two_copies_share_what_customer_and_agent_write():
    base = real_traces()
    grown = grow(base, 3 * int((base["role"] == "agent").sum()))
    written = pl.col("role").is_in(["customer", "agent"]) | pl.col("content").str.contains(TICKET)
    same = {name: table.filter(written).group_by("content").len()["len"].sort().to_list() for name, table in (("base", base), ("grown", grown))}
    assert same["grown"] == sorted(3 * same["base"])
    steps = grown.filter(pl.col("role") == "agent")["content"]
    words = ["", "qc ", "qd "]
    assert [parse_action(text).thought for text in steps] == [
        word + parse_action(text).thought for word in words for text in base.filter(pl.col("role") == "agent")["content"]]


def test_a_process_that_starts_others_is_watched_with_them(tmp_path):
    held = "import time; x = bytearray(100 * 2**20); time.sleep(2)"
    (tmp_path / "work.py").write_text(
        f"import subprocess, sys\nfor p in [subprocess.Popen([sys.executable, '-c', {held!r}]) for _ in range(2)]: p.wait()")
    process, _ = watch("work", cwd=tmp_path, limit_s=60)
    assert process.peak_mb > 220


def test_tables_are_measured_through_the_stages(space):
    put_traces(space, real_traces())
    part = tables.measure(options(tables, "--turns", "60", "5"))
    small, large = part.sizes
    assert not part.missing and (small.turns, large.turns) >= (5, 60) and large.kept == large.conversations > small.conversations
    assert large.verify.peak_mb > 10 < large.oversample.peak_mb


def test_a_table_that_takes_too_long_is_missing_with_a_reason(space):
    put_traces(space, real_traces())
    part = tables.measure(options(tables, "--turns", "5", "--limit-s", "0.1"))
    assert part.sizes == [] and "stopped after" in part.missing["5 turns"]


def test_no_two_copied_scenarios_say_the_same_first(space):
    companies = many_scenarios(1500)
    scenarios = [scenario for company in companies.values() for scenario in company.scenarios]
    assert len(scenarios) == 1500 == len({scenario.turns[0].customer for scenario in scenarios})
    assert len({(scenario.customer.aim, scenario.customer.facts) for scenario in scenarios}) == 1500


def test_calls_and_conversations_are_counted_and_timed(space):
    words = ["teacher_gen", "--latency-s", "0.05", "--slots", "1", "3", "--calls-per-slot", "2", "--rounds", "2", "--conversations", "12",
             "--held", "6", "--held-slots", "2", "--held-latency-s", "0.02"]
    done = bench(*words)
    assert done.returncode == 0, done.stderr
    results = written()
    part = results.details.teacher_gen
    assert [(level.slots, level.calls, len(level.seconds)) for level in part.levels] == [(1, 2, 2), (3, 6, 2)]
    assert all(seconds >= level.ideal_s for level in part.levels for seconds in level.seconds), "calls overlapped more than they may"
    held = part.held
    assert held.ideal_s == pytest.approx(0.02 * held.calls / 2) and held.calls > 3 * 6
    assert len(held.seconds) == 2 and all(seconds >= held.ideal_s for seconds in held.seconds), "the server answered more at a time than it may"
    assert part.generation.conversations == 12 and part.generation.calls > 3 * 12 and part.generation.peak_mb >= part.generation.start_mb
    assert results.teacher_gen_vs_ideal == min(level.vs_ideal.median for level in part.levels) <= 1
    assert results.conversations_vs_ideal == held.vs_ideal.median <= 1
    # The customer's first line and its last word, that there is nothing more, are asked for as well.
    calls = [sum(1 + len(turn.agent) for turn in scenario.turns) + (scenario.kind is not Kind.HANDOFF)
             for company in many_scenarios(12).values() for scenario in company.scenarios]
    assert (part.generation.calls, part.generation.longest) == (sum(calls), max(calls))
    assert not (space / ".cache/responses").exists()


def test_start_up_without_a_pipeline_says_why_and_still_measures_imports(space):
    assert bench("start_up", "--rounds", "1").returncode == 0
    part = written().details.start_up
    assert part.extra_s is None and "dvc status" in part.missing["extra_s"]
    assert part.imports["stages.oversample"].seconds > 0 and not part.imports["schemas.tables"].torch


STAGES = list(yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"])


def log(*, times, stages=STAGES):
    lines = [f"{times[0]} pip install", *(f"{second} \x1b[?25lRunning stage '{name}':" for second, name in zip(times[1:], stages, strict=False))]
    return [*lines, f"{times[-1]} the table"]


def test_every_stage_has_its_place_among_the_minutes():
    assert set(repro.SECTIONS) == set(STAGES) and set(repro.SECTIONS.values()) | {"install"} == set(repro.Minutes.model_fields)


def test_a_log_is_parted_by_stage(space):
    times = [1000 + 60 * number for number in range(len(STAGES) + 2)]
    lines = "\n".join(log(times=times)).replace("Running stage 'corpus':", "Stage 'corpus' didn't change, skipping")
    (space / "log").write_text(lines.replace("Running stage 'report':", "half\rdone\rRunning stage 'report':"), newline="")
    part = repro.measure(options(repro, "--log", "log"))
    assert part.stages_s == {name: 60 for name in ("install", *STAGES)} and part.total == len(STAGES) + 1
    assert part.minutes.model_dump() == {"install": 1, "data": 4, "train": 1, "evaluate": len(STAGES) - 6, "judge": 1}


@pytest.mark.parametrize(("lines", "why"), [
    (["pip install"], "does not begin with seconds"), (["0 Running stage 'brew':"], "no stage"), (["0 all is up to date"], "not of a whole run")])
def test_a_log_of_something_else_is_refused(space, lines, why):
    (space / "log").write_text("\n".join(lines))
    with pytest.raises(InputError, match=why):
        repro.measure(options(repro, "--log", "log"))


def tiny_model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=TILE,
        vocab_size=len(tokenizer()), bos_token_id=1, eos_token_id=2, pad_token_id=2, tie_word_embeddings=True))


@pytest.mark.skipif(library() is None, reason="torch cannot count where its own fused attention computes")
@pytest.mark.parametrize("first", [0, 2])
def test_the_flops_are_those_that_torch_counts(first, tmp_path, monkeypatch):
    """Torch counts matrix products as they run; attention's are of another kind, and it knows none with weights that oneDNN laid out."""
    from peft import LoraConfig, get_peft_model

    from agent.layer_states import LayerStates
    from agent.student import only_layers

    model = get_peft_model(tiny_model(), LoraConfig(r=3, target_modules=adapted(4, first), task_type="CAUSAL_LM"))
    batch = [Example("g", Encoded(list(range(5)) + [7 + row] * 6, 5, [(7, 11)]), 1) for row in range(3)]

    def products(counter):
        return sum(count for what, count in counter.get_flop_counts().get("Global", {}).items() if what in (torch.ops.aten.mm, torch.ops.aten.addmm))

    monkeypatch.setattr("agent.layer_states.prepacked", nullcontext)
    states = LayerStates(model, first, tmp_path) if first else None
    with FlopCounterMode(display=False) as below:
        if states:
            states.compute([example.encoded for example in batch], "test")
    with FlopCounterMode(display=False) as above, only_layers(model, first, 4):
        supervised_nll(model, Collator(True, states)(batch), share=True).backward()
    # What is computed and not needed: the gradient, at the prefix, of what the last layer makes of it for itself.
    unread = [(inputs, outputs, rank) for name, inputs, outputs, rank in _linear(backbone(model).layers[-1]) if name not in READ_BY_OTHERS]
    wasted = sum(2 * (inputs * outputs + 2 * rank * (inputs + outputs)) * batch[0].encoded.prefix for inputs, outputs, rank in unread)
    assert linear_flop(model, backbone(model).layers, first, [[*batch]]) == (products(below), products(above) - wasted)


@pytest.fixture
def small_student(space):
    """A workspace whose student has four tiny layers."""
    tiny_model().save_pretrained(space / "tiny")
    tokenizer().save_pretrained(space / "tiny")
    workspace(space, student={"weights": str(space / "tiny")}, qlora_train={"first_layer": 2}, predict={"max_new_tokens": 6})
    rows = real_traces(6).select("conversation_id", "company", "index", "role", "content", "scenario").with_columns(
        system=pl.lit("Be short."), kind=pl.lit("ordinary"))
    for path, table in (("data/verify/held_out.parquet", rows), ("data/oversample/train.parquet", rows.with_columns(copy=pl.lit(0, dtype=pl.Int64)))):
        (space / path).parent.mkdir(parents=True)
        table.write_parquet(space / path)


@pytest.mark.long
def test_training_and_evaluation_are_measured_against_others(small_student):
    done = bench("train", "--batches", "2", "--rounds", "2")
    assert done.returncode == 0, done.stderr
    done = bench("eval", "--rounds", "2", "--conversations", "6", "--generate-turns", "3")
    assert done.returncode == 0, done.stderr
    results = written()
    train, evaluation = results.details.train, results.details.eval
    assert len(train.vs_trl.rounds) == 2 == len(train.matmul_gflop_per_s) and train.tokens > 0 and train.repeats == 1
    assert results.train_vs_trl == train.vs_trl.median and results.train_vs_roofline == train.vs_roofline.median
    assert evaluation.turns["generate"] == [3, 3] and evaluation.turns["llama_cpp"] == [] and evaluation.model == "base"
    assert results.eval_vs_llama_cpp is None and "vs_llama_cpp" in evaluation.missing
    assert not (ROOT / "metrics/qlora_train/params.yaml").exists(), "training wrote into the repository"


@pytest.mark.long
def test_a_student_of_trls_trainer_is_set_beside_ours_turn_by_turn(small_student, space, monkeypatch):
    """Ours says what the gold step says, which a tiny model of random weights does not."""
    def spent(*_):
        raise AssertionError("an hour of training was spent for nothing")

    monkeypatch.setattr(trl_student, "CACHE", space / "cache")
    gold = gold_turns(held_out := pl.read_parquet(predict.HELD_OUT))
    ours = held_out.filter(pl.col("role") == "agent").join(gold, on=["conversation_id", "index"]).select(
        "conversation_id", "number", model=pl.lit("student"), decoding=pl.lit("free"), raw="content", other=pl.lit(None, dtype=pl.String))
    predict.STUDENT_REPLIES.parent.mkdir(parents=True)
    ours.tail(-1).write_parquet(predict.STUDENT_REPLIES)
    with monkeypatch.context() as patched, pytest.raises(InputError, match=f"replied to {len(gold) - 1} of {len(gold)}"):
        patched.setattr(trl_student, "train", spent)
        trl_student.measure(options(trl_student))
    ours.write_parquet(predict.STUDENT_REPLIES)
    part = trl_student.measure(options(trl_student))
    turns, handoffs = len(gold), int((gold["gold_action"] == "escalate").sum())
    for name, k, n in (("action_accuracy", turns, turns), ("escalate_recall", handoffs, handoffs), ("over_escalation", 0, turns - handoffs)):
        found = part.rates["pooled"][name]
        assert (found.k_trl, found.k_ours, found.n, found.gained, found.lost) == (0, k, n, k, 0), name
    assert set(part.rates) == {"gym", "travel", "pooled"} and part.rates["pooled"]["action_accuracy"].difference == 1
    monkeypatch.setattr(trl_student, "train", spent)
    assert trl_student.measure(options(trl_student)).rates == part.rates


@pytest.mark.long
def test_weights_written_for_llama_cpp_are_read_back_as_they_were(tmp_path):
    from importlib.util import find_spec
    from pathlib import Path

    from bench._llama import write_gguf
    from tests.students import base

    source = next(Path(find_spec(STUDENT.weights.replace("-", "_")).origin).parent.glob("*.gguf"))
    write_gguf(base(), source, tmp_path / "w.gguf", "f32")
    read = type(base()).from_pretrained(str(tmp_path), gguf_file="w.gguf", dtype=torch.float32)
    for name, tensor in base().state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor), name
    assert PARAMS["student"]["weights"] == STUDENT.weights
