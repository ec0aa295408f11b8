"""Our C against torch: attention over whole conversations and what is computed number by number, with gradients."""

import re
import subprocess
from functools import cache

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from agent import compiled
from agent.compiled import COMMAND, SOURCES, TILE, Line, library, make
from agent.fused import FAMILIES, fused
from agent.packing import _fused, _packed_attention, causal

HEADS, KV = 6, 2
KINDS = {"Llama": "llama", "Mistral": "mistral", "Qwen2": "qwen2", "Qwen3": "qwen3", "SmolLM3": "smollm3"}

with_compiler = pytest.mark.skipif(library() is None, reason="no C compiler here")


@cache
def without_avx_512():
    return make(["-march=x86-64-v3" if word == "-march=native" else word for word in COMMAND])


@pytest.fixture(params=["native", "x86-64-v3"])
def processor(request, monkeypatch):
    """This one, and as if it were one without AVX-512."""
    if request.param != "native":
        if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
            pytest.skip("no AVX2 here")
        monkeypatch.setattr(compiled, "library", without_avx_512)


def states(heads, tokens, size, spread=1.0):
    """(1, heads, tokens, size), as a projection leaves it in memory, with something between the rows."""
    return (torch.randn(1, tokens, heads * size + 5) * spread)[..., :heads * size].unflatten(2, (heads, size)).transpose(1, 2)


def outcome(attend, tensors, upstream):
    leaves = [each.detach().requires_grad_() for each in tensors]
    out = attend(*leaves)
    return [out, *torch.autograd.grad(out, leaves, upstream)]


def near(found, exact, tolerance):
    return all((one - other).abs().max() <= tolerance * max(1, other.abs().max()) for one, other in zip(found, exact, strict=True))


@with_compiler
@pytest.mark.parametrize("size", [TILE, 2 * TILE])
@pytest.mark.parametrize("before", [0, 5, TILE])
@pytest.mark.parametrize("rows", [1, 3, TILE, 2 * TILE + 7])
def test_attention_over_all_before(processor, rows, before, size):
    torch.manual_seed(0)
    query, key, value = states(HEADS, rows, size), states(KV, before + rows, size), states(KV, before + rows, size)
    upstream = torch.randn_like(query)
    exact = outcome(lambda *all_: _fused(*all_, 0.2), [each.double() for each in (query, key, value)], upstream.double())
    assert near(outcome(lambda *all_: causal(*all_, 0.2), (query, key, value), upstream), exact, 1e-5)


@with_compiler
@pytest.mark.parametrize("cut, lengths", [(0, (3, 70, 1)), (70, (1, 64, 200)), (64, (5,)), (129, (130, 129))])
def test_a_line_of_sequences_behind_a_common_beginning(processor, cut, lengths, monkeypatch):
    torch.manual_seed(0)
    tensors = [states(heads, cut + sum(lengths), TILE) for heads in (HEADS, KV, KV)]
    upstream = torch.randn_like(tensors[0])

    def attend(*all_):
        return _packed_attention(None, *all_, None, packed=(cut, lengths))[0].transpose(1, 2)

    found = outcome(attend, tensors, upstream)
    with monkeypatch.context() as patch:
        patch.setattr(compiled, "library", lambda: None)
        assert near(found, outcome(attend, [each.double() for each in tensors], upstream.double()), 1e-5)


@with_compiler
def test_how_many_cores_compute_changes_no_bit():
    torch.manual_seed(0)
    tensors, upstream, found = [states(heads, 500, TILE) for heads in (HEADS, KV, KV)], torch.randn(1, HEADS, 500, TILE), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(outcome(lambda *all_: _packed_attention(None, *all_, None, packed=(100, (250, 150)))[0].transpose(1, 2), tensors, upstream))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@with_compiler
@pytest.mark.parametrize("spread", [0.0, 30.0])
def test_scores_that_are_all_alike_or_lie_far_apart(processor, spread):
    """A later key's score may lie hundreds above all before it, or below."""
    torch.manual_seed(0)
    query, key, value = states(HEADS, 200, TILE, spread), states(KV, 200, TILE), states(KV, 200, TILE)
    exact = _fused(*(each.double() for each in (query, key, value)), 1.0)
    assert near([causal(query, key, value, 1.0)], [exact], 1e-4)


