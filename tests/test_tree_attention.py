"""Attention of a step's tokens, by our C and by torch, against torch's own over all keys at once."""

import pytest
import torch

from agent import compiled
from agent.compiled import TILE
from agent.tree_attention import Seen, attend, joined, lay_out

KV = 2


@pytest.fixture(params=["compiled", "torch"])
def way(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(compiled, "library", lambda: None)
    elif compiled.library() is None:
        pytest.skip("no C compiler here")
    return request.param


def whole(query, keys, values, hidden):
    """(KV, R, D) over (KV, S, D), in float64; `hidden` (R, S) is not seen."""
    scores = (query.double() @ keys.double().transpose(1, 2)).masked_fill(hidden, float("-inf"))
    return scores.softmax(dim=-1) @ values.double(), scores.logsumexp(dim=-1, keepdim=True)


def attended(query, layer, seen):
    outs, sums = torch.full_like(query, 7), query.new_full((*query.shape[:2], 1), 7, dtype=torch.float32)
    attend(query, layer, seen, outs, sums)
    return outs, sums


@pytest.mark.parametrize("size", [TILE, 2 * TILE])
@pytest.mark.parametrize("scale", [1, 30])
def test_every_row_sees_its_part_of_its_own_list(way, size, scale):
    """Blocks of one to eleven rows, lists out of order, ends before, at and behind a tile's; other rows are left alone."""
    torch.manual_seed(0)
    lists, firsts = [2, 0, 3, 2], [1, 2, 13, 17, 22]
    ends = torch.tensor([99, *torch.randint(1, 151, (21,)), 99])
    ends[3:7] = torch.tensor([1, 64, 65, 150])
    query = torch.randn(KV, 23, size) * scale / size ** 0.5
    keys, values = torch.randn(4, KV, 150, size), torch.randn(4, KV, 150, size)
    layer = lay_out(keys, values)
    outs, sums = attended(query, layer, Seen([layer], lists, firsts, ends))
    for block, number in enumerate(lists):
        rows = slice(firsts[block], firsts[block + 1])
        out, total = whole(query[:, rows], keys[number], values[number], torch.arange(150) >= ends[rows, None])
        assert torch.allclose(outs[:, rows].double(), out, atol=2e-5) and torch.allclose(sums[:, rows].double(), total, atol=2e-5)
    assert (outs[:, [0, 22]] == 7).all() and (sums[:, [0, 22]] == 7).all()


@pytest.mark.parametrize("far", [50.0, 500.0])
def test_scores_that_lie_far_apart(way, far):
    query, keys = torch.zeros(1, 1, TILE), torch.zeros(1, 1, 3, TILE)
    query[..., 0], keys[..., 0] = 1, torch.tensor([far, 0, -far])
    values = torch.eye(TILE)[:3][None, None]
    layer = lay_out(keys, values)
    outs, sums = attended(query, layer, Seen([layer], [0], [0, 1], torch.tensor([3])))
    assert torch.allclose(outs[0, 0, :3], torch.tensor([1.0, 0, 0]), atol=1e-20) and sums.item() == far


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("size", [TILE, 24])
def test_attention_in_parts_is_attention_over_all(way, dtype, tolerance, size):
    """In a list of its own and in one that all share."""
    torch.manual_seed(0)
    query = (torch.randn(KV, 6, size) / size ** 0.5).to(dtype)
    states = torch.randn(2, 3, KV, 80, size).to(dtype)
    own, shared = lay_out(*states[:, :2]), lay_out(*states[:, 2:])
    ends = torch.tensor([1, 5, 80, 70, 64, 3])
    parts = [(own, Seen([own], [0, 1], [0, 4, 6], ends)), (shared, Seen([shared], [0], [0, 6], torch.full((6,), 80)))]
    outs, sums = (torch.stack(each) for each in zip(*(attended(query, *part) for part in parts), strict=True))
    found = joined(outs, sums)
    keys, values = states.float()
    for row, number in enumerate([0, 0, 0, 0, 1, 1]):
        seen = slice(0, int(ends[row]))
        all_keys, all_values = (torch.cat([each[number, :, seen], each[2]], dim=1) for each in (keys, values))
        out, _ = whole(query[:, [row]].float(), all_keys, all_values, torch.zeros(1, all_keys.shape[1], dtype=torch.bool))
        assert torch.allclose(found[:, [row]].double(), out, atol=tolerance, rtol=tolerance)
