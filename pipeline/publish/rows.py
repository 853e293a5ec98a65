"""Rows for a consumer table: the rows of prediction files, sorted, in tables of bounded size."""

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.commit import Partition
from pipeline.predictions import LABEL_SCHEMA
from pipeline.storage import content_errors

#: By class, then the lowest score first: a filter on label, or on label and score, reads few row groups of a
#: file. Shard and index make the order unique.
_SORT_KEYS = [("label", "ascending"), ("score", "ascending"), ("shard", "ascending"), ("index", "ascending")]
#: Larger tables make files that are too large; over 2 GiB, Arrow cannot sort strings.
_MAX_TABLE_BYTES = 1024**3


def read_sorted_rows(
    partition: Partition, shards: pa.Table, constants: Mapping[str, Any], table_bytes: int
) -> Iterator[pa.Table]:
    """Yields the rows of shards of the manifest with `LABEL_SCHEMA`, in sorted tables of about `table_bytes`.

    A table has at most 1 GiB, and the rows of successive shards, so that a change concerns few files.
    Columns in `constants` are not read, and have this value in all rows. Reading ahead takes `table_bytes`
    more. Raises `StorageError`; an `ObjectChanged` or `ObjectNotFound` if labels were replaced.
    """
    names = [name for name in LABEL_SCHEMA.names if name not in constants]
    batch, size, limit = list[pa.Table](), 0, min(table_bytes, _MAX_TABLE_BYTES)
    for shard, rows in partition.read_shards(shards, names, table_bytes):
        values = {**constants, "output_version": shard["output_version"], "run": shard["run"]}
        with content_errors(f"{partition.uri}/{shard['output']}", "a file of prediction rows"):
            part = _add_columns(rows, values)
        if batch and size + part.nbytes > limit:
            yield _concat_sorted(batch)
            size = 0
        batch.append(part)
        size += part.nbytes
    if batch:
        yield _concat_sorted(batch)


def _add_columns(rows: pa.Table, constants: Mapping[str, Any]) -> pa.Table:
    values = {"embedding": None, **constants}  # predictions may have no embeddings
    columns = [
        rows[field.name].cast(field.type)
        if field.name in rows.column_names
        else pa.repeat(pa.scalar(values[field.name], field.type), len(rows))
        for field in LABEL_SCHEMA
    ]
    return pa.table(columns, schema=LABEL_SCHEMA)


def _concat_sorted(tables: list[pa.Table]) -> pa.Table:
    """Returns the rows of tables in the order of a file. Clears the list to free the memory."""
    rows = pa.concat_tables(tables)
    tables.clear()
    keys = rows.select([name for name, _ in _SORT_KEYS]).combine_chunks()
    return rows.take(pc.sort_indices(keys, sort_keys=_SORT_KEYS))
