"""Several datasets and models in one table: a publication changes the rows of its own partition only."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pyarrow as pa
import pytest

from pipeline.publish import Publication
from pipeline.storage import StorageError
from tests.pipeline.publish.tables import Dataset, Datasets, WatchedStorage, changes


@pytest.fixture
def both(local: Dataset) -> Datasets:
    return Datasets(local)


def models(dataset: Dataset, count: int) -> list[Dataset]:
    """Returns datasets of several models for the same table."""
    return [Dataset(dataset.root, f"cvt-0000000{number}", table_of=dataset) for number in range(count)]


def rows_by_model(dataset: Dataset) -> dict[str, int]:
    """Returns the number of rows of each model in the table."""
    return Counter(dataset.rows()["model"].to_pylist())


def test_publication_changes_rows_of_its_own_dataset_only(both: Datasets) -> None:
    one, two = both
    one.publish()
    assert changes(two.publish(), two.root) == {"added": ["a", "z"]}
    assert one.published() == both.labels()
    assert one.publish().published_at is None
    assert two.publish().published_at is None

    one.label(b=7, d=8, remove=["a"])
    found = changes(one.publish(), one.root)
    assert found == {"added": ["b", "d"], "replaced": ["b"], "removed": ["a"]}
    assert one.published() == both.labels()
    two.label(y=3, remove=["z"])
    two.publish()
    assert one.published() == both.labels()


def test_rebuild_replaces_rows_of_its_own_dataset_only(both: Datasets) -> None:
    one, two = both
    one.publish()
    before = two.publish()
    one.label(b=3, remove=["a"])
    done = one.publish(rebuild=True)
    assert changes(done, one.root) == {"added": ["b", "c"], "replaced": ["b", "c"], "removed": ["a"]}
    assert one.published() == both.labels()
    times = {row["source"]: row["published_at"] for row in one.rows().to_pylist()}
    assert times == {one.uri: done.published_at, two.uri: before.published_at}
    assert two.publish().published_at is None
    assert one.publish(rebuild=True).published_at is not None
    assert one.published() == both.labels()


def test_removing_all_shards_of_a_dataset_keeps_the_other_dataset(both: Datasets) -> None:
    one, two = both
    one.publish()
    two.publish()
    two.label(remove=["a", "z"])
    assert len(two.publish().removed) == 2
    assert one.published() == one.labels()


def test_shard_of_two_partitions_is_refused_and_the_other_one_is_named(both: Datasets) -> None:
    """The same input is labeled with the same model into two outputs."""
    one, _ = both
    one.publish()
    duplicate = Dataset(one.root, table_of=one)
    duplicate.uri = f"{one.root}/duplicate/{one.partition.name}"
    duplicate.label(a=5)
    for rebuild in (False, True):
        with pytest.raises(StorageError) as raised:
            duplicate.publish(rebuild=rebuild)
        cause = (
            f"{one.to}: the table already has shard {one.shard('a')} from {one.uri}; publish to another table"
        )
        assert str(raised.value).startswith(cause)
    assert one.published() == one.labels()
    one.label(remove=["a"])
    one.publish()
    duplicate.publish()
    assert len(one.published()) == len(one.labels()) + 5


def test_deleted_shard_is_refused_if_another_partition_has_rows_of_it(both: Datasets) -> None:
    """The owner of the table added these rows. `publish` never changes rows of another source."""
    one, _ = both
    one.publish()
    rows = one.rows().slice(0, 1)
    source = rows.schema.get_field_index("source")
    rows = rows.set_column(source, rows.schema.field(source), pa.array(["elsewhere"], pa.string()))
    if one.format == "delta":
        import deltalake

        deltalake.write_deltalake(one.table, rows, mode="append")
    else:
        one.iceberg().append(rows)
    one.label(remove=[rows["shard"][0].as_py().rpartition("/")[2]])
    before = one.rows().num_rows
    with pytest.raises(StorageError, match="from elsewhere; publish to another table"):
        one.publish()
    assert one.rows().num_rows == before


def test_shards_of_two_partitions_at_once_are_refused(both: Datasets) -> None:
    """The other partition is published before the commit of the first."""
    one, _ = both
    duplicate = Dataset(one.root, table_of=one)
    duplicate.uri = f"{one.root}/duplicate/{one.partition.name}"
    duplicate.label(a=5)
    others = iter([duplicate])

    def publish_other(uri: str) -> None:
        if other := next(others, None):
            other.publish()

    with pytest.raises(StorageError, match="the table already has shard"):
        one.publish(WatchedStorage(before=publish_other))
    assert one.published() == duplicate.labels()


def test_concurrent_publications_of_two_datasets_succeed(both: Datasets) -> None:
    """The second dataset is published before the commit of the first."""
    one, two = both
    others = iter([two])

    def publish_other(uri: str) -> None:
        if "/predictions/" in uri and (other := next(others, None)):
            assert other.publish().published_at is not None

    assert one.publish(WatchedStorage(before=publish_other)).published_at is not None
    assert one.published() == both.labels()


def test_models_share_a_table(local: Dataset) -> None:
    one, two = models(local, 2)
    one.label(a=5)
    two.label(a=5, b=6)
    one.publish()
    two.publish()
    assert one.publish().published_at is None
    assert two.publish().published_at is None
    assert rows_by_model(one) == {one.partition.model: 5, two.partition.model: 11}
    two.label(a=2, remove=["b"])
    two.publish()
    one.publish(rebuild=True)
    assert rows_by_model(one) == {one.partition.model: 5, two.partition.model: 2}
    one.label(remove=["a"])
    one.publish()
    assert one.published() == two.labels()


def test_table_is_partitioned_by_model(local: Dataset) -> None:
    for each in models(local, 2):
        each.label(a=3)
        each.publish()
    folders = {
        uri.removeprefix(f"{local.table}/").removeprefix("data/").partition("/")[0] for uri in local.files()
    }
    assert folders == {"model=cvt-00000000", "model=cvt-00000001"}


def test_publications_during_those_of_another_model_succeed(local: Dataset) -> None:
    """A second model is published before each commit of the first model."""
    one, two = models(local, 2)
    for day in ({"a": 5}, {"b": 6}, {"a": 4}):
        one.label(**day)
        two.label(**day)
        done = one.publish(WatchedStorage(before=lambda uri: "/predictions/" in uri and two.publish()))
        assert done.published_at is not None
    assert rows_by_model(one) == {each.partition.model: 10 for each in (one, two)}


def test_concurrent_first_publications_of_models_succeed(local: Dataset) -> None:
    several = models(local, 4)
    assert local.version() is None  # this prepares the SQL catalog, which fails in several threads
    for each in several:
        each.label(a=3)
    start = Barrier(4)

    def publish(dataset: Dataset) -> Publication:
        start.wait(60)
        return dataset.publish()

    with ThreadPoolExecutor(4) as pool:
        assert all(done.published_at for done in pool.map(publish, several))
    assert rows_by_model(local) == {each.partition.model: 3 for each in several}
    assert all(each.publish().published_at is None for each in several)
