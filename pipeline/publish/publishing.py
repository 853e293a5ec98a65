"""Brings a consumer table in line with the manifest of a partition: what is new, has changed or was removed.

A prediction file is the unit of commit, so there are as many as shards; who queries all of them is better
served by few large ones. The order of a publication:

1. Read the current version of the table, and compare it with the manifest.
2. Write data files under names that no other attempt has: readers don't know of them.
3. Make the next version the current one in one transaction. If another publisher was faster, start again
   from what that one has published.
4. Remove lists of shards that earlier attempts and versions left behind.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.commit import Partition, prediction_files
from pipeline.config import ConfigError
from pipeline.publish.data_files import table_schema
from pipeline.publish.delta_log import Snapshot, TableChangedError
from pipeline.publish.delta_table import DeltaTable
from pipeline.publish.version_writer import Increment, VersionWriter
from pipeline.storage import ObjectChanged, ObjectNotFound, StorageError, lies_in, normalize_uri

#: Bytes of rows in memory that make one file. As Parquet that is a third of it; with embeddings, most of it.
FILE_BYTES = 512 * 1024**2
_ATTEMPTS = 5
_LISTED_AT_ONCE = 10_000

_LABELED = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        ("output", pa.string()),
        ("output_version", pa.string()),
        ("rows", pa.int64()),
    ]
)

#: A prediction file, as the manifest names it.
_FILES = pa.schema([_LABELED.field("output"), _LABELED.field("output_version")])


class TableBusyError(RuntimeError):
    """Table or labels changed again and again while they were read; the message says which."""


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
    schema = _published_schema(partition, embedding)
    writer = VersionWriter(partition, table.uri, schema, file_bytes)
    cause: Exception | None = None
    for _ in range(_ATTEMPTS):
        try:
            return _publish(partition, table, writer, rebuild)
        except TableChangedError as error:
            cause = error
        except (ObjectChanged, ObjectNotFound) as error:
            if not lies_in(error.uri, partition.uri):
                raise
            cause = error  # a run has replaced labels
    raise TableBusyError(f"{table.uri}: not published, since others were faster {_ATTEMPTS} times: {cause}")


def _publish(partition: Partition, table: DeltaTable, writer: VersionWriter, rebuild: bool) -> Publication:
    base = table.read(rebuild)
    # After it: what others have published meanwhile is labeled, too.
    labeled = pa.concat_tables([_LABELED.empty_table(), *partition.manifest.labelled(_LABELED.names)])
    columns = tuple(writer.schema.names)
    _check_others(table.uri, partition.uri, base, labeled, columns)
    increment = _compare(partition, labeled, base, rebuild, columns)
    is_new = bool(len(increment.added) or len(increment.removed) or (rebuild and base.files))
    snapshot = writer.write(base, increment, rebuild) if is_new else base
    if is_new:
        table.commit(base, snapshot)
    table.clean_up(snapshot)
    return Publication(table.uri, snapshot, increment, is_new)


def _check_place(table: str, partition: Partition) -> None:
    """Refuses places where readers, or Delta's VACUUM, would mix the table up with other things."""
    runs = partition.records()
    config = ((partition.record(runs[-1]) if runs else None) or {}).get("config", {})
    places = {"output": partition.uri.rpartition("/")[0], "input": config.get("input", {}).get("uri")}
    for name, place in places.items():
        if place and (lies_in(table, place) or lies_in(place, table)):
            raise ConfigError(f"{table}: a table needs a place of its own, and the {name} is {place}")


def _published_schema(partition: Partition, embedding: bool) -> pa.Schema:
    """The columns to publish: embeddings where these are asked for and the prediction files have them."""
    outputs = (output for table in partition.manifest.labelled(["output"]) for output in table["output"])
    first = next(outputs, None)
    if first is None or not embedding:
        return table_schema(embedding=False)
    with partition.storage.open(f"{partition.uri}/{first}") as file:
        return table_schema("embedding" in pq.read_schema(file).names)


def _check_others(
    table: str, source: str, base: Snapshot, labeled: pa.Table, columns: tuple[str, ...]
) -> None:
    """Refuses what would do harm to rows of other partitions."""
    others = base.shards.filter(pc.not_equal(base.shards["source"], source))
    twice = others.filter(pc.is_in(others["shard"], value_set=labeled["uri"]))
    if len(twice):
        shard, other = twice["shard"][0], twice["source"][0]
        cause = f"has the shard {shard} from {other} already: {source} needs a table of its own"
        raise StorageError(table, cause)
    if len(others) and base.columns != columns:
        cause = (
            f"has rows of {others['source'][0]} in other columns: publish {source} with or without "
            "embeddings as that, or into a table of its own"
        )
        raise StorageError(table, cause)


def _compare(
    partition: Partition, labeled: pa.Table, base: Snapshot, rebuild: bool, columns: tuple[str, ...]
) -> Increment:
    """Compares the manifest with what is published."""
    own = base.shards.filter(pc.equal(base.shards["source"], partition.uri))
    is_restart = rebuild or base.columns != columns  # then no row of this partition can be taken over
    published = own["output_version"].take(pc.index_in(labeled["uri"], value_set=own["shard"]))
    is_same = pc.fill_null(pc.equal(labeled["output_version"], published), False)
    added, pending = _by_presence(partition, labeled if is_restart else labeled.filter(pc.invert(is_same)))
    replaced, waiting = (
        each["uri"].filter(pc.is_in(each["uri"], value_set=own["shard"])) for each in (added, pending)
    )
    removed = own["shard"].filter(pc.invert(pc.is_in(own["shard"], value_set=labeled["uri"])))
    if is_restart and (rebuild or len(added)):
        removed = pa.chunked_array([*removed.chunks, *waiting.chunks], pa.string())
    return Increment(added, replaced, removed, pending["uri"])


def _by_presence(partition: Partition, shards: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Shards whose prediction file is there in the version that the manifest names, and all others."""
    if not len(shards):
        return shards, shards
    files = pa.concat_tables([_FILES.empty_table(), *_listed(partition)])
    present, absent = (
        shards.join(files, _FILES.names, join_type=f"left {kind}").sort_by("uri") for kind in ("semi", "anti")
    )
    return present, absent


def _listed(partition: Partition) -> Iterator[pa.Table]:
    start = len(partition.uri) + 1
    files = prediction_files(partition.storage, partition.uri)
    while batch := list(islice(files, _LISTED_AT_ONCE)):
        outputs, versions = [info.uri[start:] for info in batch], [info.version for info in batch]
        yield pa.table([outputs, versions], schema=_FILES)
