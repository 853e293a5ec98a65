from __future__ import annotations

import io
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.classify import classify
from pipeline.commit import Committer, Manifest, ManifestRow, Partition, PredictionWriter, Progress
from pipeline.commit.prediction_files import IncompleteShardError
from pipeline.predictions import PredictionOptions, deserialize_table, prediction_schema, read_footer
from pipeline.read import Chunk, Shard, failed_chunk
from pipeline.statistics import ClassStatistics
from pipeline.storage import Storage, StorageError
from tests.pipeline.classify.test_classifying import LABELS, Backend

OPTIONS = PredictionOptions(LABELS, topk=2, embedding="float16", embedding_width=3)


def shards(count: int) -> list[Shard]:
    return [Shard(f"s3://bucket/{i:03d}.tar", f"v{i}", "webdataset", 100) for i in range(count)]


def result(shard: int, start: int, rows: int, total: int | None = None, error: str | None = None) -> Chunk:
    """A chunk from the classifier; every fourth sample is an error."""
    numbers = np.arange(start, start + rows)
    bad = numbers % 4 == 3
    pixels = np.zeros((rows, 4, 4, 3), np.uint8)
    pixels[:, 0, :, 0] = (numbers[:, None] * 7 + shard) * [1, 3, 5, 11] % 40
    samples = pa.table(
        {
            "key": [f"k{i}" for i in numbers],
            "target": pa.array(numbers % 4, pa.int32(), mask=numbers % 5 == 0),
            "unmatched": pa.array(
                [f"'{n}' is no class" if n % 5 == 0 else None for n in numbers], pa.string()
            ),
            "width": pa.array(numbers + 10, pa.int32()),
            "height": pa.array(numbers + 20, pa.int32()),
            "error": pa.array(["bad" if b else None for b in bad], pa.string()),
            **{name: pa.nulls(rows, pa.string()) for name in ("uri", "version")},
            **{name: pa.nulls(rows, pa.int64()) for name in ("offset", "size")},
        }
    )
    return classify(Chunk(shard, start, samples, total, error, pixels[~bad]), Backend(), OPTIONS)


def split(shard: int, total: int, size: int) -> list[Chunk]:
    """All chunks of a shard."""
    starts = range(0, total, size)
    return [
        result(shard, start, min(size, total - start), total if start == starts[-1] else None)
        for start in starts
    ]


@dataclass
class Committed:
    """A committer after its run, and its manifest rows by URI."""

    rows: dict[str, ManifestRow]
    committer: Committer


def writer(
    folder: Path, expected: Mapping[str, str], is_current: Callable[[Shard], bool]
) -> PredictionWriter:
    partition = Partition(Storage(), str(folder), LABELS)
    return PredictionWriter(partition, "f" * 64, OPTIONS, "run-1", expected, is_current)


def commit(
    folder: Path,
    plan: list[Shard],
    chunks: list[Chunk],
    *,
    finish: bool = True,
    expected: Mapping[str, str] | None = None,
    is_current: Callable[[Shard], bool] = lambda shard: True,
) -> Committed:
    rows: dict[str, ManifestRow] = {}
    committer = Committer(
        writer(folder, expected or {}, is_current), plan, lambda row: rows.update({row.uri: row})
    )
    with committer:
        for chunk in chunks:
            committer.add(chunk)
        if finish:
            committer.finish()
    return Committed(rows, committer)


def test_failed_retry_makes_the_shard_unreadable(tmp_path: Path) -> None:
    """One chunk has arrived; a node with the others is lost, and the shard changes before the retry."""
    failed = replace(result(0, 0, 0, 0, error="s3://bucket/000.tar: has changed"), pixels=None)
    committed = commit(tmp_path, shards(1), [result(0, 0, 4), failed])
    assert [row.error for row in committed.rows.values()] == ["s3://bucket/000.tar: has changed"]
    assert (committed.committer.progress().images, files(tmp_path)) == (0, {})


def test_chunk_that_killed_its_workers_makes_the_shard_unreadable(tmp_path: Path) -> None:
    chunks = split(0, 12, 4)
    chunks[1] = failed_chunk(chunks[1], "s3://bucket/000.tar: 4 workers died")
    committed = commit(tmp_path, shards(2), [*chunks, chunks[1], *split(1, 4, 4)])
    row = committed.rows["s3://bucket/000.tar"]
    assert (row.error, row.failed_version) == ("s3://bucket/000.tar: 4 workers died", None)
    assert [*files(tmp_path)] == ["predictions/s3/bucket/001.tar.parquet"]
    assert committed.committer.progress().images == 4


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_shard_becomes_one_file_with_the_contract_columns_in_order(tmp_path: Path) -> None:
    commit(tmp_path, shards(1), split(0, 10, 4))
    table = pq.read_table(tmp_path / "predictions/s3/bucket/000.tar.parquet")
    assert table.schema.remove_metadata().equals(prediction_schema("float16", 3))
    assert table["shard"].unique().to_pylist() == ["s3://bucket/000.tar"]
    assert table["index"].to_pylist() == list(range(10))
    assert table["key"].to_pylist() == [f"k{i}" for i in range(10)]
    assert table["target_id"].to_pylist() == [None if i % 5 == 0 else i % 4 for i in range(10)]
    assert table["width"].to_pylist() == list(range(10, 20))
    for row in table.to_pylist():
        bad = row["index"] % 4 == 3
        assert (row["error"] == "bad") == bad
        for name in ("label", "label_id", "score", "topk_label_ids", "topk_scores", "entropy", "embedding"):
            assert (row[name] is None) == bad


