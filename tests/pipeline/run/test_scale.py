"""Planning of many shards: a correct plan, in memory that stays small."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.commit import Manifest, ManifestRow, reconcile
from pipeline.config import LABEL_NEW
from pipeline.read import ShardListing
from pipeline.run import ShardState
from pipeline.run.planning import plan
from pipeline.storage import ObjectInfo, Storage
from tests.measuring import measure

ROOT = "bucket/dataset/train"


def name(number: int) -> str:
    return f"{ROOT}/part-{number // 1000:04d}/shard-{number:07d}.tar"


def version(number: int, change: int = 0) -> str:
    return f"{number + change:032x}"


def row(number: int) -> ManifestRow:
    output = f"predictions/s3/{name(number)}.parquet"
    return ManifestRow(
        uri=f"s3://{name(number)}",
        version=version(number),
        format="webdataset",
        size=10**9,
        rows=1000,
        errors=0,
        output=output,
        output_version=version(number, 1),
        run="20260102T030405Z-012345",
    )


def plan_many(folder: str, count: int) -> tuple[dict[ShardState, int], int]:
    """Plans an input of `count` labeled shards, of which 1 % have changed, and 10 % more new shards."""
    entries = Manifest(Storage(), folder, num_classes=1000).entries()
    listed = range(count + count // 10)
    objects = (ObjectInfo(f"s3://{name(n)}", 10**9, version(n, 0 if n % 100 else 7)) for n in listed)
    outputs = f"{folder}/predictions/s3"
    files = (ObjectInfo(f"{outputs}/{name(n)}.parquet", 10**5, version(n, 1)) for n in range(count))
    assert reconcile(files, entries, folder) == ([], [])
    found = plan(ShardListing(objects, f"s3://{ROOT}"), entries, LABEL_NEW)
    return dict(found.states), len(found.shards)


@pytest.mark.slow
def test_planning_takes_little_memory_and_time_per_shard(tmp_path: Path) -> None:
    count = 50_000
    Manifest(Storage(), str(tmp_path), num_classes=1000).replace(lambda: map(row, range(count)))
    measured = measure(plan_many, str(tmp_path), count)
    states, to_label = measured.outcome
    assert states == {
        ShardState.NEW: 5000,
        ShardState.CHANGED: 500,
        ShardState.DONE: 49_500,
        ShardState.DELETED: 0,
    }
    assert to_label == 5500
    assert measured.peak < count * 4000
    assert measured.seconds < 30
