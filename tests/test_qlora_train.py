"""Real NF4 weights, real adapters, a few short conversations."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import TrainerState

from agent.fused import fused
from agent.layer_states import LayerStates
from agent.merged_lora import merged_lora
from agent.packing import read_packed
from agent.student import attention, load_base, only_layers
from schemas.errors import InputError
from schemas.tables import Oversampled
from stages._batches import Collator, Example, count_copies, make_batches
from stages._encoded import encode_table
from stages._stage import write_table
from stages.qlora_train import (
    adapted,
    check_devices,
    check_encoded,
    head_loss,
    last_checkpoint,
    mean_loss,
    supervised_nll,
    tokens_a_step,
)
from tests.students import ALL, HANDOFF, LONG, SEARCH, STUDENT, SYSTEM, base, customer, encoder, table

ROOT = Path(__file__).parent.parent


def encode(*names, times=1):
    return [Example(SYSTEM, encoder().conversation(SYSTEM, ALL[name]), times) for name in names]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = get_peft_model(load_base(STUDENT), LoraConfig(r=4, target_modules=adapted(30, 26), task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


SHARED, WHOLE = Collator(share=True), Collator(share=False)


def collated(batch, collator=SHARED):
    """A batch where the model is, as the trainer hands it on."""
    return {name: tensor.to(base().device) for name, tensor in collator(batch).items()}


def ids_of(example):
    return torch.tensor([example.encoded.ids], device=base().device)


def nll(model, batch, collator=SHARED):
    return supervised_nll(model, collated(batch, collator), collator.share)


def gradients(model, batch, collator=SHARED):
    model.zero_grad()
    nll(model, batch, collator).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def near(one, other):
    return torch.linalg.vector_norm(one - other) < 1e-4 * torch.linalg.vector_norm(other)


def test_sharing_the_prefix_gives_the_gradient_of_whole_conversations(model):
    batch = encode("search", "handoff", "long")
    assert near(gradients(model, batch), sum(gradients(model, [one], WHOLE) for one in batch))


def test_conversations_in_one_line_do_not_see_each_other(model):
    """Their logits are those of each conversation alone, in transformers' own attention."""
    batch = encode("search", "handoff", "long")
    line = collated(batch)
    with torch.no_grad():
        packed = model.get_output_embeddings()(read_packed(model, line["prefix"], line["rows"], line["lengths"].tolist()))
        for example, logits in zip(batch, packed.split(line["lengths"].tolist()), strict=True):
            alone = model(input_ids=ids_of(example)).logits[0, example.encoded.prefix:]
            assert torch.allclose(logits, alone, atol=1e-3) and torch.equal(logits.argmax(-1), alone.argmax(-1))


def test_products_are_float32_whoever_computes_them():
    """oneDNN may be told that bfloat16 is precise enough: it is not to make use of it, which would be off by a thousandth."""
    base()
    assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    torch.manual_seed(0)
    for left, right in ((torch.randn(300, 576), torch.randn(576, 1536)), (torch.randn(3, 200, 64), torch.randn(3, 64, 700))):
        exact = left.double() @ right.double()
        assert (left @ right - exact).abs().mean() < 1e-6 * exact.abs().mean()


def test_states_computed_once_give_the_gradient_of_reading_from_the_first_token(model, tmp_path):
    batches = [encode("search", "long"), encode("handoff")]
    states = LayerStates(model, 26, tmp_path)
    states.compute([example.encoded for batch in batches for example in [*batch, *batch]], "test")
    for share in (True, False):
        for batch in batches:
            whole = gradients(model, batch)
            with only_layers(model, 26, 30):
                upper = gradients(model, batch, Collator(share, states))
            assert near(upper, whole)


def test_states_are_computed_once_for_the_same_weights(model, tmp_path, monkeypatch):
    encoded = [example.encoded for example in encode("search", "handoff")]
    LayerStates(model, 26, tmp_path).compute(encoded, "test")
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert len(files) == 3, "two conversations and the prompt that they share"
    again = LayerStates(base(), 26, tmp_path)
    again.compute(encoded, "the same weights without an adapter")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == files
    LayerStates(model, 25, tmp_path).compute(encoded[:1], "another layer")
    assert len(list(tmp_path.rglob("*.safetensors"))) == 5
    weight = base().model.layers[0].mlp.up_proj.weight
    monkeypatch.setattr(weight, "data", weight.data * 2)
    assert not LayerStates(base(), 26, tmp_path)._path(encoded[0].ids).is_file(), "other weights"