@pytest.mark.parametrize("seed", range(4))
def test_file_bytes_do_not_depend_on_the_chunks_or_their_order(tmp_path: Path, seed: int) -> None:
    plan = shards(3)
    commit(tmp_path / "whole", plan, [c for i in range(3) for c in split(i, 23, 100)])
    chunks = [c for i in range(3) for c in split(i, 23, 2 + seed)]
    random.Random(seed).shuffle(chunks)
    commit(tmp_path / "parts", plan, chunks)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_progress_reports_the_fraction_of_bytes_processed(tmp_path: Path) -> None:
    plan = [replace(shard, size=1000 * (number + 1)) for number, shard in enumerate(shards(2))]
    first, last = split(0, 8, 4)
    other = replace(result(1, 0, 4), encoded_bytes=300)
    first = replace(first, encoded_bytes=400)
    for chunks, fraction in (
        ([], 0),
        ([first], 0.4 / 3),
        ([first, other], 0.7 / 3),
        ([first, other, last], 1.3 / 3),
    ):
        progress = commit(tmp_path, plan, chunks, finish=False).committer.progress()
        assert progress.fraction == pytest.approx(fraction)


def test_log_names_run_shard_and_key_of_error_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    chunks = split(0, 40, 40)
    keys = pa.array([f"k{i}\n\x1b[31m" for i in range(40)])
    samples = chunks[0].samples
    chunks = [replace(chunks[0], samples=samples.set_column(samples.column_names.index("key"), "key", keys))]
    commit(tmp_path, shards(1), chunks)
    assert [record.getMessage() for record in caplog.records] == [
        *(
            f"run run-1: shard 's3://bucket/000.tar', sample {i}, key 'k{i}\\n\\x1b[31m': bad"
            for i in (3, 7, 11)
        ),
        "run run-1: shard 's3://bucket/000.tar': 7 more error rows",
    ]


def test_duplicate_chunk_counts_once(tmp_path: Path) -> None:
    plan = shards(2)
    chunks = split(0, 10, 4) + split(1, 6, 4)
    commit(tmp_path / "once", plan, chunks)
    again = commit(tmp_path / "twice", plan, [c for chunk in chunks for c in (chunk, chunk)] + chunks)
    assert files(tmp_path / "twice") == files(tmp_path / "once")
    assert again.committer.progress().images == 16


def test_incomplete_shard_is_not_visible(tmp_path: Path) -> None:
    plan = shards(2)
    commit(tmp_path, plan, split(0, 10, 4)[1:] + split(1, 6, 4), finish=False)
    assert list(files(tmp_path)) == ["predictions/s3/bucket/001.tar.parquet"]


def test_incomplete_shard_at_the_end_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(IncompleteShardError, match=r"s3://bucket/001\.tar: 2 of 6 samples"):
        commit(tmp_path, shards(2), split(0, 10, 4) + split(1, 6, 4)[1:])


def test_shard_without_results_at_the_end_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(IncompleteShardError, match=r"001\.tar: 0 of an unknown number of samples"):
        commit(tmp_path, shards(2), split(0, 10, 4))


def test_empty_shard_has_a_file_without_rows(tmp_path: Path) -> None:
    committer = commit(tmp_path, shards(1), [result(0, 0, 0, total=0)])
    table = pq.read_table(tmp_path / "predictions/s3/bucket/000.tar.parquet")
    assert table.num_rows == 0
    assert table.schema.remove_metadata().equals(prediction_schema("float16", 3))
    assert committer.rows["s3://bucket/000.tar"].rows == 0


def test_unreadable_shard_has_a_manifest_row_and_no_file(tmp_path: Path) -> None:
    error = "s3://bucket/000.tar: truncated"
    chunks = [result(0, 0, 4), result(0, 4, 2, total=6, error=error)]
    for order in (chunks, chunks[::-1]):
        committer = commit(tmp_path, shards(1), order)
        row = committer.rows["s3://bucket/000.tar"]
        assert (row.error, row.rows, row.output, row.statistics) == (error, None, None, None)
        assert files(tmp_path) == {}
        assert committer.committer.progress() == Progress(images=0, errors=0, shards=1, fraction=1.0)


