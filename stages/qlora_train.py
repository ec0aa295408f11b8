"""Train the student's adapter on the agent's own turns.

Reads   data/oversample/train.parquet
Writes  models/qlora_train/ (the adapter), metrics/qlora_train.json, metrics/qlora_train/ (the loss curve)

NF4 with double quantisation (bitsandbytes), LoRA (peft), TRL's SFTTrainer. A batch holds conversations of one company in one
line behind their common system prompt, without padding; the language-model head runs at supervised positions only, a few at a
time; the adapter is added to the unpacked weights once a step. What enters the first layer with an adapter never changes: it is
computed once and kept under `.cache/states` (hidden size x 4 bytes a token in float32), for every epoch, seed and factor, and for the
hand-off score. A conversation that stands in the table several times is read once an epoch and weighs as much as all its
copies: the gradient of a batch that holds them all. A killed run goes on from its last whole checkpoint, kept outside every DVC
output, and reports what it would have reported unharmed; only the run time in metrics/qlora_train/metrics.json and the tok/s
are those of its last part.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from agent.encode import Encoded, Encoder
from agent.fused import fused
from agent.layer_states import LayerStates
from agent.merged_lora import merged_lora
from agent.packing import entering, read_packed
from agent.paths import CACHE
from agent.student import (
    StudentParams,
    backbone,
    load_base,
    load_tokenizer,
    only_layers,
    shares_prefix,
)
from schemas.errors import InputError
from schemas.metrics import QloraTrainMetrics
from schemas.tables import Oversampled
from stages._batches import IGNORE, Collator, Example, count_copies, make_batches
from stages._encoded import encode_table
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
LOG_EVERY = 5
"""Optimiser steps between points of the loss curve, each the mean since the last."""
CHECKPOINT_EVERY = 25
"""Optimiser steps between checkpoints; a multiple of LOG_EVERY, since a checkpoint keeps no loss that is not logged yet."""
LOGITS_AT_ONCE = 512
"""Tokens that the head reads at once."""


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


def adapted(layers: int, first: int) -> str:
    """The pattern of the modules that get an adapter: every projection of the layers from `first` on.

    Raises:
        InputError: there is no such layer.
    """
    if first >= layers:
        raise InputError(f"qlora_train.first_layer is {first}, and the student has layers 0 to {layers - 1}", "lower it in params.yaml; 0 = all")
    return rf".*\.layers\.(?:{'|'.join(map(str, range(first, layers)))})\..*proj\w*"


def head_loss(head: Any, hidden: torch.Tensor, targets: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of targets, weighed and summed, a few tokens at a time: never all logits at once.

    The gradient is taken along the way, as a frozen head allows (Hsu et al. 2024, "Liger Kernel"): logits become probabilities, and
    those the gradient, in the same memory.

    Args:
        head: the language-model head, a frozen linear layer.
        hidden: what it reads, shape (N, H).
        targets: the tokens wanted, (N).
        times: how often each counts, (N).
    """
    import torch

    class Chunked(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden: torch.Tensor) -> torch.Tensor:
            total, grads = hidden.new_zeros((), dtype=torch.float32), []
            for read, wanted, weight in zip(*(each.split(LOGITS_AT_ONCE) for each in (hidden, targets[:, None], times[:, None])), strict=True):
                logits = torch.nn.functional.linear(read, head.weight, head.bias).float()
                top, of_wanted = logits.amax(dim=-1, keepdim=True), logits.gather(1, wanted)
                odds = torch.softmax(logits, dim=-1, out=logits)
                # The greatest probability is 1 / sum(exp(logit - top)).
                total += ((top - odds.amax(dim=-1, keepdim=True).log() - of_wanted) * weight).sum()
                odds.scatter_add_(1, wanted, torch.full_like(of_wanted, -1.0)).mul_(weight)
                # Turned, which oneDNN computes in nine tenths of the time.
                grads.append((head.weight.T @ odds.to(head.weight.dtype).T).T)
            ctx.save_for_backward(torch.cat(grads))
            return total

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            return ctx.saved_tensors[0] * grads[0]

    loss: torch.Tensor = Chunked.apply(hidden)
    return loss


