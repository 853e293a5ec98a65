"""A partition: all labels of one fingerprint under one output URI, opened without its model."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.commit.manifest import Manifest
from pipeline.commit.recovery import prediction_files
from pipeline.statistics import CLASS_STATS_SCHEMA
from pipeline.storage import ObjectNotFound, Storage, StorageError, normalize_uri

CLASS_STATS = "class_stats.parquet"


@dataclass(frozen=True)
class Partition:
    """All labels of one fingerprint under one output URI.

    Attributes:
        uri: `<output>/model=<name>-<fingerprint8>`, without a slash at the end.
        labels: the classes' names, by class id.
    """

    storage: Storage
    uri: str
    labels: Sequence[str]

    @classmethod
    def open(cls, storage: Storage, uri: str) -> Partition:
        """Opens a stored partition; raises `StorageError` if there is none, or it can't be read."""
        partition = cls(storage, normalize_uri(uri), ())
        names: list[str] = partition.class_table["label"].to_pylist()
        return cls(storage, partition.uri, names)

    def read_labels(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Reads these columns, or all, of the prediction files, one table per shard, in their names' order.

        Raises:
            StorageError: a file can't be read, or lacks a column.
        """
        for info in prediction_files(self.storage, self.uri):
            with self.storage.open(info.uri, info.version) as file:
                parquet = pq.ParquetFile(file)
                unknown = {*(columns or ())} - {*parquet.schema_arrow.names}
                if unknown:
                    raise StorageError(info.uri, f"has no column {', '.join(sorted(unknown))}")
                yield parquet.read(None if columns is None else list(columns))

    @property
    def name(self) -> str:
        """The folder's name: `model=<name>-<fingerprint8>`."""
        return self.uri.rpartition("/")[2]

    @property
    def model(self) -> str:
        """`<name>-<fingerprint8>`, the value of the Hive column `model`."""
        return self.name.removeprefix("model=")

    @property
    def manifest(self) -> Manifest:
        """One row per labeled shard."""
        return Manifest(self.storage, self.uri, len(self.labels))

    @cached_property
    def class_table(self) -> pa.Table:
        """`class_stats.parquet`: one row per class; raises `StorageError` if there is no such file."""
        uri = f"{self.uri}/{CLASS_STATS}"
        try:
            return pq.read_table(io.BytesIO(self.storage.read(uri))).select(CLASS_STATS_SCHEMA.names)
        except ObjectNotFound:
            raise StorageError(
                self.uri,
                f"no labels of a model: it has no {CLASS_STATS} (expected: .../model=NAME-FINGERPRINT)",
            ) from None
        except (pa.ArrowInvalid, KeyError) as error:
            raise StorageError(uri, f"not class statistics: {error}") from None

    def topk(self) -> int:
        """How many classes the rows keep, as the last run's record says."""
        return int(self.config().get("output", {}).get("topk", 5))

    def config(self) -> dict[str, Any]:
        """The configuration of the last run; empty where there is no record."""
        runs = self.records()
        config: dict[str, Any] = ((self.record(runs[-1]) if runs else None) or {}).get("config", {})
        return config

    def record(self, run: str) -> dict[str, Any] | None:
        """The record of a run; None where there is none. Raises `StorageError` if it can't be read."""
        uri = f"{self.uri}/runs/{run}.json"
        try:
            found = self.storage.read_latest(uri, json.load)
            return None if found is None else dict(found.content)
        except (ValueError, TypeError) as error:
            raise StorageError(uri, f"not the record of a run: {error}") from None

    def records(self) -> list[str]:
        """The ids of all runs that left a record, in their order."""
        listing = self.storage.list(f"{self.uri}/runs")
        found = [info.uri.rpartition("/")[2] for info in listing]
        return sorted(name.removesuffix(".json") for name in found if name.endswith(".json"))


def open_partition(uri: str, *, endpoint_url: str | None = None, region: str | None = None) -> Partition:
    """Opens the labels of one model; neither the model nor a configuration is needed.

    Args:
        uri: of the partition, `.../model=<name>-<fingerprint8>`: s3://, gs://, or a local path.
        endpoint_url: of an S3 service other than AWS; `AWS_ENDPOINT_URL_S3` where None.
        region: of the bucket; as the AWS configuration says where None.

    Raises:
        StorageError: there is none at the URI, or it can't be read.
    """
    return Partition.open(Storage(endpoint_url=endpoint_url, region=region), uri)
