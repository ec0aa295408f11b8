"""What dvc.yaml declares is what the code reads and writes, and packages depend on each other one way."""

import ast
import json
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import yaml

from tests.layout import CALLED, PACKAGES, ROOT, SIMULATED, imports, stage_code

PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
STAGES = PIPELINE["stages"]
MODULES = {name: stage["cmd"].split()[2].removeprefix("stages.") for name, stage in STAGES.items()}
SHOWING = {"table", "card", "estimate", "cache", "compare", "gate", "pr_comment", "sweep", "check"}
"""Modules that are no stage: they show what stages wrote or would do, and write no output of the pipeline."""
SWEEP = {"metrics/sweep/calibration.csv"}
"""Drawn beside the outputs; a command writes it."""
COMPANIES = "data/companies"
"""Declared by stages, named once, in schemas/company.py."""


def resolved(path):
    """`${section.key}` as params.yaml has it."""
    value = PARAMS
    for key in path.removeprefix("${").removesuffix("}").split("."):
        value = value[key]
    return value


def names(entries):
    found = [next(iter(entry)) if isinstance(entry, dict) else entry for entry in entries or []]
    return {resolved(path) if path.startswith("${") else path for path in found}


def is_code(path):
    """Python, or a page that a stage fills in: it lies in one of our packages."""
    return Path(path).parts[0] in PACKAGES


def inputs(stage):
    return {path for path in names(STAGES[stage]["deps"]) if not is_code(path)}


def outputs(stage):
    return names(STAGES[stage].get("outs")) | names(STAGES[stage].get("metrics")) | names(STAGES[stage].get("plots"))


def of_module(module, what):
    """Union over the stages that run the module: `predict` is run by two."""
    return set().union(*(what(stage) for stage, runs in MODULES.items() if runs == module))


def tree(module):
    return ast.parse((ROOT / "stages" / f"{module}.py").read_text(encoding="utf-8"))


def named_paths(module):
    """The `NAME = Path("…")` constants at the top of a stage."""
    values = [node.value for node in tree(module).body if isinstance(node, ast.Assign)]
    return {value.args[0].value for value in values if isinstance(value, ast.Call) and getattr(value.func, "id", "") == "Path"}


def calls(module, function):
    """The first arguments of all calls of a function in a stage."""
    return [node.args[0] for node in ast.walk(tree(module)) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == function and node.args]


def ancestors(path):
    """All paths that a path is made from, directly or not."""
    makers = {output: stage for stage in STAGES for output in outputs(stage)}
    found, waiting = set(), {path}
    while waiting:
        new = inputs(makers[maker]) if (maker := waiting.pop()) in makers else set()
        waiting |= new - found
        found |= new
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_runs_its_module_and_says_what_for(stage):
    python, flag, module, *arguments = STAGES[stage]["cmd"].split()
    assert (python, flag) == ("python", "-m") and (ROOT / f"{module.replace('.', '/')}.py").is_file()
    assert stage == "_".join([MODULES[stage], *arguments]), "a stage is called as its module, with the argument if there is one"
    assert STAGES[stage]["desc"].strip()
    assert names(STAGES[stage].get("metrics")) <= {f"metrics/{MODULES[stage]}.json"}
    assert {Path(path).parts[1] for path in outputs(stage) if path.startswith("data/")} <= {MODULES[stage]}


def test_every_module_is_a_stage_or_shows_results():
    modules = {path.stem for path in (ROOT / "stages").glob("*.py")}
    assert {module for module in modules if not module.startswith("_")} == {*MODULES.values(), *SHOWING}


@pytest.mark.parametrize("stage", STAGES)
def test_the_declared_params_are_those_the_stage_loads(stage):
    role, command = SIMULATED.get(MODULES[stage]), CALLED.get(MODULES[stage])
    modules = [MODULES[stage], *([command] if command else [])]
    loaded = {call.value for module in modules for call in calls(module, "load_params")} | ({f"simulator.{role}"} if role else set())
    assert of_module(MODULES[stage], lambda stage: set(STAGES[stage].get("params", []))) == loaded
    for section in loaded:
        found = PARAMS
        for key in section.split("."):
            found = found[key]


