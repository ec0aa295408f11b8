"""Train the student's adapter on the agent's own turns.

Reads   data/oversample/train.parquet
Writes  models/qlora_train/ (the adapter), metrics/qlora_train.json, metrics/qlora_train/ (the loss curve)

NF4 with double quantisation (bitsandbytes), LoRA (peft), TRL's SFTTrainer. A batch holds conversations of one company,
so their common system prompt is computed once; the head runs at supervised positions only. A killed run goes on from
its last checkpoint, kept outside every DVC output.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from agent.encode import Encoded, Encoder
from agent.paths import CACHE
from agent.student import (
    StudentParams,
    load_base,
    load_tokenizer,
    read_rows,
    shares_prefix,
)
from schemas.errors import InputError
from schemas.metrics import QloraTrainMetrics
from schemas.tables import Oversampled
from stages._conversations import encode_table
from stages._stage import Params, load_params, read_table, run, say, write_metrics

if TYPE_CHECKING:
    import torch
    from trl.trainer.sft_trainer import SFTTrainer

TRAIN = Path("data/oversample/train.parquet")
ADAPTER = Path("models/qlora_train")
METRICS = Path("metrics/qlora_train.json")
CURVE = Path("metrics/qlora_train")
CHECKPOINTS = CACHE / "checkpoints"
IGNORE = -100
CHECKPOINT_EVERY = 25
"""Optimiser steps between checkpoints."""
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


def make_batches(conversations: list[tuple[str, str, Encoded]], budget: int, seed: int) -> list[list[Encoded]]:
    """Cut the conversations into batches of one company, similar length, and at most `budget` tokens computed at once.

    A batch computes its common prefix once and every row padded to the longest. Conversations are sorted by length
    within windows only, so that which ones meet in a batch stays mixed; the batches come in seeded order.
    """
    by_company: dict[str, list[Encoded]] = {}
    for company, _, encoded in conversations:
        by_company.setdefault(company, []).append(encoded)
    batches: list[list[Encoded]] = []
    for items in by_company.values():
        for start in range(0, len(items), WINDOW):
            batch: list[Encoded] = []
            for encoded in sorted(items[start:start + WINDOW], key=lambda encoded: len(encoded.ids)):
                # Sorted, so the newcomer is the longest row.
                if batch and encoded.prefix + (len(batch) + 1) * (len(encoded.ids) - encoded.prefix) > budget:
                    batches.append(batch)
                    batch = []
                batch.append(encoded)
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


def collate(batch: list[Encoded], share: bool) -> dict[str, torch.Tensor]:
    """One batch as tensors: the common prefix (1, P), and the rest of every row with its labels and mask, (B, L) each."""
    import torch

    cut = batch[0].prefix if share else 0
    length = max(len(encoded.ids) for encoded in batch) - cut
    rows = torch.zeros(len(batch), length, dtype=torch.long)
    labels, mask = torch.full_like(rows, IGNORE), torch.zeros_like(rows)
    for i, encoded in enumerate(batch):
        n = len(encoded.ids) - cut
        rows[i, :n] = torch.tensor(encoded.ids[cut:])
        labels[i, :n] = torch.tensor(encoded.labels(IGNORE)[cut:])
        mask[i, :n] = 1
    return {"prefix": torch.tensor([batch[0].ids[:cut]], dtype=torch.long), "rows": rows, "labels": labels, "mask": mask}


def supervised_loss(model: Any, batch: dict[str, torch.Tensor], count: torch.Tensor | int | None) -> torch.Tensor:
    """Mean negative log-likelihood of the agent's tokens; the language-model head runs at their positions only."""
    import torch

    hidden, _ = read_rows(model, batch["prefix"], batch["rows"], batch["mask"])
    targets = batch["labels"][:, 1:]
    wanted = targets != IGNORE
    logits = model.get_output_embeddings()(hidden[:, :-1][wanted])
    total = torch.nn.functional.cross_entropy(logits.float(), targets[wanted], reduction="sum")
    return total / (wanted.sum() if count is None else count)


def make_trainer(model: Any, tokenizer: Any, batches: list[list[Encoded]], params: QloraTrainParams, folder: Path) -> SFTTrainer:
    """TRL's trainer, one of our batches a step."""
    from datasets import Dataset
    from dvclive.huggingface import DVCLiveCallback
    from dvclive.live import Live
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    share = shares_prefix(model)

    class AgentTurnTrainer(SFTTrainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            return supervised_loss(model, inputs, num_items_in_batch)

    config = SFTConfig(
        output_dir=str(folder), per_device_train_batch_size=1, num_train_epochs=params.epochs, learning_rate=params.learning_rate,
        lr_scheduler_type="cosine", warmup_steps=0.05, weight_decay=0.0, max_grad_norm=1.0, seed=params.seed, data_seed=params.seed,
        logging_steps=5, save_steps=CHECKPOINT_EVERY, save_total_limit=1, report_to="none", gradient_checkpointing=False,
        bf16=False, fp16=False, dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False, max_length=None,
        dataloader_pin_memory=False)
    live = Live(str(CURVE), save_dvc_exp=False, dvcyaml=None, report=None)
    return AgentTurnTrainer(
        model=model, args=config, processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"batch": list(range(len(batches)))}),
        data_collator=lambda items: collate(batches[items[0]["batch"]], share), callbacks=[DVCLiveCallback(live=live)])


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
    from transformers.trainer_utils import get_last_checkpoint

    set_seed(params.seed)
    tokenizer = load_tokenizer(student)
    conversations = encode_table(table, Encoder(tokenizer))
    check_encoded(conversations, params.max_tokens)
    batches = make_batches(conversations, params.batch_tokens, params.seed)
    base = load_base(student)
    model = get_peft_model(base, LoraConfig(
        r=params.rank, lora_alpha=params.alpha, target_modules=adapted(base.config.num_hidden_layers, params.first_layer), task_type="CAUSAL_LM"))
    folder = CHECKPOINTS / run_key(params, student)
    folder.mkdir(parents=True, exist_ok=True)
    trainer = make_trainer(model, tokenizer, batches, params, folder)
    started = time.monotonic()
    result = trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)))
    seconds = time.monotonic() - started

    # DVCLive's callback writes the trainer's arguments down too: ours are in params.yaml, and its copy names this machine's folders.
    (CURVE / "params.yaml").unlink(missing_ok=True)
    shutil.rmtree(ADAPTER, ignore_errors=True)
    model.save_pretrained(str(ADAPTER))
    shutil.rmtree(folder)
    tokens = sum(len(encoded.ids) for _, _, encoded in conversations)
    supervised = sum(end - start for _, _, encoded in conversations for start, end in encoded.spans)
    write_metrics(METRICS, {
        "student": student.weights, "conversations": len(conversations), "tokens": tokens, "supervised_tokens": supervised,
        "steps": result.global_step, "train_loss": result.training_loss}, QloraTrainMetrics)
    say(f"qlora_train: {len(conversations)} conversations, {params.epochs} epoch(s), {result.global_step} steps, loss {result.training_loss:.3f}, "
        f"{tokens * params.epochs / seconds:.0f} tok/s")


if __name__ == "__main__":
    run(main)
