from __future__ import annotations

import tracemalloc

import pyarrow as pa
import pytest

from pipeline.statistics import ErrorCauses
from pipeline.statistics.causes import MAX_CAUSES, MAX_SAMPLES, OTHER_CAUSES, normalize_errors


def samples(*errors: str | None) -> pa.Table:
    return pa.table({"key": [f"k{i}" for i in range(len(errors))], "error": pa.array(errors, pa.string())})


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (
            "dimensions too large: 60000 x 70000 pixels, more than 178",
            "dimensions too large: N x N pixels, more than N",
        ),
        (r"unsupported format: starts with b'<ht\'ml 4'", "unsupported format: starts with '...'"),
        ("'boot-ish' is not a class", "'...' is not a class"),
        ("empty image: the file has no bytes", "empty image: the file has no bytes"),
    ],
)
def test_cause_has_placeholders_for_numbers_and_quotes(error: str, cause: str) -> None:
    assert normalize_errors(pa.array([error])).to_pylist() == [cause]


def test_causes_are_sorted_by_count() -> None:
    causes = ErrorCauses()
    causes.add("s3://b/a.tar", samples("3 bytes", None, "no image", *(f"{i} bytes" for i in range(20))))
    other = ErrorCauses()
    other.add("s3://b/b.tar", samples("no image", "9 bytes"))
    causes.merge(other)
    first, second = causes.to_record()
    assert (first["cause"], first["count"]) == ("N bytes", 22)
    assert (second["cause"], second["count"]) == ("no image", 2)
    assert first["samples"][0] == {"shard": "s3://b/a.tar", "key": "k0", "error": "3 bytes"}
    assert len(first["samples"]) == MAX_SAMPLES
    assert [sample["shard"] for sample in second["samples"]] == ["s3://b/a.tar", "s3://b/b.tar"]


def test_memory_does_not_grow_with_the_number_of_errors() -> None:
    table = samples(*["empty image: the file has no bytes"] * 60_000)
    unmatched = table.rename_columns(["key", "unmatched"])
    causes = ErrorCauses()
    tracemalloc.start()
    causes.add("s3://b/a.tar", table)
    causes.add_unmatched("s3://b/a.tar", unmatched)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert causes.count == 120_000
    assert peak < 15 * 1024**2


def test_number_of_causes_is_limited() -> None:
    causes = ErrorCauses()
    causes.add("s3://b/a.tar", samples(*("x" * i for i in range(1, 200))))
    record = causes.to_record()
    assert len(record) == MAX_CAUSES + 1
    assert record[0]["cause"] == OTHER_CAUSES
    assert sum(cause["count"] for cause in record) == 199
