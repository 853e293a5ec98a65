"""Repeated and concurrent runs: what is labeled again, and what overlapping runs do to each other."""

from __future__ import annotations

import io
import json
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from jobs.local_s3 import LocalS3
from pipeline.commit import Lease, LeaseHeldError, LeaseLostError, Progress
from pipeline.commit import committer as committing
from pipeline.config import Config, ConfigError, Selection
from pipeline.predictions import prediction_path
from pipeline.report import read_gallery
from pipeline.run import (
    Job,
    PreparedRun,
    RunResult,
    ShardState,
    Stopped,
    label,
    labeling,
    make_job,
    plan_run,
    rebuild,
    streaming,
    summaries,
)
from pipeline.storage import ObjectInfo, Storage
from tests.fault_proxy import FaultProxy
from tests.makers import make_image, make_tar
from tests.partitions import manifest_rows
from tests.runs import run_config as config
from tests.runs import small_groups


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    small_groups(monkeypatch)


def write(root: str, name: str, seed: int, count: int = 12, bad: bool = False) -> None:
    members = [(f"{i}.jpg", make_image(seed * 100 + i)) for i in range(count)]
    members += [("bad.jpg", b"no image")] * bad
    Storage().write(f"{root}/in/{name}", make_tar(members))


def files(root: str, part: str = "/predictions/") -> dict[str, bytes]:
    storage = Storage()
    return {o.uri: storage.read(o.uri) for o in storage.list(f"{root}/out") if part in o.uri}


def keys(root: str) -> list[tuple[str, str]]:
    tables = [pq.read_table(io.BytesIO(data)) for data in files(root).values()]
    return [(row["shard"], row["key"]) for table in tables for row in table.to_pylist()]


def record(result: RunResult) -> dict[str, Any]:
    partition = result.job.partition
    return dict(json.loads(Storage().read(f"{partition.uri}/runs/{result.run}.json")))


def test_rerun_without_changes_starts_no_executor_and_writes_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = str(tmp_path)
    write(root, "a.tar", 1)
    label(config(root))
    kept = {path: path.stat() for path in (tmp_path / "out").rglob("*.parquet")}

    def fail(settings: object) -> None:
        raise AssertionError("an executor was opened")

    monkeypatch.setattr(streaming, "open_executor", fail)
    again = label(config(root))
    assert again.is_complete
    assert again.plan.states == {ShardState.DONE: 1, ShardState.DELETED: 0}
    assert {path: path.stat() for path in (tmp_path / "out").rglob("*.parquet")} == kept
    assert record(again)["status"] == "complete"


def test_rerun_labels_only_new_and_changed_shards(tmp_path: Path) -> None:
    root = str(tmp_path)
    for i in range(3):
        write(root, f"{i}.tar", i)
    first = label(config(root))
    assert first.totals.images == 36
    write(root, "1.tar", 9, count=5)
    write(root, "3.tar", 3)
    (tmp_path / "in" / "2.tar").unlink()
    plan = plan_run(config(root)).plan
    assert plan.states == {
        ShardState.DONE: 1,
        ShardState.CHANGED: 1,
        ShardState.NEW: 1,
        ShardState.DELETED: 1,
    }
    second = label(config(root))
    assert (second.totals.shards, second.totals.images) == (2, 17)
    assert second.statistics is not None
    assert int(second.statistics.count.sum()) == len(keys(root)) == len(set(keys(root))) == 12 + 5 + 12 + 12
    assert record(second)["plan"] == {"new": 1, "changed": 1, "done": 1, "deleted": 1, "to_label": 2}


def label_with_thumbnails(root: str) -> None:
    write(root, "0.tar", 0)
    partition = label(config(root)).partition
    assert len(read_gallery(partition.storage, partition.uri))


def test_gallery_is_removed_when_disabled(tmp_path: Path) -> None:
    root = str(tmp_path)
    label_with_thumbnails(root)
    write(root, "1.tar", 1)
    label(config(root, "report.gallery=0"))
    assert files(root, "/gallery.parquet") == {}


