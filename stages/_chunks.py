"""Tables larger than memory: read in chunks of whole conversations, worked on by every core, written from parts."""

from __future__ import annotations

import copyreg
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from hashlib import blake2b
from itertools import chain, islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from schemas.errors import InputError
from stages._stage import read_table

if TYPE_CHECKING:
    import pandera.polars as pa
    import polars as pl

ROWS = 2**15
"""Messages in a chunk, a conversation more or less: 10 to 20 MB. Smaller tables are one chunk."""
WORTH_A_PROCESS = 3
"""Chunks from which on other processes are begun: that takes about as long as a chunk."""
ROW_GROUP = 2**16
"""Messages in a row group of a table that is written from parts; also what a later reader has to hold at once."""
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_work: Callable[[Any], Any]
# By itself it comes back from a worker without its hint, which it cannot be made without.
copyreg.pickle(InputError, lambda error: (InputError, (str(error), error.hint)))


def digest(text: str) -> bytes:
    """16 bytes that stand for a text, in any process: no two texts that anybody writes have the same."""
    return blake2b(text.encode(), digest_size=16).digest()


def checked_chunks(path: Path, schema: type[pa.DataFrameModel], rows: int = ROWS) -> Iterator[pl.DataFrame]:
    """A stage's input, checked, in chunks; at least one, which is empty if the table is. Holds 90 bytes a conversation besides the chunk.

    Raises:
        InputError: as `read_table`; after the chunks before the fault.
    """
    import pandera.errors
    import polars as pl

    if not path.is_file():
        read_table(path, schema)
    names, seen = 0, set[bytes]()
    try:
        schema.validate(pl.read_parquet(path, n_rows=0))
        for chunk in chunks(pl.scan_parquet(path), rows):
            schema.validate(chunk)
            begun = chunk.filter(pl.col("index") == 0)["conversation_id"]
            names += len(begun)
            seen.update(map(digest, begun))
            if len(seen) < names:
                read_table(path, schema)
            yield chunk
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, pandera.errors.SchemaError, pandera.errors.SchemaErrors):
        read_table(path, schema)  # which says what is wrong, in the words of every stage
        raise


def chunks(table: pl.LazyFrame, rows: int = ROWS) -> Iterator[pl.DataFrame]:
    """A table of conversations, or whole conversations of one, in chunks of about so many rows that cut none of them; at least one chunk."""
    import polars as pl

    begun = table.head(0).collect()
    for batch in table.collect_batches(chunk_size=rows):
        begun = pl.concat([begun, batch])
        if len(begun) >= rows and (last := (begun["index"] == 0).arg_true().max()):
            yield begun[:last]
            begun = begun[last:]
    yield begun


def _itself(item: Any) -> Any:
    return item


def on_all_cores(work: Callable[[Any], _Result], items: Iterable[_Item], sent: Callable[[_Item], Any] = _itself) -> Iterator[tuple[_Item, _Result]]:
    """Every item with what `work` makes of it, in order; a process for each core, or none for fewer than `WORTH_A_PROCESS` items or one core.

    At most two items a core are on the way, whatever comes of them.

    Args:
        work: a function that pickle can send, with what it is bound to; sent once.
        items: taken one by one.
        sent: what of an item `work` gets; it has to be pickled, and the item does not.
    """
    items, cores = iter(items), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    first = list(islice(items, WORTH_A_PROCESS))
    if len(first) < WORTH_A_PROCESS or cores < 2:
        yield from ((item, work(sent(item))) for item in chain(first, items))
        return
    on_the_way: deque[tuple[_Item, Future[_Result]]] = deque()
    # Spawned, since a fork of a process in which polars has threads may hang.
    with ProcessPoolExecutor(cores, get_context("spawn"), _begin, (work,)) as pool:
        for item in chain(first, items):
            on_the_way.append((item, pool.submit(_do, sent(item))))
            if len(on_the_way) == 2 * cores:
                done, result = on_the_way.popleft()
                yield done, result.result()
        for done, result in on_the_way:
            yield done, result.result()


def _begin(work: Callable[[Any], Any]) -> None:
    """Set a worker up: Ctrl-C is its parent's to answer, and it does not outlive a parent that was killed."""
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if parent := parent_process():
        parent.join()
        os._exit(1)


def _do(item: Any) -> Any:
    return _work(item)


class Parts:
    """A table that grows by parts, which lie on disk, except for the last `rows` at most; one file in the end.

    Args:
        folder: where they lie; it is made here, and nobody else writes there.
        schema: of the table, which is checked by it. Columns that it does not know stay behind.
        beside: columns that are kept although it does not know them.
        rows: how many wait until they are checked and written.
    """

    def __init__(self, folder: Path, schema: type[pa.DataFrameModel], *beside: str, rows: int = ROWS) -> None:
        self._folder, self._schema, self._beside, self._at_once = folder, schema, beside, rows
        self._files, self._rows = 0, 0
        self._waiting: list[pl.DataFrame] = []
        folder.mkdir()

    def add(self, part: pl.DataFrame) -> None:
        """Whole conversations, to stand below those before."""
        self._waiting.append(part.select(*self._schema.to_schema().columns, *self._beside))
        self._rows += len(part)
        # A check takes a while, however short the part.
        if self._rows >= self._at_once:
            self._write()

    def _write(self) -> None:
        import polars as pl

        part = pl.concat(self._waiting)
        self._schema.validate(part.drop(self._beside))
        part.write_parquet(self._folder / f"{self._files:06}.parquet", compression="lz4")
        self._files, self._rows, self._waiting = self._files + 1, 0, []

    def scan(self) -> pl.LazyFrame:
        """What is there so far, and be it no rows of a table."""
        import polars as pl

        if self._waiting:
            self._write()
        return pl.scan_parquet(self._folder / "*.parquet")


def publish(path: Path, table: pl.LazyFrame) -> None:
    """Write a checked table by row groups; the file appears whole or not at all, and is what `write_table` writes where it is one row group."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    table.sink_parquet(partial, compression="zstd", row_group_size=ROW_GROUP)
    os.replace(partial, path)
