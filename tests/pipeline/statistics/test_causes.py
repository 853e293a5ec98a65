from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.commit import Manifest
from pipeline.report.causes import SHARD_COLUMNS, read_causes
from pipeline.statistics import Causes
from pipeline.statistics.causes import MOST_CAUSES, MOST_KEYS, OTHERS, causes_of
from pipeline.storage import Storage, StorageError
from tests.partitions import make_predictions, write_partition


def samples(*errors: str | None) -> pa.Table:
    return pa.table({"key": [f"k{i}" for i in range(len(errors))], "error": pa.array(errors, pa.string())})


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        ("60000 x 70000 pixels are more than the limit of 178", "N x N pixels are more than the limit of N"),
        (r"not an image: starts with b'<ht\'ml 4'", "not an image: starts with '...'"),
        ("label 'boot-ish' names no class", "label '...' names no class"),
        ("an empty object", "an empty object"),
    ],
)
def test_what_differs_from_sample_to_sample_is_left_out(error: str, cause: str) -> None:
    assert causes_of(pa.array([error])).to_pylist() == [cause]


def test_errors_are_counted_by_cause_the_most_frequent_first_with_a_few_samples() -> None:
    causes = Causes()
    causes.add("s3://b/a.tar", samples("3 bytes", None, "no image", *(f"{i} bytes" for i in range(20))))
    other = Causes()
    other.add("s3://b/b.tar", samples("no image", "9 bytes"))
    causes.merge(other)
    first, second = causes.to_record()
    assert (first["cause"], first["count"]) == ("N bytes", 22)
    assert (second["cause"], second["count"]) == ("no image", 2)
    assert first["samples"][0] == {"shard": "s3://b/a.tar", "key": "k0", "error": "3 bytes"}
    assert len(first["samples"]) == MOST_KEYS
    assert [sample["shard"] for sample in second["samples"]] == ["s3://b/a.tar", "s3://b/b.tar"]


def test_causes_without_end_are_counted_as_one() -> None:
    causes = Causes()
    causes.add("s3://b/a.tar", samples(*("x" * i for i in range(1, 200))))
    record = causes.to_record()
    assert len(record) == MOST_CAUSES + 1
    assert record[0]["cause"] == OTHERS
    assert sum(cause["count"] for cause in record) == 199


def test_of_labels_that_lie_there_only_files_with_errors_are_read_those_with_the_most_first(
    tmp_path: Path,
) -> None:
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
        path.write_bytes(b"without errors: nobody looks at it")
    manifest = Manifest(storage, uri, 1)

    def causes(most: int) -> Causes:
        found, missing = read_causes(storage, uri, manifest.labelled(SHARD_COLUMNS), most)
        assert missing == 0
        return found

    [found] = causes(100).to_record()
    assert (found["cause"], found["count"]) == ("N bytes, day '...'", 2 * (1 + 2 + 3))
    assert found["samples"][0] == {"shard": "/in/x-3.tar", "key": "k1", "error": "3 bytes, day 'x'"}
    assert len(found["samples"]) == MOST_KEYS
    assert causes(3).count == 3 + 3 + 2
    [path] = Path(uri).rglob("x-3.tar.parquet")
    path.unlink()
    found, missing = read_causes(storage, uri, manifest.labelled(SHARD_COLUMNS), 100)
    assert (found.count, missing) == (2 * (1 + 2 + 3) - 3, 1)
    path.write_bytes(b"of somebody else")
    with pytest.raises(StorageError, match=r"x-3\.tar\.parquet: not a prediction file"):
        causes(100)


def test_the_causes_of_a_copy_are_those_of_what_was_copied(tmp_path: Path) -> None:
    """Its files have other versions than the manifest that was copied with them."""
    uri, copy = (str(tmp_path / name / "model=m-ffffffff") for name in ("there", "copy"))
    predictions = make_predictions("/in/a.tar", ["a"], [0, None, None], error="3 bytes")
    write_partition(Storage(), uri, ["a"], [{"/in/a.tar": predictions}])
    shutil.copytree(uri, copy, copy_function=shutil.copyfile)
    records = []
    for each in (uri, copy):
        shards = Manifest(Storage(), each, 1).labelled(SHARD_COLUMNS)
        found, missing = read_causes(Storage(), each, shards, 100)
        assert (found.count, missing) == (2, 0)
        records.append(found.to_record())
    assert records[0] == records[1]
