"""Publications that are killed, get no response, or are overtaken by other writers, at any of their steps."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.compute as pc
import pytest

from pipeline.publish import Publication
from tests.fault_proxy import FaultProxy, Request
from tests.pipeline.publish.crashing import Outcome, Reaction, SavedTable, Step, kill, publish_in_child
from tests.pipeline.publish.tables import FORMATS, Dataset, Rows, needs_format, predictions

needs_format("delta")
needs_format("iceberg")

#: Faults of one request. The server executes the request of the first and the last one.
FAULTS = ("lost_answer", "error", "slow_down", "refused", "reset", "no_head")


@pytest.fixture
def proxy(s3_server: object) -> Iterator[FaultProxy]:
    with FaultProxy(os.environ["AWS_ENDPOINT_URL_S3"]) as proxy:
        yield proxy


class Scene:
    """A dataset in a bucket that is to be published, with the rows before and after the publication.

    Attributes:
        old: rows of the table.
        new: rows of the prediction files.
    """

    def __init__(self, dataset: Dataset, catalog: Path, proxy: FaultProxy) -> None:
        self.dataset, self.catalog, self.proxy = dataset, catalog, proxy
        self.label_first()

    def label_first(self) -> None:
        """Prepares the first publication: the table does not exist."""
        self.dataset.label(**{"changed": 4, "deleted": 3, "it's; --": 6, "same": 5})
        self._prepare()

    def publish_first(self) -> None:
        """Prepares an increment that adds, replaces and removes shards."""
        self.dataset.publish()
        self.dataset.label(changed=7, new=2, remove=["deleted"])
        self._prepare()

    def _prepare(self) -> None:
        self.old, self.new = self.dataset.published(), self.dataset.labels()
        assert self.old != self.new
        self._saved = SavedTable(self.dataset, self.catalog)

    def restore(self) -> None:
        """Restores the table to its state before the publication."""
        self._saved.restore()
        self.proxy.clear()

    def publish(self, react: Reaction = lambda *_: None) -> Outcome | None:
        return publish_in_child(self.dataset, self.proxy, react)

    def steps(self) -> list[Step]:
        """Returns the steps of the publication, in order."""
        steps = list[Step]()
        outcome = self.publish(lambda step, _: steps.append(step))
        assert outcome is not None
        assert (outcome.is_new, outcome.version) == (True, self.dataset.version())
        assert self.dataset.published() == self.new
        return steps

    def at(self, number: int, action: Callable[[Step, int], None]) -> Reaction:
        """Returns a reaction to the step with this number."""
        numbers = itertools.count()

        def react(step: Step, process: int) -> None:
            if next(numbers) == number:
                action(step, process)

        return react

    def check(self, outcome: Outcome | None) -> None:
        """Checks that the table is old or new, as reported, and that the next publication completes it."""
        rows = self.dataset.published()
        assert rows in (self.old, self.new)
        is_new = rows == self.new
        if outcome is not None:
            assert is_new == (outcome.error is None), outcome
            if is_new:
                assert outcome == Outcome(self.dataset.version(), True)
        assert (self.dataset.publish().published_at is None) == is_new
        self.check_finished()

    def check_finished(self) -> None:
        """Checks that the table has the rows of the prediction files, and that no publication changes it."""
        assert self.dataset.published() == self.new
        version = self.dataset.version()
        done = self.dataset.publish()
        assert (done.published_at, done.version, self.dataset.version()) == (None, version, version)
        for version, _ in self.dataset.history()[-2:]:
            assert self.dataset.published(version) in ([], self.old, self.new)


@pytest.fixture(params=FORMATS)
def scene(request: pytest.FixtureRequest, bucket: str, tmp_path: Path, proxy: FaultProxy) -> Scene:
    dataset = Dataset(bucket, format=request.param, catalog_folder=str(tmp_path))
    return Scene(dataset, tmp_path / "catalog.db", proxy)


def once(where: Callable[[Step], bool], action: Callable[[], object]) -> Reaction:
    """Returns a reaction to the first of some steps."""
    actions = [action]

    def react(step: Step, process: int) -> None:
        if actions and where(step):
            actions.pop()()

    return react


def some(steps: Mapping[int, Step]) -> list[int]:
    """Returns the numbers of the commits and of three other steps; of all with `KILL_AT_EVERY_WRITE`."""
    if os.environ.get("KILL_AT_EVERY_WRITE"):
        return [*steps]
    commits = {number for number, step in steps.items() if step.is_table_commit or step.name == "COMMIT"}
    others = [number for number in steps if number not in commits]
    return sorted(commits.union(others[:: max(1, len(others) // 3)]))


def before_commit(step: Step) -> bool:
    return step.is_table_commit and not step.is_done


@pytest.mark.slow
@pytest.mark.parametrize("is_first", [True, False], ids=["first", "increment"])
def test_publication_killed_at_any_write_is_completed_by_the_next(scene: Scene, is_first: bool) -> None:
    if not is_first:
        scene.publish_first()

    def matters(step: Step) -> bool:
        """Before most writes, others see the same as after the write before."""
        return step.is_visible_write and (step.is_done or step.is_table_commit or step.name == "COMMIT")

    numbers = {number: step for number, step in enumerate(scene.steps()) if matters(step)}
    assert len(numbers) >= 4
    for number in some(numbers):
        scene.restore()
        assert scene.publish(scene.at(number, lambda step, process: kill(process, step))) is None
        scene.check(None)


@pytest.mark.slow
def test_publication_in_a_folder_killed_at_any_time_is_completed_by_the_next(
    local: Dataset, proxy: FaultProxy
) -> None:
    local.label(same=3)
    start = time.monotonic()
    publish_in_child(local, proxy)
    duration, states = time.monotonic() - start, [Rows(), local.labels()]
    for number in range(8):
        local.label(remove=[f"extra{number - 1}"] * (number > 0), same=number + 4)
        local.label(predictions(local.shard(f"extra{number}"), 2))
        states.append(local.labels())
        publish_in_child(local, proxy, kill_after_s=duration * (number + 1) / 8)
        assert local.published() in states[-2:]
        local.publish()
        assert local.published() == states[-1]
        assert local.publish().published_at is None
    for version, _ in local.history():
        assert local.published(version) in states


@pytest.mark.slow
@pytest.mark.parametrize("scene", ["delta"], indirect=True)
def test_vacuum_removes_the_files_of_killed_publications(scene: Scene) -> None:
    def is_deletion_of_probe(step: Step) -> bool:
        return step.name.startswith("DELETE") and not step.is_done

    dataset = scene.dataset
    for where in (is_deletion_of_probe, before_commit):
        assert (
            scene.publish(lambda step, process, where=where: kill(process, step) if where(step) else None)
            is None
        )
    dataset.publish()
    scene.check_finished()
    table = dataset.delta()

    def orphans() -> list[str]:
        files = {*dataset.files(), *dataset.objects(f"{dataset.table}/_delta_log")}
        return sorted(uri.rpartition("/")[2][:5] for uri in dataset.objects(dataset.table).keys() - files)

    assert orphans() == ["cvt-l", "part-"]
    table.vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False, full=True)
    assert orphans() == []
    scene.check_finished()


@pytest.mark.slow
@pytest.mark.parametrize("is_first", [True, False], ids=["first", "increment"])
def test_fault_of_any_write_is_survived_or_reported(scene: Scene, is_first: bool) -> None:
    """A write loses its answer, or fails in another way."""
    if not is_first:
        scene.publish_first()
    writes = [step for step in scene.steps() if step.is_write and not step.is_done and step.name != "COMMIT"]
    chosen = range(len(writes) - 1, -1, -max(1, len(writes) // 3))
    for number, kind in zip(chosen, itertools.cycle(FAULTS), strict=False):
        scene.restore()
        numbers = itertools.count()

        def where(request: Request, number: int = number, numbers: Iterator[int] = numbers) -> bool:
            return request.method in ("PUT", "POST", "DELETE") and next(numbers) == number

        scene.proxy.next(kind, where=where)
        outcome = scene.publish()
        assert scene.proxy.remaining == 0
        assert outcome is not None
        if kind in ("error", "slow_down"):
            assert outcome.error is None
        scene.check(outcome)


@pytest.mark.parametrize("scene", ["delta"], indirect=True)
@pytest.mark.parametrize(
    "kind", ["lost_answer", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("refused", "reset"))]
)
def test_fault_of_the_commit_of_a_delta_table_is_survived_or_reported(scene: Scene, kind: str) -> None:
    scene.publish_first()
    scene.proxy.next(
        kind, where=lambda request: before_commit(Step(f"{request.method} {request.path}", False))
    )
    outcome = scene.publish()
    assert outcome is not None
    assert (outcome.error is None) == (kind != "reset"), outcome
    scene.check(outcome)


@pytest.mark.slow
@pytest.mark.parametrize("scene", ["delta"], indirect=True)
def test_checkpoint_after_the_commit_of_a_delta_table_may_fail(scene: Scene) -> None:
    """A checkpoint only makes reading faster."""
    scene.dataset.publish()
    scene.dataset.delta().alter.set_table_properties({"delta.checkpointInterval": "1"})
    scene.publish_first()
    numbers = [n for n, step in enumerate(scene.steps()) if step.is_write and "checkpoint" in step.name]
    assert len(numbers) == 4
    for number in numbers:
        scene.restore()
        assert scene.publish(scene.at(number, lambda step, process: kill(process, step))) is None
        scene.check(None)
    scene.restore()
    scene.proxy.always(
        "denied", where=lambda request: request.method == "PUT" and "checkpoint" in request.path
    )
    outcome = scene.publish()
    assert outcome == Outcome(scene.dataset.version(), True)
    assert scene.proxy.injected["denied"]
    scene.check(outcome)


@pytest.mark.parametrize("retries", ["0", "4"])
def test_executed_iceberg_commit_that_is_reported_as_a_conflict_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, retries: str
) -> None:
    """pyiceberg would delete the manifests of this commit, unless it has retries left."""
    from pyiceberg.catalog import AVAILABLE_CATALOGS, CatalogType

    from tests.pipeline.publish.repeating_catalog import RepeatingCatalog

    dataset = Dataset(str(tmp_path), format="iceberg")
    dataset.label(a=4, b=3)
    dataset.publish()
    with dataset.iceberg().transaction() as transaction:
        transaction.set_properties({"commit.retry.num-retries": retries, "commit.retry.min-wait-ms": "1"})
    with monkeypatch.context() as patch:
        patch.setitem(AVAILABLE_CATALOGS, CatalogType.SQL, lambda name, conf: RepeatingCatalog(name, **conf))
        dataset.label(c=5)
        done = dataset.publish()
        assert (done.version, len(done.added)) == (dataset.version(), 1)
        dataset.label(b=6)
        assert dataset.publish().version == dataset.version()
    assert dataset.published() == dataset.labels()
    assert dataset.publish().published_at is None
    assert [operation for _, operation in dataset.history()] == ["append", "append", "overwrite"]


def test_publisher_that_is_overtaken_at_its_commit_publishes_nothing_twice(scene: Scene) -> None:
    """Another publisher of the partition is faster."""
    outcome = scene.publish(once(before_commit, scene.dataset.publish))
    assert outcome == Outcome(scene.dataset.version(), False)
    scene.check_finished()
    scene.publish_first()
    outcome = scene.publish(once(before_commit, scene.dataset.publish))
    assert outcome == Outcome(scene.dataset.version(), False)
    scene.check_finished()


@pytest.mark.slow
@pytest.mark.parametrize("model", ["cvt-00000001", "cvt-00000002"], ids=["dataset", "model"])
def test_publishers_of_two_datasets_or_models_collide_and_both_succeed(scene: Scene, model: str) -> None:
    one = scene.dataset
    scene.publish_first()
    two = Dataset(f"{one.root}/two", model, table_of=one)
    two.label(a=3, b=4)
    outcome = scene.publish(once(before_commit, two.publish))
    assert outcome == Outcome(one.version(), True)

    def check() -> None:
        expected = sorted(one.labels() + two.labels(), key=lambda row: (row["shard"], row["index"]))
        assert one.published() == expected
        assert (one.publish().published_at, two.publish().published_at) == (None, None)

    check()
    two.label(c=2, remove=["a"])  # now the second publisher is overtaken
    one.label(same=1)
    outcome = publish_in_child(two, scene.proxy, once(before_commit, one.publish))
    assert outcome == Outcome(one.version(), True)
    check()


@pytest.mark.slow
def test_reported_version_is_that_of_the_publication(scene: Scene) -> None:
    """Another model is published before the publication gets the response to its commit."""
    scene.publish_first()
    other = Dataset(f"{scene.dataset.root}/two", "cvt-00000002", table_of=scene.dataset)
    other.label(a=3)

    def after_commit(step: Step) -> bool:
        is_commit = step.is_table_commit if other.format == "delta" else step.name == "COMMIT"
        return is_commit and step.is_done

    outcome = scene.publish(once(after_commit, other.publish))
    assert outcome == Outcome(scene.dataset.history()[-2][0], True)


@pytest.mark.slow
@pytest.mark.parametrize("is_first", [True, False], ids=["first", "increment"])
def test_publisher_may_be_overtaken_at_any_step(scene: Scene, is_first: bool) -> None:
    """Another publisher of the partition publishes between two steps, also between two reads."""
    if not is_first:
        scene.publish_first()
    others = list[Publication]()
    # A commit of the SQL catalog locks the catalog.
    steps = {n: step for n, step in enumerate(scene.steps()) if not step.is_done and step.name != "COMMIT"}
    for number in some(steps):
        scene.restore()
        outcome = scene.publish(scene.at(number, lambda *_: others.append(scene.dataset.publish())))
        assert outcome == Outcome(scene.dataset.version(), others.pop().published_at is None)
        scene.check_finished()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "is_append"),
    [("restore", True), ("compact", False), ("delete", True), ("truncate", False)],
)
def test_maintenance_at_the_commit_of_a_publication(scene: Scene, change: str, is_append: bool) -> None:
    """Another program changes the table. The publication follows it, or reports the edit."""
    dataset, is_delta = scene.dataset, scene.dataset.format == "delta"
    dataset.publish()
    first = dataset.version()
    dataset.label(more=3)
    dataset.publish()
    dataset.label(remove=["deleted"])
    dataset.publish()
    dataset.label(new=2) if is_append else dataset.label(changed=7, new=2, remove=["more"])

    def maintain() -> None:
        if is_delta:
            table = dataset.delta()
            if change == "restore":
                table.restore(first)
            elif change == "compact":
                assert table.optimize.compact()["numFilesRemoved"]
                table.vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False)
            else:
                table.delete("label = 'boot'" if change == "delete" else None)
        elif change == "restore":
            dataset.iceberg().manage_snapshots().rollback_to_snapshot(first).commit()
        elif change == "compact":
            table = dataset.iceberg()
            table.overwrite(table.scan().to_arrow())
        else:
            dataset.iceberg().delete("label == 'boot'" if change == "delete" else "model != ''")

    outcome = scene.publish(once(before_commit, maintain))
    assert outcome is not None
    if change == "delete":
        edit = "the table was edited"
        assert edit in (outcome.error or "")
        rows = dataset.rows()
        assert "boot" not in pc.unique(rows["label"]).to_pylist()
        dataset.publish(rebuild=True)
    else:
        assert outcome == Outcome(dataset.version(), True)
    assert dataset.published() == dataset.labels()
    assert dataset.publish().published_at is None


@pytest.mark.slow
def test_reader_sees_complete_increments_only(scene: Scene) -> None:
    """A reader polls while publications run, half of them killed."""
    dataset, states, seen = scene.dataset, [Rows()], list[tuple[int | None, Rows]]()
    stop = threading.Event()

    def poll() -> None:
        while not stop.is_set():
            version = dataset.version()
            seen.append((version, dataset.published(version)))
            seen.append((None, dataset.published()))

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(poll)
        try:
            for number in range(4):
                dataset.label(remove=[f"extra{number - 1}"] * (number > 0), same=number + 3)
                dataset.label(predictions(dataset.shard(f"extra{number}"), 2))
                states.append(dataset.labels())
                if number % 2:
                    scene.publish(scene.at(50, lambda step, process: kill(process, step)))
                scene.publish()
        finally:
            stop.set()
        reading.result()
    assert len(seen) > 20
    numbers = [states.index(rows) for _, rows in seen]
    assert numbers == sorted(numbers)
    assert {*numbers} > {0, 1}
    for version, _ in dataset.history():
        assert dataset.published(version) in states
    assert dataset.published() == states[-1]


@pytest.mark.slow
def test_many_publishers_at_once_succeed(scene: Scene) -> None:
    """Two publishers of one partition, one of another dataset, and two of another model."""
    one = scene.dataset
    two = Dataset(f"{one.root}/two", table_of=one)
    other = Dataset(f"{one.root}/two", "cvt-00000002", table_of=one)
    datasets = [one, one, two, other, other]
    with ThreadPoolExecutor(len(datasets)) as pool:
        for number in range(2):
            for dataset in (one, two, other):
                dataset.label(remove=[f"b{number - 1}"] * (number > 0), a=3 + number)
                dataset.label(predictions(dataset.shard(f"b{number}"), 2))
            outcomes = [*pool.map(lambda each: publish_in_child(each, scene.proxy), datasets)]
            assert [outcome.error for outcome in outcomes if outcome] == [None] * len(datasets)
            expected = one.labels() + two.labels() + other.labels()
            assert one.published() == sorted(expected, key=lambda row: (row["shard"], row["index"]))
    assert [dataset.publish().published_at for dataset in datasets] == [None] * len(datasets)
