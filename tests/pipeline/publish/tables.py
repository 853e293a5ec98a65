"""Helpers of the publishing tests: partitions, their Delta tables, and storage that reports writes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.commit import Partition
from pipeline.predictions import prediction_path
from pipeline.publish import Publication, publish_labels
from pipeline.storage import ObjectInfo, ObjectNotFound, Storage
from tests.partitions import make_predictions, write_partition

LABELS = ("boot", "coat", "dress")
Rows = list[dict[str, Any]]


def predictions(shard: str, count: int, seed: int = 0, embedding: str | None = None) -> pa.Table:
    """Makes a shard's rows with random labels and scores. The last of several rows has an error."""
    random = np.random.default_rng(seed)
    given: list[int | None] = random.integers(0, len(LABELS), count).tolist()
    if count > 1:
        given[-1] = None
    rows = make_predictions(shard, LABELS, given, scores=random.uniform(0.4, 1, count).tolist())
    if embedding is None:
        return rows
    values = random.uniform(-1, 1, (count, 4)).astype(embedding).tolist()
    vector_type = pa.list_(pa.type_for_alias(embedding), 4)
    vectors = [None if label is None else value for label, value in zip(given, values, strict=True)]
    return rows.append_column("embedding", pa.array(vectors, vector_type))


class Dataset:
    """A partition and the table for its labels.

    Attributes:
        root: folder or bucket with input, output and table.
        uri: URI of the partition.
        table: URI of the table.
        config: the job's configuration in the record of a run.
    """

    def __init__(
        self, root: str, model: str = "cvt-00000001", embedding: str | None = None, table: str | None = None
    ) -> None:
        self.root = root
        self.uri = f"{root}/out/model={model}"
        self.table = table or f"{root}/table"
        self.storage = Storage()
        self.embedding = embedding
        self.config: dict[str, Any] = {"input": {"uri": f"{root}/in"}}
        self._labelings = 0

    @property
    def partition(self) -> Partition:
        """The partition in its current state."""
        return Partition.open(self.storage, self.uri)

    def shard(self, name: str) -> str:
        """Returns a shard's URI."""
        return f"{self.root}/in/{name}"

    def prediction_uri(self, name: str) -> str:
        """Returns the URI of a shard's prediction file."""
        return f"{self.uri}/predictions/{prediction_path(self.shard(name))}"

    def label(self, *tables: pa.Table, remove: Iterable[str] = (), **counts: int) -> None:
        """Labels or relabels shards, and removes the labels of other shards.

        Args:
            tables: predictions, one table per shard.
            remove: names of shards whose labels are removed.
            counts: number of rows by shard name; these rows get new random labels.
        """
        self._labelings += 1
        run = {table["shard"][0].as_py(): table for table in tables}
        for number, (name, count) in enumerate(counts.items()):
            shard, seed = self.shard(name), 100 * self._labelings + number
            run[shard] = predictions(shard, count, seed, self.embedding)
        write_partition(self.storage, self.uri, LABELS, [run], {"config": self.config})
        for name in remove:
            self.storage.delete(self.prediction_uri(name))
        self.partition.manifest.update({}, removed=[self.shard(name) for name in remove])

    def publish(self, storage: Storage | None = None, **options: Any) -> Publication:
        """Publishes the partition, with this storage."""
        partition = Partition.open(storage or self.storage, self.uri)
        return publish_labels(partition, self.table, **options)

    def objects(self, uri: str) -> dict[str, str]:
        """Returns the versions of all objects in a folder by URI."""
        try:
            return {info.uri: info.version for info in self.storage.list(uri)}
        except ObjectNotFound:
            return {}

    def labels(self) -> Rows:
        """Returns the rows of all prediction files, sorted."""
        uris = [uri for uri in self.objects(self.uri) if "/predictions/" in uri]
        return rows_of(pq.read_table(pa.BufferReader(self.storage.read(uri))) for uri in uris)

    def published(self, version: int | None = None) -> Rows:
        """Returns the rows that a reader of the table sees, sorted, without `published` and `model`."""
        from deltalake.exceptions import TableNotFoundError

        try:
            rows = self.delta(version).to_pyarrow_table()
        except TableNotFoundError:
            return []
        return rows_of([rows.drop_columns(["published", "model"])])

    def delta(self, version: int | None = None) -> Any:
        """Opens the Delta table as a reader."""
        import deltalake

        options = self.storage.object_store_options(self.table)
        return deltalake.DeltaTable(self.table, version=version, storage_options=options)

    def lists(self) -> list[str]:
        """Returns the URIs of the lists of shards of all versions."""
        return list(self.objects(f"{self.table}/_cvt_label"))


def rows_of(tables: Iterable[pa.Table]) -> Rows:
    """Returns sorted rows. A null embedding is left out."""
    rows = [row for table in tables for row in table.to_pylist()]
    for row in rows:
        if row.get("embedding", 0) is None:
            del row["embedding"]
    return sorted(rows, key=lambda row: (row["shard"], row["index"]))


def changes(done: Publication, root: str) -> Mapping[str, list[str]]:
    """Returns the names of added, replaced, removed and pending shards, without empty lists."""
    columns = {
        "added": done.added["uri"],
        "replaced": done.replaced,
        "removed": done.removed,
        "pending": done.pending,
    }
    names_by_kind = {
        kind: [uri.removeprefix(f"{root}/in/") for uri in each.to_pylist()] for kind, each in columns.items()
    }
    return {kind: names for kind, names in names_by_kind.items() if names}


@dataclass(frozen=True)
class WatchedStorage(Storage):
    """Storage that calls a function with the URI before each write."""

    before: Callable[[str], None] = print

    def write(self, uri: str, data: bytes | BinaryIO, expected: str | None = None) -> ObjectInfo:
        self.before(uri)
        return super().write(uri, data, expected)

    def delete(self, uri: str, expected: str | None = None) -> None:
        self.before(uri)
        super().delete(uri, expected)

    def remove_unfinished_writes(self, uri: str) -> None:
        self.before(uri)
        super().remove_unfinished_writes(uri)


def needs_delta() -> None:
    """Skips the module if deltalake is not installed."""
    pytest.importorskip("deltalake", reason="deltalake is not installed: cvt-label[delta]")


class Datasets:
    """Two datasets with labels of the same model, for one table."""

    def __init__(self, root: str, embedding: str | None = None) -> None:
        self.one = Dataset(root, embedding=embedding)
        self.two = Dataset(f"{root}/two", embedding=embedding, table=self.one.table)
        self.one.label(a=5, b=6, c=5)
        self.two.label(a=5, z=5)

    def __iter__(self) -> Iterator[Dataset]:
        return iter((self.one, self.two))

    def labels(self) -> Rows:
        """Returns the rows of both datasets, sorted."""
        rows = self.one.labels() + self.two.labels()
        return sorted(rows, key=lambda row: (row["shard"], row["index"]))
