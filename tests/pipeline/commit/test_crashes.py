"""Runs that die between any two storage writes, and the runs after them.

A run is recorded: the output after each of its writes is what a run that dies there leaves. A few runs are
really killed.
"""

from __future__ import annotations

import io
import json
import random
import secrets
import shutil
import tarfile
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.commit import lease, manifest_writer
from pipeline.config import LABEL_NEW, Config, Selection, load_config
from pipeline.run import label, make_job, rebuild
from pipeline.storage import ObjectNotFound, Storage
from tests.makers import make_tar
from tests.pipeline import crashing
from tests.pipeline.crashing import Crash
from tests.runs import run_fields, small_groups

SAMPLE = Path(__file__).parents[3] / "jobs" / "data" / "fashion-mnist" / "test-0000.tar"
Members = list[tuple[str, bytes]]
#: An output: a copy of a folder, or the objects of a bucket.
Snapshot = Path | dict[str, bytes]


pytestmark = pytest.mark.slow


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

    def snapshot(self, name: str = "kept") -> Snapshot:
        """The output as it is now, for `restore`; in a folder with its times, which are versions."""
        if not self.root.startswith("/"):
            return self.objects("out")
        return Path(shutil.copytree(f"{self.root}/out", f"{self.root}/{name}", dirs_exist_ok=False))

    def restore(self, snapshot: Snapshot) -> None:
        """Makes the output what it was."""
        if isinstance(snapshot, dict):
            self.put("out", snapshot)
            return
        shutil.rmtree(f"{self.root}/out", ignore_errors=True)
        shutil.copytree(snapshot, f"{self.root}/out")

    def fields(self) -> list[str]:
        return run_fields(self.root)

    def run(self, selection: Selection | None = LABEL_NEW) -> None:
        """A run of the job, or of `stats --rebuild` where nothing is selected."""
        config = load_config(Config, None, self.fields())
        if selection is None:
            rebuild(make_job(config).partition)
        else:
            label(config, selection=selection)

    def recorded(self, selection: Selection | None = LABEL_NEW) -> list[Snapshot]:
        """As `run`; returns the output after each write and each removal."""
        lock, snapshots = threading.Lock(), list[Snapshot]()

        def recording(action: Callable[..., Any]) -> Callable[..., Any]:
            def act(*args: Any, **options: Any) -> Any:
                with lock:
                    result = action(*args, **options)
                    snapshots.append(self.snapshot(f"state-{secrets.token_hex(4)}"))
                return result

            return act

        with pytest.MonkeyPatch.context() as patch:
            for name in ("write", "delete"):
                patch.setattr(Storage, name, recording(getattr(Storage, name)))
            self.run(selection)
        return snapshots

    def dies(self, selection: Selection | None, crash: Crash) -> bool:
        """As `run`, in a process that is killed; returns whether it was before its end."""
        return not crashing.run(self.fields(), selection, crash)

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


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    small_groups(monkeypatch)
    monkeypatch.setattr(manifest_writer, "MOST_PENDING", 2)
    monkeypatch.setattr(lease.LeaseState, "is_live", False)  # runs die, and their leases are not waited for


@pytest.fixture
def every(place: Place) -> int:
    """1 to die at every write; in a bucket, where writes take longer, 8 for every eighth."""
    return 1 if place.root.startswith("/") else 8


def test_a_run_that_dies_at_any_write_leaves_whole_shards_and_the_next_one_does_the_rest(
    place: Place, members: Members, every: int
) -> None:
    """The first run over an input."""
    place.put("in", first_day(members))
    states = place.recorded()
    end, labels = place.end_state(), place.labels()
    assert len(labels) > 8
    assert len(states) > 10
    for state in states[::every]:
        place.restore(state)
        there = place.labels()
        for uri, rows in there.items():
            assert rows == labels[uri]
        place.run()
        assert place.end_state() == end
        counts = place.last_counts()
        assert counts["shards"] - counts["unreadable_shards"] == len(labels) - len(there)  # paid once


@pytest.mark.parametrize(
    "selection", [LABEL_NEW, Selection(retry_errors=True, prune=True)], ids=["increment", "retry and prune"]
)
def test_an_increment_that_dies_at_any_write_does_so_too(
    place: Place, members: Members, selection: Selection, every: int
) -> None:
    """A second run, over an input that has changed."""
    place.put("in", first_day(members))
    place.run()
    start, old = place.end_state(), place.labels()
    place.put("in", second_day(members))
    states = place.recorded(selection)
    end, new = place.end_state(), place.labels()
    assert end.keys() != start.keys()
    assert len(states) > 10
    for state in states[::every]:
        place.restore(state)
        for uri, rows in place.labels().items():
            assert rows in (old.get(uri), new.get(uri)), uri
        place.run(selection)
        assert place.end_state() == end


def test_runs_that_are_killed_one_after_the_other_leave_no_more_than_one_does(
    tmp_path: Path, members: Members
) -> None:
    """Each of a row of runs is killed at a random write, and so is a rebuilding of the manifest."""
    place, chance = Place(str(tmp_path)), random.Random(5)
    place.put("in", first_day(members))
    place.run()
    kept = place.snapshot()
    place.put("in", second_day(members))
    place.run()
    end, new = place.end_state(), place.labels()
    for _ in range(2):
        place.restore(kept)
        old = place.labels()
        for selection in (LABEL_NEW, None, LABEL_NEW, None):
            place.dies(selection, Crash(chance.randint(1, 25), chance.choice(["before", "after"])))
            for uri, rows in place.labels().items():
                assert rows in (old.get(uri), new.get(uri)), uri
        place.run()
        assert place.end_state() == end


def test_an_input_that_has_changed_since_a_run_died_is_labelled_as_it_is(
    tmp_path: Path, members: Members
) -> None:
    place = Place(str(tmp_path))
    place.put("in", second_day(members))
    place.run()
    new = place.labels()
    place.put("out", {})
    place.put("in", first_day(members))
    states = place.recorded()
    old = place.labels()
    place.put("in", second_day(members))
    for state in states[::3]:
        place.restore(state)
        place.run(Selection(prune=True))
        labels = place.labels()
        [broken] = [uri for uri in old if uri.endswith("/broken.tar")]
        assert labels.pop(broken, old[broken]) == old[broken]  # its old labels stay, if there are any
        assert labels == new
        assert place.last_counts()["unreadable_shards"] >= 1


def test_a_rebuilding_that_dies_at_any_write_is_made_up_for(place: Place, members: Members) -> None:
    """By a run, and by another rebuilding."""
    place.put("in", first_day(members))
    place.run()
    place.put("in", second_day(members))
    place.run()
    end = place.end_state()
    for name in place.objects("out"):
        if name.endswith(("manifest.parquet", "class_stats.parquet")):
            place.storage.delete(f"{place.root}/out/{name}")
    states = place.recorded(None)
    assert len(states) > 3
    for number, state in enumerate(states):
        place.restore(state)
        place.run(LABEL_NEW if number % 2 else None)
        assert place.end_state() == end
