"""`Partition`: rows of shards in order, read ahead in threads within a size; present files; overlaps."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.commit import Partition
from pipeline.predictions import prediction_path
from pipeline.storage import ObjectChanged, ObjectNotFound, Storage, StorageError
from tests.partitions import make_predictions, write_partition

COLUMNS = ("shard", "index", "label", "embedding")


@dataclass(frozen=True)
class CountingStorage(Storage):
    """Storage that remembers the opened objects, and the threads that opened them."""

    opened: list[str] = field(default_factory=list, compare=False)
    threads: set[str] = field(default_factory=set, compare=False)

    def open(self, uri: str, version: str | None = None, read_ahead: int = 0) -> BufferedReader:
        if "/predictions/" in uri:
            self.opened.append(uri)
            self.threads.add(threading.current_thread().name)
        return super().open(uri, version, read_ahead)


def write(folder: Path, count: int, rows: int = 3) -> Partition:
    """Writes a partition of shards `00`, `01`, ...; opens it with storage that counts."""
    names = [f"{number:02d}" for number in range(count)]
    run = {name: make_predictions(name, ["cat", "dog"], [row % 2 for row in range(rows)]) for name in names}
    uri = f"{folder}/model=m-00000001"
    write_partition(Storage(), uri, ["cat", "dog"], [run])
    return Partition.open(CountingStorage(), uri)


def shards(partition: Partition) -> pa.Table:
    return partition.manifest.labeled(("uri", "output", "output_version"))


def read(partition: Partition, ahead_bytes: int = 10**9) -> list[tuple[Any, pa.Table]]:
    return list(partition.read_shards(shards(partition), COLUMNS, ahead_bytes))


@pytest.mark.parametrize("ahead_bytes", [0, 10**9])
def test_rows_of_all_shards_are_in_order(tmp_path: Path, ahead_bytes: int) -> None:
    partition = write(tmp_path, 20)
    found = read(partition, ahead_bytes)
    assert [shard["uri"] for shard, _ in found] == [f"{number:02d}" for number in range(20)]
    for shard, rows in found:
        assert {*rows["shard"].to_pylist()} == {shard["uri"]}
        assert shard["output"] == f"predictions/{prediction_path(shard['uri'])}"
        assert rows["index"].to_pylist() == [0, 1, 2]


def test_columns_that_a_file_lacks_are_left_out(tmp_path: Path) -> None:
    [(_, rows)] = read(write(tmp_path, 1))
    assert rows.column_names == ["shard", "index", "label"]


def test_small_shards_are_read_ahead_in_threads(tmp_path: Path) -> None:
    partition = write(tmp_path, 40)
    storage = partition.storage
    assert isinstance(storage, CountingStorage)
    parts = partition.read_shards(shards(partition), COLUMNS, 10**9)
    next(parts)
    assert 2 <= len(storage.opened) <= 9
    assert threading.current_thread().name not in storage.threads
    parts.close()  # type: ignore[attr-defined]
    assert len(storage.opened) <= 9
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("storage")]


def test_large_shards_are_read_one_row_group_at_a_time(tmp_path: Path) -> None:
    """A file of a tenth of the size, uncompressed, may fill the memory."""
    partition = write(tmp_path, 10)
    storage = partition.storage
    assert isinstance(storage, CountingStorage)
    size = Path(partition.uri, shards(partition)["output"][0].as_py()).stat().st_size
    parts = partition.read_shards(shards(partition), COLUMNS, 10 * size)
    next(parts)
    assert len(storage.opened) == 1
    assert storage.threads == {threading.current_thread().name}


def test_large_file_is_yielded_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.commit.partition._PART_ROWS", 4)
    partition = write(tmp_path, 1, rows=10)
    for ahead_bytes in (0, 10**9):
        found = list(partition.read_shards(shards(partition), COLUMNS, ahead_bytes))
        assert [len(rows) for _, rows in found] == [4, 4, 2]


def test_shard_without_rows_has_no_parts(tmp_path: Path) -> None:
    assert read(write(tmp_path, 2, rows=0)) == []


@pytest.mark.parametrize("ahead_bytes", [0, 10**9])
def test_replaced_or_deleted_labels_are_reported(tmp_path: Path, ahead_bytes: int) -> None:
    partition = write(tmp_path, 3)
    known = shards(partition)
    path = Path(partition.uri, known["output"][1].as_py())
    content = path.read_bytes()
    path.write_bytes(content + b" ")
    with pytest.raises(ObjectChanged):
        list(partition.read_shards(known, COLUMNS, ahead_bytes))
    path.unlink()
    with pytest.raises(ObjectNotFound):
        list(partition.read_shards(known, COLUMNS, ahead_bytes))


def test_damaged_file_is_named(tmp_path: Path) -> None:
    partition = write(tmp_path, 2)
    known = shards(partition)
    path = Path(partition.uri, known["output"][1].as_py())
    path.write_bytes(b"not Parquet")
    version = pa.array([known["output_version"][0].as_py(), Storage().version(str(path))])
    known = known.set_column(known.column_names.index("output_version"), "output_version", version)
    with pytest.raises(StorageError, match=rf"^{path}: not a file of prediction rows: "):
        list(partition.read_shards(known, COLUMNS, 10**9))


def test_replaced_and_deleted_files_lack_the_version_of_the_manifest(tmp_path: Path) -> None:
    partition = write(tmp_path, 4)
    known = shards(partition)
    assert partition.has_versions(known).to_pylist() == [True] * 4
    paths = [Path(partition.uri, output.as_py()) for output in known["output"]]
    paths[1].write_bytes(paths[1].read_bytes() + b" ")
    paths[2].unlink()
    assert partition.has_versions(known).to_pylist() == [True, False, False, True]
    assert partition.has_versions(known.slice(0, 0)).to_pylist() == []


def test_folder_in_or_around_output_and_input_overlaps(tmp_path: Path) -> None:
    uri = f"{tmp_path}/out/model=m-00000001"
    record = {"config": {"input": {"uri": f"{tmp_path}/in/photos"}}}
    write_partition(Storage(), uri, ["cat"], [{"a": make_predictions("a", ["cat"], [0])}], record)
    partition = Partition.open(Storage(), uri)
    places = {
        "out": f"output {tmp_path}/out",
        "out/table": f"output {tmp_path}/out",
        "in/photos/table": f"input {tmp_path}/in/photos",
        "in": f"input {tmp_path}/in/photos",
        "table": None,
        "out2": None,
    }
    assert {name: partition.overlap(f"{tmp_path}/{name}") for name in places} == places
    assert partition.overlap(str(tmp_path)) is not None
