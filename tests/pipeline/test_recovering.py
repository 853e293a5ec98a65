"""The manifest that is made anew is the one that runs have left, whatever they went through."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.local_s3 import LocalS3
from pipeline import lease
from pipeline.config import Config, load_config
from pipeline.labelling import make_plan, rebuild, run_labelling
from pipeline.manifest import ManifestRow
from pipeline.partition import Partition, open_partition
from pipeline.planning import LABEL_NEW, Selection
from pipeline.recovering import rebuilt_rows
from pipeline.storage import Storage, StorageError
from tests.fault_proxy import FaultProxy
from tests.makers import make_image, make_tar
from tests.pipeline import crashing
from tests.pipeline.crashing import Crash, leave_out_ray

SELECTIONS = [
    LABEL_NEW,
    LABEL_NEW,
    Selection(retry_errors=True),
    Selection(relabel=True),
    Selection(prune=True),
]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_out_ray(monkeypatch)
    monkeypatch.setattr("pipeline.retrying._FIRST_PAUSE", 0.001)
    monkeypatch.setattr("pipeline.retrying._LONGEST_PAUSE", 0.01)
    monkeypatch.setattr(lease._State, "is_live", False)  # runs are killed, and their leases not waited for


def fields(root: str, *overrides: str) -> list[str]:
    return [f"input.uri={root}/in", f"output.uri={root}/out", "model.path=fashion-mnist", *overrides]


def config(root: str, *overrides: str) -> Config:
    return load_config(Config, None, fields(root, *overrides))


def untimed(rows: list[ManifestRow]) -> list[ManifestRow]:
    return [replace(row, run=None, committed_at=None) for row in rows]


def assert_rebuilds(partition: Partition) -> None:
    rebuilt = rebuilt_rows(partition.storage, partition.uri, partition.fingerprint)
    assert untimed(rebuilt) == untimed(list(partition.manifest.rows()))


def test_failures_cures_and_returns_are_told_by_the_records(bucket: str) -> None:
    storage, uri = Storage(), f"{bucket}/in/a.tar"
    good = make_tar([("0.jpg", make_image(1))])
    storage.write(f"{bucket}/in/other.tar", good)
    partition = open_partition(config(bucket))

    def error_after(content: bytes, selection: Selection = LABEL_NEW) -> str | None:
        storage.write(uri, content)
        run_labelling(config(bucket), selection=selection)
        assert_rebuilds(partition)
        [row] = [row for row in partition.manifest.rows() if row.uri == uri]
        return row.error

    assert "damaged" in str(error_after(good[:700]))  # never labelled
    assert error_after(good) is None
    assert "damaged" in str(error_after(good[:800]))  # labelled in another version
    assert error_after(good) is None  # there again, and not labelled again
    assert "damaged" in str(error_after(good[:900]))
    storage.delete(uri)
    run_labelling(config(bucket))
    assert_rebuilds(partition)
    assert [(row.gone, row.error is None) for row in partition.manifest.rows()] == [
        (True, False),
        (False, True),
    ]
    run_labelling(config(bucket), selection=Selection(prune=True))
    assert_rebuilds(partition)
    assert error_after(good) is None


@pytest.mark.parametrize("seed", [0, 18])
def test_after_any_history_the_manifest_is_rebuilt_as_it_was(
    bucket: str, s3_server: LocalS3, seed: int
) -> None:
    """Shards come, change, go, return, and can't be read; runs are killed; files are removed by hand."""
    chance, storage, partition = random.Random(seed), Storage(), open_partition(config(bucket))
    tars = [make_tar([(f"{i}-{j}.jpg", make_image(10 * i + j)) for j in range(3)]) for i in range(4)]
    contents = [*tars[:2], tars[2][:3000], tars[3][:3000]]  # two can't be read
    storage.write(f"{bucket}/in/always.tar", tars[0])
    settled = 0
    for _ in range(20):
        for _ in range(chance.randint(0, 3)):
            uri = f"{bucket}/in/{chance.randrange(4)}.tar"
            if chance.random() < 0.3:
                storage.delete(uri)
            else:
                storage.write(uri, chance.choice(contents))
        if chance.random() < 0.2:
            remove_one_by_hand(chance, storage, partition)
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
            run_labelling(config(bucket, f"storage.endpoint_url={proxy.url}"), selection=selection)
        assert_rebuilds(partition)
        settled += 1
    assert settled > 5


def remove_one_by_hand(chance: random.Random, storage: Storage, partition: Partition) -> None:
    found = sorted(info.uri for info in storage.list(partition.uri) if info.uri.endswith(".parquet"))
    if found:
        storage.delete(chance.choice(found))


def test_failures_that_a_killed_run_has_recorded_are_not_tried_again(bucket: str) -> None:
    storage = Storage()
    tar = make_tar([("0.jpg", make_image(1))])
    for i in range(6):
        storage.write(f"{bucket}/in/{i}.tar", tar[:700])
    storage.write(f"{bucket}/in/good.tar", tar)
    partition = open_partition(config(bucket))
    recorded = 0
    for number in range(3, 7):  # lease, record, the good one's labels, the record with failures, the manifest
        assert not crashing.run(fields(bucket), LABEL_NEW, Crash(number, "after"))
        assert not partition.manifest.exists()
        if recorded := len(make_plan(config(bucket)).failing):
            break
    assert recorded > 0
    result = run_labelling(config(bucket))
    assert len(result.totals.unreadable) == 6 - recorded
    assert_rebuilds(partition)


def test_a_record_that_is_none_is_named(tmp_path: Path) -> None:
    root = str(tmp_path)
    Storage().write(f"{root}/in/a.tar", make_tar([("0.jpg", make_image(1))]))
    partition = run_labelling(config(root)).plan.partition
    Storage().write(f"{partition.uri}/runs/20260101.json", b'{"run": "x"}')
    with pytest.raises(StorageError, match=r"20260101.json: not the record of a run: KeyError\('removed'\)"):
        rebuild(config(root))


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    root = str(tmp_path)
    Storage().write(f"{root}/in/a.tar", make_tar([("0.jpg", make_image(1))]))
    partition = run_labelling(config(root)).plan.partition
    other = run_labelling(config(root, "output.topk=2")).plan.partition
    [file] = Storage().list(f"{other.uri}/predictions")
    Storage().write(f"{partition.uri}/predictions/stray.parquet", Storage().read(file.uri))
    with pytest.raises(StorageError, match=r"stray\.parquet: is of another model or options"):
        rebuild(config(root))
