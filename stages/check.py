"""Find mistakes in params.yaml, the companies and the logs, and missing weights, before anything runs: DVC removes a stage's outputs before it
starts it.

    python -m stages.check

Every section is read, also those of stages that would not run; a section that nobody reads is a mistake.
"""

from __future__ import annotations

from pydantic import BaseModel

from agent.probe_layer import HandoffScoreParams
from agent.student import StudentParams, find_weights
from schemas.company import Company
from schemas.errors import InputError
from schemas.recorded import Source
from simulator import actors, judge
from stages._recorded import read_logs
from stages._stage import PARAMS, DataParams, Params, load_params, read_params, run, say, used_companies
from stages.calibrate import CalibrateParams
from stages.eval_judge import EvalJudgeParams
from stages.gate import GateParams
from stages.oversample import OversampleParams
from stages.predict import PredictParams
from stages.qlora_train import QloraTrainParams
from stages.report import ReportParams
from stages.teacher_gen import TeacherGenParams
from stages.verify import VerifyParams
from stages.yardsticks import model_folder


class SimulatorParams(Params):
    """`simulator`: the simulator reads one role's rates itself."""

    actors: actors.Rates
    judge: judge.Rates


SECTIONS: dict[str, type[BaseModel]] = {
    "data": DataParams, "teacher_gen": TeacherGenParams, "verify": VerifyParams, "oversample": OversampleParams, "student": StudentParams,
    "qlora_train": QloraTrainParams, "handoff_score": HandoffScoreParams, "predict": PredictParams, "eval_judge": EvalJudgeParams,
    "calibrate": CalibrateParams, "gate": GateParams, "report": ReportParams, "simulator": SimulatorParams}


def check_sections() -> None:
    """All of params.yaml.

    Raises:
        InputError: a section is missing or nobody reads it, a key is unknown, or a value has the wrong type.
    """
    for section in read_params():
        if section not in SECTIONS:
            raise InputError(f"{PARAMS}: unknown section '{section}'", f"known here: {', '.join(SECTIONS)}")
    for section, model in SECTIONS.items():
        load_params(section, model)


def check_companies() -> dict[str, Company]:
    """The companies as the stages will load them; where logs are the teacher, those are read too.

    Raises:
        InputError: a company, a log or the mapping is broken, or the companies cannot be parted.
    """
    data, generation = load_params("data", DataParams), load_params("teacher_gen", TeacherGenParams)
    if generation.source is not Source.RECORDED:
        return used_companies(data)
    return used_companies(data, {row["company"] for row in read_logs(generation.recorded, data).traces})


def check_weights() -> None:
    """The weights that stages load hours later: the student's, as far as they are on this machine, and the sentence embedding's.

    Raises:
        InputError: they are not there.
    """
    find_weights(load_params("student", StudentParams).weights)
    model_folder()


def main() -> None:
    check_sections()
    companies = check_companies()
    check_weights()
    say(f"check: {len(SECTIONS)} sections of {PARAMS} and {len(companies)} companies can be read")


if __name__ == "__main__":
    run(main)