def test_footer_has_the_labeled_version_and_statistics(tmp_path: Path) -> None:
    committer = commit(tmp_path, shards(1), split(0, 30, 7))
    content = (tmp_path / "predictions/s3/bucket/000.tar.parquet").read_bytes()
    footer = read_footer("file", io.BytesIO(content))
    stats = ClassStatistics.empty(len(LABELS))
    stats.add_partial(deserialize_table(footer.statistics))
    assert (footer.shard, footer.version) == ("s3://bucket/000.tar", "v0")
    assert (footer.fingerprint, footer.rows, footer.errors) == ("f" * 64, 30, 7)
    expected = ClassStatistics.from_predictions(pq.read_table(io.BytesIO(content)), len(LABELS))
    manifest = Manifest(Storage(), str(tmp_path), len(LABELS))
    manifest.update(committer.rows)
    folded = manifest.fold_statistics()
    assert stats.to_partial().equals(expected.to_partial())
    assert folded.to_partial().equals(expected.to_partial())


def test_other_parquet_file_is_not_a_prediction_file() -> None:
    out = io.BytesIO()
    pq.write_table(pa.table({"a": [1]}), out)
    with pytest.raises(StorageError, match=r"some\.parquet: not a prediction file"):
        read_footer("some.parquet", io.BytesIO(out.getvalue()))


def test_duplicate_keys_are_kept_and_counted(tmp_path: Path) -> None:
    chunk = result(0, 0, 5, total=5)
    keys = pa.array(["a", "b", "a", "a", "c"])
    chunk = Chunk(0, 0, chunk.samples.set_column(0, "key", keys), 5)
    row = commit(tmp_path, shards(1), [chunk]).rows["s3://bucket/000.tar"]
    assert (row.rows, row.duplicate_keys) == (5, 2)


def test_unwritable_output_raises_with_the_name_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "predictions").write_text("a file")
    with pytest.raises(StorageError, match=r"000\.tar\.parquet"):
        commit(tmp_path, shards(1), split(0, 4, 4))


def overwrite(folder: Path, plan: list[Shard], is_current: bool) -> Committed:
    """Commits a plan that does not expect the existing files."""
    return commit(folder, plan, split(0, 12, 5), is_current=lambda shard: is_current)


def test_second_write_of_a_shard_keeps_the_first_file(tmp_path: Path) -> None:
    plan = shards(1)
    first = commit(tmp_path, plan, split(0, 12, 4))
    content = files(tmp_path)
    second = overwrite(tmp_path, plan, is_current=True)
    assert files(tmp_path) == content
    [row], [other] = first.rows.values(), second.rows.values()
    assert replace(row, committed_at=None) == replace(other, committed_at=None)


def test_zombie_run_does_not_replace_labels_of_a_newer_version(tmp_path: Path) -> None:
    newer = [replace(shards(1)[0], version="newer")]
    commit(tmp_path, newer, split(0, 9, 4))
    content = files(tmp_path)
    zombie = overwrite(tmp_path, shards(1), is_current=False)
    assert files(tmp_path) == content
    assert [(row.version, row.rows) for row in zombie.rows.values()] == [("newer", 9)]


def test_current_version_replaces_labels_of_a_zombie_run(tmp_path: Path) -> None:
    commit(tmp_path, [replace(shards(1)[0], version="older")], split(0, 9, 4))
    done = overwrite(tmp_path, shards(1), is_current=True)
    assert [(row.version, row.rows) for row in done.rows.values()] == [("v0", 12)]
    assert pq.read_table(tmp_path / "predictions/s3/bucket/000.tar.parquet").num_rows == 12


def test_expected_file_that_was_removed_is_written(tmp_path: Path) -> None:
    done = commit(tmp_path, shards(1), split(0, 12, 5), expected={"s3://bucket/000.tar": "1-1"})
    assert [row.rows for row in done.rows.values()] == [12]


def test_committer_finishes_open_shards_and_rejects_new_ones(tmp_path: Path) -> None:
    rows: dict[str, ManifestRow] = {}
    prediction_writer = writer(tmp_path, {}, lambda shard: True)
    with Committer(prediction_writer, shards(2), lambda row: rows.update({row.uri: row})) as committer:
        first, *rest = split(0, 10, 4)
        committer.add(first)
        committer.accepts_new_shards = False
        for chunk in split(1, 6, 4) + rest:
            committer.add(chunk)
        assert committer.open_shards == 0
        committer.wait_for_writes()
    assert list(files(tmp_path)) == ["predictions/s3/bucket/000.tar.parquet"]
    assert list(rows) == ["s3://bucket/000.tar"]
    assert committer.totals.images == 10