def test_a_model_made_of_some_layers_is_whole_again_afterwards(model):
    ids = ids_of(encode("handoff")[0])

    def read(states):
        return read_packed(model, states[:, :0], states, [states.shape[1]])

    with torch.no_grad():
        before = read(ids)
        with pytest.raises(ZeroDivisionError), only_layers(model, 26, 30), attention(model, "eager"):
            raise ZeroDivisionError
        with only_layers(model, 0, 26):
            states = read(ids)[None]
        with only_layers(model, 26, 30):
            parted = read(states)
        after = read(ids)
    assert torch.equal(before, after)
    assert torch.allclose(before, parted, atol=1e-4)


def test_an_adapter_added_to_the_weights_gives_the_gradient_of_one_beside_them(model):
    batch = encode("search", "handoff")
    with fused(model), merged_lora(model):
        both = gradients(model, batch)
    with merged_lora(model):
        assert sum("forward" in vars(module) for module in model.modules()) == 4 * 7, "every projection of the layers with an adapter"
        merged, loss = gradients(model, batch), nll(model, batch)
    assert not any("forward" in vars(module) for module in model.modules())
    assert near(both, merged) and near(merged, gradients(model, batch)) and torch.isclose(loss, nll(model, batch), rtol=1e-5)
    packed = get_peft_model(load_base(STUDENT.model_copy(update={"unpack_once": False})), LoraConfig(r=4, target_modules=adapted(30, 29)))
    with merged_lora(packed):
        assert not any("forward" in vars(module) for module in packed.modules()), "packed weights have nothing to be added to"


def test_a_weighted_conversation_gives_the_gradient_of_its_copies(model):
    copies = [*encode("search"), *encode("handoff") * 3]
    weighted = count_copies([(example.group, f"{number}", example.encoded) for number, example in enumerate(copies)])
    assert [example.times for example in weighted] == [1, 3]
    assert near(gradients(model, weighted), gradients(model, copies))


def test_copies_weigh_as_much_in_a_batch_of_their_own():
    search, handoff = *encode("search"), *encode("handoff", times=4)
    tokens = [(example.encoded.ids, example.encoded.labels()) for example in (search, handoff)]
    own, repeated = (sum(label != -100 for label in labels) for _, labels in tokens)
    assert tokens_a_step([[search], [handoff]]) == (own + 4 * repeated) / 2
    assert tokens_a_step([[search, handoff]]) == own + 4 * repeated


def test_the_loss_is_the_models_own_loss_on_the_agents_tokens(model):
    example, = encode("search")
    ids = ids_of(example)
    labels = torch.tensor([example.encoded.labels()], device=ids.device)
    with torch.no_grad():
        total, theirs = nll(model, [example]), model(input_ids=ids, labels=labels).loss
    assert total.item() / tokens_a_step([[example]]) == pytest.approx(theirs.item(), rel=1e-4)


def test_the_loss_in_pieces_is_that_of_all_logits(monkeypatch):
    monkeypatch.setattr("stages.qlora_train.LOGITS_AT_ONCE", 3)
    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(6, 11, bias=False).requires_grad_(False), torch.randn(8, 6, requires_grad=True)
    targets, times = torch.randint(11, (8,)), torch.tensor([1, 1, 4, 4, 1, 1, 2, 1])
    whole = torch.nn.functional.cross_entropy(head(hidden), targets, reduction="none") @ times.float()
    pieces = head_loss(head, hidden, targets, times)
    assert pieces.item() == pytest.approx(whole.item(), rel=1e-5)
    assert torch.allclose(*(torch.autograd.grad(3 * loss, hidden)[0] for loss in (pieces, whole)), atol=1e-5)


