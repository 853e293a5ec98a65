from __future__ import annotations

import random
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.commit import Manifest, ManifestRow, ManifestWriter
from pipeline.predictions import Footer, encode_predictions, prediction_schema, serialize_table
from pipeline.statistics import ClassStatistics
from pipeline.storage import Storage, StorageError, access
from tests.partitions import manifest_rows

CLASSES = 3


def statistics(seed: int) -> ClassStatistics:
    stats = ClassStatistics.empty(CLASSES)
    stats.count[seed % CLASSES] = seed + 1
    stats.score_sum[seed % CLASSES] = 1000 * seed
    stats.score_histogram[seed % CLASSES, seed % 100] = seed + 1
    stats.score_min[seed % CLASSES] = stats.score_max[seed % CLASSES] = 1 / (seed + 1)
    return stats


def row(number: int, **fields: object) -> ManifestRow:
    values: dict[str, object] = {
        "uri": f"s3://b/{number:05d}.tar",
        "version": f"v{number}",
        "format": "webdataset",
        "size": 10,
        "rows": number,
        "errors": 0,
        "duplicate_keys": 0,
        "unmatched_targets": 0,
        "output": f"predictions/s3/b/{number:05d}.tar.parquet",
        "output_version": f"etag{number}",
        "run": "run-1",
        "committed_at": datetime(2026, 1, 2, 3, 4, 5, 678000, UTC),
        "statistics": serialize_table(statistics(number).to_partial()),
    }
    return ManifestRow(**values | fields)  # type: ignore[arg-type]


def by_uri(*rows: ManifestRow) -> dict[str, ManifestRow]:
    return {row.uri: row for row in rows}


def make(folder: Path, **limits: int) -> Manifest:
    return Manifest(Storage(), str(folder), CLASSES, **limits)


@pytest.fixture(params=[2000, 3], ids=["one row group", "row groups of three"])
def manifest(request: pytest.FixtureRequest, tmp_path: Path) -> Manifest:
    return make(tmp_path, group_rows=request.param)


def test_statistics_of_a_run_cover_the_shards_with_its_current_labels(manifest: Manifest) -> None:
    manifest.update(by_uri(row(1), row(2, run="run-2"), row(3, run=None), row(4, run="run-2")))
    manifest.update(by_uri(row(4, run="run-3")))
    np.testing.assert_array_equal(manifest.fold_statistics("run-2").count, statistics(2).count)
    assert manifest.fold_statistics().count.sum() == 2 + 3 + 4 + 5
    assert manifest.fold_statistics("run-9").count.sum() == 0


def test_rows_are_read_as_written_and_sorted(manifest: Manifest) -> None:
    assert not manifest.exists()
    assert manifest_rows(manifest) == []
    rows = [row(i) for i in range(10)]
    shuffled = random.Random(0).sample(rows, len(rows))
    manifest.update(by_uri(*shuffled))
    assert manifest.exists()
    assert manifest_rows(manifest) == rows
    assert manifest.read(["uri", "rows"]).to_pylist() == [{"uri": r.uri, "rows": r.rows} for r in rows]


def test_update_changes_some_rows_and_keeps_the_others(manifest: Manifest) -> None:
    manifest.update(by_uri(*(row(i) for i in range(0, 20, 2))))
    newer = row(4, version="newer", rows=99)
    states, removed = by_uri(row(8, deleted=True)), [row(6).uri, row(18).uri]
    manifest.update(by_uri(newer, row(7), row(30), row(1)), removed, states)
    expected = by_uri(*(row(i) for i in (0, 1, 2, 4, 7, 8, 10, 12, 14, 16, 30)))
    expected |= by_uri(newer, replace(row(8), deleted=True))
    assert manifest_rows(manifest) == list(expected.values())
    manifest.update({}, states=by_uri(row(8, rows=0, error="cut off")))
    assert {r.uri: r for r in manifest_rows(manifest)}[row(8).uri] == row(8, error="cut off")
    manifest.update({}, states=by_uri(row(50)))  # another writer has removed the row
    assert row(50).uri not in {r.uri for r in manifest_rows(manifest)}


def test_equal_rows_give_equal_bytes_in_any_order_of_updates(manifest: Manifest, tmp_path: Path) -> None:
    rows = [row(i) for i in range(11)]
    manifest.replace(lambda: rows)
    whole = Path(manifest.uri).read_bytes()
    Path(manifest.uri).unlink()
    for part in (rows[5:7], rows[:3], rows[7:], rows[3:5]):
        manifest.update(by_uri(*part))
    assert Path(manifest.uri).read_bytes() == whole


