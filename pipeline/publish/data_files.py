"""Data files of a consumer table: the rows of many shards in few large, sorted files."""

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.predictions import ROW_GROUP_ROWS, prediction_schema
from pipeline.storage import Storage, content_errors, read_table

#: Sort order of a file: by class, then the lowest score first. A filter on label, or on label and score,
#: reads only a few row groups of each file. Shard and index make the order unique.
_SORT_KEYS = [("label", "ascending"), ("score", "ascending"), ("shard", "ascending"), ("index", "ascending")]


@dataclass(frozen=True, slots=True)
class DataFile:
    """A data file of a table. Data files are never modified.

    Attributes:
        path: path relative to the table.
        first_shard, last_shard: minimum and maximum of the shard URIs in the file.
        statistics: column statistics in the format of Delta's log; None if the file is not new.
    """

    path: str
    bytes: int
    first_shard: str
    last_shard: str
    statistics: str | None = field(default=None, compare=False, repr=False)


#: The columns of data files: the prediction columns and `published`. Delta supports neither half precision
#: nor fixed-size lists. Therefore embeddings are lists of float32, and null for samples without one.
SCHEMA = pa.schema(
    [
        *(pa.field(column.name, column.type) for column in prediction_schema()),
        pa.field("embedding", pa.list_(pa.float32())),
        pa.field("published", pa.int64()),
    ]
)


def read_rows(
    storage: Storage,
    uri: str,
    version: str | None = None,
    columns: Sequence[str] = SCHEMA.names,
    constants: Mapping[str, int | None] = {},
) -> pa.Table:
    """Reads columns of a data file or of a prediction file; raises `StorageError`.

    Columns in `constants` are not read; all rows have the given value. Other types, such as string views that
    a tool for compaction writes, are cast.
    """
    with content_errors(uri, "a file of prediction rows"):
        with storage.open(uri, version) as file:
            rows = read_table(file, [name for name in columns if name not in constants])
        values = {**constants}
        if "embedding" not in rows.column_names:
            values["embedding"] = None
        schema = pa.schema([SCHEMA.field(name) for name in columns])
        arrays = [
            pa.repeat(pa.scalar(values[field.name], field.type), len(rows))
            if field.name in values
            else rows[field.name].cast(field.type)
            for field in schema
        ]
        return pa.table(arrays, schema=schema)


def pack_rows(tables: Iterable[pa.Table], file_bytes: int) -> Iterator[pa.Table]:
    """Yields the sorted rows of one file at a time: as many input tables as fit, at least one."""
    batch, size = list[pa.Table](), 0
    for table in tables:
        if batch and size + table.nbytes > file_bytes:
            yield _concat_sorted(batch)
            size = 0
        if table.num_rows:
            batch.append(table)
            size += table.nbytes
    if batch:
        yield _concat_sorted(batch)


def _concat_sorted(tables: list[pa.Table]) -> pa.Table:
    """Returns the rows of tables in the order of a file. Clears the list to free the memory."""
    rows = pa.concat_tables(tables)
    tables.clear()
    keys = rows.select([name for name, _ in _SORT_KEYS]).combine_chunks()
    return rows.take(pc.sort_indices(keys, sort_keys=_SORT_KEYS))


def write_data_file(
    storage: Storage, table: str, path: str, rows: pa.Table, row_group_rows: int = ROW_GROUP_ROWS
) -> DataFile:
    """Writes sorted rows to a path in a table; returns the data file. Raises `StorageError`."""
    with tempfile.TemporaryFile() as file:
        pq.write_table(
            rows,
            file,
            row_group_rows,
            compression="zstd",
            use_dictionary=["shard", "label", "error"],
            write_page_index=True,
            # For lookups by key. Rows are sorted by class, so the key ranges of row groups exclude nothing.
            bloom_filter_options={"key": {"ndv": max(1, min(len(rows), row_group_rows)), "fpp": 0.01}},
            sorting_columns=pq.SortingColumn.from_ordering(rows.schema, _SORT_KEYS, null_placement="at_end"),
        )
        size = file.tell()
        storage.write(f"{table}/{path}", file)
    shards = pc.min_max(rows["shard"]).as_py()
    return DataFile(path, size, shards["min"], shards["max"], _describe(rows))


def _describe(rows: pa.Table) -> str:
    """Returns row count, bounds and null counts for Delta's log.

    Readers skip files by these statistics. Every column that is not a list needs bounds. If the log has
    bounds for some columns only, deltalake's datasets find no rows by the other columns.
    """
    columns = [column.name for column in rows.schema if not pa.types.is_list(column.type)]
    bounds = {name: pc.min_max(rows[name]).as_py() for name in columns if rows[name].null_count < len(rows)}
    statistics = {
        "numRecords": len(rows),
        "minValues": {name: each["min"] for name, each in bounds.items()},
        "maxValues": {name: each["max"] for name, each in bounds.items()},
        "nullCount": {name: rows[name].null_count for name in columns},
    }
    # ASCII output would encode emoji as surrogate pairs, and deltalake misreads long texts of these.
    return json.dumps(statistics, ensure_ascii=False, allow_nan=False)
