"""Brings a consumer table in line with the manifest of a partition: what is new, has changed or was removed.

A prediction file is the unit of commit, so there are as many as shards; who queries all of them is better
served by few large ones. The order of a publication:

1. Read the current version of the table, and compare it with the manifest.
2. Write data files under names that no other attempt has: readers don't know of them.
3. Make the next version the current one in one transaction. If another publisher was faster, start again
   from what that one has published.
4. Remove lists of shards that earlier attempts and versions left behind.
"""

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.commit import Partition, prediction_files
from pipeline.config import ConfigError
from pipeline.publish.data_files import table_schema
from pipeline.publish.delta_table import DeltaTable, Snapshot, TableChangedError
from pipeline.publish.version_writer import VersionWriter
from pipeline.storage import ObjectChanged, ObjectNotFound, StorageError, lies_in, normalize_uri

#: Bytes of rows in memory that make one file. As Parquet that is a third of it; with embeddings, most of it.
FILE_BYTES = 512 * 1024**2
_ATTEMPTS = 5


class TableBusyError(RuntimeError):
    """Table or labels changed again and again while they were read; the message says which."""


@dataclass(frozen=True)
class Increment:
    """What a table lacks.

    Attributes:
        added: shards to publish, sorted: `uri`, `rows`, and their prediction files, `output` (relative to
            the partition) and `output_version`.
        replaced: those of them that the table has from this partition already.
        removed: shards that the table has from this partition, and that are no longer labeled.
        pending: shards whose file has changed since the manifest was written: they wait.
    """

    added: pa.Table
    replaced: pa.ChunkedArray
    removed: pa.ChunkedArray
    pending: pa.ChunkedArray


@dataclass(frozen=True)
class Publication:
    """The result of publishing.

    Attributes:
        snapshot: the version of the table that is current now.
        increment: what changed; `pending` are shards that wait for the next publication.
        is_new: whether this publication made the version; else there was nothing to do.
    """

    table: str
    snapshot: Snapshot
    increment: Increment
    is_new: bool


def publish_labels(
    partition: Partition,
    uri: str,
    *,
    rebuild: bool = False,
    embedding: bool = True,
    file_bytes: int = FILE_BYTES,
) -> Publication:
    """Brings a Delta table in line with the manifest of a partition.

    The table may also hold rows of other models, and of other partitions (datasets) of this model.

    Args:
        partition: whose predictions are published.
        uri: the table's.
        rebuild: publish all shards again, also where somebody edited the table: that is refused otherwise.
        embedding: whether embeddings are published too, where there are any.
        file_bytes: bytes of rows in memory that make one file; memory is about three times that.

    Raises:
        ConfigError: the table would be in the output or the input, or contain it.
        TableBusyError: other publishers, or a run, were faster each time.
        StorageError: nothing is labeled yet; something can't be read or written; somebody edited the table;
            or it has a shard from another partition, or other columns of one.
    """
    table = DeltaTable(partition.storage, normalize_uri(uri), partition.model)
    _check_place(table.uri, partition)
    if not partition.manifest.exists():
        raise StorageError(partition.uri, "nothing is labeled yet")
    cause: Exception | None = None
    for _ in range(_ATTEMPTS):
        try:
            return _publish(partition, table, rebuild, embedding, file_bytes)
        except TableChangedError as error:
            cause = error
        except (ObjectChanged, ObjectNotFound) as error:
            if not lies_in(error.uri, partition.uri):
                raise
            cause = error  # a run has replaced labels
    raise TableBusyError(f"{table.uri}: not published, since others were faster {_ATTEMPTS} times: {cause}")


def _publish(
    partition: Partition, table: DeltaTable, rebuild: bool, embedding: bool, file_bytes: int
) -> Publication:
    base = table.read(rebuild)
    # After it: what others have published meanwhile is labeled, too.
    labeled = partition.manifest.read(("uri", "rows", "output", "output_version"))
    labeled = labeled.filter(pc.is_valid(labeled["output"]))
    schema = table_schema(embedding=False)
    if embedding and len(labeled):
        with partition.storage.open(f"{partition.uri}/{labeled['output'][0]}") as file:
            schema = table_schema("embedding" in pq.read_schema(file).names)
    has_other_columns = base.columns != (*schema.names,)
    _check_others(table.uri, partition.uri, base, labeled, has_other_columns)
    # With other columns, no row of this partition can be taken over.
    increment = _compare(partition, labeled, base, rebuild, rebuild or has_other_columns)
    is_new = bool(len(increment.added) or len(increment.removed) or (rebuild and base.files))
    snapshot = base
    if is_new:
        gone = pa.chunked_array([*increment.replaced.chunks, *increment.removed.chunks], pa.string())
        writer = VersionWriter(partition, table.uri, schema, file_bytes)
        snapshot = writer.write(base, increment.added, gone, rebuild)
        table.commit(base, snapshot)
    table.clean_up(snapshot)
    return Publication(table.uri, snapshot, increment, is_new)


def _check_place(table: str, partition: Partition) -> None:
    """Refuses places where readers, or Delta's VACUUM, would mix the table up with other things."""
    source = partition.config().get("input", {}).get("uri")
    for name, place in {"output": partition.uri.rpartition("/")[0], "input": source}.items():
        if place and (lies_in(table, place) or lies_in(place, table)):
            raise ConfigError(f"{table}: a table needs a place of its own, and the {name} is {place}")


def _check_others(
    table: str, source: str, base: Snapshot, labeled: pa.Table, has_other_columns: bool
) -> None:
    """Refuses what would do harm to rows of other partitions."""
    others = base.shards.filter(pc.not_equal(base.shards["source"], source))
    twice = others.filter(pc.is_in(others["shard"], value_set=labeled["uri"]))
    if len(twice):
        shard, other = twice["shard"][0], twice["source"][0]
        cause = f"has the shard {shard} from {other} already: {source} needs a table of its own"
        raise StorageError(table, cause)
    if len(others) and has_other_columns:
        cause = (
            f"has rows of {others['source'][0]} in other columns: publish {source} with or without "
            "embeddings as that, or into a table of its own"
        )
        raise StorageError(table, cause)


def _compare(
    partition: Partition, labeled: pa.Table, base: Snapshot, rebuild: bool, is_restart: bool
) -> Increment:
    """Compares the manifest with what is published; with `is_restart`, every shard is published again."""
    own = base.shards.filter(pc.equal(base.shards["source"], partition.uri))
    published = own["output_version"].take(pc.index_in(labeled["uri"], value_set=own["shard"]))
    is_same = pc.fill_null(pc.equal(labeled["output_version"], published), False)
    due = labeled if is_restart else labeled.filter(pc.invert(is_same))
    missing = set(zip(due["output"].to_pylist(), due["output_version"].to_pylist(), strict=True))
    if missing:
        start = len(partition.uri) + 1
        files = prediction_files(partition.storage, partition.uri)
        missing.difference_update((info.uri[start:], info.version) for info in files)
    waits = pc.is_in(due["output"], value_set=pa.array([output for output, _ in missing], pa.string()))
    added, pending = due.filter(pc.invert(waits)), due["uri"].filter(waits)
    replaced = added["uri"].filter(pc.is_in(added["uri"], value_set=own["shard"]))
    stays = added if is_restart and (rebuild or len(added)) else labeled
    removed = own["shard"].filter(pc.invert(pc.is_in(own["shard"], value_set=stays["uri"])))
    return Increment(added, replaced, removed, pending)
