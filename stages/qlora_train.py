"""Train the student's adapter on the agent's own turns.

Reads   data/oversample/train.parquet
Writes  models/qlora_train/ (the adapter), metrics/qlora_train.json, metrics/qlora_train/ (the loss curve)

NF4 with double quantisation (bitsandbytes), LoRA (peft), TRL's SFTTrainer. A batch holds conversations of one company,
so their common system prompt is computed once; the language-model head runs at supervised positions only. What enters
the first layer with an adapter never changes, so it is computed once for all epochs. A conversation that stands in the
table several times is read once an epoch and weighs as much as all its copies: the gradient of a batch that holds them
all. A killed run goes on from its last whole checkpoint, kept outside every DVC output, and reports what it would have
reported unharmed; only the run time in metrics/qlora_train/metrics.json and the tok/s are those of its last part.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import sys
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field
from tqdm import tqdm

from agent.encode import Encoded, Encoder
from agent.paths import CACHE
from agent.student import (
    StudentParams,
    load_base,
    load_tokenizer,
    only_layers,
    read_rows,
    shares_prefix,
    stack_rows,
)
from schemas.errors import InputError
from schemas.metrics import QloraTrainMetrics
from schemas.tables import Oversampled
from stages._conversations import encode_table
from stages._stage import Params, load_params, read_table, run, say, write_metrics

if TYPE_CHECKING:
    import torch
    from transformers import TrainerState
    from trl.trainer.sft_trainer import SFTTrainer

TRAIN = Path("data/oversample/train.parquet")
ADAPTER = Path("models/qlora_train")
METRICS = Path("metrics/qlora_train.json")
CURVE = Path("metrics/qlora_train")
CHECKPOINTS = CACHE / "checkpoints"
IGNORE = -100
LOG_EVERY = 5
"""Optimiser steps between points of the loss curve, each the mean since the last."""
CHECKPOINT_EVERY = 25
"""Optimiser steps between checkpoints; a multiple of LOG_EVERY, since a checkpoint keeps no loss that is not logged yet."""
WINDOW = 48
"""Conversations that are sorted by length together: more pads less and mixes less."""


class QloraTrainParams(Params):
    """`qlora_train`."""

    rank: int = Field(ge=1)
    alpha: int = Field(ge=1)
    first_layer: int = Field(ge=0, description="layers below carry no adapter: nothing is kept for them and no gradient runs through them")
    learning_rate: float = Field(gt=0)
    epochs: int = Field(ge=1)
    batch_tokens: int = Field(ge=1, description="tokens computed at once, one optimiser step; bounds the memory")
    max_tokens: int = Field(ge=1, description="a longer conversation stops the run: its end is where the hand-off is")
    seed: int


def check_encoded(conversations: list[tuple[str, str, Encoded]], max_tokens: int) -> None:
    """Refuse what training would spoil in silence.

    Raises:
        InputError: a conversation is too long, so its end would be cut off, or has nothing to learn from.
    """
    for _, name, encoded in conversations:
        if len(encoded.ids) > max_tokens:
            raise InputError(f"conversation {name} has {len(encoded.ids)} tokens, more than qlora_train.max_tokens ({max_tokens})",
                             "raise max_tokens in params.yaml; cutting would lose the conversation's end, where hand-offs are")
        if not any(end > start for start, end in encoded.spans):
            raise InputError(f"conversation {name} has no agent turn to learn from", "dvc repro --force verify")


@dataclass(frozen=True, slots=True)
class Example:
    """One conversation to learn from: `group` is what it shares its prefix with, `times` how often it stands in the table."""

    group: str
    encoded: Encoded
    times: int


def count_copies(conversations: list[tuple[str, str, Encoded]]) -> list[Example]:
    """The conversations without their copies, in the order in which each comes first."""
    times = Counter(tuple(encoded.ids) for _, _, encoded in conversations)
    first = {tuple(encoded.ids): (group, encoded) for group, _, encoded in reversed(conversations)}
    return [Example(*first[ids], count) for ids, count in times.items()]


def make_batches(examples: list[Example], budget: int, seed: int) -> list[list[Example]]:
    """Cut the conversations into batches of one company, similar length, and at most `budget` tokens computed at once.

    A batch computes its common prefix once and every row padded to the longest. Conversations are sorted by length
    within windows only, so that which ones meet in a batch stays mixed; the batches come in seeded order.
    """
    by_group: dict[str, list[Example]] = {}
    for example in examples:
        by_group.setdefault(example.group, []).append(example)
    batches: list[list[Example]] = []
    for items in by_group.values():
        for start in range(0, len(items), WINDOW):
            batch: list[Example] = []
            for example in sorted(items[start:start + WINDOW], key=lambda example: len(example.encoded.ids)):
                # Sorted, so the newcomer is the longest row.
                prefix, length = example.encoded.prefix, len(example.encoded.ids)
                if batch and prefix + (len(batch) + 1) * (length - prefix) > budget:
                    batches.append(batch)
                    batch = []
                batch.append(example)
            batches.append(batch)
    random.Random(seed).shuffle(batches)
    return batches


def adapted(layers: int, first: int) -> str:
    """The pattern of the modules that get an adapter: every projection of the layers from `first` on.

    Raises:
        InputError: there is no such layer.
    """
    if first >= layers:
        raise InputError(f"qlora_train.first_layer is {first}, and the student has layers 0 to {layers - 1}", "lower it in params.yaml; 0 = all")
    return rf".*\.layers\.(?:{'|'.join(map(str, range(first, layers)))})\..*proj\w*"


class Reader:
    """Turns a batch into what enters the first layer that is trained: token ids, or states computed once and for all.

    Args:
        share: whether the common prefix is computed once for a batch.

    Attributes:
        tokens_read: of the conversations in all batches that were trained on.
    """

    def __init__(self, share: bool) -> None:
        self.share = share
        self.tokens_read = 0
        self._states: dict[tuple[int, ...], torch.Tensor] = {}

    def cut(self, batch: list[Example]) -> int:
        """How many tokens the batch's rows have in common."""
        return batch[0].encoded.prefix if self.share else 0

    def tokens(self, batch: list[Example]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Token ids of the common prefix, (1, P), and of the rest of every row, (L_i)."""
        import torch

        cut = self.cut(batch)
        return torch.tensor([batch[0].encoded.ids[:cut]], dtype=torch.long), [torch.tensor(example.encoded.ids[cut:]) for example in batch]

    def freeze(self, model: Any, batches: list[list[Example]], first: int) -> None:
        """Compute what enters layer `first`: the layers below carry no adapter, so it is the same at every step."""
        import torch

        with torch.no_grad(), only_layers(model, 0, first):
            for batch in tqdm(batches, desc="layers without an adapter", unit="batch", file=sys.stderr):
                new = [example for example in batch if tuple(example.encoded.ids) not in self._states]
                if not new:
                    continue
                prefix, rows = self.tokens(new)
                states, _ = read_rows(model, prefix, *stack_rows(rows))
                for example, row, state in zip(new, rows, states, strict=True):
                    self._states[tuple(example.encoded.ids)] = state[:len(row)].clone()
                shared = tuple(prefix[0].tolist())
                if shared and shared not in self._states:
                    self._states[shared] = read_rows(model, prefix[:, :0], prefix, torch.ones_like(prefix))[0][0].clone()

    def __call__(self, batch: list[Example]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Prefix and rows as `read_rows` takes them."""
        self.tokens_read += sum(len(example.encoded.ids) for example in batch)
        prefix, rows = self.tokens(batch)
        if not self._states:
            return prefix, rows
        states = [self._states[tuple(example.encoded.ids)] for example in batch]
        shared = self._states.get(tuple(prefix[0].tolist()))
        return states[0][None, :0] if shared is None else shared[None], states


def collate(batch: list[Example], reader: Reader) -> dict[str, torch.Tensor]:
    """One batch as tensors.

    Returns:
        `prefix` (1, P) and `rows`, `labels`, `mask` (B, L), prefix and rows with a last dimension H where they are states;
        `times` (B).
    """
    import torch

    cut = reader.cut(batch)
    prefix, rows = reader(batch)
    stacked, mask = stack_rows(rows)
    labels, _ = stack_rows([torch.tensor(example.encoded.labels(IGNORE)[cut:]) for example in batch])
    return {
        "prefix": prefix, "rows": stacked, "labels": labels.masked_fill(mask == 0, IGNORE), "mask": mask,
        "times": torch.tensor([example.times for example in batch])}


def supervised_nll(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood of the agent's tokens, summed over a batch and its copies, and how many tokens that are.

    The language-model head runs at the agent's tokens only.
    """
    import torch

    hidden, _ = read_rows(model, batch["prefix"], batch["rows"], batch["mask"])
    targets = batch["labels"][:, 1:]
    wanted = targets != IGNORE
    logits = model.get_output_embeddings()(hidden[:, :-1][wanted])
    times = batch["times"][:, None].expand_as(targets)[wanted]
    return torch.nn.functional.cross_entropy(logits.float(), targets[wanted], reduction="none") @ times.float(), times.sum()


def last_checkpoint(folder: Path) -> tuple[str | None, TrainerState]:
    """A run's newest whole checkpoint and how far it had come there; none, and step 0, at a run's beginning.

    transformers writes the state last, so a kill while it saves leaves a folder without one, or with half of one: it is deleted.
    """
    from transformers import TrainerState
    from transformers.trainer import TRAINER_STATE_NAME

    for checkpoint in sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        try:
            return str(checkpoint), TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        except (FileNotFoundError, ValueError):
            shutil.rmtree(checkpoint)
    return None, TrainerState()


def mean_loss(before: TrainerState, since: float, steps: int) -> float:
    """Mean loss of a whole run: of the steps before its checkpoint, as they were logged, and of those since.

    Args:
        before: the state at the checkpoint; step 0 for a run that was not killed.
        since: mean loss of the steps since.
        steps: optimiser steps of the whole run.
    """
    if not before.global_step:
        return since
    ends = [int(logged["step"]) for logged in before.log_history]
    weights = [end - start for start, end in pairwise([0, *ends])]
    total = sum(weight * logged["loss"] for weight, logged in zip(weights, before.log_history, strict=True))
    # Killed after the last step, a run does not know the loss of what it had not logged.
    new = steps - before.global_step
    return (total + new * since) / (sum(weights) + new)


def make_trainer(
        model: Any, tokenizer: Any, batches: list[list[Example]], reader: Reader, params: QloraTrainParams, folder: Path,
        before: TrainerState) -> SFTTrainer:
    """TRL's trainer, one of our batches a step; its loss curve begins with what was logged `before`."""
    from datasets import Dataset
    from dvclive.huggingface import DVCLiveCallback
    from dvclive.live import Live
    from transformers import TrainerControl
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    class AgentTurnTrainer(SFTTrainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            total, count = supervised_nll(model, inputs)
            return total / count

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            if "train_loss" in logs:
                # transformers reports that of the steps since a resume.
                logs["train_loss"] = mean_loss(before, logs["train_loss"], self.state.global_step)
            super().log(logs, start_time)

    config = SFTConfig(
        output_dir=str(folder), per_device_train_batch_size=1, num_train_epochs=params.epochs, learning_rate=params.learning_rate,
        lr_scheduler_type="cosine", warmup_steps=0.05, weight_decay=0.0, max_grad_norm=1.0, seed=params.seed, data_seed=params.seed,
        logging_steps=LOG_EVERY, save_steps=CHECKPOINT_EVERY, save_total_limit=1, report_to="none", gradient_checkpointing=False,
        bf16=False, fp16=False, dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False, max_length=None,
        dataloader_pin_memory=False)
    curve = DVCLiveCallback(live=Live(str(CURVE), save_dvc_exp=False, dvcyaml=None, report=None))
    for logged in before.log_history:
        curve.on_log(config, before, TrainerControl(), logs={name: value for name, value in logged.items() if name != "step"})
    return AgentTurnTrainer(
        model=model, args=config, processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"batch": list(range(len(batches)))}),
        data_collator=lambda items: collate(batches[items[0]["batch"]], reader), callbacks=[curve])


def run_key(params: QloraTrainParams, student: StudentParams) -> str:
    """Names the checkpoints of this very run: same parameters, same data."""
    whole = json.dumps([params.model_dump(), student.model_dump(), hashlib.sha256(TRAIN.read_bytes()).hexdigest()], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()[:16]


def main() -> None:
    params = load_params("qlora_train", QloraTrainParams)
    student = load_params("student", StudentParams)
    table = read_table(TRAIN, Oversampled)

    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    set_seed(params.seed)
    tokenizer = load_tokenizer(student)
    conversations = encode_table(table, Encoder(tokenizer))
    check_encoded(conversations, params.max_tokens)
    batches = make_batches(count_copies(conversations), params.batch_tokens, params.seed)
    base = load_base(student)
    layers = base.config.get_text_config().num_hidden_layers
    model = get_peft_model(base, LoraConfig(
        r=params.rank, lora_alpha=params.alpha, target_modules=adapted(layers, params.first_layer), task_type="CAUSAL_LM"))
    folder = CHECKPOINTS / run_key(params, student)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, before = last_checkpoint(folder)
    reader = Reader(shares_prefix(base))
    started = time.monotonic()
    if params.first_layer:
        reader.freeze(model, batches, params.first_layer)
    with only_layers(model, params.first_layer, layers) if params.first_layer else nullcontext():
        trainer = make_trainer(model, tokenizer, batches, reader, params, folder, before)
        result = trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.monotonic() - started

    # DVCLive's callback writes the trainer's arguments down too: ours are in params.yaml, and its copy names this machine's folders.
    (CURVE / "params.yaml").unlink(missing_ok=True)
    shutil.rmtree(ADAPTER, ignore_errors=True)
    model.save_pretrained(str(ADAPTER))
    shutil.rmtree(folder)
    train_loss = float(result.metrics["train_loss"])
    read = [example.encoded for batch in batches for example in batch]
    tokens = sum(len(encoded.ids) for encoded in read)
    write_metrics(METRICS, {
        "student": student.weights, "conversations": len(conversations), "distinct_conversations": len(read), "tokens": tokens,
        "supervised_tokens": sum(end - start for encoded in read for start, end in encoded.spans),
        "steps": result.global_step, "train_loss": train_loss}, QloraTrainMetrics)
    say(f"qlora_train: {len(conversations)} conversations, {len(read)} without copies, {params.epochs} epoch(s), {result.global_step} steps, "
        f"loss {train_loss:.3f}, {reader.tokens_read / seconds:.0f} tok/s")


if __name__ == "__main__":
    run(main)