def test_every_section_of_params_yaml_is_used():
    declared = {section for stage in STAGES.values() for section in stage.get("params", [])}
    sections = {name for name in PARAMS if name != "simulator"} | {f"simulator.{role}" for role in PARAMS["simulator"]}
    assert declared == sections


@pytest.mark.parametrize("stage", STAGES)
def test_the_code_a_stage_depends_on_is_all_declared_and_no_more(stage):
    declared = {path for path in names(STAGES[stage]["deps"]) if is_code(path)}
    needed = stage_code(MODULES[stage])
    assert (needed - declared, declared - needed) == (set(), set())


def test_every_page_beside_the_stages_is_one_that_a_stage_names():
    pages = {path.relative_to(ROOT).as_posix() for path in (ROOT / "stages").rglob("*.*") if path.suffix not in (".py", ".pyc")}
    assert pages and pages == set().union(*(stage_code(module) for module in MODULES.values())) & pages


@pytest.mark.parametrize("module", sorted(set(MODULES.values())))
def test_the_paths_a_stage_names_are_those_it_declares(module):
    chosen = set(PARAMS[module]["recorded"].values()) if module == "teacher_gen" else set()
    declared = of_module(module, lambda stage: inputs(stage) | outputs(stage))
    assert chosen <= declared and named_paths(module) == declared - {COMPANIES} - chosen


@pytest.mark.parametrize("module", sorted(set(MODULES.values())))
def test_a_stage_that_loads_companies_depends_on_them(module):
    loads = any(calls(module, function) for function in ("used_companies", "load_company")) or "load_companies()" in ast.unparse(tree(module))
    assert loads == (COMPANIES in of_module(module, inputs))


@pytest.mark.parametrize("module", ["table", "compare", "gate", "pr_comment", "_revisions"])
def test_a_command_reads_what_stages_write(module):
    assert named_paths(module) and named_paths(module) - {"dvc.lock"} <= set().union(*map(outputs, STAGES))


def test_a_path_has_one_writer_and_every_input_has_one_or_is_data():
    writers = defaultdict(list)
    for stage in STAGES:
        for path in outputs(stage):
            writers[path].append(stage)
    assert not {path: stages for path, stages in writers.items() if len(stages) > 1}
    sources = set().union(*map(inputs, STAGES)) - set(writers)
    assert all((ROOT / path).exists() for path in sources) and COMPANIES in sources


def test_plots_lie_in_an_output():
    written = set().union(*map(outputs, STAGES)) | SWEEP
    for plot in PIPELINE["plots"]:
        (name, drawn), = plot.items()
        for path in drawn["y"] if isinstance(drawn["y"], dict) else [name]:
            assert any(Path(path).is_relative_to(out) for out in written), path


