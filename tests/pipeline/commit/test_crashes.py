"""Runs that die before and after every single storage write, and the runs after them."""

from __future__ import annotations

import io
import json
import random
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.config import LABEL_NEW, Selection
from pipeline.storage import ObjectNotFound, Storage
from tests.makers import make_tar
from tests.pipeline import crashing
from tests.pipeline.crashing import Crash, Moment

SAMPLE = Path(__file__).parents[3] / "jobs" / "data" / "fashion-mnist" / "test-0000.tar"
Members = list[tuple[str, bytes]]


@pytest.fixture(scope="module")
def members() -> Members:
    """Images and labels of a tar, 120 samples."""
    with tarfile.open(SAMPLE) as tar:
        return [(m.name, tar.extractfile(m).read()) for m in tar.getmembers()[:240]]  # type: ignore[union-attr]


def images(members: Members, *numbers: int) -> dict[str, bytes]:
    """Loose images; in groups of about four, the names decide which."""
    return {f"loose/{n:03d}.png": members[2 * n][1] for n in numbers}


def first_day(members: Members) -> dict[str, bytes]:
    """An input."""
    return {
        "same.tar": make_tar(members[:40]),
        "changed.tar": make_tar(members[40:80]),
        "gone.tar": make_tar(members[80:100]),
        "broken.tar": make_tar(members[100:140]),
        "fails.tar": make_tar(members[140:160])[:3000],
        **images(members, *range(40, 70)),
    }


def second_day(members: Members) -> dict[str, bytes]:
    """What it is a day later: shards are new, have changed, and are gone; groups of images are cut anew."""
    return {
        "same.tar": make_tar(members[:40]),
        "changed.tar": make_tar(members[40:60] + members[160:180]),
        "broken.tar": make_tar(members[100:140])[:5000],
        "fails.tar": make_tar(members[140:160])[:3000],
        "new.tar": make_tar(members[180:220]),
        **images(members, *range(40, 50), *range(55, 70), *range(75, 95)),
    }


