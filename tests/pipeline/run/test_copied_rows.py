"""Changed groups of image files: only new and changed images are read, and the other rows are copied."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.commit import LeaseLostError, lease
from pipeline.config import Selection
from pipeline.report import read_gallery
from pipeline.run import RunResult, label, plan_run, rebuild, streaming
from pipeline.run.copied_rows import read_source
from pipeline.storage import Storage
from tests.makers import make_image
from tests.runs import run_config, small_groups


class Folder:
    """A folder of images and its labels; records the images that a run reads."""

    def __init__(self, root: str, patch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.read: list[str] = []
        read = Storage.read

        def recording(storage: Storage, uri: str, *args: Any, **options: Any) -> bytes:
            if uri.endswith(".png"):
                self.read.append(uri.rpartition("/")[2].removesuffix(".png"))
            return read(storage, uri, *args, **options)

        patch.setattr(Storage, "read", recording)

    def write(self, *names: str, seed: int = 0, data: bytes | None = None) -> None:
        for name in names:
            content = make_image(sum(name.encode()) + seed) if data is None else data
            Storage().write(f"{self.root}/in/{name}.png", content)

    def label(self, *fields: str, selection: Selection | None = None) -> RunResult:
        self.read.clear()
        return label(run_config(self.root, "classify.batch_size=1", *fields), selection or Selection())

    def rows(self) -> list[dict[str, Any]]:
        storage, tables = Storage(), []
        for info in storage.list(f"{self.root}/out"):
            if "/predictions/" in info.uri:
                tables.append(pq.read_table(io.BytesIO(storage.read(info.uri))))
        return sorted((row for table in tables for row in table.to_pylist()), key=lambda row: row["uri"])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    found = Folder(str(tmp_path), monkeypatch)
    found.write("a", "b", "c", "d")
    found.write("e", data=b"no image")
    return found


def relabeled(folder: Folder) -> list[dict[str, Any]]:
    """The rows when everything is labeled again, without any copy."""
    folder.label(selection=Selection(relabel=True, prune=True))
    return folder.rows()


def test_added_image_is_the_only_image_that_is_read(folder: Folder) -> None:
    folder.label()
    assert sorted(folder.read) == ["a", "b", "c", "d", "e"]
    folder.write("bb")
    result = folder.label()
    assert folder.read == ["bb"]
    assert result.plan.describe() == "6 images: 6 changed; 1 to label (5 unchanged are copied)"
    assert result.totals.images == 6
    assert [row["index"] for row in folder.rows()] == list(range(6))
    copied = folder.rows()
    assert copied == relabeled(folder)


def test_replaced_and_deleted_images_change_only_their_rows(folder: Folder) -> None:
    folder.label()
    before = folder.rows()
    folder.write("b", seed=7)
    Path(f"{folder.root}/in/c.png").unlink()
    folder.label()
    assert folder.read == ["b"]
    after = folder.rows()
    assert [row["key"] for row in after] == ["a.png", "b.png", "d.png", "e.png"]
    assert after[1]["version"] != before[1]["version"]
    assert after == relabeled(folder)


def test_deleted_image_needs_no_reading(folder: Folder) -> None:
    folder.label()
    Path(f"{folder.root}/in/a.png").unlink()
    folder.label()
    assert folder.read == []
    assert len(folder.rows()) == 4


def test_retry_of_errors_reads_only_error_rows(folder: Folder) -> None:
    folder.label()
    folder.label(selection=Selection(retry_errors=True))
    assert folder.read == ["e"]


def test_relabel_copies_nothing(folder: Folder) -> None:
    folder.label()
    folder.label(selection=Selection(relabel=True))
    assert sorted(folder.read) == ["a", "b", "c", "d", "e"]


def test_copied_error_rows_do_not_break_the_limit_on_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder(str(tmp_path), monkeypatch)
    folder.write("a", "b", data=b"no image")
    folder.write("c", "d")
    assert folder.label().broken_failure_limits == []
    folder.write("e")
    result = folder.label()
    assert result.totals.errors == 2
    assert result.broken_failure_limits == []


@pytest.mark.parametrize("count", [1, 3])
def test_split_and_merged_groups_copy_the_rows_of_unchanged_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """With groups of four images on average, every few added or deleted images change the groups."""
    small_groups(monkeypatch)
    folder = Folder(str(tmp_path), monkeypatch)
    names = [f"{number:02d}" for number in range(40)]
    folder.write(*names[1::2])
    folder.label()
    for start in range(0, 20, count):
        added = names[2 * start : 2 * (start + count) : 2]
        folder.write(*added)
        folder.label()
        assert sorted(folder.read) == added
    for start in range(0, 20, count):
        for name in names[2 * start : 2 * (start + count) : 2]:
            Path(f"{folder.root}/in/{name}.png").unlink()
        folder.label()
        assert folder.read == []
    rows = folder.rows()
    assert [row["key"] for row in rows] == [f"{name}.png" for name in names[1::2]]
    assert rows == relabeled(folder)


def test_gallery_keeps_thumbnails_of_copied_rows(folder: Folder) -> None:
    partition = folder.label().partition
    before = read_gallery(partition.storage, partition.uri)
    assert len(before) == 4
    folder.write("0")
    folder.label()
    after = read_gallery(partition.storage, partition.uri)
    rows = {row["index"]: row["key"] for row in folder.rows()}
    assert len(after) == 5
    assert all(rows[row["index"]] == row["key"] for row in after.to_pylist())


def test_rows_that_another_run_has_replaced_end_the_run_with_a_lost_lease(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.label()
    folder.write("bb")

    def read_after_other_run(*args: Any) -> pa.Table:
        monkeypatch.setattr(streaming, "read_source", read_source)
        folder.write("cc")
        folder.label()
        return read_source(*args)

    monkeypatch.setattr(streaming, "read_source", read_after_other_run)
    monkeypatch.setattr(lease.LeaseContent, "is_live", False)
    with pytest.raises(LeaseLostError, match="run the same command again"):
        folder.label()
    assert len(folder.rows()) == 7


def test_rebuild_after_copying_gives_the_same_statistics(folder: Folder) -> None:
    partition = folder.label().partition
    folder.write("bb")
    folder.label()
    before = Storage().read(f"{partition.uri}/class_stats.parquet")
    rebuild(partition)
    assert Storage().read(f"{partition.uri}/class_stats.parquet") == before


def test_plan_reports_images_to_copy_without_labeling(folder: Folder) -> None:
    folder.label()
    folder.write("x")
    plan = plan_run(run_config(folder.root, "classify.batch_size=1")).plan
    assert (plan.images, plan.copied_images) == (1, 5)


def test_rows_are_copied_in_a_bucket(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder(bucket, monkeypatch)
    folder.write("a", "b")
    folder.label()
    folder.write("c")
    folder.label()
    assert folder.read == ["c"]
    assert folder.rows() == relabeled(folder)


def test_copied_rows_are_images_of_the_shard_for_the_gate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder(str(tmp_path), monkeypatch)
    folder.write(*(f"{number:02d}" for number in range(19)))
    folder.write("a", data=b"no image")
    folder.label()
    folder.write("b", "c", data=b"no image")
    assert folder.label("gate.max_error_fraction=0.1").broken_failure_limits == []
    assert folder.label("gate.max_error_fraction=0.1").broken_failure_limits == []  # nothing to label
    [limit] = folder.label("gate.max_error_fraction=0.05").broken_failure_limits
    assert limit.startswith("2 of 22 images (9.1%) failed")


def test_copied_decode_error_keeps_its_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder(str(tmp_path), monkeypatch)
    folder.write("Bag/a", data=b"no image")
    folder.write("Bag/b")
    folder.label("input.label_from=folder")
    folder.write("Bag/c")
    folder.label("input.label_from=folder")
    assert folder.read == ["c"]
    assert [row["target_id"] for row in folder.rows()] == [8, 8, 8]


def test_error_of_a_row_is_found_again_after_the_row_is_corrected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder(str(tmp_path), monkeypatch)
    folder.write("a", "b")
    table, fields = tmp_path / "t.csv", (f"input.uri={tmp_path}/t.csv", "input.format=table")
    fields += ("input.uri_column=uri", "input.key_column=id", "input.check_objects=never")

    def label_rows(*ids: str) -> list[tuple[str, str | None]]:
        rows = [f"{key},in/{name}.png" for key, name in zip(ids, "aab", strict=True)]
        table.write_text("\n".join(["id,uri", *rows]) + "\n")
        folder.label(*fields)
        return sorted((row["key"], row["error"] and row["error"].partition(":")[0]) for row in folder.rows())

    long = "x" * 5000
    assert [error for _, error in label_rows("1", long, "3")] == [None, None, "invalid key"]
    assert label_rows("1", "2", "3") == [("1", None), ("2", None), ("3", None)]
    assert [error for _, error in label_rows(long, "2", "3")] == [None, None, "invalid key"]
