"""Several datasets of one model in one consumer table: each is brought up to date by its own publications."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Selection
from pipeline.publish import Publication, publish
from pipeline.storage import StorageError
from tests.makers import make_tar
from tests.pipeline.crashing import leave_out_ray
from tests.pipeline.publish.publishing_runs import DELTA, PARQUET, Datasets, Place, make_table

SAMPLE = Path(__file__).parents[3] / "jobs" / "data" / "fashion-mnist" / "test-0000.tar"


@pytest.fixture(scope="module")
def shards() -> list[bytes]:
    """Tars of five images each."""
    with tarfile.open(SAMPLE) as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar.getmembers()[:80]]  # type: ignore[union-attr]
    return [make_tar(members[start : start + 10]) for start in range(0, 80, 10)]


@pytest.fixture(params=[PARQUET, DELTA])
def datasets(
    request: pytest.FixtureRequest, tmp_path: Path, shards: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> Datasets:
    leave_out_ray(monkeypatch)
    return Datasets(str(tmp_path), request.param, shards)


def test_a_publication_changes_rows_of_its_own_dataset_only(datasets: Datasets, shards: list[bytes]) -> None:
    one, two = datasets.one, datasets.two
    assert datasets.publish(one).snapshot.version == 1
    done = datasets.publish(two)
    assert done.snapshot.version == 2
    assert not len(done.increment.removed)
    assert one.published() == datasets.labels
    assert not datasets.publish(one).is_new
    assert not datasets.publish(two).is_new

    one.put({"b.tar": shards[5], "d.tar": shards[6]}, remove=("a.tar",))
    one.label(Selection(prune=True))
    done = datasets.publish(one)
    assert done.increment.removed.to_pylist() == [one.shard_uri("a.tar")]
    assert one.published() == datasets.labels
    two.put({"y.tar": shards[7]}, remove=("z.tar",))
    two.label(Selection(prune=True))
    datasets.publish(two)
    assert one.published() == datasets.labels
    assert one.published(2) != one.published()


def test_a_dataset_of_which_every_shard_is_gone_leaves_the_other_as_it_is(datasets: Datasets) -> None:
    one, two = datasets.one, datasets.two
    datasets.publish(one)
    datasets.publish(two)
    two.partition.manifest.update({}, removed=[two.shard_uri("a.tar"), two.shard_uri("z.tar")])
    assert len(datasets.publish(two).increment.removed) == 2
    assert one.published() == one.predictions()


def test_a_shard_that_two_outputs_have_is_refused_and_both_are_named(datasets: Datasets) -> None:
    one = datasets.one
    datasets.publish(one)
    again = Place(one.root, one.format, f"output.uri={one.root}/again")
    again.label()
    with pytest.raises(StorageError) as raised:
        datasets.publish(again)
    assert raised.value.cause.startswith(f"has the shard {one.shard_uri('a.tar')} from {one.partition.uri}")
    assert again.partition.uri in raised.value.cause
    assert one.published() == one.predictions()


def test_a_table_from_before_sources_were_noted_goes_on(datasets: Datasets, shards: list[bytes]) -> None:
    """Its rows are left alone by another dataset, and adopted by the one that has its shards."""
    one, two = datasets.one, datasets.two
    datasets.publish(one)
    datasets.forget_sources()
    assert not datasets.publish(one).is_new
    assert not len(datasets.publish(two).increment.removed)
    assert one.published() == datasets.labels
    one.put({"b.tar": shards[5]}, remove=("a.tar",))
    one.label(Selection(prune=True))
    done = datasets.publish(one)
    assert done.increment.removed.to_pylist() == [one.shard_uri("a.tar")]
    assert one.published() == datasets.labels
    assert set(done.snapshot.shards["source"].to_pylist()) == {one.partition.uri, two.partition.uri}


def test_datasets_that_are_published_at_once_both_come_through(
    datasets: Datasets, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one just before this one's commit."""
    one, two = datasets.one, datasets.two
    slow = make_table(one.partition, f"{one.root}/table", one.format)
    commit, others = slow.commit, iter([two])

    def overtaken(*arguments: Any) -> None:
        for other in others:
            assert datasets.publish(other).is_new
        commit(*arguments)

    monkeypatch.setattr(slow, "commit", overtaken)
    assert publish(one.partition, slow).snapshot.version == 2
    assert one.published() == datasets.labels


def test_columns_are_not_changed_under_another_dataset(
    tmp_path: Path, shards: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_out_ray(monkeypatch)
    one, two = (Place(f"{tmp_path}/{name}", "parquet", "output.embedding=float16") for name in ("one", "two"))
    for place in (one, two):
        place.put({f"{Path(place.root).name}.tar": shards[0]})
        place.label()

    def published(place: Place, embedding: bool) -> Publication:
        table = make_table(place.partition, f"{tmp_path}/table", "parquet")
        return publish(place.partition, table, embedding=embedding)

    published(one, embedding=True)
    with pytest.raises(StorageError, match=f"rows of {one.partition.uri} in other columns"):
        published(two, embedding=False)
    assert published(two, embedding=True).snapshot.rows == 10