def test_gallery_is_removed_when_disabled_without_shards_to_label(tmp_path: Path) -> None:
    root = str(tmp_path)
    label_with_thumbnails(root)
    [page] = files(root, "/report.html").values()
    assert b"data:image/jpeg" in page
    label(config(root, "report.gallery=0"))
    assert files(root, "/gallery.parquet") == {}
    [page] = files(root, "/report.html").values()
    assert b"data:image/jpeg" not in page


def test_labels_of_a_run_during_model_loading_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = str(tmp_path)
    write(root, "a.tar", 0)
    label(config(root))
    make = labeling.make_job

    def make_after_other_run(job: Config) -> Job:
        monkeypatch.setattr(labeling, "make_job", make)
        write(root, "b.tar", 1)
        label(config(root))
        return make(job)

    monkeypatch.setattr(labeling, "make_job", make_after_other_run)
    late = label(config(root), Selection(prune=True))
    assert late.plan.states == {ShardState.DONE: 2, ShardState.DELETED: 0}
    assert len(files(root)) == 2


def test_failed_report_does_not_fail_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: Any) -> str:
        raise RuntimeError("template error")

    root = str(tmp_path)
    write(root, "0.tar", 0)
    monkeypatch.setattr(summaries, "render_report", fail)
    assert label(config(root)).is_complete
    assert "the report could not be written" in caplog.text
    assert record(label(config(root)))["status"] == "complete"


def test_labels_of_a_deleted_shard_stay_until_pruned(tmp_path: Path) -> None:
    root = str(tmp_path)
    for i in range(2):
        write(root, f"{i}.tar", i)
    label(config(root))
    shard = tmp_path / "in" / "0.tar"
    content = shard.read_bytes()
    shard.unlink()
    label(config(root))
    assert len(files(root)) == 2
    manifest = plan_run(config(root)).job.partition.manifest
    assert [row.deleted for row in manifest_rows(manifest)] == [True, False]
    gallery = Storage(), plan_run(config(root)).job.partition.uri
    shards = {f"{root}/in/{i}.tar" for i in range(2)}
    assert {*read_gallery(*gallery)["shard"].to_pylist()} == shards
    pruned = label(config(root), selection=Selection(prune=True))
    assert len(pruned.plan.to_prune) == 1
    assert len(files(root)) == 1
    assert pruned.statistics is not None
    assert int(pruned.statistics.count.sum()) == 12
    assert {*read_gallery(*gallery)["shard"].to_pylist()} == {f"{root}/in/1.tar"}
    shard.write_bytes(content)
    restored = label(config(root))
    assert restored.totals.shards == 1
    assert len(files(root)) == 2


def test_retry_errors_reprocesses_failed_shards_and_error_rows(tmp_path: Path) -> None:
    root = str(tmp_path)
    write(root, "good.tar", 1)
    write(root, "bad.tar", 2, bad=True)
    (tmp_path / "in" / "cut.tar").write_bytes((tmp_path / "in" / "good.tar").read_bytes()[:2000])
    first = label(config(root))
    assert not first.is_complete
    second = label(config(root))
    assert (second.totals.shards, second.is_complete) == (0, False)
    third = label(config(root), selection=Selection(retry_errors=True))
    assert (third.totals.shards, third.totals.errors, third.is_complete) == (2, 1, False)
    write(root, "cut.tar", 3)
    fourth = label(config(root))
    assert (fourth.totals.shards, fourth.is_complete) == (1, True)


