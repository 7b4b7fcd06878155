"""The rows of a Parquet file, by pyarrow, which the extra `data` brings.  No jax.

A file is decoded a few rows at a time on the thread that asks, and only the columns that are trained.  What it unpacks to
is bounded by the limits of the process (`reader_process`).
"""

from __future__ import annotations

import functools
import io
import itertools
from collections.abc import Iterator

from jaxlora.core.errors import DataInvalid
from train.data.examples import KINDS
from train.data.shapes import Record, check_columns, shape_of, some_of

ROWS = 64  # decoded at once
MAX_COLUMNS = 1000
MAX_FOOTER_BYTES = 2**24  # of names and of columns in the description of a file


def prepare() -> None:
    """Imports pyarrow, which then uses one thread and the allocator that the limits of a process bound.

    Raises DataInvalid, which says what to install, where it is absent.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise DataInvalid(
            "the file is Parquet, which pyarrow reads; install it with `uv sync --extra data` or `pip install "
            "'jaxlora[data]'`, or give JSONL"
        ) from error
    pyarrow.set_memory_pool(pyarrow.system_memory_pool())
    pyarrow.set_cpu_count(1)
    pyarrow.set_io_thread_count(1)


def rows(file: io.BufferedReader) -> Iterator[tuple[int, functools.partial[Record]]]:
    """Yields each row, by number from 1.  Raises DataInvalid, also between rows, for a damaged file and unknown columns."""
    prepare()
    import pyarrow
    import pyarrow.parquet

    try:
        opened = pyarrow.parquet.ParquetFile(
            file,
            pre_buffer=False,
            thrift_string_size_limit=MAX_FOOTER_BYTES,
            thrift_container_size_limit=MAX_FOOTER_BYTES,
        )
        names = opened.schema_arrow.names
        shape = shape_of([name.lower() for name in names])
        if shape is None:
            raise DataInvalid(f"columns {some_of(names)} are of no known kind; give {'; or '.join(KINDS.values())}")
        check_columns(shape, [name.lower() for name in names])
        wanted = [name for name in names if not shape.passes_over(name.lower())]
        batches = opened.iter_batches(batch_size=ROWS, columns=wanted, use_threads=False)
        numbers = itertools.count(1)
        for batch in batches:
            for row in batch.to_pylist():
                yield next(numbers), functools.partial(_record, row)
    except MemoryError:
        raise
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataInvalid(f"the file is not whole Parquet: {reason}; write it again, or give JSONL") from error


def _record(row: Record) -> Record:
    return {name.lower(): _without_nulls(value) for name, value in row.items() if value is not None}


def _without_nulls(value: object) -> object:
    """Returns the value as a line of JSON would hold it: a Parquet structure has all of its fields in every row."""
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    if isinstance(value, list):
        return [_without_nulls(one) for one in value]
    return value