def test_unpacked_weights_are_the_nf4_values():
    import bitsandbytes as bnb
    packed = load_base(STUDENT.model_copy(update={"unpack_once": False}))
    layer = packed.model.layers[3].mlp.up_proj
    assert isinstance(layer, bnb.nn.Linear4bit) and layer.weight.quant_state.quant_type == "nf4" and layer.weight.quant_state.nested
    plain = base().model.layers[3].mlp.up_proj
    assert torch.equal(plain.weight, bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float())
    assert len(plain.weight.unique()) > 16, "double quantisation scales differ between blocks"
    assert not plain.weight.requires_grad


def test_only_upper_layers_carry_an_adapter(model):
    layers = {int(name.split("layers.")[1].split(".")[0]) for name, p in model.named_parameters() if p.requires_grad and "lora" in name}
    assert layers == {26, 27, 28, 29}
    with pytest.raises(InputError, match="layers 0 to 29"):
        adapted(30, 30)


def test_several_gpus_are_refused_before_anything_is_computed(monkeypatch):
    check_devices()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="one GPU, and 2 can be seen") as error:
        check_devices()
    assert "CUDA_VISIBLE_DEVICES=0" in error.value.hint


def test_batches_hold_one_company_within_the_budget():
    rows = [Example(company, example.encoded, 1)
            for company in ("a", "b") for _ in range(7) for example in encode("search", "handoff", "long")]
    batches = make_batches(rows, budget=400, seed=1)
    assert sum(map(len, batches)) == len(rows)
    for batch in batches:
        assert len({example.group for example in batch}) == 1
        prefix = batch[0].encoded.prefix
        assert len(batch) == 1 or prefix + sum(len(example.encoded.ids) - prefix for example in batch) <= 400
    assert batches != make_batches(rows, budget=400, seed=2)
    assert all(len(batch) == 1 for batch in make_batches(rows, budget=1, seed=1)), "a conversation beyond the budget stands alone"


def test_a_conversation_that_would_be_cut_stops_the_run_by_name():
    rows = encode_table(table({"long": LONG}), encoder())
    with pytest.raises(InputError, match=r"teashop/long/0 has .* tokens, more than qlora_train.max_tokens"):
        check_encoded(rows, max_tokens=50)
    check_encoded(rows, max_tokens=500)


def test_a_conversation_without_agent_turns_stops_the_run_by_name():
    rows = encode_table(table({"silent": SEARCH[:1]}), encoder())
    with pytest.raises(InputError, match="teashop/silent/0 has no agent turn"):
        check_encoded(rows, max_tokens=500)


@pytest.fixture
def workspace(tmp_path):
    """A folder in which the stage runs for real, on a few conversations."""
    data = table({f"{name}{i}": [customer(f"{messages[0].content} ({i})"), *messages[1:]]
                  for i in range(4) for name, messages in {"s": SEARCH, "h": HANDOFF, "l": LONG}.items()})
    import polars as pl
    tmp_path.joinpath("data/oversample").mkdir(parents=True)
    write_table(tmp_path / "data/oversample/train.parquet", data.with_columns(pl.lit(0, dtype=pl.Int64).alias("copy")), Oversampled)
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["qlora_train"] |= {"rank": 4, "first_layer": 26, "batch_tokens": 150}
    tmp_path.joinpath("params.yaml").write_text(yaml.safe_dump(params))
    return tmp_path


def start(workspace, cache):
    """The stage, with checkpoints soon and a clock on which a run takes a second, so that its tok/s are the tokens that it read."""
    code = ("import itertools, types, stages.qlora_train as q; q.LOG_EVERY, q.CHECKPOINT_EVERY = 2, 4; "
            "q.time = types.SimpleNamespace(monotonic=itertools.count().__next__); q.main()")
    weights = Path(os.environ.get("HANDOFF_CACHE", ROOT / ".cache")) / "weights"
    cache.mkdir(exist_ok=True)
    if not (cache / "weights").exists():
        (cache / "weights").symlink_to(weights)
    return subprocess.Popen([sys.executable, "-c", code], cwd=workspace, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={
        **os.environ, "PYTHONPATH": str(ROOT), "HANDOFF_CACHE": str(cache), "HF_HUB_OFFLINE": "1"})


