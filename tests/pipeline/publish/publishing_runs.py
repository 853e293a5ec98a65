"""Labelled datasets and their consumer tables, in a folder or a bucket; publications that die on the way."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import signal
from collections.abc import Iterable, Mapping
from multiprocessing.process import BaseProcess
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.commit import Partition
from pipeline.config import LABEL_NEW, Config, Selection, load_config
from pipeline.predictions import prediction_path
from pipeline.publish import FILE_BYTES, ConsumerTable, ParquetTable, Publication, publish
from pipeline.publish.delta_table import DeltaTable
from pipeline.run import label, make_job
from pipeline.storage import ObjectNotFound, Storage
from tests.pipeline import crashing
from tests.pipeline.crashing import Crash

Format = Literal["parquet", "delta"]
NEEDS_DELTALAKE = pytest.mark.skipif(
    importlib.util.find_spec("deltalake") is None, reason="deltalake is not installed: cvt-label[delta]"
)
PARQUET = pytest.param("parquet", id="parquet")
DELTA = pytest.param("delta", id="delta", marks=NEEDS_DELTALAKE)
Rows = list[dict[str, Any]]
#: So that a table of two datasets has several files, and some of them rows of both.
SMALL_FILES = 4000


class Place:
    """A dataset with its labels, and the tables made of them. Labelling it wants `leave_out_ray`."""

    def __init__(self, root: str, format: Format = "parquet", *overrides: str) -> None:
        self.root = root
        self.format = format
        self.storage = Storage()
        fields = [f"input.uri={root}/in", f"output.uri={root}/out", "model.path=fashion-mnist", *overrides]
        self.fields = fields
        self.config = load_config(Config, None, fields)

    def put(self, shards: Mapping[str, bytes], remove: tuple[str, ...] = ()) -> None:
        """Adds shards to the input, or changes them."""
        for name in remove:
            self.storage.delete(f"{self.root}/in/{name}")
        for name, data in shards.items():
            self.storage.write(f"{self.root}/in/{name}", data)

    def label(self, selection: Selection = LABEL_NEW) -> None:
        """Brings the labels up to date."""
        label(self.config, selection=selection)

    @property
    def partition(self) -> Partition:
        """The labels."""
        return make_job(self.config).partition

    def table(self, keep: int = 10) -> ConsumerTable:
        """The consumer table, as a publisher sees it."""
        return make_table(self.partition, f"{self.root}/table", self.format, keep)

    def publish(self, keep: int = 10, file_bytes: int = FILE_BYTES, embedding: bool = True) -> Publication:
        """Publishes in this process."""
        return publish(self.partition, self.table(keep), embedding=embedding, file_bytes=file_bytes)

    def start_publishing(self, crash: Crash | None = None, file_bytes: int = FILE_BYTES) -> BaseProcess:
        """Publishes in a child process, which dies where it is told to."""
        arguments = dict(os.environ), self.fields, f"{self.root}/table", self.format, crash, file_bytes
        child = crashing._context().Process(target=_publish, args=arguments)
        child.start()
        return child

    def dies_publishing(self, crash: Crash, file_bytes: int = FILE_BYTES) -> bool:
        """As `start_publishing`; waits, and says whether it died."""
        child = self.start_publishing(crash, file_bytes)
        child.join(60)
        if child.exitcode not in (0, -signal.SIGKILL):
            child.kill()
            raise RuntimeError(f"publishing ended with {child.exitcode}")
        return child.exitcode != 0

    def objects(self, folder: str) -> dict[str, str]:
        """Versions of all objects below a folder."""
        try:
            return {info.uri: info.version for info in self.storage.list(f"{self.root}/{folder}")}
        except ObjectNotFound:
            return {}

    def predictions(self) -> Rows:
        """The rows of all prediction files, sorted, without embeddings."""
        uris = [uri for uri in self.objects("out") if "/predictions/" in uri]
        return self._rows(pq.read_table(io.BytesIO(self.storage.read(uri))) for uri in uris)

    def published(self, version: int | None = None) -> Rows:
        """The rows that a reader of the table sees, sorted, without `published` and embeddings."""
        read = self._parquet if self.format == "parquet" else self._delta
        return self._rows(table.drop_columns(["published"]) for table in read(version))

    def content(self) -> dict[str, Any]:
        """The pointer of a Parquet table; empty where there is none."""
        uris = [uri for uri in self.objects("table") if uri.endswith("/current.json")]
        return json.loads(self.storage.read(uris[0])) if uris else {}

    def delta(self, version: int | None = None) -> Any:
        """The Delta table, as any reader opens it."""
        import deltalake

        options = None
        if not self.root.startswith("/"):
            options = {"endpoint_url": self.storage.s3_access().endpoint_url, "allow_http": "true"}
        return deltalake.DeltaTable(f"{self.root}/table", version=version, storage_options=options)

    def _parquet(self, version: int | None) -> list[pa.Table]:
        uri, content = f"{self.root}/table/model={self.partition.model}", self.content()
        if version is not None and version != content["version"]:
            [kept] = [entry["path"] for entry in content["kept"] if entry["version"] == version]
            content = json.loads(self.storage.read(f"{uri}/{kept}"))
        paths = [file["path"] for file in content.get("files", [])]
        return [pq.read_table(io.BytesIO(self.storage.read(f"{uri}/{path}"))) for path in paths]

    def _delta(self, version: int | None) -> list[pa.Table]:
        from deltalake.exceptions import TableNotFoundError

        try:
            table = self.delta(None if version is None else version - 1).to_pyarrow_table()
        except TableNotFoundError:
            return []
        assert set(table["model"].to_pylist()) <= {self.partition.model}
        return [table.drop_columns(["model"])]

    def _rows(self, tables: Iterable[pa.Table]) -> Rows:
        rows = [row for table in tables for row in table.to_pylist()]
        for row in rows:  # single precision in a table, and in Delta there also where there is none
            row.pop("embedding", None)
        return sorted(rows, key=lambda row: (row["shard"], row["index"]))

    def shard_uri(self, name: str) -> str:
        """A shard's URI."""
        return f"{self.root}/in/{name}"

    def prediction_uri(self, name: str) -> str:
        """A shard's prediction file."""
        return f"{self.partition.uri}/predictions/{prediction_path(self.shard_uri(name))}"