def supervised_nll(model: Any, batch: dict[str, torch.Tensor], share: bool) -> torch.Tensor:
    """Negative log-likelihood of the agent's tokens, summed over a batch and its copies.

    The language-model head runs at the agent's tokens only. Without `share` every conversation is read alone.
    """
    import torch

    prefix, rows, lengths = batch["prefix"], batch["rows"], batch["lengths"].tolist()
    if share:
        hidden = read_packed(model, prefix, rows, lengths)
    else:
        hidden = torch.cat([backbone(model)(**entering(row), use_cache=False).last_hidden_state[0] for row in rows.split(lengths, dim=1)])
    wanted = batch["targets"] != IGNORE
    return head_loss(model.get_output_embeddings(), hidden[wanted], batch["targets"][wanted], batch["times"][wanted])


def tokens_a_step(batches: list[list[Example]]) -> float:
    """The agent's tokens in a batch, copies counted, on average.

    What every step's loss is divided by, so that a token weighs the same in whatever batch it stands, and a conversation's
    copies as much as if they stood in batches of their own. Divided by its own batch's tokens, a repeated conversation that
    has a batch for itself would weigh nothing more.
    """
    return sum(example.times * example.encoded.supervised for batch in batches for example in batch) / len(batches)


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
        model: Any, tokenizer: Any, batches: list[list[Example]], collator: Collator, params: QloraTrainParams, folder: Path,
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
            with merged_lora(model), fused(model):
                return supervised_nll(model, inputs, collator.share) / per_step

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            if "train_loss" in logs:
                # transformers reports that of the steps since a resume.
                logs["train_loss"] = mean_loss(before, logs["train_loss"], self.state.global_step)
            super().log(logs, start_time)

    per_step = tokens_a_step(batches)
    config = SFTConfig(
        output_dir=str(folder), per_device_train_batch_size=1, num_train_epochs=params.epochs, learning_rate=params.learning_rate,
        lr_scheduler_type="cosine", warmup_steps=0.05, weight_decay=0.0, max_grad_norm=1.0, seed=params.seed, data_seed=params.seed,
        logging_steps=LOG_EVERY, save_steps=CHECKPOINT_EVERY, save_total_limit=1, report_to="none", gradient_checkpointing=False,
        bf16=False, fp16=False, dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False, max_length=None,
        dataloader_pin_memory=False)
    curve = DVCLiveCallback(live=Live(str(CURVE), save_dvc_exp=False, dvcyaml=None, report=None))
    for logged in before.log_history:
        curve.on_log(config, before, TrainerControl(), logs={name: value for name, value in logged.items() if name != "step"})
    trainer = AgentTurnTrainer(
        model=model, args=config, processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"batch": list(range(len(batches)))}),
        data_collator=lambda items: collator(batches[items[0]["batch"]]), callbacks=[curve])
    # TRL makes the adapter of packed weights bfloat16, whatever they compute in; small steps would be rounded away.
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return trainer


def run_key(params: QloraTrainParams, student: StudentParams) -> str:
    """Names the checkpoints of this very run: same parameters, same data."""
    whole = json.dumps([params.model_dump(), student.model_dump(), hashlib.sha256(TRAIN.read_bytes()).hexdigest()], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()[:16]


def check_devices() -> None:
    """Refuse what TRL would refuse once the layers without an adapter are computed.

    Raises:
        InputError: there are several GPUs.
    """
    import torch

    if (gpus := torch.cuda.device_count()) > 1:
        raise InputError(f"training takes one GPU, and {gpus} can be seen", "CUDA_VISIBLE_DEVICES=0 before the command shows it the first one alone")


def main() -> None:
    params = load_params("qlora_train", QloraTrainParams)
    student = load_params("student", StudentParams)
    table = read_table(TRAIN, Oversampled)
    check_devices()

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
    started, states = time.monotonic(), None
    if params.first_layer:
        states = LayerStates(model, params.first_layer)
        states.compute([example.encoded for batch in batches for example in batch], "layers without an adapter")
    collator = Collator(shares_prefix(base), states)
    with only_layers(model, params.first_layer, layers) if params.first_layer else nullcontext():
        trainer = make_trainer(model, tokenizer, batches, collator, params, folder, before)
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
        "supervised_tokens": sum(encoded.supervised for encoded in read),
        "steps": result.global_step, "train_loss": train_loss}, QloraTrainMetrics)
    say(f"qlora_train: {len(conversations)} conversations, {len(read)} without copies, {params.epochs} epoch(s), {result.global_step} steps, "
        f"loss {train_loss:.3f}, {collator.tokens_read / seconds:.0f} tok/s")


if __name__ == "__main__":
    run(main)
