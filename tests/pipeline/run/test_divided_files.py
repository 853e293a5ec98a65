"""Runs over large files that are several shards: at any time, each row is in one prediction file at most."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.commit import LeaseLostError, PredictionWriter, Progress
from pipeline.config import Config, Selection
from pipeline.run import PreparedRun, RunResult, label, plan_run, rebuild, streaming
from pipeline.storage import Storage, StorageError
from tests.makers import make_image, make_parquet, make_tar
from tests.runs import run_config

COUNT = 24
WHOLE = "read.split_bytes=null"


def write(root: Path, format: str, seed: int = 0, count: int = COUNT) -> int:
    """Writes an input file; returns its size in bytes."""
    images = [make_image(seed + i) for i in range(count)]
    data = make_parquet({"image": images}, row_group_size=2)
    if format == "tar":
        data = make_tar([(f"{i:09d}.jpg", image) for i, image in enumerate(images)])
    Storage().write(f"{root}/in/x.{format}", data)
    return len(data)


def rows(root: Path) -> list[dict[str, Any]]:
    found = []
    for info in Storage().list(f"{root}/out"):
        if "/predictions/" in info.uri:
            found += pq.read_table(io.BytesIO(Storage().read(info.uri))).to_pylist()
    return sorted(found, key=lambda row: row["key"])


def keys(root: Path) -> list[str]:
    return [row["key"] for row in rows(root)]


def split(size: int, count: int) -> str:
    return f"read.split_bytes={size // count}"


def run(root: Path, *fields: str, selection: Selection | None = None) -> RunResult:
    return label(run_config(root, "read.chunk_images=3", *fields), selection or Selection())


@contextmanager
def interrupted(*functions: str) -> Iterator[None]:
    """A run in this block is interrupted at the first call of one of these functions."""

    def die(*args: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        for function in functions:
            patch.setattr(function, die)
        with pytest.raises(KeyboardInterrupt):
            yield


@pytest.fixture(autouse=True)
def _check_each_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks after each write and removal of a prediction file that no row is in two files."""
    for name in ("update", "delete"):
        change = getattr(Storage, name)

        def checked(storage: Storage, uri: str, *args: Any, change: Any = change) -> Any:
            result = change(storage, uri, *args)
            if "/predictions/" in uri:
                assert len(keys(tmp_path)) == len({*keys(tmp_path)})
            return result

        monkeypatch.setattr(Storage, name, checked)
    # One write at a time, so that the check sees each state.
    monkeypatch.setattr("pipeline.commit.committer.MAX_CONCURRENT_WRITES", 1)
    monkeypatch.setattr("pipeline.run.cleanup.map_in_threads", map)


@pytest.fixture(params=["parquet", "tar"])
def format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


ALL = [f"{i:09d}" for i in range(COUNT)]


def test_every_row_is_labeled_once_with_position_in_file(tmp_path: Path, format: str) -> None:
    size = write(tmp_path, format)
    result = run(tmp_path, split(size, 5))
    assert result.totals.shards >= 3
    divided = rows(tmp_path)
    assert [row["key"] for row in divided] == ALL
    assert {row["uri"] for row in divided} == {f"{tmp_path}/in/x.{format}"}
    assert all(path.is_file() for path in (tmp_path / "out").rglob("*.parquet"))
    again = run(tmp_path, split(size, 5))
    assert again.plan.shards == []
    rebuild(result.job.partition)
    assert run(tmp_path, split(size, 5)).plan.shards == []
    run(tmp_path, WHOLE)
    same = ("key", "label", "uri", "version", "offset", "size")
    assert [[row[name] for name in same] for row in rows(tmp_path)] == [
        [row[name] for name in same] for row in divided
    ]


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 1), (2, 5), (5, 2), (3, 4)])
def test_changed_division_replaces_the_labels(tmp_path: Path, format: str, before: int, after: int) -> None:
    size = write(tmp_path, format)
    run(tmp_path, split(size, before))
    result = run(tmp_path, split(size, after))
    assert result.is_complete
    assert keys(tmp_path) == ALL
    manifest = pq.read_table(io.BytesIO(Storage().read(result.job.partition.manifest.uri))).to_pylist()
    assert sum(row["rows"] for row in manifest) == COUNT
    assert not any(row["deleted"] for row in manifest)
    assert run(tmp_path, split(size, after)).plan.shards == []


@pytest.mark.parametrize("count", [COUNT + 6, COUNT, 8])
def test_changed_file_replaces_all_labels_of_its_parts(tmp_path: Path, format: str, count: int) -> None:
    size = write(tmp_path, format)
    run(tmp_path, split(size, 4))
    write(tmp_path, format, seed=500, count=count)
    assert run(tmp_path, split(size, 4)).is_complete
    assert keys(tmp_path) == [f"{i:09d}" for i in range(count)]
    assert len({row["version"] for row in rows(tmp_path)}) == 1


