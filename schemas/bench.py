"""`metrics/bench.json`: how fast the loop is beside what others, or the machine, would do."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Seconds = Annotated[float, Field(ge=0)]
Megabytes = Annotated[float, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]


class _Bench(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Machine(_Bench):
    """Where it was measured. Figures from two machines never stand in one file."""

    cpu: str
    cores: Count = Field(description="that this process may use")
    memory_gb: float
    system: str
    python: str


class Ratio(_Bench):
    """Our speed over another's, one value a round, both sides measured within it; above 1 we are faster."""

    median: float
    low: float
    high: float
    rounds: list[float] = Field(min_length=1)


class Part(_Bench):
    """What every part says of itself."""

    commit: str = Field(description="what was measured, with `-dirty` where files differed from it")
    load: float = Field(description="mean number of processes that wanted to run in the minute before it began; near 0 on a quiet machine")
    missing: dict[str, str] = Field(default={}, description="figure -> why it is null")


class TrainPart(Part):
    """A few batches of the training table, by our trainer and by TRL's SFTTrainer with plain settings."""

    batches: Count = Field(description="of ours, the optimiser steps of a round")
    conversations: Count = Field(description="distinct ones, in a round")
    tokens: Count = Field(description="of those, each once, no padding")
    trl_batch: Count = Field(description="conversations in a batch of TRL's: as many as make batch_tokens at their mean length")
    tokens_per_s: dict[str, list[Rate]] = Field(description="`ours` and `trl`, by round")
    loss: dict[str, list[float]] = Field(description="mean over a round's steps; later rounds see the same conversations again")
    vs_trl: Ratio
    repeats: float = Field(ge=1, description="tokens of the whole table over those of its distinct conversations: what TRL reads more of in an epoch")
    linear_tflop: Rate = Field(description="of a round, in linear layers; bench/_flop.py has the formula")
    attention_tflop: Rate = Field(description="of a round, in attention scores and values")
    matmul_gflop_per_s: list[Rate] = Field(description="of a large torch.mm, fp32, by round")
    vs_roofline: Ratio = Field(description="linear and attention's FLOPs a second over that rate: model FLOPs utilisation (Chowdhery et al. 2022)")
    vs_roofline_linear: Ratio = Field(description="linear ones alone: at most what they are of linear and attention's")


class PairedRate(_Bench):
    """One rate of two students, over the same turns; what is said of the difference draws whole conversations."""

    k_trl: Count
    k_ours: Count
    n: Count = Field(description="turns that the rate is of")
    lost: Count = Field(description="turns that count for TRL's student alone")
    gained: Count = Field(description="turns that count for ours alone")
    difference: float | None = Field(description="ours less TRL's, a share; null for no turns")
    low: float | None = Field(description="of its 95 % interval")
    high: float | None
    cluster_p: float = Field(ge=0, le=1, description="of no difference, by Fisher's randomisation test")


class TrlStudentPart(Part):
    """A student that TRL's SFTTrainer trained on the whole table, beside ours, on the turns of the held-out companies."""

    rates: dict[str, dict[str, PairedRate]] = Field(description="company, or `pooled` -> action_accuracy, escalate_recall, over_escalation")


class EvalPart(Part):
    """Agent turns of held-out conversations, taken by our decoder, by `generate`, and by llama.cpp's server."""

    model: str = Field(description="`student`, or `base` where no adapter is there")
    conversations: Count = Field(description="in a round")
    turns: dict[str, list[Count]] = Field(description="`ours`, `generate`, `llama_cpp`: how many each took, by round")
    turns_per_s: dict[str, list[Rate]]
    different: dict[str, list[Count]] = Field(description="turns whose text is not ours, of those that the other took")
    llama_weights: str | None = Field(description="how llama.cpp holds the weights")
    vs_generate: Ratio
    vs_llama_cpp: Ratio | None


class Slots(_Bench):
    """Calls of an endpoint at a fixed latency, after all slots are open."""

    slots: Count
    calls: Count = Field(description="in a round")
    ideal_s: Seconds = Field(description="calls / slots x latency")
    seconds: list[Seconds] = Field(description="by round")
    overhead_ms: float = Field(description="median time that a call holds its slot beyond the latency")
    vs_ideal: Ratio = Field(description="ideal over measured; 1 is ideal")


class Generation(_Bench):
    """Whole conversations through teacher_gen, at an endpoint that answers at once."""

    conversations: Count
    calls: Count
    longest: Count = Field(description="calls of the longest conversation")
    slots: Count
    seconds: Seconds
    calls_per_s: Rate
    start_mb: Megabytes = Field(description="resident before the first call")
    half_mb: Megabytes = Field(description="resident at half of the time")
    peak_mb: Megabytes = Field(description="resident until the last conversation has ended")
    table_mb: Megabytes = Field(description="resident when the whole table has been read back, to be written")