def test_shard_with_a_storage_failure_is_retried_by_the_next_run(
    bucket: str, s3_server: LocalS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.storage.retrying.MAX_PAUSE_S", 0.01)
    write(bucket, "a.tar", 1)
    write(bucket, "b.tar", 2)
    with FaultProxy(s3_server.endpoint_url) as proxy:
        is_b = lambda request: request.method == "GET" and request.path.endswith("/b.tar")  # noqa: E731
        proxy.next(*["slow_down"] * 50, where=is_b)
        first = label(config(bucket, f"storage.endpoint_url={proxy.url}"))
    [row] = first.totals.unreadable
    assert row.uri == f"{bucket}/in/b.tar"
    assert "SlowDown" in str(row.error)
    assert not first.is_complete
    second = label(config(bucket))
    assert (second.totals.shards, second.totals.images, second.is_complete) == (1, 12, True)


@pytest.mark.parametrize("kind", ["folder", "bucket"])
def test_manifest_and_statistics_are_rebuilt_from_prediction_files(
    kind: str, request: pytest.FixtureRequest
) -> None:
    root = str(request.getfixturevalue("tmp_path" if kind == "folder" else "bucket"))
    for i in range(3):
        write(root, f"{i}.tar", i, bad=i == 1)
    storage = Storage()
    label(config(root))
    cut = storage.read(f"{root}/in/0.tar")[:2000]
    storage.write(f"{root}/in/0.tar", cut)  # labeled, then replaced by an unreadable version
    storage.write(f"{root}/in/cut.tar", cut)
    storage.delete(f"{root}/in/2.tar")
    partition = label(config(root)).job.partition
    names = [f"{partition.uri}/{name}.parquet" for name in ("manifest", "class_stats")]
    before = [storage.read(name) for name in names]
    for name in names:
        storage.delete(name)
    rebuild(make_job(config(root)).partition)
    after = [storage.read(name) for name in names]
    assert after[1] == before[1]
    tables = [
        pq.read_table(io.BytesIO(data)).drop_columns(["run", "committed_at"])
        for data in (before[0], after[0])
    ]
    assert tables[0].equals(tables[1])
    assert [row["deleted"] for row in tables[0].to_pylist()] == [False, False, True, False]
    assert plan_run(config(root)).plan.shards == []


def test_run_without_a_manifest_finds_the_labeled_shards(tmp_path: Path) -> None:
    root = str(tmp_path)
    for i in range(3):
        write(root, f"{i}.tar", i)
    partition = label(config(root)).job.partition
    Path(partition.manifest.uri).unlink()
    write(root, "3.tar", 3)
    again = label(config(root))
    assert again.totals.shards == 1
    assert again.statistics is not None
    assert int(again.statistics.count.sum()) == 48


def test_second_run_is_rejected_while_another_is_active(tmp_path: Path) -> None:
    root = str(tmp_path)
    write(root, "a.tar", 1)
    errors = []

    def another(progress: Progress, prepared: PreparedRun) -> None:
        try:
            label(config(root))
        except LeaseHeldError as error:
            errors.append(str(error))

    label(config(root), on_progress=another)
    assert errors
    assert "labels this partition" in errors[0]
    assert plan_run(config(root)).plan.shards == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "bucket"])
