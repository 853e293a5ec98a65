"""What the owner of a Delta table does with it beside publishing: the next publications set it right."""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.config import Selection
from pipeline.publish import delta_table, publish
from tests.makers import make_tar
from tests.pipeline.crashing import leave_out_ray
from tests.pipeline.publish.publishing_runs import Datasets, Place, Rows, make_table

deltalake = pytest.importorskip("deltalake", reason="deltalake is not installed: cvt-label[delta]")

SAMPLE = Path(__file__).parents[3] / "jobs" / "data" / "fashion-mnist" / "test-0000.tar"


@pytest.fixture(scope="module")
def shards() -> list[bytes]:
    """Tars of five images each."""
    with tarfile.open(SAMPLE) as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar.getmembers()[:80]]  # type: ignore[union-attr]
    return [make_tar(members[start : start + 10]) for start in range(0, 80, 10)]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory, shards: list[bytes]) -> Iterator[Datasets]:
    with pytest.MonkeyPatch.context() as patch:
        leave_out_ray(patch)
        yield Datasets(str(tmp_path_factory.mktemp("owner")), "delta", shards)


@pytest.fixture
def both(labelled: Datasets) -> Datasets:
    """Two datasets in a new table, which no test labels anew."""
    shutil.rmtree(f"{labelled.one.root}/table", ignore_errors=True)
    labelled.publish(labelled.one)
    labelled.publish(labelled.two)
    assert labelled.one.published() == labelled.labels
    return labelled


@pytest.fixture
def datasets(tmp_path: Path, shards: list[bytes], monkeypatch: pytest.MonkeyPatch) -> Datasets:
    """Two datasets, not published yet."""
    leave_out_ray(monkeypatch)
    return Datasets(str(tmp_path), "delta", shards)


def takes_a_row_out_of_each(both: Datasets) -> None:
    for place, name in ((both.one, "b.tar"), (both.two, "z.tar")):
        both.one.delta().delete(f"shard = '{place.shard_uri(name)}' AND index = 3")


def takes_a_shard_out_of_each(both: Datasets) -> None:
    for place in (both.one, both.two):
        both.one.delta().delete(f"shard = '{place.shard_uri('a.tar')}'")


def takes_out_the_shard_that_came_last_and_compacts(both: Datasets) -> None:
    both.one.delta().delete(f"shard = '{both.two.shard_uri('z.tar')}'")
    both.one.delta().optimize.compact()


def takes_out_all(both: Datasets) -> None:
    both.one.delta().delete()


def adds_all_once_more(both: Datasets) -> None:
    deltalake.write_deltalake(both.one.delta(), both.one.delta().to_pyarrow_table(), mode="append")


def puts_the_first_version_back(both: Datasets) -> None:
    both.one.delta().restore(0)


def sorts_it_by_label_over_small_files(both: Datasets) -> None:
    both.one.delta().optimize.z_order(["label"], target_size=6000)


def loses_the_list(both: Datasets) -> None:
    for uri in both.lists():
        both.one.storage.delete(uri)


def copies_the_rows(both: Datasets) -> None:
    """As a tool does it that knows rows, and nothing of the log."""
    rows, table = both.one.delta().to_pyarrow_table(), f"{both.one.root}/table"
    shutil.rmtree(table)
    deltalake.write_deltalake(table, rows, partition_by=["model"])


Doing = Callable[[Datasets], None]
DOINGS: list[Doing] = [
    takes_a_row_out_of_each,
    takes_a_shard_out_of_each,
    takes_out_the_shard_that_came_last_and_compacts,
    takes_out_all,
    adds_all_once_more,
    puts_the_first_version_back,
    sorts_it_by_label_over_small_files,
    loses_the_list,
    copies_the_rows,
]


def rows_of(place: Place, table: Rows) -> Rows:
    return [row for row in table if row["shard"].startswith(f"{place.root}/in/")]


@pytest.mark.parametrize("first", ["one", "two"])
@pytest.mark.parametrize("doing", DOINGS, ids=lambda doing: doing.__name__)
def test_each_dataset_sets_its_own_rows_right_and_leaves_the_others_as_they_are(
    both: Datasets, doing: Doing, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delta_table, "_AT_ONCE", 1)
    doing(both)
    places = [both.one, both.two] if first == "one" else [both.two, both.one]
    others = rows_of(places[1], both.one.published())
    both.publish(places[0])
    found = both.one.published()
    assert rows_of(places[0], found) == places[0].predictions()
    assert rows_of(places[1], found) == others
    both.publish(places[1])
    assert both.one.published() == both.labels
    for place in places:
        assert not both.publish(place).is_new


