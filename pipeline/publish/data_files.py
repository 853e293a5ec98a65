"""Data files of a consumer table: rows of many shards in few large files, sorted."""

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.predictions import ROW_GROUP_ROWS, prediction_schema
from pipeline.storage import Storage, StorageError

#: By class, and within it the lowest score first: a filter on label, or on label and score, reads a few row
#: groups of each file. The rest only makes the order a total one.
_ORDER = [("label", "ascending"), ("score", "ascending"), ("shard", "ascending"), ("index", "ascending")]


@dataclass(frozen=True, slots=True)
class DataFile:
    """A data file of a table, by its path in the table; it is never changed.

    Attributes:
        first_shard, last_shard: bounds of the URIs of its shards.
        statistics: of a new file, as Delta's log has them.
    """

    path: str
    bytes: int
    first_shard: str
    last_shard: str
    statistics: str | None = field(default=None, compare=False, repr=False)


#: The columns of data files: those of predictions, and `published`. Delta has neither half precision nor
#: lists of one length, so embeddings are lists of single precision, null where there are none.
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
    """Reads columns of a data file, or of a prediction file; `constants` have one value in all rows instead.

    Who compacts a table may choose other types, such as views: they are cast. Raises `StorageError`.
    """
    try:
        with storage.open(uri, version) as file:
            parquet = pq.ParquetFile(file)
            given = {**constants}
            if "embedding" not in parquet.schema_arrow.names:
                given["embedding"] = None
            rows = parquet.read(columns=[name for name in columns if name not in given])
        schema = pa.schema([SCHEMA.field(name) for name in columns])
        found = (
            pa.repeat(pa.scalar(given[field.name], field.type), len(rows))
            if field.name in given
            else rows[field.name].cast(field.type)
            for field in schema
        )
        return pa.table([*found], schema=schema)
    except (pa.ArrowInvalid, KeyError) as error:
        raise StorageError(uri, f"not a file of predictions: {error}") from None


def packed(units: Iterable[pa.Table], file_bytes: int) -> Iterator[pa.Table]:
    """Yields the rows of one file after the other: as many units as fit, at least one, sorted."""
    held, size = list[pa.Table](), 0
    for unit in units:
        if held and size + unit.nbytes > file_bytes:
            yield _sorted(held)
            size = 0
        if unit.num_rows:
            held.append(unit)
            size += unit.nbytes
    if held:
        yield _sorted(held)


def _sorted(units: list[pa.Table]) -> pa.Table:
    """Rows of units in the order of a file; empties the list, for their memory."""
    rows = pa.concat_tables(units)
    units.clear()
    keys = rows.select([name for name, _ in _ORDER]).combine_chunks()
    return rows.take(pc.sort_indices(keys, sort_keys=_ORDER))


def encode(rows: pa.Table, file: BinaryIO, row_group_rows: int = ROW_GROUP_ROWS) -> None:
    """Writes sorted rows as Parquet."""
    with pq.ParquetWriter(
        file,
        rows.schema,
        compression="zstd",
        use_dictionary=["shard", "label", "error"],
        write_page_index=True,
        # For one image by its key: sorted by class, a row group's range of keys excludes nothing.
        bloom_filter_options={"key": {"ndv": max(1, min(rows.num_rows, row_group_rows)), "fpp": 0.01}},
        sorting_columns=pq.SortingColumn.from_ordering(rows.schema, _ORDER, null_placement="at_end"),
    ) as writer:
        writer.write_table(rows, row_group_size=row_group_rows)


def write_file(storage: Storage, table: str, path: str, rows: pa.Table) -> DataFile:
    """Writes sorted rows to a path in a table; raises `StorageError`."""
    with tempfile.TemporaryFile() as file:
        encode(rows, file)
        size = file.tell()
        storage.write(f"{table}/{path}", file)
    return _described(path, size, rows)


def _described(path: str, size: int, rows: pa.Table) -> DataFile:
    """A new data file, with rows, bounds and nulls as Delta's log has them: by these, readers skip files.

    Every column that is no list has bounds: where the log has bounds of some columns only, deltalake's
    datasets find no row by the others.
    """
    columns = [column.name for column in rows.schema if not pa.types.is_list(column.type)]
    bounds = {name: pc.min_max(rows[name]).as_py() for name in columns}
    found = {name: each for name, each in bounds.items() if each["min"] is not None}
    statistics = {
        "numRecords": rows.num_rows,
        "minValues": {name: each["min"] for name, each in found.items()},
        "maxValues": {name: each["max"] for name, each in found.items()},
        "nullCount": {name: rows[name].null_count for name in columns},
    }
    # Not in ASCII: deltalake misreads long texts of surrogate pairs, which stand for emoji there.
    text = json.dumps(statistics, ensure_ascii=False, allow_nan=False)
    return DataFile(path, size, bounds["shard"]["min"], bounds["shard"]["max"], text)
