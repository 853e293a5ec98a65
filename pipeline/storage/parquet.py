"""Encodes small Parquet files, and reads Parquet from open objects, on the calling thread only.

A thread of Arrow that waits for the interpreter lock while Python exits would abort the process.
"""

import io
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def encode_parquet(table: pa.Table) -> bytes:
    """Returns a table as a Parquet file."""
    out = io.BytesIO()
    pq.write_table(table, out, compression="zstd")
    return out.getvalue()


def read_table(file: Any, columns: Iterable[str] | None = None) -> pa.Table:
    """Returns columns of a Parquet file, or all columns; ignores names that the file lacks."""
    names = None if columns is None else list(columns)
    return pq.ParquetFile(file, pre_buffer=False).read(names, use_threads=False)


def read_row_groups(file: Any, columns: Iterable[str]) -> Iterator[pa.Table]:
    """Yields columns of a Parquet file, one row group at a time; ignores names that the file lacks."""
    parquet, names = pq.ParquetFile(file, pre_buffer=False), list(columns)
    for group in range(parquet.num_row_groups):
        yield parquet.read_row_group(group, columns=names, use_threads=False)


def read_batches(file: Any, columns: Iterable[str], rows: int) -> Iterator[pa.Table]:
    """Yields columns of a Parquet file, at most `rows` rows at a time; ignores names that the file lacks."""
    parquet, names = pq.ParquetFile(file, pre_buffer=False), list(columns)
    for batch in parquet.iter_batches(rows, columns=names, use_threads=False):
        yield pa.table(batch)
