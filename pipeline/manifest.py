"""The manifest: what is labelled, one row a shard, and the per-class statistics folded from it.

It is a fold over the prediction files, never the truth itself.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from datetime import datetime

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.predictions import unpack_partial
from pipeline.statistics import ClassStatistics, merge
from pipeline.storage import ObjectNotFound, Storage, StorageError

_SCHEMA = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("version", pa.string(), nullable=False),
        ("format", pa.string()),
        ("size", pa.int64()),
        ("rows", pa.int64()),
        ("errors", pa.int64()),
        ("duplicate_keys", pa.int64()),
        ("error", pa.string()),
        ("output", pa.string()),
        ("run", pa.string()),
        ("committed_at", pa.timestamp("ms", tz="UTC")),
        ("statistics", pa.binary()),
    ]
)


@dataclass(frozen=True, slots=True)
class ManifestRow:
    """What became of a shard.

    Attributes:
        uri, version, format, size: the shard, and the version of it that was read.
        rows: its samples; None where it couldn't be read.
        errors: samples that are error rows.
        duplicate_keys: samples whose key an earlier sample of the shard has.
        error: why the shard couldn't be read; None where it was labelled.
        output: its prediction file, relative to the model's partition; None where there is none.
        run: the run that labelled it.
        committed_at: when (UTC).
        statistics: partial class statistics, packed.
    """

    uri: str
    version: str
    format: str
    size: int
    rows: int | None
    errors: int | None
    duplicate_keys: int | None
    error: str | None
    output: str | None
    run: str
    committed_at: datetime
    statistics: bytes | None


def write_manifest(storage: Storage, uri: str, rows: Iterable[ManifestRow]) -> None:
    """Writes the manifest in one atomic PUT, sorted by shard URI."""
    ordered = sorted(rows, key=lambda row: row.uri)
    columns = [pa.array([getattr(row, field.name) for row in ordered], field.type) for field in _SCHEMA]
    out = io.BytesIO()
    pq.write_table(pa.table(columns, schema=_SCHEMA), out, compression="zstd")
    storage.write(uri, out.getvalue())


def read_manifest(storage: Storage, uri: str) -> dict[str, ManifestRow]:
    """The manifest's rows by shard URI; empty where there is no manifest yet.

    Raises:
        StorageError: the object is there, but can't be read, or is no manifest.
    """
    try:
        data = storage.read(uri)
    except ObjectNotFound:
        return {}
    try:
        table = pq.read_table(io.BytesIO(data)).cast(_SCHEMA)
    except (pa.ArrowInvalid, ValueError, KeyError) as error:
        raise StorageError(uri, f"not a manifest: {error}") from None
    names = [field.name for field in fields(ManifestRow)]
    return {
        record["uri"]: ManifestRow(**{name: record[name] for name in names}) for record in table.to_pylist()
    }


def fold_statistics(manifest: Mapping[str, ManifestRow], num_classes: int) -> ClassStatistics:
    """The class statistics over every labelled shard of the manifest."""
    return merge(
        (
            ClassStatistics.from_partial(unpack_partial(row.statistics), num_classes)
            for row in manifest.values()
            if row.statistics is not None
        ),
        num_classes,
    )
