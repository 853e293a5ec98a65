"""What only Delta tables have: application transactions, the change data feed, and features."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs.local_s3 import LocalS3
from pipeline.config import ConfigError
from pipeline.storage import Storage, StorageError
from tests.fault_proxy import FaultProxy
from tests.pipeline.publish.tables import Dataset, needs_format

needs_format("delta")


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    dataset = Dataset(str(tmp_path))
    dataset.label(a=5, b=6)
    dataset.publish()
    return dataset


def actions(dataset: Dataset, version: int | None) -> list[dict[str, Any]]:
    """Returns the actions of a version in the log."""
    text = Path(dataset.table, "_delta_log", f"{version:020d}.json").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_versions_of_the_table_count_publications(dataset: Dataset) -> None:
    assert dataset.history() == [(0, "create table"), (1, "append")]
    dataset.label(a=4)
    assert dataset.publish().version == 2
    assert dataset.publish().version == 2


def test_publication_is_one_transaction_of_the_model(dataset: Dataset) -> None:
    dataset.label(a=7, remove=["b"])
    done = dataset.publish()
    found = actions(dataset, done.version)
    kinds = Counter(next(iter(action)) for action in found)
    assert kinds == {"commitInfo": 1, "txn": 1, "add": 1, "remove": 1, "cdc": 1}
    assert dataset.delta().transaction_version("cvt-label/model=cvt-00000001") == 2
    assert dataset.delta(1).transaction_version("cvt-label/model=cvt-00000001") == 1


def test_change_data_feed_has_the_rows_of_each_publication(dataset: Dataset) -> None:
    old = dataset.labels()
    dataset.label(a=7, c=3, remove=["b"])
    done = dataset.publish()
    dataset.label(d=2)
    dataset.publish()
    columns = ["shard", "index", "key", "score", "_change_type", "_commit_version"]
    feed = pa.table(dataset.delta().load_cdf(starting_version=1).read_all()).select(columns).to_pylist()
    by_version: dict[int, Counter[tuple[str, str]]] = {1: Counter(), 2: Counter(), 3: Counter()}
    for row in feed:
        by_version[row["_commit_version"]][row["shard"].rpartition("/")[2], row["_change_type"]] += 1
    assert by_version == {
        1: {("a", "insert"): 5, ("b", "insert"): 6},
        2: {("a", "delete"): 5, ("b", "delete"): 6, ("a", "insert"): 7, ("c", "insert"): 3},
        3: {("d", "insert"): 2},
    }
    rows = {(row["shard"], row["index"], row["score"]) for row in feed if row["_change_type"] == "insert"}
    assert rows == {(row["shard"], row["index"], row["score"]) for row in old + dataset.labels()}
    assert done.version == 2


def test_file_has_few_sorted_row_groups_and_bounds_for_filters(dataset: Dataset) -> None:
    [add] = [action["add"] for action in actions(dataset, 1) if "add" in action]
    statistics = json.loads(add["stats"])
    assert statistics["numRecords"] == 11
    assert {"shard", "label", "score"} <= {*statistics["minValues"]} & {*statistics["maxValues"]}
    assert add["partitionValues"] == {"model": "cvt-00000001"}


def test_table_without_changes_is_not_listed_again(dataset: Dataset) -> None:
    """A publication without changes reads the log and no prediction file."""
    opened = list[str]()

    class Counting(Storage):
        def open(self, uri: str, version: str | None = None, read_ahead: int = 0) -> Any:
            opened.append(uri)
            return super().open(uri, version, read_ahead)

    assert dataset.publish(Counting()).published_at is None
    assert not [uri for uri in opened if "/predictions/" in uri]


def test_compressed_log_is_read_after_a_checkpoint(dataset: Dataset) -> None:
    dataset.delta().alter.set_table_properties({"delta.checkpointInterval": "1"})
    dataset.label(c=3)
    dataset.publish()
    dataset.label(a=2)
    dataset.publish()
    assert list(Path(dataset.table, "_delta_log").glob("*.checkpoint.parquet"))
    assert dataset.published() == dataset.labels()
    assert dataset.delta().transaction_version("cvt-label/model=cvt-00000001") == 3


def test_store_that_ignores_conditions_gets_no_table(bucket: str, tmp_path: Path, s3_server: LocalS3) -> None:
    """Two publishers could commit the same version there."""
    dataset = Dataset(str(tmp_path), table_root=bucket)
    dataset.label(a=5)
    with FaultProxy(s3_server.endpoint_url) as proxy:
        proxy.always("ignored_conditions")
        with pytest.raises(StorageError, match="the store ignores the conditions of writes"):
            dataset.publish(Storage(endpoint_url=proxy.url))
    assert not dataset.objects(dataset.table)


def test_first_publication_leaves_no_object_outside_the_table(bucket: str, tmp_path: Path) -> None:
    dataset = Dataset(str(tmp_path), table_root=bucket)
    dataset.label(a=5)
    dataset.publish()
    names = {uri.removeprefix(f"{dataset.table}/").partition("/")[0] for uri in dataset.objects(bucket)}
    assert names == {"_delta_log", "model=cvt-00000001"}


@pytest.mark.parametrize(
    "name", ["a b", "100%", "ü", "it's", "a=b", "a&b", "a+b", "*", "~", "$x", '"', "日本"]
)
def test_table_may_have_any_of_these_names(dataset: Dataset, name: str) -> None:
    dataset.table = f"{dataset.root}/{name}/table"
    dataset.to = f"delta:{dataset.table}"
    dataset.publish()
    assert dataset.published() == dataset.labels()


@pytest.mark.parametrize(
    "name", ["a#b", "a?b", "a%20b", "a:b", "[x]", "a\\b", "a^b", "a|b", "a\tb", "a\x7fb"]
)
@pytest.mark.parametrize("place", ["", "s3://bucket"])
def test_name_that_the_library_reads_as_another_one_is_refused(
    dataset: Dataset, name: str, place: str
) -> None:
    before = dataset.objects(dataset.root)
    dataset.to = f"delta:{place or dataset.root}/{name}/table"
    with pytest.raises(ConfigError, match="the path of a Delta table must not contain '"):
        dataset.publish()
    assert dataset.objects(dataset.root) == before


def test_table_that_only_appends_refuses_changed_shards(dataset: Dataset) -> None:
    dataset.delta().alter.set_table_properties({"delta.appendOnly": "true"})
    dataset.label(c=3)
    dataset.publish()
    before = dataset.published()
    dataset.label(a=4)
    with pytest.raises(StorageError, match=rf"^{re.escape(dataset.to)}: the transaction was not committed: "):
        dataset.publish()
    assert dataset.published() == before


def test_constraint_that_rows_violate_is_reported(dataset: Dataset) -> None:
    dataset.delta().alter.add_constraint({"certain": "score IS NULL OR score > 0.1"})
    dataset.label(c=3)
    dataset.publish()
    dataset.delta().alter.drop_constraint("certain")
    dataset.delta().alter.add_constraint({"short": '"index" < 10'})
    before = dataset.published()
    dataset.label(d=11)
    with pytest.raises(
        StorageError, match=r"the transaction was not committed: .*1 rows failed validation"
    ) as raised:
        dataset.publish()
    assert "\n" not in str(raised.value)
    assert dataset.published() == before
