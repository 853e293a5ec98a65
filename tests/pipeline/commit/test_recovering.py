"""The rebuilt manifest equals the manifest that runs have written, after any history."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.local_s3 import LocalS3
from pipeline.commit import LeaseLostError, ManifestRow, Partition, Progress, lease, rebuilt_rows
from pipeline.config import LABEL_NEW, Selection
from pipeline.run import PreparedRun, label, make_job, plan_run, rebuild, stored
from pipeline.storage import Storage, StorageError
from tests.fault_proxy import FaultProxy
from tests.makers import make_image, make_tar
from tests.partitions import manifest_rows
from tests.pipeline import crashing
from tests.pipeline.crashing import Crash
from tests.pipeline.replaying import Place
from tests.runs import run_config as config
from tests.runs import run_fields as fields
from tests.runs import small_groups

SELECTIONS = [
    LABEL_NEW,
    LABEL_NEW,
    Selection(retry_errors=True),
    Selection(relabel=True),
    Selection(prune=True),
]


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    small_groups(monkeypatch)
    monkeypatch.setattr("pipeline.storage.retrying.MAX_PAUSE_S", 0.01)
    monkeypatch.setattr(lease.LeaseContent, "is_live", False)  # no wait for the leases of killed runs


def without_runs(rows: list[ManifestRow]) -> list[ManifestRow]:
    return [replace(row, run=None, committed_at=None) for row in rows]


def assert_rebuilds(partition: Partition) -> None:
    rebuilt = rebuilt_rows(partition)
    assert without_runs(rebuilt) == without_runs(manifest_rows(partition.manifest))


@pytest.mark.slow
def test_records_determine_failed_recovered_and_reappeared_shards(bucket: str) -> None:
    storage, uri = Storage(), f"{bucket}/in/a.tar"
    good = make_tar([("0.jpg", make_image(1))])
    storage.write(f"{bucket}/in/other.tar", good)
    partition = make_job(config(bucket)).partition

    def error_after(content: bytes, selection: Selection = LABEL_NEW) -> str | None:
        storage.write(uri, content)
        label(config(bucket), selection=selection)
        assert_rebuilds(partition)
        [row] = [row for row in manifest_rows(partition.manifest) if row.uri == uri]
        return row.error

    assert "damaged" in str(error_after(good[:700]))  # not labeled before
    assert error_after(good) is None
    assert "damaged" in str(error_after(good[:800]))  # labeled in another version
    assert error_after(good) is None  # recovered without relabeling
    assert "damaged" in str(error_after(good[:900]))
    storage.delete(uri)
    label(config(bucket))
    assert_rebuilds(partition)
    assert [(row.deleted, row.error is None) for row in manifest_rows(partition.manifest)] == [
        (True, False),
        (False, True),
    ]
    label(config(bucket), selection=Selection(prune=True))
    assert_rebuilds(partition)
    assert error_after(good) is None


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, pytest.param(18, marks=pytest.mark.long)])
def test_rebuilt_manifest_equals_the_manifest_after_any_history(
    bucket: str, s3_server: LocalS3, seed: int
) -> None:
    """Shards are added, changed, deleted and damaged; runs are killed; files are removed by hand."""
    chance, storage, partition = random.Random(seed), Storage(), make_job(config(bucket)).partition
    tars = [make_tar([(f"{i}-{j}.jpg", make_image(10 * i + j)) for j in range(3)]) for i in range(4)]
    contents = [*tars[:2], tars[2][:3000], tars[3][:3000]]  # two are unreadable
    storage.write(f"{bucket}/in/always.tar", tars[0])
    finished = 0
    for _ in range(14):
        for _ in range(chance.randint(0, 3)):
            uri = f"{bucket}/in/{chance.randrange(4)}.tar"
            if chance.random() < 0.3:
                storage.delete(uri)
            else:
                storage.write(uri, chance.choice(contents))
        if chance.random() < 0.2:
            remove_random_file(chance, storage, partition)
        selection = chance.choice(SELECTIONS)
        if chance.random() < 0.3:
            crash = Crash(chance.randint(1, 15), chance.choice(["before", "after"]))
            crashing.run(fields(bucket), selection, crash)
            continue
        with FaultProxy(s3_server.endpoint_url) as proxy:
            if chance.random() < 0.3:
                name = f"/in/{chance.randrange(4)}.tar"
                proxy.next(
                    *["slow_down"] * 50,
                    where=lambda r, name=name: r.method == "GET" and r.path.endswith(name),
                )
            label(config(bucket, f"storage.endpoint_url={proxy.url}"), selection=selection)
        assert_rebuilds(partition)
        finished += 1
    assert finished > 5


def remove_random_file(chance: random.Random, storage: Storage, partition: Partition) -> None:
    found = sorted(info.uri for info in storage.list(partition.uri) if info.uri.endswith(".parquet"))
    if found:
        storage.delete(chance.choice(found))


def test_failures_recorded_by_a_killed_run_are_not_retried(bucket: str) -> None:
    storage = Storage()
    tar = make_tar([("0.jpg", make_image(1))])
    for i in range(6):
        storage.write(f"{bucket}/in/{i}.tar", tar[:700])
    storage.write(f"{bucket}/in/good.tar", tar)
    partition = make_job(config(bucket)).partition
    place = Place(bucket)
    for state in place.recorded():
        place.restore(state)
        rows = plan_run(config(bucket)).repairs.entries.values()
        if recorded := sum(row.error is not None for row in rows):
            break
    assert not partition.manifest.exists()
    assert recorded > 0
    result = label(config(bucket))
    assert len(result.totals.unreadable) == 6 - recorded
    assert_rebuilds(partition)


def history(bucket: str, *contents: bytes | None, die_at_last: bool) -> Partition:
    """Labels a shard with each of these contents in turn; None deletes the shard.

    With `die_at_last`, the last run dies between writing its record and the manifest.
    """
    storage, partition = Storage(), make_job(config(bucket)).partition
    storage.write(f"{bucket}/in/always.tar", make_tar([("0.jpg", make_image(9))]))
    for index, content in enumerate(contents):
        if content is None:
            storage.delete(f"{bucket}/in/a.tar")
        else:
            storage.write(f"{bucket}/in/a.tar", content)
        if not die_at_last or index < len(contents) - 1:
            label(config(bucket))
            continue
        place = Place(bucket)
        before = storage.read(partition.manifest.uri)
        for state in place.recorded():
            place.restore(state)
            last = max(info.uri for info in storage.list(f"{partition.uri}/runs"))
            if b"a.tar" in storage.read(last):
                break
        assert storage.read(partition.manifest.uri) == before
    return partition


GOOD = make_tar([("0.jpg", make_image(1)), ("1.jpg", make_image(2))])


@pytest.mark.slow
@pytest.mark.parametrize(
    "contents",
    [(GOOD, GOOD[:700], GOOD[:800]), (GOOD[:700], None), (GOOD, GOOD[:700], GOOD), (GOOD, GOOD[:700], None)],
    ids=["fails differently", "fails, deleted", "fails, recovered", "labeled, fails, deleted"],
)
@pytest.mark.parametrize(
    "then",
    [GOOD, GOOD[:700], GOOD[:800], None],
    ids=["good", "cut", "cut differently", "deleted"],
)
def test_next_run_adds_the_record_of_a_killed_run_to_the_manifest(
    tmp_path: Path, contents: tuple[bytes | None, ...], then: bytes | None
) -> None:
    partition = history(root := str(tmp_path), *contents, die_at_last=True)
    if then is None:
        Storage().delete(f"{root}/in/a.tar")
    else:
        Storage().write(f"{root}/in/a.tar", then)
    label(config(root))
    assert_rebuilds(partition)
    assert plan_run(config(root)).plan.shards == []


def test_run_without_a_manifest_uses_the_run_records(bucket: str) -> None:
    partition = history(bucket, GOOD, GOOD[:700], die_at_last=False)
    states = plan_run(config(bucket)).plan.states
    Storage().delete(partition.manifest.uri)
    assert plan_run(config(bucket)).plan.states == states
    label(config(bucket))
    assert_rebuilds(partition)


def test_deleted_shards_of_one_input_stay_deleted_when_another_is_labeled(bucket: str) -> None:
    partition = history(bucket, GOOD, None, die_at_last=False)
    Storage().delete(partition.manifest.uri)
    Storage().write(f"{bucket}/other/b.tar", GOOD)
    label(config(bucket, f"input.uri={bucket}/other"))
    assert_rebuilds(partition)
    assert [row.deleted for row in manifest_rows(partition.manifest)] == [True, False, False]


def test_overtaken_run_records_no_unsaved_failures(bucket: str) -> None:
    storage = Storage()
    for i in range(4):
        storage.write(f"{bucket}/in/{i}.tar", GOOD[:700])
    partition = make_job(config(bucket)).partition

    def overtaken(progress: Progress, prepared: PreparedRun) -> None:
        if not prepared.job.partition.manifest.exists():
            for i in range(4):
                storage.write(f"{bucket}/in/{i}.tar", GOOD)
            label(config(bucket))

    with pytest.raises(LeaseLostError):
        label(config(bucket, "run.lease_duration_s=0.1"), on_progress=overtaken)
    label(config(bucket))
    assert_rebuilds(partition)
    assert [row.error for row in manifest_rows(partition.manifest)] == [None] * 4


def test_rebuilt_manifest_has_a_run_that_ends_during_the_rebuild(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    partition = history(bucket, GOOD, die_at_last=False)
    make_rows = stored.rebuilt_rows

    def run_meanwhile(*args: Any) -> list[ManifestRow]:
        rows = make_rows(*args)
        monkeypatch.setattr(stored, "rebuilt_rows", make_rows)
        Storage().write(f"{bucket}/in/b.tar", GOOD[:700])
        label(config(bucket))
        return rows

    monkeypatch.setattr(stored, "rebuilt_rows", run_meanwhile)
    with pytest.raises(LeaseLostError):
        rebuild(make_job(config(bucket)).partition)
    assert_rebuilds(partition)
    assert [row.error is None for row in manifest_rows(partition.manifest)] == [True, True, False]


def test_invalid_run_record_is_named(tmp_path: Path) -> None:
    root = str(tmp_path)
    Storage().write(f"{root}/in/a.tar", make_tar([("0.jpg", make_image(1))]))
    partition = label(config(root)).job.partition
    Storage().write(f"{partition.uri}/runs/20260101.json", b'{"run": "x"}')
    with pytest.raises(StorageError, match=r"20260101.json: not a run record: KeyError: 'removed'"):
        rebuild(make_job(config(root)).partition)


def test_prediction_file_of_another_model_is_rejected(tmp_path: Path) -> None:
    root = str(tmp_path)
    Storage().write(f"{root}/in/a.tar", make_tar([("0.jpg", make_image(1))]))
    partition = label(config(root)).job.partition
    other = label(config(root, "output.topk=2")).job.partition
    [file] = Storage().list(f"{other.uri}/predictions")
    Storage().write(f"{partition.uri}/predictions/stray.parquet", Storage().read(file.uri))
    with pytest.raises(StorageError, match=r"stray\.parquet: the fingerprint"):
        rebuild(make_job(config(root)).partition)


def test_missing_run_records_lose_only_failures(bucket: str) -> None:
    partition = history(bucket, GOOD, GOOD[:700], die_at_last=False)
    for info in Storage().list(f"{partition.uri}/runs"):
        Storage().delete(info.uri)
    assert plan_run(config(bucket)).plan.shards == []
    rebuild(make_job(config(bucket)).partition)
    assert [shard.uri for shard in plan_run(config(bucket)).plan.shards] == [f"{bucket}/in/a.tar"]
    label(config(bucket))
    assert_rebuilds(partition)
