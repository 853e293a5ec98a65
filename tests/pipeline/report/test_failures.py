"""Reading the causes of errors from prediction files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline.commit import Partition
from pipeline.report.sections import read_causes
from pipeline.statistics import ErrorCauses
from pipeline.statistics.causes import MAX_SAMPLES
from pipeline.storage import Storage, StorageError
from tests.partitions import make_predictions, write_partition


def test_files_with_the_most_errors_are_read(tmp_path: Path) -> None:
    uri, storage = str(tmp_path / "model=m-ffffffff"), Storage()
    days = [
        {
            f"/in/{day}-{bad}.tar": make_predictions(
                f"/in/{day}-{bad}.tar", ["a"], [0, *[None] * bad], error=f"{bad} bytes, day '{day}'"
            )
            for bad in range(4)
        }
        for day in "xy"
    ]
    write_partition(storage, uri, ["a"], days)
    for path in Path(uri).rglob("?-0.tar.parquet"):
        path.write_bytes(b"must not be read: the shard has no errors")
    partition = Partition.open(storage, uri)

    def causes(max_files: int) -> ErrorCauses:
        causes, missing = read_causes(partition, max_files)
        assert missing == 0
        return causes

    [cause] = causes(100).to_record()
    assert (cause["cause"], cause["count"]) == ("N bytes, day '...'", 2 * (1 + 2 + 3))
    assert cause["samples"][0] == {"shard": "/in/x-3.tar", "key": "k1", "error": "3 bytes, day 'x'"}
    assert len(cause["samples"]) == MAX_SAMPLES
    assert causes(3).count == 3 + 3 + 2
    [path] = Path(uri).rglob("x-3.tar.parquet")
    path.unlink()
    remaining, missing = read_causes(partition, 100)
    assert (remaining.count, missing) == (2 * (1 + 2 + 3) - 3, 1)
    path.write_bytes(b"another format")
    with pytest.raises(StorageError, match=r"x-3\.tar\.parquet: not a prediction file"):
        causes(100)


def test_copied_partition_has_the_same_causes(tmp_path: Path) -> None:
    """The manifest of the copy has the object versions of the original."""
    uri, copy = (str(tmp_path / name / "model=m-ffffffff") for name in ("original", "copy"))
    predictions = make_predictions("/in/a.tar", ["a"], [0, None, None], error="3 bytes")
    write_partition(Storage(), uri, ["a"], [{"/in/a.tar": predictions}])
    shutil.copytree(uri, copy, copy_function=shutil.copyfile)
    records = []
    for each in (uri, copy):
        causes, missing = read_causes(Partition.open(Storage(), each), 100)
        assert (causes.count, missing) == (2, 0)
        records.append(causes.to_record())
    assert records[0] == records[1]
