"""A few batches of the training table, by our trainer and by TRL's SFTTrainer with plain settings, in turn.

Both train the same adapter (rank, layers, NF4 base, fp32) on the same conversations from the same seed. Ours is stages.qlora_train
as it runs, with the pass through the layers below the adapter. TRL's pads, computes all logits and unpacks NF4 at every
use; it does not recompute activations, which its default would, and whichever library torch takes by itself computes its
products. Tokens are those of the conversations, each once, whoever computes them how often. Repeats in the table are left
out on both sides: how many more tokens they would make TRL read is `repeats`.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import chdir, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench._measure import circumstances, ratio
from schemas.bench import TrainPart
from schemas.tables import Oversampled
from stages._stage import load_params, read_table

if TYPE_CHECKING:
    from agent.encode import Encoded
    from agent.student import StudentParams
    from stages._batches import Example
    from stages.qlora_train import QloraTrainParams

TRAIN = Path("data/oversample/train.parquet")
MATMUL = 2048
"""Rows and columns of the matrices that the machine's rate is measured with."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes."""
    parser.add_argument("--batches", type=int, default=4, help="of ours, drawn from those of the whole table")
    parser.add_argument("--batch-tokens", type=int, default=0, help="tokens computed at once; 0: as in params.yaml")
    parser.add_argument("--rounds", type=int, default=3, help="how often each trainer goes over them, in turn; before, each takes one step")


@dataclass(frozen=True)
class Setting:
    """What both trainers share."""

    params: QloraTrainParams
    student: StudentParams
    tokenizer: Any
    batches: list[list[Example]]

    @property
    def conversations(self) -> list[Encoded]:
        """The conversations of all batches."""
        return [example.encoded for batch in self.batches for example in batch]


def conversations_a_batch(conversations: list[Encoded], params: QloraTrainParams) -> int:
    """Conversations in a batch of TRL's: as many as make `batch_tokens` at their mean length."""
    return max(1, round(params.batch_tokens * len(conversations) / sum(len(encoded.ids) for encoded in conversations)))


def adapted_model(student: StudentParams, params: QloraTrainParams) -> Any:
    """The base with a new adapter, as the stage makes it."""
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    from agent.student import load_base
    from stages.qlora_train import adapted

    set_seed(params.seed)
    base = load_base(student)
    modules = adapted(base.config.get_text_config().num_hidden_layers, params.first_layer)
    return get_peft_model(base, LoraConfig(r=params.rank, lora_alpha=params.alpha, target_modules=modules, task_type="CAUSAL_LM"))


def timed(trainer: Any) -> tuple[float, float]:
    """Seconds from the first step to the end of the last, and the mean loss."""
    from transformers import TrainerCallback

    class Stopwatch(TrainerCallback):
        seconds = 0.0

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.seconds = -time.monotonic()

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            self.seconds += time.monotonic()

    watch = Stopwatch()
    trainer.add_callback(watch)
    loss = trainer.train().training_loss
    trainer.remove_callback(watch)
    return watch.seconds, loss


def our_round(model: Any, setting: Setting, batches: list[list[Example]], folder: Path) -> tuple[float, float]:
    """One pass over batches with the stage's trainer: seconds, with the layers that carry no adapter, and the mean loss."""
    from transformers import TrainerState

    from agent.layer_states import LayerStates
    from agent.student import only_layers, shares_prefix
    from stages._batches import Collator
    from stages.qlora_train import make_trainer

    layers, first = model.config.get_text_config().num_hidden_layers, setting.params.first_layer
    started, states = time.monotonic(), None
    with tempfile.TemporaryDirectory() as kept:
        if first:
            states = LayerStates(model, first, Path(kept))
            states.compute([example.encoded for batch in batches for example in batch], "layers without an adapter")
        frozen = time.monotonic() - started
        collator = Collator(shares_prefix(model), states)
        with only_layers(model, first, layers) if first else nullcontext():
            seconds, loss = timed(make_trainer(model, setting.tokenizer, batches, collator, setting.params, folder, TrainerState()))
    return frozen + seconds, loss


@contextmanager
def torchs_own_products() -> Iterator[None]:
    """Let torch choose who computes float32 products, as it does unless told otherwise, for the time of a `with` block."""
    import torch

    mkldnn: Any = torch.backends.mkldnn
    before, mkldnn.matmul.fp32_precision = mkldnn.matmul.fp32_precision, "none"
    try:
        yield
    finally:
        mkldnn.matmul.fp32_precision = before