def test_dvc_draws_one_picture_a_plot(tmp_path):
    """Each in an element of its own, whose name the page's script can select, with the rows of every file."""
    done = subprocess.run(["dvc", "plots", "show", "-o", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    places, drawn = (re.findall(pattern, page) for pattern in (r'<div id = "(.*)">', r"vegaEmbed\('#([\w-]+)', spec\)"))
    specs = [json.loads(spec) for spec in re.findall(r"var spec = (.*);", page)]
    assert len(places) == len(PIPELINE["plots"]) == len(specs) and places == drawn
    for plot, spec in zip(PIPELINE["plots"], specs, strict=True):
        (name, of), = plot.items()
        rows = spec["data"]["values"]
        assert all(of["x"] in row for row in rows)
        drawn_of = of["y"] if isinstance(of["y"], dict) else {name: of["y"]}
        assert len(rows) == sum((len((ROOT / path).read_text(encoding="utf-8").splitlines()) - 1) * (len(fields) if isinstance(fields, list) else 1)
                                for path, fields in drawn_of.items())


@pytest.mark.parametrize("path", ["models/qlora_train", "data/oversample/train.parquet"])
def test_training_never_sees_the_held_out_companies(path):
    """The two arms part in verify: of its tables only the training one leads to the student."""
    assert {found for found in ancestors(path) if found.startswith("data/verify/")} == {"data/verify/train.parquet"}
    assert not {found for found in ancestors(path) if found.startswith(("data/predict", "data/eval", "metrics/"))}


def test_evaluation_is_on_the_held_out_companies_and_the_student():
    assert {"data/verify/held_out.parquet", "models/qlora_train"} <= ancestors("metrics/eval_exact.json")
    assert "models/qlora_train" not in ancestors("data/predict/base.parquet")


def test_the_calibration_split_is_read_to_score_it_and_never_to_train():
    assert "data/verify/calibration.parquet" not in ancestors("models/qlora_train")
    assert "yardsticks" in {stage for stage in STAGES if "data/verify/calibration.parquet" in inputs(stage)}


def test_the_documents_say_who_played_and_who_reads_the_calibration_split():
    """The simulators where they are the default, the metrics files that name them, and the readers that dvc.yaml declares."""
    card, readme = ((ROOT / path).read_text(encoding="utf-8") for path in ("data/README.md", "README.md"))
    row = next(line for line in card.splitlines() if line.startswith("| `calibration` |"))
    readers = {stage for stage in STAGES if "data/verify/calibration.parquet" in inputs(stage)}
    assert set(re.findall(r"`(\w+)`", row)) == {"calibration", "calibrate"} | readers
    naming = {f"metrics/{path.name}" for path in (ROOT / "metrics").glob("*.json") if {"teacher", "judge"} & set(json.loads(path.read_text()))}
    caveat = readme.partition("The teacher and the judge are simulators by default")[2].partition("\n- **")[0]
    assert set(re.findall(r"`(metrics/\w+\.json)`", caveat)) == naming
    played = {"teacher": PARAMS["teacher_gen"]["teacher"], "judge": PARAMS["eval_judge"]["judge"]}
    model_card = (ROOT / "models/README.md").read_text(encoding="utf-8")
    assert {role for role in played if f"simulated {role}" in model_card} == {role for role in played if played[role]["base_url"] == "simulator"}


MAY_IMPORT = {"schemas": {"schemas"}, "agent": {"agent", "schemas"}, "simulator": {"simulator", "schemas"}, "stages": {"stages", "agent", "schemas"}}


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_one_way(package):
    for path in sorted((ROOT / package).rglob("*.py")):
        found = imports(path.relative_to(ROOT))
        allowed = MAY_IMPORT[package] | ({"simulator"} if path == ROOT / "stages/check.py" else set())  # it reads the simulator's parameters too
        assert {file.parts[0] for file in found} <= allowed, path
        if package == "stages" and path.stem not in SHOWING:
            assert all(file.parts[1].startswith("_") for file in found if file.parts[0] == "stages"), f"{path} imports another stage"


LIGHT = ["agent.loop", "schemas.tables", "stages.corpus", "stages.teacher_gen", "stages.verify", "stages.oversample", "stages.eval_exact",
         "stages.eval_judge", "stages.yardsticks", "stages.calibrate", "stages.report", "stages.table", "stages.compare", "stages.gate",
         "stages.pr_comment", "simulator.__main__"]


def test_what_needs_no_model_imports_no_torch():
    """One after the other in one interpreter: none after the last is none after any."""
    code = ("import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(name)\n"
            "    print(*(f'{name}: {heavy}' for heavy in ('torch', 'transformers') if heavy in sys.modules), sep='\\n', end='')")
    done = subprocess.run([sys.executable, "-c", code, *LIGHT], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_readme_names_every_file_with_long_tests():
    files = {path.name for path in (ROOT / "tests").glob("test_*.py") if "pytest.mark.long" in path.read_text(encoding="utf-8")} - {"test_layout.py"}
    assert files == set(re.findall(r"^\| `tests/(test_\w+\.py)` \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE))
