"""Updates a consumer table to the manifest of a partition: adds, replaces and removes shards.

The rows of the table show which shards it has, in which version. So a table that was restored, copied or
compacted is updated like any other.
"""

import time
from dataclasses import dataclass
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.commit import Partition
from pipeline.config import ConfigError
from pipeline.publish.delta import DeltaTable
from pipeline.publish.iceberg import IcebergTable
from pipeline.publish.label_table import Increment, LabelTable, TableChangedError
from pipeline.publish.rows import read_sorted_rows
from pipeline.storage import ObjectChanged, ObjectNotFound, StorageError, is_under, normalize_uri, pause_after

#: Maximum number of shards that a transaction lists. With more, all rows of the partition are replaced.
_MAX_DROPPED = 10_000
_MAX_ATTEMPTS = 5


class TableBusyError(RuntimeError):
    """The table or the labels changed during every attempt. The message names the changed object."""


@dataclass(frozen=True)
class Publication:
    """The result of publishing.

    Attributes:
        table: the table, as `delta:URI` or `iceberg:CATALOG.NAMESPACE.TABLE`.
        version: Delta's version of the table, or Iceberg's snapshot id; None if there is no snapshot.
        published_at: the value of `published_at` in the added rows; None if the table was up to date.
        added: rows of the manifest, of new and changed shards.
        replaced: URIs of added shards that the table already had from this partition.
        removed: URIs of shards that the table had from this partition and that are no longer labeled.
        pending: URIs of shards that changed after the manifest was written, and are not published yet.
    """

    table: str
    version: int | None
    published_at: datetime | None
    added: pa.Table
    replaced: pa.ChunkedArray
    removed: pa.ChunkedArray
    pending: pa.ChunkedArray


def publish_labels(
    partition: Partition,
    to: str,
    *,
    rebuild: bool = False,
    embedding: bool = True,
    memory_bytes: int = 4 * 1024**3,
) -> Publication:
    """Updates a Delta Lake or Iceberg table to the manifest of a partition, in one transaction.

    Creates the table if needed. It may have rows of other models, and of other partitions of this model.

    Args:
        partition: the partition to publish.
        to: `delta:URI`, or `iceberg:CATALOG.NAMESPACE.TABLE` with a catalog of pyiceberg's configuration.
        rebuild: replace all rows of the partition. By default, a table with edited shards is refused.
        embedding: whether to publish embeddings, if the predictions have any.
        memory_bytes: memory for rows. An eighth of it, at most 1 GiB, is the size of the rows of one file.

    Raises:
        ConfigError: `to` is not valid, or the table is in the output or the input, or contains one of them.
        TableBusyError: other writers or a run changed the table or the labels during every attempt.
        StorageError: the partition has no labels; an object cannot be read or written; the table has other
            columns, lacks rows of a shard, or has a shard from another partition.
    """
    if not partition.manifest.exists():
        raise StorageError(partition.uri, "nothing is labeled yet; run cvt-label label first")
    cause: Exception | None = None
    for attempt in range(_MAX_ATTEMPTS):
        if attempt:
            time.sleep(pause_after(attempt))
        try:
            return _publish(partition, _open_table(partition, to), rebuild, embedding, memory_bytes)
        except (TableChangedError, ObjectChanged, ObjectNotFound) as error:
            if isinstance(error, StorageError) and not is_under(error.uri, partition.uri):
                raise
            cause = error  # another publisher, or a run that replaced labels
    changed = f"the table or the labels changed during all {_MAX_ATTEMPTS} attempts ({cause})"
    raise TableBusyError(f"{to}: not published: {changed}; publish again later")


def _open_table(partition: Partition, to: str) -> LabelTable:
    kind, _, name = to.partition(":")
    if kind == "iceberg" and name.count(".") >= 2 and all(name.split(".")):
        return IcebergTable(name, partition.model)
    if kind != "delta" or not name:
        raise ConfigError(f"--to {to}: expected delta:URI or iceberg:CATALOG.NAMESPACE.TABLE")
    uri = normalize_uri(name)
    if place := partition.overlap(uri):
        # Readers, and Delta's VACUUM, would confuse the table with other files.
        raise ConfigError(f"{uri}: the table must be outside the {place}, and not contain it")
    return DeltaTable(partition.storage, uri, partition.model)