def test_read_failure_keeps_the_labels_of_an_earlier_version(manifest: Manifest) -> None:
    failed = ManifestRow(row(1).uri, error="cut off", failed_version="v9", run="run-2")
    never = ManifestRow(row(2).uri, error="cut off", failed_version="v9", run="run-2")
    manifest.update(by_uri(row(1)))
    manifest.update(by_uri(failed, never))
    assert manifest_rows(manifest) == [replace(row(1), error="cut off", failed_version="v9"), never]
    manifest.update(by_uri(row(1, version="v9"), row(2, version="v9")))
    assert [r.error for r in manifest_rows(manifest)] == [None, None]


def test_two_concurrent_writers_lose_no_rows(manifest: Manifest) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: manifest.update(by_uri(row(i))), range(24)))
    assert manifest_rows(manifest) == [row(i) for i in range(24)]


def test_read_restarts_after_a_concurrent_write(
    bucket: str, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access, "CHUNK_BYTES", 100)  # else the first request reads the whole manifest
    manifest = Manifest(storage, bucket, CLASSES, group_rows=3)
    manifest.update(by_uri(*(row(i) for i in range(9))))
    attempts: list[list[int]] = []

    def read_while_another_run_writes(tables: Iterable[pa.Table]) -> None:
        attempts.append([])
        for table in tables:
            attempts[-1].append(table.num_rows)
            if len(attempts) == 1:
                manifest.update(by_uri(row(9)))

    manifest._read(["uri"], read_while_another_run_writes)
    assert attempts == [[3], [3, 3, 3, 1]]


@pytest.mark.parametrize("limit", [10**9, 0], ids=["in the manifest", "in the footers"])
@pytest.mark.parametrize("group_rows", [2000, 3])
def test_statistics_are_folded_over_all_shards(tmp_path: Path, limit: int, group_rows: int) -> None:
    manifest = make(tmp_path, max_statistics=limit, group_rows=group_rows)
    expected = ClassStatistics.empty(CLASSES)
    for i in range(8):
        partial = statistics(i).to_partial()
        footer = Footer(row(i).uri, f"v{i}", "webdataset", 10, "f" * 64, i, 0, 0, 0, serialize_table(partial))
        content = encode_predictions(prediction_schema().empty_table(), footer)
        Storage().write(f"{tmp_path}/{row(i).output}", content)
        expected.add_partial(partial)
    manifest.update(
        by_uri(*(row(i) for i in range(8)), ManifestRow("s3://b/x", error="e", failed_version="v"))
    )
    assert (manifest.read(["statistics"])["statistics"].null_count == 9) == (limit == 0)
    assert manifest.fold_statistics().to_partial().equals(expected.to_partial())


def test_damaged_manifest_is_named(manifest: Manifest) -> None:
    Path(manifest.uri).write_bytes(b"PAR1 not Parquet")
    with pytest.raises(StorageError, match=r"manifest\.parquet: not a manifest"):
        manifest.read(["uri"])
    pa.parquet.write_table(pa.table({"uri": ["x"]}), manifest.uri)
    with pytest.raises(StorageError, match=r"manifest\.parquet: not a manifest: no column committed_at"):
        manifest_rows(manifest)


def test_writer_writes_periodically_and_at_the_end(manifest: Manifest) -> None:
    writer = ManifestWriter(manifest, interval=0.05)
    seen = set()
    for i in range(40):
        writer.add(row(i))
        time.sleep(0.02)
        seen.add(len(manifest_rows(manifest)))
    writer.flush()
    writer.close()
    assert manifest_rows(manifest) == [row(i) for i in range(40)]
    assert len(seen) > 1


def test_writers_of_several_drivers_write_less_often(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update takes 20 ms, so that one driver updates every 0.4 s, and each of ten drivers every 4 s."""
    updates, counts = list[float](), []

    def slow_update(*_: object) -> None:
        updates.append(time.monotonic())
        time.sleep(0.02)

    monkeypatch.setattr(Manifest, "update", slow_update)
    for drivers in (1, 10):
        updates.clear()
        writer, end = ManifestWriter(manifest, 0.01, drivers=drivers), time.monotonic() + 2
        while time.monotonic() < end:
            writer.add(row(1))
            time.sleep(0.01)
        writer.close()
        counts.append(len(updates))
    assert counts[0] > 2
    assert counts[1] == 1


def test_writer_that_cannot_write_raises(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    writer = ManifestWriter(Manifest(Storage(), str(tmp_path / "out"), CLASSES), interval=60)
    writer.add(row(1))
    with pytest.raises(StorageError, match=r"manifest\.parquet"):
        writer.flush()
    writer.close()
