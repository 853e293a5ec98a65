"""Publishing a partition as a table of either format, in a folder and in a bucket."""

from __future__ import annotations

from tests.pipeline.publish.tables import Dataset, Datasets, changes


def test_every_version_has_the_rows_of_the_prediction_files(anywhere: Dataset) -> None:
    dataset = anywhere
    dataset.label(**{"a.tar": 4, "b'; --.tar": 10, "c=d/e.tar": 20, "f.tar": 10})
    first = dataset.publish()
    history = {first.version: dataset.labels()}
    dataset.label(remove=["f.tar"], **{"b'; --.tar": 15})
    second = dataset.publish()
    history[second.version] = dataset.labels()
    for version, rows in history.items():
        assert dataset.published(version) == rows
    assert dataset.published() == rows


def test_publication_changes_rows_of_its_own_dataset_only(local: Dataset) -> None:
    both = Datasets(local)
    assert local.published() == []
    one, two = both
    one.publish()
    done = two.publish()
    assert changes(done, two.root) == {"added": ["a", "z"]}
    assert one.published() == both.labels()
    other = Dataset(one.root, "cvt-00000002", table_of=one)
    other.label(a=3)
    other.publish()
    assert len(one.published()) == len(both.labels()) + 3