def test_only_what_is_not_as_it_was_published_is_published_anew(both: Datasets) -> None:
    takes_a_row_out_of_each(both)
    done = both.publish(both.one)
    assert done.increment.added["uri"].to_pylist() == [both.one.shard_uri("b.tar")]
    done = both.publish(both.two)
    assert done.increment.added["uri"].to_pylist() == [both.two.shard_uri("z.tar")]
    takes_a_shard_out_of_each(both)
    done = both.publish(both.one)
    assert done.increment.added["uri"].to_pylist() == [both.one.shard_uri("a.tar")]
    sorts_it_by_label_over_small_files(both)
    assert not both.publish(both.one).is_new
    assert both.publish(both.two).increment.added["uri"].to_pylist() == [both.two.shard_uri("a.tar")]


def test_a_shard_that_was_published_again_with_as_many_rows_comes_again_after_an_earlier_version(
    datasets: Datasets, shards: list[bytes]
) -> None:
    one = datasets.one
    datasets.publish(one)
    datasets.publish(datasets.two)
    one.put({"b.tar": shards[5]})
    one.label()
    datasets.publish(one)
    one.delta().restore(1)
    assert len(one.published()) == len(datasets.labels)
    assert one.published() != datasets.labels
    assert not datasets.publish(datasets.two).is_new
    done = datasets.publish(one)
    assert done.increment.added["uri"].to_pylist() == [one.shard_uri("b.tar")]
    assert one.published() == datasets.labels


def test_of_shards_that_an_earlier_version_brings_back_those_of_a_single_dataset_go_again(
    datasets: Datasets,
) -> None:
    """In a table of several nobody knows whose they were, and they stay."""
    one, two = datasets.one, datasets.two
    datasets.publish(one)
    one.put({}, remove=("a.tar",))
    one.label(Selection(prune=True))
    datasets.publish(one)
    one.delta().restore(0)
    done = datasets.publish(one)
    assert done.increment.removed.to_pylist() == [one.shard_uri("a.tar")]
    assert one.published() == one.predictions()

    datasets.publish(two)
    gone = [row for row in one.published() if row["shard"] == one.shard_uri("b.tar")]
    one.put({}, remove=("b.tar",))
    one.label(Selection(prune=True))
    datasets.publish(one)
    one.delta().restore(one.delta().version() - 1)
    datasets.publish(two)
    datasets.publish(one)
    assert one.published() == sorted([*datasets.labels, *gone], key=lambda row: (row["shard"], row["index"]))
    one.delta().delete(f"shard = '{one.shard_uri('b.tar')}'")
    assert not datasets.publish(two).is_new
    assert not datasets.publish(one).is_new
    assert one.published() == datasets.labels


@pytest.mark.parametrize("doing", [loses_the_list, copies_the_rows], ids=lambda doing: doing.__name__)
def test_a_table_with_embeddings_is_known_as_one_without_its_list(
    tmp_path: Path, shards: list[bytes], monkeypatch: pytest.MonkeyPatch, doing: Doing
) -> None:
    leave_out_ray(monkeypatch)
    both = Datasets(str(tmp_path), "delta", shards, "output.embedding=float16")
    both.publish(both.one)
    both.publish(both.two)
    expected = embeddings(both.one)
    assert len(expected) == 25
    doing(both)
    both.publish(both.one)
    both.publish(both.two)
    assert embeddings(both.one) == expected
    assert both.one.published() == both.labels


def test_a_version_from_before_embeddings_is_brought_up_to_date(
    tmp_path: Path, shards: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while labels of a shard have changed since the manifest was written."""
    leave_out_ray(monkeypatch)
    one = Place(str(tmp_path), "delta", "output.embedding=float16")
    one.put({"a.tar": shards[0], "b.tar": shards[1]})
    one.label()
    one.publish(embedding=False)
    one.publish(embedding=True)
    expected = embeddings(one)
    one.delta().restore(0)
    kept = one.storage.read(one.prediction_uri("b.tar"))
    one.storage.write(one.prediction_uri("b.tar"), kept)
    assert one.publish().increment.pending.to_pylist() == [one.shard_uri("b.tar")]
    one.label()
    one.publish()
    assert embeddings(one) == expected


def embeddings(place: Place) -> list[Any]:
    table: pa.Table = place.delta().to_pyarrow_table(columns=["shard", "index", "embedding"])
    found: list[Any] = table.sort_by([("shard", "ascending"), ("index", "ascending")])[
        "embedding"
    ].to_pylist()
    assert None not in found
    return found


def test_what_is_no_data_file_of_a_table_is_named(both: Datasets) -> None:
    rows = both.one.delta().to_pyarrow_table().drop_columns(["published"])
    shutil.rmtree(f"{both.one.root}/table")
    deltalake.write_deltalake(f"{both.one.root}/table", rows, partition_by=["model"])
    table = make_table(both.one.partition, f"{both.one.root}/table", "delta")
    with pytest.raises(delta_table.StorageError, match=r"\.parquet: not a file of predictions"):
        publish(both.one.partition, table)