def _publish(
    partition: Partition, table: LabelTable, rebuild: bool, embedding: bool, memory_bytes: int
) -> Publication:
    """Makes one attempt; raises `TableChangedError` if another writer commits first."""
    source, published = partition.uri, table.read_published()
    # The manifest is read after the table: all shards that others have published are labeled in it.
    labeled = partition.manifest.labeled(("uri", "rows", "output", "output_version", "run"))
    is_own = pc.fill_null(pc.equal(published["source"], source), False)
    own, others = published.filter(is_own), published.filter(pc.invert(is_own))
    shards = pc.unique(own["shard"]).drop_null()
    is_duplicate = pc.or_(*(pc.is_in(others["shard"], value_set=uris) for uris in (labeled["uri"], shards)))
    if conflicts := others.filter(is_duplicate).to_pylist():
        cause = f"the table already has shard {conflicts[0]['shard']} from {conflicts[0]['source']}"
        remedy = "publish to another table, or delete the rows of the other source first"
        raise StorageError(table.name, f"{cause}; {remedy}")
    outdated = labeled if rebuild else labeled.filter(pc.invert(_is_current(table, own, labeled)))
    is_present = partition.has_versions(outdated)
    added, pending = outdated.filter(is_present), outdated["uri"].filter(pc.invert(is_present))
    replaced = shards.filter(pc.is_in(shards, value_set=added["uri"]))
    remaining = added["uri"] if rebuild else labeled["uri"]
    removed = shards.filter(pc.invert(pc.is_in(shards, value_set=remaining)))
    if not rebuild and len(replaced) + len(removed) > _MAX_DROPPED:
        if not pc.all(partition.has_versions(labeled)).as_py():  # a rebuild would remove their rows
            raise ObjectChanged(partition.uri, "published labels changed after the manifest was written")
        return _publish(partition, table, True, embedding, memory_bytes)
    if not len(added) and not len(removed):
        return Publication(table.name, table.version, None, added, replaced, removed, pending)
    now = datetime.now(UTC)
    constants = {"model": partition.model, "source": source, "published_at": now}
    if not embedding:
        constants["embedding"] = None
    # The memory holds rows read ahead, rows to sort, sorted rows, and copies and buffers of the library.
    rows = read_sorted_rows(partition, added, constants, memory_bytes // 8)
    condition = ("source", [source]) if rebuild else ("shard", [*replaced.to_pylist(), *removed.to_pylist()])
    version = table.commit(Increment(rows, now, *condition))
    return Publication(table.name, version, now, added, replaced, removed, pending)


def _is_current(table: LabelTable, own: pa.Table, labeled: pa.Table) -> pa.ChunkedArray:
    """Returns for each labeled shard whether the table has exactly its rows.

    Raises `StorageError` if the table has the shard's version, but another number of rows.
    """
    # After changes by other writers, a shard may have rows of several versions.
    counts = own.group_by("shard").aggregate([("output_version", "min_max"), ("rows", "sum")])
    counts = counts.take(pc.index_in(labeled["uri"], value_set=counts["shard"]))
    versions, rows = counts["output_version_min_max"], pc.fill_null(counts["rows_sum"], 0)
    first, last = (pc.equal(pc.struct_field(versions, x), labeled["output_version"]) for x in ("min", "max"))
    has_version = pc.fill_null(pc.and_(first, last), False)
    is_current = pc.or_(has_version, pc.and_(pc.is_null(counts["shard"]), pc.equal(labeled["rows"], 0)))
    edited = labeled["uri"].filter(pc.and_(is_current, pc.not_equal(rows, labeled["rows"])))
    if len(edited):
        cause = f"the table was edited: rows of shard {edited[0]} were deleted or added"
        raise StorageError(table.name, f"{cause}; replace all rows of this partition with --rebuild")
    return is_current