class Datasets:
    """Two datasets with labels of the same model, and a table of both."""

    def __init__(self, root: str, format: Format, shards: list[bytes], *overrides: str) -> None:
        self.one, self.two = (Place(each, format, *overrides) for each in (root, f"{root}/two"))
        self.one.put({"a.tar": shards[0], "b.tar": shards[1], "c.tar": shards[2]})
        self.two.put({"a.tar": shards[3], "z.tar": shards[4]})
        self.one.label()
        self.two.label()

    def publish(self, place: Place, **options: Any) -> Publication:
        """Publishes one of them."""
        table = make_table(place.partition, f"{self.one.root}/table", place.format)
        return publish(place.partition, table, file_bytes=SMALL_FILES, **options)

    @property
    def labels(self) -> Rows:
        """The rows of both."""
        rows = self.one.predictions() + self.two.predictions()
        return sorted(rows, key=lambda row: (row["shard"], row["index"]))

    def lists(self) -> list[str]:
        """The lists of shards of all versions."""
        folder = "/versions/" if self.one.format == "parquet" else "/_cvt_label/"
        found = self.one.objects("table")
        return [uri for uri in found if folder in uri and uri.endswith(".parquet")]

    def forget_sources(self) -> None:
        """Makes the table one from before it was noted where shards are from."""
        for uri in self.lists():
            table, out = pq.read_table(io.BytesIO(self.one.storage.read(uri))), io.BytesIO()
            pq.write_table(table.drop_columns(["source"]), out)
            self.one.storage.write(uri, out.getvalue())


def make_table(partition: Partition, target: str, format: Format, keep: int = 10) -> ConsumerTable:
    """A consumer table of a format."""
    if format == "delta":
        return DeltaTable(partition.storage, target, partition.model)
    return ParquetTable(partition.storage, target, partition.model, keep)


def _publish(
    environment: dict[str, str],
    fields: list[str],
    target: str,
    format: Format,
    crash: Crash | None,
    file_bytes: int,
) -> None:
    import multiprocessing

    os.environ |= environment
    patch = pytest.MonkeyPatch()
    crashing.leave_out_ray(patch)
    writes: list[tuple[Any, str]] = [(Storage, "write"), (Storage, "delete")]
    if format == "delta":
        import deltalake
        import deltalake.transaction

        writes += [
            (deltalake.DeltaTable, "create_write_transaction"),
            (deltalake.transaction, "create_table_with_add_actions"),
        ]
    if crash is not None:
        done = multiprocessing.Value("i", 0)
        for owner, name in writes:
            patch.setattr(owner, name, crashing._dying(getattr(owner, name), crash, done))
    partition = make_job(load_config(Config, None, fields)).partition
    publish(partition, make_table(partition, target, format), file_bytes=file_bytes)