def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over_and_deleted(tmp_path):
    assert last_checkpoint(tmp_path)[0] is None
    for step in (4, 12, 16, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (4, 12):
        TrainerState(global_step=step).save_to_json(tmp_path / f"checkpoint-{step}/trainer_state.json")
    (tmp_path / "checkpoint-16/trainer_state.json").write_text('{"global_step": 1')
    checkpoint, before = last_checkpoint(tmp_path)
    assert checkpoint == str(tmp_path / "checkpoint-12") and before.global_step == 12
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-4", "checkpoint-12"}


def test_the_mean_loss_of_a_resumed_run_is_that_of_all_its_steps():
    losses = [3.0, 1.0, 2.0, 5.0, 4.0, 7.0, 9.0]
    logged = [{"loss": 2.0, "step": 2}, {"loss": 3.5, "step": 4}]
    before = TrainerState(global_step=4, log_history=logged)
    assert mean_loss(before, sum(losses[4:]) / 3, 7) == pytest.approx(sum(losses) / 7)
    assert mean_loss(TrainerState(), 0.1, 7) == 0.1
    assert mean_loss(TrainerState(global_step=5, log_history=logged), 0.0, 5) == pytest.approx(sum(losses[:4]) / 4), "the fifth is not known"


def reported(workspace, out):
    """What a run leaves besides the adapter: its metrics, its curve, how many tokens it read."""
    metrics = json.loads((workspace / "metrics/qlora_train.json").read_text())
    curve = (workspace / "metrics/qlora_train/plots/metrics/loss.tsv").read_text().splitlines()
    latest = json.loads((workspace / "metrics/qlora_train/metrics.json").read_text())
    return metrics, curve, latest, int(re.search(r"(\d+) tok/s", out)[1])


def numbers(curve):
    return [float(cell) for row in curve[1:] for cell in row.split("\t")]


def test_a_killed_run_goes_on_where_it_stopped_and_ends_alike(workspace, tmp_path_factory):
    base()  # the weights are converted by now
    whole = start(workspace, tmp_path_factory.mktemp("whole"))
    out, err = whole.communicate(timeout=300)
    assert whole.returncode == 0, err
    assert "qlora_train: 12 conversations" in out
    metrics, curve, latest, tokens = reported(workspace, out)
    assert tokens == metrics["tokens"] and curve[0] == "step\tloss" and len(curve) == 1 + metrics["steps"] // 2
    folder = workspace / "models/qlora_train"
    adapter = load_file(folder / "adapter_model.safetensors")

    cache = tmp_path_factory.mktemp("killed")
    victim = start(workspace, cache)
    deadline = time.monotonic() + 200
    while not list(cache.glob("checkpoints/*/checkpoint-4/trainer_state.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    assert list(cache.glob("checkpoints/*/checkpoint-*")), "it was killed after a checkpoint"

    for output in ("models", "metrics"):
        shutil.rmtree(workspace / output)  # as DVC does before it runs a stage
    whole_one = next(cache.glob("checkpoints/*/checkpoint-*"))
    shutil.copytree(whole_one, unfinished := whole_one.with_name("checkpoint-1000"))
    (unfinished / "trainer_state.json").unlink()
    again = start(workspace, cache)
    out, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    metrics_again, curve_again, latest_again, tokens_again = reported(workspace, out)
    assert metrics_again == metrics | {"train_loss": pytest.approx(metrics["train_loss"], rel=1e-4)}
    assert curve_again[0] == curve[0] and numbers(curve_again) == pytest.approx(numbers(curve), rel=1e-4)
    assert latest_again["train"]["loss"] == pytest.approx(latest["train"]["loss"], rel=1e-4) and latest_again["step"] == latest["step"]
    assert 0 < tokens_again < tokens, "only the tokens since the checkpoint were read"
    resumed = load_file(workspace / "models/qlora_train/adapter_model.safetensors")
    assert all(torch.allclose(adapter[name], resumed[name], atol=1e-5) for name in adapter)
    assert not list(cache.glob("checkpoints/*")), "checkpoints go once the adapter stands"

    loaded = PeftModel.from_pretrained(load_base(STUDENT), workspace / "models/qlora_train")
    trained = {name for name, p in loaded.named_parameters() if "lora_B" in name and p.abs().sum() > 0}
    assert trained and all(int(name.split("layers.")[1].split(".")[0]) >= 26 for name in trained)
