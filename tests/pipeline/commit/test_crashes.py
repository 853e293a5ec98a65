"""Runs that die between any two storage writes, and the following runs.

A run is recorded: the output after each of its writes equals the output of a run that dies there. A few runs
are really killed.
"""

from __future__ import annotations

import itertools
import os
import random
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.commit import lease, manifest_writer
from pipeline.config import LABEL_NEW, Selection
from pipeline.storage import Storage
from tests.makers import make_tar
from tests.pipeline.crashing import Crash
from tests.pipeline.replaying import Place, Snapshot
from tests.runs import small_groups

SAMPLE = Path(__file__).parents[3] / "jobs" / "data" / "fashion-mnist" / "test-0000.tar"
Members = list[tuple[str, bytes]]


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def members() -> Members:
    """Images and labels of a tar, 120 samples."""
    with tarfile.open(SAMPLE) as tar:
        return [(m.name, tar.extractfile(m).read()) for m in tar.getmembers()[:240]]  # type: ignore[union-attr]


def images(members: Members, *numbers: int) -> dict[str, bytes]:
    """Image files; their names determine the groups of about four."""
    return {f"loose/{n:03d}.png": members[2 * n][1] for n in numbers}


def first_day(members: Members) -> dict[str, bytes]:
    return {
        "same.tar": make_tar(members[:40]),
        "changed.tar": make_tar(members[40:80]),
        "deleted.tar": make_tar(members[80:100]),
        "broken.tar": make_tar(members[100:140]),
        "fails.tar": make_tar(members[140:160])[:3000],
        **images(members, *range(40, 70)),
    }


def second_day(members: Members) -> dict[str, bytes]:
    """The input of the next day: new, changed and deleted shards; other groups of image files."""
    return {
        "same.tar": make_tar(members[:40]),
        "changed.tar": make_tar(members[40:60] + members[160:180]),
        "broken.tar": make_tar(members[100:140])[:5000],
        "fails.tar": make_tar(members[140:160])[:3000],
        "new.tar": make_tar(members[180:220]),
        **images(members, *range(40, 50), *range(55, 70), *range(75, 95)),
    }


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest) -> Place:
    if request.param == "folder":
        return Place(str(request.getfixturevalue("tmp_path")))
    return Place(str(request.getfixturevalue("bucket")))


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    small_groups(monkeypatch)
    monkeypatch.setattr(manifest_writer, "MAX_PENDING", 2)
    monkeypatch.setattr(lease.LeaseContent, "is_live", False)  # no wait for the leases of killed runs


@pytest.fixture
def every(place: Place) -> int:
    """1 to test every write, 3 to test every third; for a bucket, whose writes take longer, 24."""
    in_folder = 1 if os.environ.get("KILL_AT_EVERY_WRITE") else 3
    return in_folder if place.root.startswith("/") else 24


def test_run_killed_at_any_write_leaves_complete_shards_and_resumes(
    place: Place, members: Members, every: int
) -> None:
    """The first run on an input."""
    place.put("in", first_day(members))
    states = place.recorded()
    end, labels = place.end_state(), place.labels()
    assert len(labels) > 8
    assert len(states) > 10
    for state in states[::every]:
        place.restore(state)
        found = place.labels()
        for uri, rows in found.items():
            assert rows == labels[uri]
        place.run()
        assert place.end_state() == end
        counts = place.last_counts()
        assert counts["shards"] - counts["unreadable_shards"] == len(labels) - len(found)  # none twice


@pytest.mark.parametrize(
    "selection", [LABEL_NEW, Selection(retry_errors=True, prune=True)], ids=["increment", "retry and prune"]
)
def test_incremental_run_killed_at_any_write_resumes(
    place: Place, members: Members, selection: Selection, every: int
) -> None:
    """A second run, on a changed input."""
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


def test_repeatedly_killed_runs_end_like_a_single_run(tmp_path: Path, members: Members) -> None:
    """Runs and rebuilds are killed one after another, each at a random write."""
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


def test_input_changed_after_a_crash_is_labeled_in_its_current_state(
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
        assert labels.pop(broken, old[broken]) == old[broken]  # an unreadable shard keeps its old labels
        assert labels == new
        assert place.last_counts()["unreadable_shards"] >= 1


#: The shares of the runs that complete the labels after the share 2/2 was killed.
TAKEOVERS = (["2/2"], ["1/3", "2/3", "3/3"], ["4/4", "2/4"], [None])


def share(text: str | None) -> str:
    return f"run.share={text or 'null'}"


def begin(place: Place, members: Members, day: str) -> Snapshot:
    """Puts the input of a day, after a run of the day before; returns the output before the day."""
    place.put("in", first_day(members))
    start: Snapshot = {}
    if day == "second day":
        place.run()
        start = place.snapshot()
        place.put("in", second_day(members))
    return start


@pytest.mark.parametrize("day", [pytest.param("first day", marks=pytest.mark.long), "second day"])
def test_share_killed_at_any_write_is_completed_by_other_divisions(
    place: Place, members: Members, every: int, day: str
) -> None:
    """Predictions, manifest and statistics equal those of one driver."""
    start = begin(place, members, day)
    place.run()
    end, labels = place.end_state(), place.labels()
    place.restore(start)
    old = place.labels()
    place.run(LABEL_NEW, share("1/2"))
    half = place.labels()
    states = place.recorded(LABEL_NEW, share("2/2"))
    assert place.end_state() == end
    assert len(states) > 8
    for number, state in enumerate(states[::every]):
        place.restore(state)
        for uri, rows in place.labels().items():
            assert rows in (old.get(uri), labels.get(uri)), uri
            assert uri not in half or half[uri] == rows or half[uri] == old.get(uri), uri
        for text in TAKEOVERS[number % len(TAKEOVERS)]:
            place.run(LABEL_NEW, share(text))
        assert place.end_state() == end, TAKEOVERS[number % len(TAKEOVERS)]


@pytest.mark.parametrize("day", ["first day", pytest.param("second day", marks=pytest.mark.long)])
def test_drivers_of_different_divisions_label_one_dataset_at_once(
    place: Place, members: Members, every: int, day: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any write of the share 1/2, the shares 2/4 and 4/4 are labeled; then 1/2 continues."""
    start = begin(place, members, day)
    place.run()
    end = place.end_state()
    place.restore(start)
    count = len(place.recorded(LABEL_NEW, share("1/2")))
    assert count >= 8

    def interrupted(action: Callable[..., Any], writes: Iterator[int], number: int) -> Callable[..., Any]:
        def act(storage: Storage, uri: str, *args: Any, **options: Any) -> Any:
            if uri.startswith(place.root) and next(writes) == number:
                for text in ("2/4", "4/4"):
                    place.run(LABEL_NEW, share(text))
            return action(storage, uri, *args, **options)

        return act

    for number in range(0, count, every):
        place.restore(start)
        writes = itertools.count()
        with monkeypatch.context() as patch:
            for name in ("write", "delete"):
                patch.setattr(Storage, name, interrupted(getattr(Storage, name), writes, number))
            place.run(LABEL_NEW, share("1/2"))
        assert next(writes) > number
        assert place.end_state() == end, number


def test_rebuild_killed_at_any_write_is_repaired(place: Place, members: Members) -> None:
    """The next run, or another rebuild, repairs the manifest."""
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