def test_two_concurrent_runs_label_every_sample_exactly_once(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither run sees the other. The input changes during the first run, which ends as a zombie."""
    root = str(request.getfixturevalue("tmp_path" if kind == "folder" else "bucket"))
    for i in range(8):
        write(root, f"{i}.tar", i)
    monkeypatch.setattr(labeling.Lease, "acquire", lambda self, wait, on_wait: False)
    monkeypatch.setattr(labeling.Lease, "release", lambda self, clean_shutdown: None)
    halfway, changed = threading.Event(), threading.Event()
    failures = []

    def pause_zombie(progress: Progress, prepared: PreparedRun) -> None:
        if progress.images >= 50 and not halfway.is_set():
            halfway.set()
            changed.wait(300)

    def job(on_progress: Callable[[Progress, PreparedRun], None]) -> None:
        try:
            label(config(root), on_progress=on_progress)
        except Exception as error:
            failures.append(error)

    zombie = threading.Thread(target=job, args=(pause_zombie,))
    zombie.start()
    assert halfway.wait(300)
    for i in (1, 5, 7):
        write(root, f"{i}.tar", 50 + i, count=9)
    other = threading.Thread(target=job, args=(lambda progress, plan: changed.set(),))
    other.start()
    zombie.join()
    other.join()
    assert failures == []
    label(config(root))
    found = keys(root)
    assert len(found) == len(set(found)) == 5 * 12 + 3 * 9
    ended = files(root)
    alone = config(root, f"output.uri={root}/out/alone")
    storage = Storage()
    partition = label(alone).job.partition
    for uri, data in ended.items():
        assert storage.read(f"{partition.uri}/predictions/{uri.partition('/predictions/')[2]}") == data


def test_run_that_loses_its_lease_ends_with_an_error(tmp_path: Path) -> None:
    root = str(tmp_path)
    for i in range(4):
        write(root, f"{i}.tar", i)

    def take_over(progress: Progress, prepared: PreparedRun) -> None:
        lease = Path(prepared.job.partition.uri, "lease.json")
        lease.write_text(lease.read_text().replace('"run": "', '"run": "other-'))
        time.sleep(0.3)

    with pytest.raises(LeaseLostError):
        label(config(root, "run.lease_duration_s=0.3"), on_progress=take_over)
    assert label(config(root), wait=True).is_complete
    assert len(keys(root)) == len(set(keys(root))) == 48


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_run_finishes_open_shards(tmp_path: Path, number: int) -> None:
    root = str(tmp_path)
    for i in range(6):
        write(root, f"{i}.tar", i)

    seen = []

    def stop(progress: Progress, prepared: PreparedRun) -> None:
        if not seen:
            seen.append(progress)
            signal.raise_signal(number)

    with pytest.raises(Stopped):
        label(config(root), on_progress=stop)
    assert (seen[0].shards, seen[0].images < 12) == (0, True)
    prepared = plan_run(config(root))
    assert prepared.clean_shutdown
    assert prepared.plan.states == {ShardState.DONE: 1, ShardState.NEW: 5, ShardState.DELETED: 0}
    assert files(root, "/class_stats.parquet")
    [path] = files(root, "/runs/")
    status = json.loads(Path(path).read_text())
    assert (status["status"], status["counts"]["shards"]) == ("interrupted", 1)
    assert label(config(root)).totals.shards == 5


def test_stopped_run_abandons_open_shards_after_the_grace_period(tmp_path: Path) -> None:
    root = str(tmp_path)
    for i in range(3):
        write(root, f"{i}.tar", i)

    def stop(progress: Progress, prepared: PreparedRun) -> None:
        signal.raise_signal(signal.SIGTERM)
        time.sleep(30)

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        label(config(root, "run.grace_period_s=0.5"), on_progress=stop)
    assert time.monotonic() - start < 15
    assert files(root) == {}
    assert label(config(root)).totals.shards == 3


def test_occasional_storage_failures_are_retried(
    bucket: str, s3_server: LocalS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.storage.retrying.MAX_PAUSE_S", 0.05)
    for i in range(6):
        write(bucket, f"{i}.tar", i)
    with FaultProxy(s3_server.endpoint_url, seed=3, rate=0.5) as proxy:
        result = label(config(bucket, f"storage.endpoint_url={proxy.url}"))
        injected = dict(proxy.injected)
    assert (result.totals.images, result.is_complete) == (72, True)
    assert sum(injected.values()) > 10
    counted = record(result)["storage_retries"]
    assert sum(counted.values()) >= sum(injected.values()) / 2  # the record's own write is not counted
    assert {"SlowDown", "InternalError", "AccessDenied"} & counted.keys()
    with_failures = files(bucket)
    again = label(config(bucket), selection=Selection(relabel=True))
    assert again.totals.shards == 6
    assert files(bucket) == with_failures


def test_grown_input_keeps_the_manifest_of_each_partition_complete(
    tmp_path: Path,
) -> None:
    write(str(tmp_path), "a.tar", 1, count=10)
    one = label(config(str(tmp_path)))
    other = label(config(str(tmp_path), "output.topk=2"))
    assert one.job.partition.uri != other.job.partition.uri
    (tmp_path / "in" / "a.tar").unlink()
    write(str(tmp_path), "b.tar", 2, count=15)
    grown = label(config(str(tmp_path)))
    assert grown.totals.images == 15
    assert grown.statistics is not None
    assert int(grown.statistics.count.sum()) == 25
    assert len(files(str(tmp_path), f"{grown.job.partition.uri}/predictions")) == 2


def test_shard_that_becomes_unreadable_keeps_its_labels(
    tmp_path: Path,
) -> None:
    shard = tmp_path / "in" / "a.tar"
    write(str(tmp_path), "a.tar", 1, count=20)
    job = config(f"file://{tmp_path}")
    first = label(job)
    shard.write_bytes(shard.read_bytes()[:3000])
    second = label(job)
    assert [row.uri for row in second.totals.unreadable] == [str(shard)]
    assert first.statistics is not None
    assert second.statistics is not None
    assert int(second.statistics.count.sum()) == int(first.statistics.count.sum()) == 20
    [row] = pq.read_table(second.job.partition.manifest.uri).to_pylist()
    assert (row["rows"], row["run"]) == (20, first.run)
    assert "damaged" in row["error"]
    assert Path(second.job.partition.uri, row["output"]).is_file()


def test_manifest_has_the_commits_of_a_failed_run(
    tmp_path: Path,
) -> None:
    for i in range(3):
        write(str(tmp_path), f"{i}.tar", i)
    job = config(str(tmp_path))

    def interrupt(progress: Progress, prepared: PreparedRun) -> None:
        if progress.shards:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        label(job, on_progress=interrupt)
    partition = plan_run(job).job.partition
    manifest = pq.read_table(partition.manifest.uri).to_pylist()
    labeled = list(Path(partition.uri, "predictions").rglob("*.parquet"))
    assert len(manifest) == len(labeled) >= 1
    [record] = [json.loads(path.read_text()) for path in Path(partition.uri, "runs").iterdir()]
    assert record["status"] == "interrupted"
    assert record["counts"]["shards"] == len(labeled)


def write_images(root: str, *numbers: int) -> None:
    for i in numbers:
        Storage().write(f"{root}/in/sub/{i:03d}.jpg", make_image(i))


def image_uris(root: str) -> list[str]:
    """URIs of the images that have labels."""
    return sorted(f"{shard.rpartition('/')[0]}/{key}" for shard, key in keys(root))


def test_labels_of_an_old_group_from_a_zombie_run_are_removed(tmp_path: Path) -> None:
    root = str(tmp_path)
    write_images(root, *range(30))
    first = label(config(root))
    kept = files(root)
    groups = [shard.members for shard in first.plan.shards]
    first_image, *others = next(members for members in groups[1:] if len(members) > 2)
    assert others
    Storage().delete(first_image.uri)  # its name starts the group: the other images join the preceding group
    label(config(root))
    [removed] = kept.keys() - files(root).keys()
    Storage().write(removed, kept[removed])
    for _ in range(2):
        label(config(root))
        assert len(image_uris(root)) == len(set(image_uris(root))) == 29


def test_parent_folder_takes_over_image_files_of_a_subfolder(tmp_path: Path) -> None:
    root = str(tmp_path)
    write_images(root, *range(10))
    narrow = config(root, f"input.uri={root}/in/sub")
    label(narrow)
    label(config(root))
    assert len(image_uris(root)) == len(set(image_uris(root))) == 10
    label(narrow)  # the only images of the parent
    assert len(image_uris(root)) == len(set(image_uris(root))) == 10
    Storage().write(f"{root}/in/parent.jpg", make_image())
    label(config(root))
    with pytest.raises(ConfigError, match=r"in/sub selects some of the image files .* be labeled twice"):
        label(narrow)


def test_removed_prediction_files_are_rewritten(tmp_path: Path) -> None:
    root = str(tmp_path)
    for i in range(3):
        write(root, f"{i}.tar", i)
    label(config(root))
    Path(sorted(files(root))[1]).unlink()
    again = label(config(root))
    assert again.totals.shards == 1
    assert len(keys(root)) == 36
    assert again.statistics is not None
    assert int(again.statistics.count.sum()) == 36


def test_run_that_lost_its_lease_does_not_restore_manifest_rows(tmp_path: Path) -> None:
    """The shard is deleted, and another run prunes its labels, before the first run writes the manifest."""
    root = str(tmp_path)
    for i in range(4):
        write(root, f"{i}.tar", i)
    content = (tmp_path / "in" / "0.tar").read_bytes()

    def meanwhile(progress: Progress, prepared: PreparedRun) -> None:
        if progress.shards < 1 or not (tmp_path / "in" / "0.tar").exists():
            return
        (tmp_path / "in" / "0.tar").unlink()
        lease = Path(prepared.job.partition.uri, "lease.json")
        lease.write_text(lease.read_text().replace('"run": "', '"run": "other-').replace("held", "released"))
        label(config(root), selection=Selection(prune=True))
        time.sleep(0.5)

    with pytest.raises(LeaseLostError):
        label(config(root, "run.lease_duration_s=0.3"), on_progress=meanwhile)
    (tmp_path / "in" / "0.tar").write_bytes(content)
    assert label(config(root)).is_complete
    assert len(keys(root)) == len(set(keys(root))) == 48


def test_pruning_keeps_files_that_another_run_has_rewritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = str(tmp_path)
    for i in range(2):
        write(root, f"{i}.tar", i)
    label(config(root))
    (tmp_path / "in" / "0.tar").unlink()
    clean_up = labeling.clean_up

    def suspended(run: Any) -> bool:
        monkeypatch.setattr(labeling, "clean_up", clean_up)
        write(root, "0.tar", 7, count=3)
        path = Path(run.result.partition.uri, "lease.json")
        held = path.read_text()
        path.unlink()
        label(config(root))
        path.write_text(held)
        return clean_up(run)

    monkeypatch.setattr(labeling, "clean_up", suspended)
    label(config(root), selection=Selection(prune=True))
    label(config(root))
    assert len(keys(root)) == 12 + 3


def test_run_suspended_before_a_group_write_rolls_the_labels_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run sleeps after verifying its lease; meanwhile another run labels the regrouped images."""
    root = str(tmp_path)
    write_images(root, *range(30))
    groups = [shard for shard in plan_run(config(root)).plan.shards if len(shard.members) > 2]
    victim = groups[-1]
    name = prediction_path(victim.uri)
    monkeypatch.setattr(committing, "MAX_CONCURRENT_WRITES", 1)
    write_object = Storage.write

    def suspended(self: Storage, uri: str, *args: Any) -> ObjectInfo:
        if not uri.endswith(name):
            return write_object(self, uri, *args)
        monkeypatch.setattr(Storage, "write", write_object)
        Storage().delete(victim.members[0].uri)  # the group has the name of this image
        lease = next(info.uri for info in Storage().list(f"{root}/out") if info.uri.endswith("lease.json"))
        Storage().delete(lease)
        monkeypatch.setattr(Lease, "release", lambda self, clean_shutdown: None)
        label(config(root))
        return write_object(self, uri, *args)

    monkeypatch.setattr(Storage, "write", suspended)
    with suppress(LeaseLostError):  # raised only if the run lasts until the next renewal
        label(config(root))
    assert len(image_uris(root)) == len(set(image_uris(root))) == 29


def test_two_unaware_runs_label_image_files_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The images are regrouped during the first run, which continues with the groups that it has listed."""
    root = str(tmp_path)
    write_images(root, *range(30))
    monkeypatch.setattr(Lease, "acquire", lambda self, wait, on_wait: True)
    monkeypatch.setattr(Lease, "release", lambda self, clean_shutdown: None)
    victim = [shard for shard in plan_run(config(root)).plan.shards if len(shard.members) > 2][-1]
    changed = []

    def meanwhile(progress: Progress, prepared: PreparedRun) -> None:
        if not changed:
            changed.append(progress)
            Storage().delete(victim.members[0].uri)
            label(config(root))

    first = label(config(root), on_progress=meanwhile)
    assert len(image_uris(root)) == len(set(image_uris(root))) == 29
    assert first.rolled_back
    assert plan_run(config(root)).plan.shards == []


def test_overtaken_run_writes_no_labels_of_image_files(tmp_path: Path) -> None:
    """The other run may have grouped the images differently."""
    root = str(tmp_path)
    write_images(root, *range(30))
    overtaken = []

    def overtake(progress: Progress, prepared: PreparedRun) -> None:
        if not overtaken:
            lease = Path(prepared.job.partition.uri, "lease.json")
            lease.write_text(lease.read_text().replace('"run": "', '"run": "other-'))
            overtaken.append(progress)

    with pytest.raises(LeaseLostError):
        label(config(root), on_progress=overtake)
    assert len(files(root)) <= 1  # the group whose write had started
