"""Several datasets of one model in one table: a publication updates the rows of its dataset only."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.storage import StorageError
from tests.pipeline.publish.tables import Dataset, Datasets, WatchedStorage, changes, needs_delta

needs_delta()

#: A small file size, so that the table has several files, some with rows of both datasets.
SMALL_FILES = 2000


@pytest.fixture
def both(tmp_path: Path) -> Datasets:
    return Datasets(str(tmp_path))


def test_publication_changes_rows_of_its_own_dataset_only(both: Datasets) -> None:
    one, two = both
    assert one.publish(file_bytes=SMALL_FILES).snapshot.version == 1
    done = two.publish(file_bytes=SMALL_FILES)
    assert (done.snapshot.version, changes(done, two.root)) == (2, {"added": ["a", "z"]})
    assert one.published() == both.labels()
    assert not one.publish().is_new
    assert not two.publish().is_new

    one.label(b=7, d=8, remove=["a"])
    done = one.publish(file_bytes=SMALL_FILES)
    assert changes(done, one.root) == {"added": ["b", "d"], "replaced": ["b"], "removed": ["a"]}
    assert one.published() == both.labels()
    two.label(y=3, remove=["z"])
    two.publish(file_bytes=SMALL_FILES)
    assert one.published() == both.labels()


def test_removing_all_shards_of_a_dataset_keeps_the_other_dataset(both: Datasets) -> None:
    one, two = both
    one.publish()
    two.publish()
    two.label(remove=["a", "z"])
    assert len(two.publish().removed) == 2
    assert one.published() == one.labels()


def test_shard_of_two_partitions_is_refused_and_both_are_named(both: Datasets) -> None:
    one, _ = both
    one.publish()
    duplicate = Dataset(one.root, table=one.table)
    duplicate.uri = f"{one.root}/duplicate/{one.partition.name}"
    duplicate.label(a=5)
    with pytest.raises(StorageError) as raised:
        duplicate.publish()
    assert raised.value.cause.startswith(f"the table already has shard {one.shard('a')} from {one.uri}")
    assert duplicate.uri in raised.value.cause
    assert one.published() == one.labels()


def test_concurrent_publications_of_two_datasets_succeed(both: Datasets) -> None:
    """The second dataset is published just before the commit of the first."""
    one, two = both
    others = iter([two])

    def publish_other(uri: str) -> None:
        if "/_cvt_label/" in uri and (other := next(others, None)):
            assert other.publish().is_new

    assert one.publish(WatchedStorage(before=publish_other)).snapshot.version == 2
    assert one.published() == both.labels()


def test_datasets_with_and_without_embeddings_share_a_table(tmp_path: Path) -> None:
    one, two = Datasets(str(tmp_path), embedding="float16")
    one.publish(embedding=False)
    assert two.publish(embedding=True).snapshot.rows == 26
    found = {row["shard"].startswith(two.root) for row in one.published() if "embedding" in row}
    assert found == {True}
    assert not one.publish(embedding=True).is_new
    one.publish(embedding=True, rebuild=True)
    assert one.published() == sorted(
        one.labels() + two.labels(), key=lambda row: (row["shard"], row["index"])
    )
