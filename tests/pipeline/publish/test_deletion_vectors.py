"""Delta tables whose rows another program deleted with a deletion vector, as Spark does on request."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.storage import StorageError
from tests.pipeline.publish.tables import Dataset, needs_format

needs_format("delta")

_Z85 = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"


def _encode(rows: list[int]) -> tuple[str, int]:
    """Returns a deletion vector as Delta stores it in the log, and its size in bytes."""
    header = struct.pack("<IQI", 1681511377, 1, 0)  # magic number, one bitmap, its high bits
    bitmap = struct.pack("<IIHHI", 12346, 1, 0, len(rows) - 1, 16) + struct.pack(f"<{len(rows)}H", *rows)
    data = header + bitmap
    padded = data + bytes(-len(data) % 4)
    words = [int.from_bytes(padded[i : i + 4], "big") for i in range(0, len(padded), 4)]
    return "".join(_Z85[word // 85**power % 85] for word in words for power in (4, 3, 2, 1, 0)), len(data)


def _delete_rows(dataset: Dataset, shard: str, count: int) -> None:
    """Deletes the first rows of a shard from the table's only file, with a deletion vector."""
    dataset.delta().alter.set_table_properties({"delta.enableDeletionVectors": "true"})
    log, version = Path(dataset.table, "_delta_log"), dataset.delta().version()
    actions = [json.loads(line) for line in (log / f"{1:020d}.json").read_text().splitlines()]
    [add] = [action["add"] for action in actions if "add" in action]
    file = pq.ParquetFile(f"{dataset.table}/{add['path'].replace('%3D', '=')}")
    shards = file.read(["shard"])["shard"].to_pylist()
    rows = [row for row, uri in enumerate(shards) if uri == dataset.shard(shard)][:count]
    remove = {name: add[name] for name in ("path", "partitionValues", "size")}
    remove |= {"deletionTimestamp": 1, "dataChange": True, "extendedFileMetadata": True}
    text, size = _encode(rows)
    vector = {"storageType": "i", "pathOrInlineDv": text, "sizeInBytes": size, "cardinality": len(rows)}
    commit = [
        {"commitInfo": {"operation": "DELETE"}},
        {"remove": remove},
        {"add": add | {"deletionVector": vector}},
    ]
    (log / f"{version + 1:020d}.json").write_text("\n".join(map(json.dumps, commit)))


def _count_rows(dataset: Dataset) -> dict[str, int]:
    """Returns the number of rows of each shard; `to_pyarrow_table` does not read such tables."""
    from deltalake import QueryBuilder

    query = "SELECT shard, count(*) AS rows FROM labels GROUP BY shard"
    found: Any = pa.table(QueryBuilder().register("labels", dataset.delta()).execute(query))
    return {row["shard"].rpartition("/")[2]: row["rows"] for row in found.to_pylist()}


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    dataset = Dataset(str(tmp_path))
    dataset.label(a=5, b=4)
    dataset.publish()
    return dataset


def test_deleted_rows_are_refused_until_rebuild(dataset: Dataset) -> None:
    _delete_rows(dataset, "b", 1)
    assert _count_rows(dataset) == {"a": 5, "b": 3}
    with pytest.raises(StorageError, match=r"rows of shard .*/b were deleted"):
        dataset.publish()
    dataset.publish(rebuild=True)
    assert _count_rows(dataset) == {"a": 5, "b": 4}


def test_rewriting_a_file_does_not_bring_deleted_rows_back(dataset: Dataset) -> None:
    _delete_rows(dataset, "b", 4)
    assert _count_rows(dataset) == {"a": 5}
    dataset.label(a=3, remove=["b"])
    done = dataset.publish()
    assert (len(done.replaced), len(done.removed)) == (1, 0)
    assert _count_rows(dataset) == {"a": 3}