def test_killed_run_resumes_with_the_parts_that_are_missing(
    tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    size, written = write(tmp_path, format), 0
    run(tmp_path, split(size, 2))
    commit = PredictionWriter.commit

    def stop(writer: PredictionWriter, *args: Any) -> Any:
        nonlocal written
        written += 1
        if written > 2:
            raise StorageError("x", "the process is killed")
        return commit(writer, *args)

    with monkeypatch.context() as patch:
        patch.setattr(PredictionWriter, "commit", stop)
        with pytest.raises(StorageError, match="killed"):
            run(tmp_path, split(size, 6))
    done = len(keys(tmp_path))
    assert 0 < done < COUNT
    prepared = plan_run(run_config(tmp_path, split(size, 6)))
    assert 0 < len(prepared.plan.shards) < 6
    result = run(tmp_path, split(size, 6))
    assert result.totals.images == COUNT - done
    assert keys(tmp_path) == ALL


def test_run_that_dies_after_removing_labels_is_continued(tmp_path: Path, format: str) -> None:
    size = write(tmp_path, format)
    run(tmp_path, split(size, 4))
    with interrupted("pipeline.commit.Manifest.update", "pipeline.run.labeling.label_shards"):
        run(tmp_path, split(size, 3))
    assert len(keys(tmp_path)) < COUNT
    assert run(tmp_path, WHOLE).is_complete
    assert keys(tmp_path) == ALL


def test_deleted_file_is_pruned_with_all_parts(tmp_path: Path, format: str) -> None:
    size = write(tmp_path, format)
    Storage().write(f"{tmp_path}/in/y.tar", make_tar({"y.jpg": make_image()}))
    run(tmp_path, split(size, 4))
    (tmp_path / "in" / f"x.{format}").unlink()
    result = run(tmp_path, split(size, 4))
    assert len(result.plan.deleted) >= 3
    assert len(keys(tmp_path)) == COUNT + 1
    run(tmp_path, split(size, 4), selection=Selection(prune=True))
    assert keys(tmp_path) == ["y"]


@pytest.mark.parametrize("verifies", [True, False])
def test_overlapping_run_with_another_division_leaves_each_row_once(
    tmp_path: Path, format: str, verifies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    size, overlapped = write(tmp_path, format), False
    if not verifies:  # as if the run had paused between the check of its lease and the write
        monkeypatch.undo()

        def unchecked(*args: Any, before_write: object, **options: Any) -> PredictionWriter:
            return PredictionWriter(*args, **options)

        monkeypatch.setattr(streaming, "PredictionWriter", unchecked)

    def overlap(progress: Progress, prepared: PreparedRun) -> None:
        nonlocal overlapped
        if overlapped:
            return
        overlapped = True
        lease = Path(prepared.job.partition.uri, "lease.json")
        content = json.loads(lease.read_text())
        lease.write_text(json.dumps(content | {"run": "other", "state": "released"}))
        assert run(tmp_path, split(size, 3)).is_complete

    with pytest.raises(LeaseLostError):
        label(run_config(tmp_path, "read.chunk_images=3", split(size, 6)), on_progress=overlap)
    assert keys(tmp_path) == ALL
    assert run(tmp_path, split(size, 3)).plan.shards == []


def test_input_is_listed_once_with_divided_and_whole_files(
    tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = write(tmp_path, format)
    Storage().write(f"{tmp_path}/in/y.tar", make_tar({"y.jpg": make_image()}))

    def list_again(config: Config) -> Any:
        raise AssertionError("no run overlaps")

    for module in ("cleanup", "streaming"):
        monkeypatch.setattr(f"pipeline.run.{module}.list_input", list_again)
    assert run(tmp_path, split(size, 3)).is_complete
    assert keys(tmp_path) == [*ALL, "y"]


def test_run_that_dies_before_it_carries_columns_keeps_all_labels(tmp_path: Path, format: str) -> None:
    size = write(tmp_path, format)
    run(tmp_path, split(size, 4))
    with interrupted("pipeline.run.labeling.label_shards"):
        run(tmp_path, split(size, 4), "input.carry=[id]")
    assert keys(tmp_path) == ALL
    assert run(tmp_path, split(size, 4), "input.carry=[id]").totals.images == COUNT
    assert keys(tmp_path) == ALL
    assert "id" in rows(tmp_path)[0]


@pytest.mark.parametrize("length", [10, None])
def test_parts_keep_their_labels_while_the_file_is_unreadable(
    tmp_path: Path, format: str, length: int | None
) -> None:
    size, path = write(tmp_path, format), tmp_path / "in" / f"x.{format}"
    Storage().write(f"{tmp_path}/in/y.tar", make_tar({"y.jpg": make_image()}))
    run(tmp_path, split(size, 4))
    before = rows(tmp_path)
    path.write_bytes(b"x" * (length or size))
    result = run(tmp_path, split(size, 4))
    assert len(result.totals.unreadable) == 1
    for selection in (Selection(prune=True), Selection(retry_errors=True)):
        result = run(tmp_path, split(size, 4), selection=selection)
        assert not result.is_complete
        assert result.plan.deleted == {}
        assert rows(tmp_path) == before
    rebuild(result.job.partition)
    write(tmp_path, format, seed=500, count=2)
    result = run(tmp_path, WHOLE)
    assert result.is_complete
    assert keys(tmp_path) == [*ALL[:2], "y"]
    manifest = pq.read_table(io.BytesIO(Storage().read(result.job.partition.manifest.uri)))
    assert manifest["rows"].to_pylist() == [2, 1]
