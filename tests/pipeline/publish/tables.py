"""Helpers of the publishing tests: partitions, and their tables of both formats as a reader sees them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.commit import Partition
from pipeline.predictions import LABEL_SCHEMA, prediction_path
from pipeline.publish import Publication, publish_labels
from pipeline.storage import ObjectNotFound, Storage
from tests.partitions import make_predictions, write_partition

LABELS = ("boot", "coat", "dress")
#: The columns of a table that prediction files do not have.
TABLE_COLUMNS = ["model", "source", "output_version", "run", "published_at"]
#: Formats, and the packages that a test of a format needs.
FORMATS = {"delta": ["deltalake"], "iceberg": ["pyiceberg", "sqlalchemy"]}
Rows = list[dict[str, Any]]


def needs_format(format: str) -> None:
    """Skips the test or the module if a package for a table format is not installed."""
    for package in FORMATS[format]:
        pytest.importorskip(package, reason=f"{package} is not installed: cvt-label[{format}]")


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

    An Iceberg table is in a SQL catalog, in a SQLite file. The process's environment has the catalog's
    configuration, also for child processes.

    Attributes:
        root: folder or bucket with input, output and table.
        uri: URI of the partition.
        format: the table's format, "delta" or "iceberg".
        to: the table, as the command `publish` has it.
        table: URI of the folder with the table's files.
        config: the job's configuration in the record of a run.
    """

    def __init__(
        self,
        root: str,
        model: str = "cvt-00000001",
        embedding: str | None = None,
        format: str = "delta",
        table_root: str | None = None,
        catalog_folder: str | None = None,
        table_of: Dataset | None = None,
    ) -> None:
        """Initializes a dataset without labels.

        Args:
            root: folder or bucket with input and output.
            model: the model, with its fingerprint.
            embedding: type of the elements of embeddings; None for no embeddings.
            format: "delta" or "iceberg".
            table_root: folder or bucket with the table; the default is `root`.
            catalog_folder: local folder with the Iceberg catalog; the default is `table_root`.
            table_of: another dataset, whose table is used.
        """
        self.root = root
        self.uri = f"{root}/out/model={model}"
        self.storage = Storage()
        self.embedding = embedding
        self.config: dict[str, Any] = {"input": {"uri": f"{root}/in"}}
        self._labelings = 0
        if table_of is not None:
            self.format, self.table, self.to = table_of.format, table_of.table, table_of.to
            return
        self.format, table_root = format, table_root or root
        self.table = f"{table_root}/table"
        self.to = f"delta:{self.table}"
        if format == "iceberg":
            catalog = add_catalog(catalog_folder or table_root, f"{table_root}/warehouse")
            self.table = f"{table_root}/warehouse/ns/table"
            self.to = f"iceberg:{catalog}.ns.table"

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
        return publish_labels(partition, self.to, **options)

    def objects(self, uri: str) -> dict[str, str]:
        """Returns the versions of all objects in a folder by URI."""
        try:
            return {info.uri: info.version for info in self.storage.list(uri)}
        except ObjectNotFound:
            return {}

    def labels(self) -> Rows:
        """Returns the rows of all prediction files, sorted."""
        uris = [uri for uri in self.objects(self.uri) if "/predictions/" in uri]
        return sorted_rows(pq.read_table(pa.BufferReader(self.storage.read(uri))) for uri in uris)

    def published(self, version: int | None = None) -> Rows:
        """Returns the rows that a reader of the table sees, sorted, with the columns of prediction files."""
        return sorted_rows([self.rows(version).drop_columns(TABLE_COLUMNS)])

    def rows(self, version: int | None = None) -> pa.Table:
        """Returns the rows that a reader of the table sees, as stored, with all columns.

        Args:
            version: Delta's version or Iceberg's snapshot id; None for the current one.
        """
        if self.version() is None:
            return LABEL_SCHEMA.empty_table()
        if self.format == "delta":
            return self.delta(version).to_pyarrow_table()
        return self.iceberg().scan(snapshot_id=version).to_arrow()

    def version(self) -> int | None:
        """Returns Delta's version or Iceberg's snapshot id; None without a table or without a snapshot."""
        history = self.history()
        return history[-1][0] if history else None

    def history(self) -> list[tuple[int, str]]:
        """Returns the versions of the table and their operations in lower case, oldest first.

        A write to a Delta table has its mode instead, such as "append".
        """
        if self.format == "delta":
            if not self.objects(f"{self.table}/_delta_log"):
                return []
            history = [(each["version"], each["operation"], each) for each in self.delta().history()]
            return [
                (version, each["operationParameters"]["mode"].lower() if name == "WRITE" else name.lower())
                for version, name, each in reversed(history)
            ]
        if not self.catalog().table_exists("ns.table"):
            return []
        return [(each.snapshot_id, each.summary.operation.value) for each in self.iceberg().snapshots()]

    def files(self) -> dict[str, pa.Table]:
        """Returns the rows of the table's current data files by URI; Delta's lack the model."""
        if self.version() is None:
            return {}
        if self.format == "delta":
            uris = self.delta().file_uris()
        else:
            uris = [
                task.file.file_path.removeprefix("file://") for task in self.iceberg().scan().plan_files()
            ]
        return {uri: pq.read_table(pa.BufferReader(self.storage.read(uri))) for uri in uris}

    def delta(self, version: int | None = None) -> Any:
        """Opens the Delta table as a reader."""
        import deltalake

        options = self.storage.object_store_options(self.table)
        return deltalake.DeltaTable(self.table, version=version, storage_options=options)

    def catalog(self) -> Any:
        """Opens the Iceberg catalog."""
        from pyiceberg.catalog import load_catalog

        return load_catalog(self.to.partition(":")[2].partition(".")[0])

    def iceberg(self) -> Any:
        """Opens the Iceberg table as a reader."""
        return self.catalog().load_table("ns.table")