class Place:
    """Where a job reads and writes: a folder, or a bucket; it can be put back to an earlier state."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.storage = Storage()

    def objects(self, folder: str) -> dict[str, bytes]:
        """All objects below a folder, by their names below it."""
        try:
            found = [info.uri for info in self.storage.list(f"{self.root}/{folder}")]
        except ObjectNotFound:
            return {}
        return {uri.removeprefix(f"{self.root}/{folder}/"): self.storage.read(uri) for uri in found}

    def put(self, folder: str, objects: dict[str, bytes]) -> None:
        """Makes these the objects of a folder; what is as it should be is not touched."""
        there = self.objects(folder)
        for name in there.keys() - objects.keys():
            self.storage.delete(f"{self.root}/{folder}/{name}")
        for name, data in objects.items():
            if there.get(name) != data:
                self.storage.write(f"{self.root}/{folder}/{name}", data)

    def keep(self) -> None:
        """Keeps the output as it is, for `put_back`."""
        if self.root.startswith("/"):
            shutil.copytree(f"{self.root}/out", f"{self.root}/kept")  # with its times, which are versions
        else:
            self._kept = self.objects("out")

    def put_back(self) -> None:
        """Makes the output what it was."""
        if self.root.startswith("/"):
            shutil.rmtree(f"{self.root}/out")
            shutil.copytree(f"{self.root}/kept", f"{self.root}/out")
        else:
            self.put("out", self._kept)

    def run(self, selection: Selection | None = LABEL_NEW, crash: Crash | None = None) -> bool:
        """A run of the job, or of `stats --rebuild`; returns whether it came to its end."""
        places = [f"input.uri={self.root}/in", f"output.uri={self.root}/out"]
        return crashing.run([*places, "model.path=fashion-mnist"], selection, crash)

    def labels(self) -> dict[str, list[dict[str, Any]]]:
        """The rows that a reader sees who globs for prediction files, by shard; none twice, or it fails."""
        rows = [
            row
            for name, data in self.objects("out").items()
            if "/predictions/" in name and name.endswith(".parquet")
            for row in pq.read_table(io.BytesIO(data)).to_pylist()
        ]
        shards: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            shards.setdefault(row["shard"], []).append(row)
        for uri, found in shards.items():
            assert [row["index"] for row in found] == list(range(len(found))), uri
        loose = Counter(row["key"] for row in rows if "/images-" in row["shard"])
        assert not [key for key, times in loose.items() if times > 1]
        return shards

    def last_counts(self) -> dict[str, int]:
        """What the last run did, by its record."""
        records = {name: data for name, data in self.objects("out").items() if "/runs/" in name}
        last = max(map(json.loads, records.values()), key=lambda record: record["started_at"])
        return dict(last["counts"])

    def end_state(self) -> dict[str, Any]:
        """What two runs have in common that came to the same end."""
        state: dict[str, Any] = {}
        for path, data in self.objects("out").items():
            name = path.partition("/")[2]
            if name.startswith("predictions/") or name == "class_stats.parquet":
                state[name] = data
            if name == "manifest.parquet":  # local versions are times
                table = pq.read_table(io.BytesIO(data)).drop_columns(["run", "committed_at"])
                is_local = self.root.startswith("/")
                state[name] = table.drop_columns(["output_version"] if is_local else []).to_pylist()
        return state


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest) -> Place:
    if request.param == "folder":
        return Place(str(request.getfixturevalue("tmp_path")))
    return Place(str(request.getfixturevalue("bucket")))


@pytest.fixture
def points(request: pytest.FixtureRequest, place: Place) -> Iterator[int]:
    """Writes at which to die: all of them; in a bucket, where they take longer, every eighth."""
    every = place.root.startswith("/") or request.config.getoption("--every-crash-point")
    return count(1) if every else count(3, 8)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_run_that_dies_at_any_write_leaves_whole_shards_and_the_next_one_does_the_rest(
    place: Place, members: Members, moment: Moment, points: Iterator[int]
) -> None:
    """The first run over an input."""
    place.put("in", first_day(members))
    assert place.run()
    end, labels = place.end_state(), place.labels()
    assert len(labels) > 8
    for number in points:
        place.put("out", {})
        died = not place.run(crash=Crash(number, moment))
        there = place.labels()
        for uri, rows in there.items():
            assert rows == labels[uri]
        assert place.run()
        assert place.end_state() == end
        counts = place.last_counts()
        assert counts["shards"] - counts["unreadable_shards"] == len(labels) - len(there)  # paid once
        if not died:
            assert number > 10
            return


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize(
    "selection", [LABEL_NEW, Selection(retry_errors=True, prune=True)], ids=["increment", "retry and prune"]
)
def test_an_increment_that_dies_at_any_write_does_so_too(
    place: Place, members: Members, selection: Selection, moment: Moment, points: Iterator[int]
) -> None:
    """A second run, over an input that has changed."""
    place.put("in", first_day(members))
    assert place.run()
    start, old = place.end_state(), place.labels()
    place.keep()
    place.put("in", second_day(members))
    assert place.run(selection)
    end, new = place.end_state(), place.labels()
    assert end.keys() != start.keys()
    for number in points:
        place.put_back()
        died = not place.run(selection, Crash(number, moment))
        for uri, rows in place.labels().items():
            assert rows in (old.get(uri), new.get(uri)), uri
        assert place.run(selection)
        assert place.end_state() == end
        if not died:
            assert number > 10
            return


def test_runs_that_die_one_after_the_other_leave_no_more_than_one_does(
    tmp_path: Path, members: Members
) -> None:
    """Each of a row of runs dies at a random write, and so does a rebuilding of the manifest between them."""
    place, chance = Place(str(tmp_path)), random.Random(5)
    place.put("in", first_day(members))
    assert place.run()
    place.keep()
    place.put("in", second_day(members))
    assert place.run()
    end, new = place.end_state(), place.labels()
    for _ in range(6):
        place.put_back()
        old = place.labels()
        for _ in range(4):
            crash = Crash(chance.randint(1, 25), chance.choice(["before", "after"]))
            place.run(chance.choice([LABEL_NEW, LABEL_NEW, None]), crash)
            for uri, rows in place.labels().items():
                assert rows in (old.get(uri), new.get(uri)), uri
        assert place.run()
        assert place.end_state() == end


def test_an_input_that_has_changed_since_a_run_died_is_labelled_as_it_is(
    tmp_path: Path, members: Members
) -> None:
    place = Place(str(tmp_path))
    place.put("in", second_day(members))
    assert place.run()
    new = place.labels()
    place.put("out", {})
    place.put("in", first_day(members))
    assert place.run()
    old = place.labels()
    for number in count(1, 3):
        place.put("out", {})
        place.put("in", first_day(members))
        died = not place.run(crash=Crash(number, "after"))
        place.put("in", second_day(members))
        assert place.run(Selection(prune=True))
        labels = place.labels()
        [broken] = [
            uri for uri in old if uri.endswith("/broken.tar")
        ]  # its old labels stay, if there are any
        assert labels.pop(broken, old[broken]) == old[broken]
        assert labels == new
        assert place.last_counts()["unreadable_shards"] >= 1
        if not died:
            return


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_rebuilding_that_dies_at_any_write_is_made_up_for(
    place: Place, members: Members, moment: Moment
) -> None:
    """By a run, and by another rebuilding."""
    place.put("in", first_day(members))
    assert place.run()
    place.put("in", second_day(members))
    assert place.run()
    end = place.end_state()
    for number in count(1):
        for name in place.objects("out"):
            if name.endswith(("manifest.parquet", "class_stats.parquet")):
                place.storage.delete(f"{place.root}/out/{name}")
        died = not place.run(None, Crash(number, moment))
        assert place.run(LABEL_NEW if number % 2 else None)
        assert place.end_state() == end
        if not died:
            assert number > 3
            return