def trl_round(
        model: Any, tokenizer: Any, params: QloraTrainParams, conversations: list[Encoded], batch: int, folder: Path) -> tuple[float, float]:
    """One training of `epochs` passes over conversations with TRL's trainer, `batch` at a time: seconds, and the mean loss."""
    from datasets import Dataset
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    config = SFTConfig(
        output_dir=str(folder), per_device_train_batch_size=batch, num_train_epochs=params.epochs, learning_rate=params.learning_rate,
        lr_scheduler_type="cosine", warmup_steps=0.05, weight_decay=0.0, max_grad_norm=1.0, seed=params.seed, data_seed=params.seed,
        report_to="none", gradient_checkpointing=False, bf16=False, fp16=False, max_length=None, dataloader_pin_memory=False)
    rows = [{"input_ids": encoded.ids, "labels": encoded.labels()} for encoded in conversations]
    trainer = SFTTrainer(model=model, args=config, processing_class=tokenizer, train_dataset=Dataset.from_list(rows))
    for parameter in model.parameters():
        if parameter.requires_grad:  # TRL turns the adapter of a packed model to bfloat16; ours is float32
            parameter.data = parameter.data.float()
    with torchs_own_products():
        return timed(trainer)


def matmul_rate(repeats: int = 5) -> float:
    """GFLOP a second of a large fp32 matrix product, by the library that ours computes with, the median of a few."""
    import torch

    left, right = torch.randn(MATMUL, MATMUL), torch.randn(MATMUL, MATMUL)
    torch.mm(left, right)
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        torch.mm(left, right)
        taken.append(time.perf_counter() - started)
    return 2 * MATMUL**3 / statistics.median(taken) / 1e9


def draw(options: argparse.Namespace) -> tuple[Setting, float]:
    """The batches, and how many times as many tokens the whole table has with its repeats.

    Raises:
        InputError: there is no training table.
    """
    from agent.encode import Encoder
    from agent.student import StudentParams, load_tokenizer
    from stages._batches import count_copies, make_batches
    from stages._encoded import encode_table
    from stages.qlora_train import QloraTrainParams

    params = load_params("qlora_train", QloraTrainParams).model_copy(update={"epochs": 1})
    if options.batch_tokens:
        params = params.model_copy(update={"batch_tokens": options.batch_tokens})
    student = load_params("student", StudentParams)
    tokenizer = load_tokenizer(student)
    examples = count_copies(encode_table(read_table(TRAIN, Oversampled), Encoder(tokenizer)))
    batches = make_batches(examples, params.batch_tokens, params.seed)
    drawn = random.Random(params.seed).sample(batches, min(options.batches, len(batches)))
    tokens = [(len(example.encoded.ids), example.times) for example in examples]
    return Setting(params, student, tokenizer, drawn), sum(length * times for length, times in tokens) / sum(length for length, _ in tokens)


def measure(options: argparse.Namespace) -> TrainPart:
    """Rounds of ours, TRL's and a large matrix product, in turn."""
    here = circumstances()
    setting, repeats = draw(options)

    from agent.student import backbone
    from bench._flop import attention_flop, linear_flop

    ours = adapted_model(setting.student, setting.params)
    trl = adapted_model(setting.student.model_copy(update={"unpack_once": False}), setting.params)
    tokens, first = sum(len(encoded.ids) for encoded in setting.conversations), setting.params.first_layer
    batch = conversations_a_batch(setting.conversations, setting.params)
    flop = sum(linear_flop(ours, backbone(ours).layers, first, setting.batches))
    attention = attention_flop(ours.config.get_text_config(), first, setting.batches)
    speeds: dict[str, list[float]] = {"ours": [], "trl": []}
    losses: dict[str, list[float]] = {"ours": [], "trl": []}
    matmul = []
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        # One step of each first: what is made once is made before the clock runs.
        our_round(ours, setting, setting.batches[:1], Path(folder) / "ours")
        trl_round(trl, setting.tokenizer, setting.params, setting.conversations[:batch], batch, Path(folder) / "trl")
        for _ in range(options.rounds):
            matmul.append(matmul_rate())
            for name, (seconds, loss) in (("ours", our_round(ours, setting, setting.batches, Path(folder) / "ours")),
                                          ("trl", trl_round(trl, setting.tokenizer, setting.params, setting.conversations, batch,
                                                            Path(folder) / "trl"))):
                speeds[name].append(tokens / seconds)
                losses[name].append(loss)
    per_s = [flop * speed / tokens / 1e9 for speed in speeds["ours"]]
    return TrainPart(
        **here, batches=len(setting.batches), conversations=len(setting.conversations), tokens=tokens, trl_batch=batch,
        tokens_per_s=speeds, loss=losses, vs_trl=ratio([a / b for a, b in zip(speeds["ours"], speeds["trl"], strict=True)]), repeats=repeats,
        linear_tflop=flop / 1e12, attention_tflop=attention / 1e12, matmul_gflop_per_s=matmul,
        vs_roofline=ratio([a * (1 + attention / flop) / b for a, b in zip(per_s, matmul, strict=True)]),
        vs_roofline_linear=ratio([a / b for a, b in zip(per_s, matmul, strict=True)]))
