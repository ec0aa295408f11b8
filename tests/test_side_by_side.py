"""Iterators in threads."""

import time
from itertools import count, repeat

import pytest
import torch

from agent.side_by_side import side_by_side


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2, "as many as before, whatever came of it"
    torch.set_num_threads(before)


def test_all_that_iterators_give_comes_out_and_each_in_its_order():
    found = list(side_by_side([zip(repeat(name), range(50), strict=False) for name in "abc"]))
    assert len(found) == 150
    for name in "abc":
        assert [number for one, number in found if one == name] == list(range(50))
    assert list(side_by_side([iter(())])) == []


def test_a_thread_has_one_core():
    assert list(side_by_side([(torch.get_num_threads() for _ in range(1)) for _ in range(3)])) == [1, 1, 1]


def test_an_error_of_one_is_raised_and_ends_the_others():
    taken = []

    def endless():
        for number in count():
            taken.append(number)
            yield number

    def broken():
        yield -1
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        for _ in side_by_side([endless(), broken()]):
            pass
    after = len(taken)
    time.sleep(0.05)
    assert len(taken) == after, "nobody goes on"


def test_who_takes_no_more_ends_them_all():
    taken = []

    def endless(name):
        for number in count():
            taken.append((name, number))
            yield number

    found = side_by_side([endless("a"), endless("b")])
    assert next(found) == 0
    found.close()
    after = len(taken)
    time.sleep(0.05)
    assert list(found) == [] and len(taken) == after