class Datasets:
    """Two datasets with labels of the same model, for one table."""

    def __init__(self, one: Dataset) -> None:
        self.one = one
        self.two = Dataset(f"{one.root}/two", embedding=one.embedding, table_of=one)
        self.one.label(a=5, b=6, c=5)
        self.two.label(a=5, z=5)

    def __iter__(self) -> Iterator[Dataset]:
        return iter((self.one, self.two))

    def labels(self) -> Rows:
        """Returns the rows of both datasets, sorted."""
        rows = self.one.labels() + self.two.labels()
        return sorted(rows, key=lambda row: (row["shard"], row["index"]))


def add_catalog(folder: str, warehouse: str) -> str:
    """Adds a SQL catalog to pyiceberg's configuration in the environment; returns its name.

    Args:
        folder: a local folder for the SQLite file.
        warehouse: folder or bucket for the tables.
    """
    name = "c" + hashlib.sha256(folder.encode()).hexdigest()[:8]
    properties = {
        "TYPE": "sql",
        "URI": f"sqlite:///{folder}/catalog.db",
        "WAREHOUSE": warehouse if "://" in warehouse else f"file://{warehouse}",
    }
    if "://" in warehouse:
        properties |= {
            "S3__ENDPOINT": os.environ["AWS_ENDPOINT_URL_S3"],
            "S3__ACCESS_KEY_ID": os.environ["AWS_ACCESS_KEY_ID"],
            "S3__SECRET_ACCESS_KEY": os.environ["AWS_SECRET_ACCESS_KEY"],
            "S3__REGION": os.environ["AWS_DEFAULT_REGION"],
        }
    os.environ |= {f"PYICEBERG_CATALOG__{name.upper()}__{key}": value for key, value in properties.items()}
    reload_catalogs()
    return name


def reload_catalogs() -> None:
    """Makes pyiceberg read the environment again, which it otherwise does at import only."""
    import pyiceberg.catalog
    from pyiceberg.utils.config import Config

    pyiceberg.catalog._ENV_CONFIG = Config()


def sorted_rows(tables: Iterable[pa.Table]) -> Rows:
    """Returns rows, sorted by shard and index. A null embedding is left out."""
    rows = [row for table in tables for row in table.to_pylist()]
    for row in rows:
        if row.get("embedding", 0) is None:
            del row["embedding"]
    return sorted(rows, key=lambda row: (row["shard"], row["index"]))


def changes(done: Publication, root: str) -> Mapping[str, list[str]]:
    """Returns the sorted names of added, replaced, removed and pending shards, without empty lists."""
    columns = {
        "added": done.added["uri"],
        "replaced": done.replaced,
        "removed": done.removed,
        "pending": done.pending,
    }
    names_by_kind = {
        kind: sorted(uri.removeprefix(f"{root}/in/") for uri in each.to_pylist())
        for kind, each in columns.items()
    }
    return {kind: names for kind, names in names_by_kind.items() if names}


@dataclass(frozen=True)
class WatchedStorage(Storage):
    """Storage that calls a function with the URI before it opens an object.

    A publication opens prediction files after it has read the table and the manifest, and before it
    commits.
    """

    before: Callable[[str], None] = print

    def open(self, uri: str, version: str | None = None, read_ahead: int = 0) -> BufferedReader:
        self.before(uri)
        return super().open(uri, version, read_ahead)
