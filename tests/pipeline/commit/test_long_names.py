"""Shards with the longest names that a bucket or a disk allows: labeled once, rebuilt, pruned."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.commit import Partition
from pipeline.compare import LabelSet
from pipeline.compare.label_sets import measure_agreement
from pipeline.config import Selection
from pipeline.predictions import is_allowed_path
from pipeline.report import read_gallery
from pipeline.run import ShardState, label, make_job, rebuild
from pipeline.statistics import ClassMapping
from pipeline.storage import ObjectNotFound, Storage, StorageError
from tests.makers import make_image, make_tar
from tests.partitions import manifest_rows
from tests.runs import run_config

#: The longest parts of a name that a disk and the test's S3 server allow, also with three bytes per
#: character.
PARTS = ("x" * 251 + ".tar", "y" * 251 + ".tar", "日" * 83 + "a.tar", "=" * 200 + ".tar", "short.tar")


class Place:
    """A dataset with its labels."""

    def __init__(self, root: str, *overrides: str) -> None:
        self.root = root
        self.storage = Storage()
        self.config = run_config(root, *overrides)

    def put(self, shards: Mapping[str, bytes], remove: Iterable[str] = ()) -> None:
        """Adds, replaces and removes shards of the input."""
        for name in remove:
            self.storage.delete(self.shard_uri(name))
        for name, data in shards.items():
            self.storage.write(self.shard_uri(name), data)

    @property
    def partition(self) -> Partition:
        return make_job(self.config).partition

    def objects(self, folder: str) -> dict[str, str]:
        """Versions of all objects in a folder."""
        try:
            return {info.uri: info.version for info in self.storage.list(f"{self.root}/{folder}")}
        except ObjectNotFound:
            return {}

    def predictions(self) -> list[dict[str, Any]]:
        """The rows of all prediction files."""
        files = [self.storage.read(uri) for uri in self.objects("out") if "/predictions/" in uri]
        return [row for file in files for row in pq.read_table(io.BytesIO(file)).to_pylist()]

    def shard_uri(self, name: str) -> str:
        return f"{self.root}/in/{name}"


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    root = str(tmp_path) if request.param == "folder" else request.getfixturevalue("bucket")
    return Place(root)


def names(root: str) -> list[str]:
    """Names of shards; two are in a deep folder, for keys of 1,024 bytes."""
    used = len("in/") if "://" in root else len(f"{root}/in/".encode())
    deep = "/".join(["d" * 100] * 11)[: 1024 - used - len("/1.tar")].rstrip("/")
    return [*PARTS, f"{deep}/1.tar", f"{deep}/2.tar"]


def tar(seed: int, count: int = 3) -> bytes:
    return make_tar([(f"{i}.jpg", make_image(seed * 10 + i)) for i in range(count)])


def put(place: Place) -> list[str]:
    found = names(place.root)
    place.put({name: tar(i) for i, name in enumerate(found)})
    return found


def outputs(place: Place) -> list[str]:
    prefix = f"{place.partition.uri}/predictions/"
    return sorted(uri.removeprefix(prefix) for uri in place.objects("out") if uri.startswith(prefix))


def shards(place: Place) -> set[str]:
    return {row["shard"].removeprefix(f"{place.root}/in/") for row in place.predictions()}


@pytest.mark.slow
def test_longest_possible_names_are_labeled_once(place: Place) -> None:
    found = put(place)
    result = label(place.config)
    assert result.is_complete
    assert shards(place) == set(found)
    assert len(place.predictions()) == 3 * len(found) == result.totals.images
    assert all(is_allowed_path(path) for path in outputs(place))
    assert sum("%7E" in path for path in outputs(place)) == len(found) - 1
    before = place.objects("out")
    again = label(place.config)
    assert again.plan.states == {ShardState.DONE: len(found), ShardState.DELETED: 0}
    after = place.objects("out")
    changed = {uri.rpartition("/")[2] for uri, version in after.items() if before.get(uri) != version}
    assert changed == {"lease.json", f"{again.run}.json"}
    gallery = read_gallery(place.storage, place.partition.uri)
    assert {*gallery["shard"].to_pylist()} <= {place.shard_uri(name) for name in found}


def test_longest_names_are_recovered_without_a_manifest_and_replaced(place: Place) -> None:
    found = put(place)
    label(place.config)
    manifest = {
        row.uri: replace(row, run=None, committed_at=None) for row in manifest_rows(place.partition.manifest)
    }
    place.storage.delete(place.partition.manifest.uri)
    rebuild(make_job(place.config).partition)
    assert {row.uri: row for row in manifest_rows(place.partition.manifest)} == manifest
    before = outputs(place)
    place.put({found[0]: tar(50, count=5), found[-1]: tar(60, count=1)})
    result = label(place.config)
    assert result.plan.states[ShardState.CHANGED] == result.totals.shards == 2
    assert outputs(place) == before
    assert len(place.predictions()) == 3 * (len(found) - 2) + 5 + 1


def test_longest_names_are_pruned(place: Place) -> None:
    found = put(place)
    label(place.config)
    removed = {found[0], found[2], found[-1]}
    place.put({}, remove=removed)
    label(place.config, selection=Selection(prune=True))
    assert shards(place) == set(found) - removed
    assert len(outputs(place)) == len(found) - len(removed)


def test_longest_names_of_two_models_are_compared(bucket: str) -> None:
    place = Place(bucket)
    found = put(place)
    label_sets = []
    for topk in (5, 2):
        partition = label(
            place.config.model_copy(update={"output": place.config.output.model_copy(update={"topk": topk})})
        ).job.partition
        label_sets.append(LabelSet.open(partition.storage, partition.uri))
    labels = list(partition.labels)
    agreement = measure_agreement(ClassMapping.matched(labels, labels), *label_sets)
    assert (agreement.shards, agreement.compared, agreement.fraction) == (len(found), 3 * len(found), 1.0)


def test_local_output_path_that_is_too_long_is_rejected(tmp_path: Path) -> None:
    Storage().write(f"{tmp_path}/in/a.tar", tar(1))
    for folder in ("o" * 256, "/".join(["o" * 200] * 20)):
        place = Place(str(tmp_path), f"output.uri={tmp_path}/{folder}")
        with pytest.raises(StorageError, match=f"{folder}.*: File name too long"):
            label(place.config)