def test_a_line_is_what_the_source_says():
    """Their fields, in order."""
    source = re.sub(r"/\*.*?\*/", "", SOURCES[0].read_text(encoding="utf-8"), flags=re.DOTALL)
    declared = re.search(r"typedef struct \{(.*?)\} Line;", source, re.DOTALL)[1]
    assert re.findall(r"\*?(\w+)[,;]", declared) == [name for name, _ in Line._fields_]
    assert f"TILE = {TILE} " in source


@pytest.mark.parametrize("fault", [FileNotFoundError("cc"), subprocess.CalledProcessError(1, "cc")])
def test_without_a_compiler_there_is_no_library(monkeypatch, fault):
    def run(*args, **kwargs):
        raise fault

    monkeypatch.setattr(subprocess, "run", run)
    assert make(COMMAND) is None


def tiny(family, **others):
    torch.manual_seed(0)
    config = AutoConfig.for_model(KINDS.get(family, family), **{
        "vocab_size": 50, "hidden_size": 2 * TILE, "intermediate_size": 3 * TILE, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": TILE, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, **others})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms begin as ones, which would hide what is done with them.
            parameter.mul_(torch.rand_like(parameter) + 0.5)
            parameter.requires_grad_(False)
    return model


def computed(model, entering):
    """Last states and the gradient of what enters."""
    entering = entering.detach().requires_grad_()
    out = model(inputs_embeds=entering).last_hidden_state
    return out.detach(), torch.autograd.grad(out, entering, torch.ones_like(out).cumsum(1))[0]


@with_compiler
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_family_computes_the_same_fused(processor, family):
    model, entering = tiny(family), torch.randn(1, 9, 2 * TILE) * 3
    own = computed(model.model, entering)
    with fused(model):
        ours = computed(model.model, entering)
        # More than one conversation at a time is rotated by the model itself.
        batch = model.model(inputs_embeds=entering.expand(2, -1, -1)).last_hidden_state
    assert near(ours, own, 1e-5) and not torch.equal(ours[0], own[0])
    assert near([batch[1:]], [own[0]], 1e-5)
    again = computed(model.model, entering)
    assert all(torch.equal(one, other) for one, other in zip(again, own, strict=True)), "afterwards the model is as it was"


@with_compiler
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_norms_gates_and_rotations_are_ours_forth_and_back(family, monkeypatch):
    """The results alone would be right without."""
    called, made = set(), library()

    class Watched:
        def __getattr__(self, name):
            called.add(name)
            return getattr(made, name)

    monkeypatch.setattr(compiled, "library", Watched)
    model = tiny(family)
    with fused(model):
        computed(model.model, torch.randn(1, 9, 2 * TILE))
    assert called == {"norm", "norm_back", "gated", "gated_back", "rotate"}


@pytest.mark.parametrize("family, others", [("gemma", {}), ("Llama", {"hidden_act": "gelu"})])
def test_what_is_computed_otherwise_stays_as_it_is(family, others):
    model, entering = tiny(family, **others), torch.randn(1, 9, 2 * TILE)
    own = computed(model.model, entering)
    with fused(model):
        assert all(torch.equal(one, other) for one, other in zip(computed(model.model, entering), own, strict=True))


@pytest.mark.parametrize("width", ["hidden_size", "intermediate_size", "head_dim"])
def test_widths_that_do_not_fit_are_torchs(width):
    model = tiny("Llama", **{width: 40})
    entering = torch.randn(1, 9, model.config.hidden_size)
    own = computed(model.model, entering)
    with fused(model):
        assert near(computed(model.model, entering), own, 1e-5)


def test_nothing_is_fused_without_a_compiler(monkeypatch):
    monkeypatch.setattr(compiled, "library", lambda: None)
    model, entering = tiny("Llama"), torch.randn(1, 9, 2 * TILE)
    own = computed(model.model, entering)
    with fused(model):
        assert all(torch.equal(one, other) for one, other in zip(computed(model.model, entering), own, strict=True))


@with_compiler
def test_gates_far_from_zero(processor):
    """Hundreds below, where their exponential is beyond float32, and above."""
    model, entering = tiny("Llama"), torch.randn(1, 40, 2 * TILE)
    mlp = model.model.layers[0].mlp
    mlp.gate_proj.weight.data.mul_(1e4)
    assert mlp.gate_proj(entering).min() < -200
    own = outcome(mlp, [entering], torch.ones_like(entering))
    with fused(model):
        assert near(outcome(mlp, [entering], torch.ones_like(entering)), own, 1e-5)
