"""A partition: all labels of one fingerprint under one output URI, opened without its model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa

from pipeline.commit.manifest import Manifest
from pipeline.commit.record import MAX_RECORD_BYTES
from pipeline.config import InputUris
from pipeline.statistics import CLASS_STATS_SCHEMA
from pipeline.storage import (
    ObjectInfo,
    Storage,
    StorageError,
    content_errors,
    is_under,
    map_in_threads,
    normalize_uri,
    read_batches,
    read_table,
)

CLASS_STATS = "class_stats.parquet"
_MAX_CLASS_STATS_BYTES = 1024**3
_READERS, _PART_ROWS = 4, 8192
#: Rows in memory have at most about this many times the size of their prediction file.
_EXPANSION = 8


@dataclass(frozen=True)
class Partition:
    """All labels of one fingerprint under one output URI.

    Attributes:
        uri: `<output>/model=<name>-<fingerprint8>`, without a slash at the end.
        labels: class names by class id.
    """

    storage: Storage
    uri: str
    labels: Sequence[str]

    @classmethod
    def open(cls, storage: Storage, uri: str) -> Partition:
        """Opens a stored partition; raises `StorageError` if it does not exist or can't be read."""
        partition = cls(storage, normalize_uri(uri), ())
        names: list[str] = partition.class_table["label"].to_pylist()
        return cls(storage, partition.uri, names)

    def prediction_files(self) -> Iterator[ObjectInfo]:
        """Lists the prediction files."""
        files = self.storage.list(f"{self.uri}/predictions")
        return (info for info in files if info.uri.endswith(".parquet"))

    def read_labels(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Yields the prediction rows, all columns or some, one table per shard, in the order of the files.

        Raises `StorageError` if a file can't be read, or lacks a column.
        """
        for info in self.prediction_files():
            with self.storage.open(info.uri, info.version) as file:
                rows = read_table(file, columns)
            if unknown := {*(columns or ())} - {*rows.column_names}:
                raise StorageError(info.uri, f"has no column {', '.join(sorted(unknown))}")
            yield rows

    def read_shards(
        self, shards: pa.Table, columns: Sequence[str], ahead_bytes: int
    ) -> Iterator[tuple[Mapping[str, Any], pa.Table]]:
        """Yields the prediction rows of shards, in parts of at most 8,192 rows, each with its shard.

        Args:
            shards: rows of the manifest, with `output` and `output_version`.
            columns: the columns to read; those that a file lacks are left out.
            ahead_bytes: about the memory for rows that threads read ahead.

        Raises `StorageError`: `ObjectChanged` or `ObjectNotFound` if labels were replaced since.
        """

        def read(shard: Mapping[str, Any]) -> tuple[Mapping[str, Any], Iterable[pa.Table]]:
            info = ObjectInfo.of_version(f"{self.uri}/{shard['output']}", shard["output_version"])
            parts = self._read_parts(info, columns)
            is_small = info.size * _EXPANSION * 2 * _READERS <= ahead_bytes
            return shard, [*parts] if is_small else parts  # a large file is read in parts, by the caller

        each = (shard for batch in shards.to_batches(1000) for shard in batch.to_pylist())
        for shard, parts in map_in_threads(read, each, _READERS):
            yield from ((shard, rows) for rows in parts)

    def has_versions(self, shards: pa.Table) -> pa.BooleanArray:
        """Returns for each shard of the manifest whether its prediction file has the manifest's version."""
        start = len(self.uri) + 1
        files = self.prediction_files() if len(shards) else ()
        versions = {info.uri[start:]: info.version for info in files}
        pairs = zip(shards["output"].to_pylist(), shards["output_version"].to_pylist(), strict=True)
        return pa.array([versions.get(output) == version for output, version in pairs], pa.bool_())

    def overlap(self, folder: str) -> str | None:
        """Returns what a folder is in, or contains: the output or the input; None if neither."""
        inputs = InputUris.of_record({"config": self.config()})
        for name, uris in {"output": InputUris.parse(self.uri.rpartition("/")[0]), "input": inputs}.items():
            if uris is not None and (uris.covers(folder) or any(is_under(x, folder) for x in uris.roots)):
                return f"{name} {uris}"
        return None

    def _read_parts(self, info: ObjectInfo, columns: Sequence[str]) -> Iterator[pa.Table]:
        expected = content_errors(info.uri, "a file of prediction rows")
        with expected, self.storage.open(info.uri, info.version) as file:
            yield from read_batches(file, columns, _PART_ROWS)

    @property
    def name(self) -> str:
        """The name of the folder: `model=<name>-<fingerprint8>`."""
        return self.uri.rpartition("/")[2]

    @property
    def model(self) -> str:
        """`<name>-<fingerprint8>`, the value of the Hive column `model`."""
        return self.name.removeprefix("model=")

    @property
    def manifest(self) -> Manifest:
        """The manifest: one row per shard."""
        return Manifest(self.storage, self.uri, len(self.labels))

    @cached_property
    def class_table(self) -> pa.Table:
        """`class_stats.parquet`: one row per class; raises `StorageError` if there is no such file."""
        uri = f"{self.uri}/{CLASS_STATS}"
        with content_errors(uri, "class statistics"):
            found = self.storage.read_latest(uri, read_table, _MAX_CLASS_STATS_BYTES)
            if found is not None:
                return found.content.select(CLASS_STATS_SCHEMA.names)
        cause = f"not a partition: it has no {CLASS_STATS}; give a URI like .../model=NAME-FINGERPRINT"
        raise StorageError(self.uri, cause)

    def topk(self) -> int:
        """Returns the number of classes in `topk_label_ids`, from the record of the last run."""
        topk: int = self.config().get("output", {}).get("topk", 5)
        return min(topk, len(self.labels))

    def config(self) -> dict[str, Any]:
        """Returns the configuration of the last run; empty if there is no run record."""
        runs = self.records()
        config: dict[str, Any] = self.record(runs[-1]).get("config", {}) if runs else {}
        return config

    def record(self, run: str) -> dict[str, Any]:
        """Returns the record of a run; empty if it does not exist. Raises `StorageError`."""
        uri = f"{self.uri}/runs/{run}.json"
        with content_errors(uri, "a run record"):
            found = self.storage.read_latest(uri, json.load, MAX_RECORD_BYTES)
            return {} if found is None else dict(found.content)

    def records(self) -> list[str]:
        """Returns the ids of all runs that have a record, sorted by time."""
        listing = self.storage.list(f"{self.uri}/runs")
        found = [info.uri.rpartition("/")[2] for info in listing]
        return sorted(name.removesuffix(".json") for name in found if name.endswith(".json"))


def open_partition(uri: str, *, endpoint_url: str | None = None, region: str | None = None) -> Partition:
    """Opens the labels of one model; needs neither the model nor a configuration.

    Args:
        uri: URI of the partition, `.../model=<name>-<fingerprint8>`: s3://, gs://, or a local path.
        endpoint_url: address of an S3 service other than AWS; None for `AWS_ENDPOINT_URL_S3`, else AWS.
        region: region of the bucket; None for the region of the AWS configuration.

    Raises:
        StorageError: there is no partition at the URI, or it can't be read.
    """
    return Partition.open(Storage(endpoint_url=endpoint_url, region=region), uri)
