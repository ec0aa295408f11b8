"""Several iterators at once, each in a thread of its own, on one core."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from threading import Event
from typing import TypeVar

import torch

Given = TypeVar("Given")


class _Ended:
    """Stands behind the last thing that an iterator gave; `error` is what it raised."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


def side_by_side(iterators: Sequence[Iterator[Given]]) -> Iterator[Given]:
    """What all iterators give, in the order in which it comes, which may differ from one time to the next.

    What one raises is raised here, and the others go no further than what they are at; so too where the caller takes no more.
    torch computes on one core in each: threads of its own inside of them would sleep and be woken for every product (libgomp does
    not let them wait awake where there are more of them than cores), and small products then take twice as long.
    """
    given: SimpleQueue[Given | _Ended] = SimpleQueue()
    enough, threads = Event(), torch.get_num_threads()

    def take(iterator: Iterator[Given]) -> None:
        try:
            for each in iterator:
                given.put(each)
                if enough.is_set():
                    break
            given.put(_Ended())
        except BaseException as error:
            given.put(_Ended(error))

    pool = ThreadPoolExecutor(len(iterators), initializer=torch.set_num_threads, initargs=(1,))
    try:
        running = len([pool.submit(take, iterator) for iterator in iterators])
        while running:
            each = given.get()
            if not isinstance(each, _Ended):
                yield each
            elif each.error:
                raise each.error
            else:
                running -= 1
    finally:
        enough.set()
        pool.shutdown()
        # It is also what later threads begin with.
        torch.set_num_threads(threads)
