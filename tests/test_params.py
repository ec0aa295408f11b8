"""params.yaml as a user edits it: each model's block alone, and README's example laid over it."""

import re

import pytest
import yaml

from stages._stage import load_params
from stages.eval_judge import EvalJudgeParams
from stages.teacher_gen import TeacherGenParams
from tests.helpers import documented
from tests.layout import ROOT

TEXT = (ROOT / "params.yaml").read_text(encoding="utf-8")
SECTIONS = {"teacher_gen": TeacherGenParams, "eval_judge": EvalJudgeParams}
BLOCKS = {"teacher": ("teacher_gen", "teacher"), "customer": ("teacher_gen", "customer"), "judge": ("eval_judge", "judge")}
GLM = re.search(r"```yaml\n(teacher_gen:\n.*?)```", documented("Use a real teacher"), re.DOTALL)[1].replace("…", "1.0")


def place(text, stage, key):
    """Where an entry of a section stands, with all below it: its first line, and the one after its last."""
    lines = text.splitlines(keepends=True)
    start = next(at for at in range(lines.index(f"{stage}:\n"), len(lines)) if lines[at].startswith(f"  {key}:"))
    return lines, start, next(at for at in range(start + 1, len(lines)) if not lines[at].startswith("   "))


def pasted(text, snippet):
    """`text` with the entries of a section that `snippet` has taken from there; everything else stays as it was written."""
    stage, *entries = [line.split(":")[0] for line in snippet.splitlines() if not line.startswith("   ")]
    for key in map(str.strip, entries):
        new, begin, stop = place(f"{snippet}\n", stage, key)
        lines, start, end = place(text, stage, key)
        text = "".join(lines[:start] + new[begin:stop] + lines[end:])
    return text


def models(folder, text):
    """The three models' blocks, read as the stages read them."""
    (folder / "params.yaml").write_text(text, encoding="utf-8")
    read = {name: load_params(name, model, folder / "params.yaml") for name, model in SECTIONS.items()}
    return {role: getattr(read[stage], key) for role, (stage, key) in BLOCKS.items()}


def test_the_documented_teacher_loads_and_leaves_the_judge_the_simulator(tmp_path):
    found = models(tmp_path, pasted(TEXT, GLM))
    assert found["teacher"] == found["customer"] and found["teacher"].model == "glm-5.2" and found["teacher"].price.output == 1.0
    assert found["judge"].simulated


@pytest.mark.parametrize("role", BLOCKS)
def test_a_block_is_edited_alone(tmp_path, role):
    lines, start, end = place(TEXT, *BLOCKS[role])
    paid = [line.replace("base_url: simulator", "base_url: https://models.example/v1") for line in lines[start:end]]
    found = models(tmp_path, "".join(lines[:start] + paid + lines[end:]))
    assert {name for name, endpoint in found.items() if not endpoint.simulated} == {role}


def test_nothing_in_params_yaml_stands_for_something_elsewhere_in_it():
    assert not [token for token in yaml.scan(TEXT) if isinstance(token, yaml.AnchorToken | yaml.AliasToken)]