class Held(_Bench):
    """Whole conversations through teacher_gen, at an endpoint that answers so many calls at a time, each after a fixed latency."""

    conversations: Count
    calls: Count
    slots: Count
    latency_s: Seconds
    ideal_s: Seconds = Field(description="calls / slots x latency, or the latencies of the longest conversation where they are more")
    seconds: list[Seconds] = Field(description="by round")
    vs_ideal: Ratio = Field(description="ideal over measured; 1 is ideal")


class TeacherGenPart(Part):
    """What teacher_gen adds to the time that the endpoint takes."""

    latency_s: Seconds
    levels: list[Slots] = Field(min_length=1)
    held: Held
    generation: Generation


class Process(_Bench):
    """One process from start to end."""

    seconds: Seconds
    peak_mb: Megabytes = Field(description="resident; with the peaks of the processes that it starts, as if they fell together")


class TableSize(_Bench):
    """verify and oversample on copies of the real traces, each with ids and, in all that customer and agent write, a word of its own."""

    turns: Count = Field(description="agent turns in")
    messages: Count
    conversations: Count
    kept: Count
    verify: Process
    oversample: Process
    seconds: Seconds = Field(description="both")


class TablesPart(Part):
    """How the table stages grow with their table."""

    sizes: list[TableSize]


class Import(_Bench):
    """Importing a module in a fresh interpreter."""

    seconds: Seconds = Field(description="median")
    torch: bool = Field(description="whether it brings torch along")


class StartUpPart(Part):
    """What it costs to do nothing."""

    dvc_status_s: list[Seconds]
    dvc_repro_s: list[Seconds]
    extra_s: float | None = Field(description="median of `dvc repro` with nothing to do minus `dvc status`, null where there was something to do")
    imports: dict[str, Import]


class Minutes(_Bench):
    """`make repro` from a clone, in minutes."""

    install: Seconds
    data: Seconds
    train: Seconds
    evaluate: Seconds
    judge: Seconds


class ReproPart(Part):
    """`make repro` from a fresh clone; it begins with the start of make and ends with the table."""

    minutes: Minutes
    total: Seconds
    stages_s: dict[str, Seconds]


class Details(_Bench):
    """What is behind the figures, by part; null where a part has not been run."""

    start_up: StartUpPart | None = None
    teacher_gen: TeacherGenPart | None = None
    tables: TablesPart | None = None
    train: TrainPart | None = None
    eval: EvalPart | None = None
    repro: ReproPart | None = None
    trl_student: TrlStudentPart | None = None


MILLION = 1_000_000


class BenchMetrics(_Bench):
    """`metrics/bench.json`. The ratios are medians over rounds, above 1 means faster than the other."""

    train_vs_trl: float | None = Field(description="tokens a second over those of TRL's SFTTrainer")
    train_vs_roofline: float | None = Field(description="FLOPs a second in linear layers, head and attention over the machine's fp32 matmul rate")
    eval_vs_generate: float | None = Field(description="agent turns a second over those of `generate`, one by one")
    eval_vs_llama_cpp: float | None = Field(description="agent turns a second over those of llama.cpp's server with prompt caching")
    teacher_gen_vs_ideal: float | None = Field(description="ideal time over measured, at the number of slots where it is worst")
    conversations_vs_ideal: float | None = Field(description="the same, for whole conversations whose calls follow each other")
    million_turns_s: float | None = Field(description="seconds for verify and oversample on a million agent turns")
    repro_minutes: float | None
    machine: Machine
    details: Details

    @classmethod
    def of(cls, details: Details, machine: Machine) -> BenchMetrics:
        """The figures that follow from the details."""
        train, evaluation, teacher_gen, tables = details.train, details.eval, details.teacher_gen, details.tables
        million = [size.seconds for size in tables.sizes if size.turns >= MILLION] if tables else []
        return cls(
            train_vs_trl=train.vs_trl.median if train else None,
            train_vs_roofline=train.vs_roofline.median if train else None,
            eval_vs_generate=evaluation.vs_generate.median if evaluation else None,
            eval_vs_llama_cpp=evaluation.vs_llama_cpp.median if evaluation and evaluation.vs_llama_cpp else None,
            teacher_gen_vs_ideal=min(level.vs_ideal.median for level in teacher_gen.levels) if teacher_gen else None,
            conversations_vs_ideal=teacher_gen.held.vs_ideal.median if teacher_gen else None,
            million_turns_s=million[0] if million else None,
            repro_minutes=details.repro.total if details.repro else None,
            machine=machine, details=details)
