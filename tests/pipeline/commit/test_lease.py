from __future__ import annotations

import json
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.commit import Lease, LeaseHeldError, LeaseLostError, left_in_order
from pipeline.commit import lease as module
from pipeline.storage import Storage, StorageError


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue("tmp_path" if request.param == "folder" else "bucket"))


def make(place: str, run: str, seconds: float = 60) -> Lease:
    return Lease(Storage(), place, run, seconds)


def state(place: str) -> dict[str, str]:
    return dict(json.loads(Storage().read(f"{place}/lease.json")))


def test_a_second_run_is_refused_and_told_who_holds_it_and_until_when(place: str) -> None:
    first = make(place, "run-1")
    assert first.acquire()
    with pytest.raises(LeaseHeldError, match=r"lease\.json: run run-1 \(.*process \d+\).* until 20.* UTC"):
        make(place, "run-2").acquire()
    first.release(in_order=True)
    second = make(place, "run-2")
    assert second.acquire()
    second.release(in_order=True)


def test_a_run_that_waits_gets_it_when_it_is_free(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_POLL", 0.05)
    first, second, told = make(place, "run-1"), make(place, "run-2"), list[str]()
    first.acquire()
    threading.Timer(0.5, first.release, [True]).start()
    start = time.monotonic()
    second.acquire(wait=True, on_wait=told.append)
    assert time.monotonic() - start > 0.4
    assert len(told) == 1
    assert "run-1" in told[0]
    second.release(in_order=True)


def test_it_is_renewed_while_the_run_lives_and_expires_after(place: str) -> None:
    first = make(place, "run-1", seconds=0.6)
    first.acquire()
    time.sleep(1.5)
    with pytest.raises(LeaseHeldError):
        make(place, "run-2").acquire()
    first.check()
    first._stop.set()  # as if it had died
    first._heart.join()
    time.sleep(0.7)
    second = make(place, "run-2")
    assert not second.acquire()  # what the first left is not in order
    second.release(in_order=True)


def test_a_run_that_was_held_up_learns_that_another_has_taken_over(place: str) -> None:
    zombie = make(place, "zombie", seconds=0.3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zombie, "_beat", lambda: None)
        zombie._heart = threading.Thread(target=lambda: None)
        zombie.acquire()
    time.sleep(0.4)
    other = make(place, "other")
    other.acquire()
    zombie._seconds = 0.03
    heart = threading.Thread(target=zombie._beat)
    heart.start()
    heart.join(10)
    with pytest.raises(LeaseLostError, match=r"lease\.json: another run has taken over"):
        zombie.check()
    zombie.release(in_order=True)
    assert (state(place)["run"], state(place)["state"]) == ("other", "held")
    other.check()
    other.release(in_order=True)


def test_a_lease_that_somebody_removes_is_written_anew(place: str) -> None:
    first = make(place, "run-1", seconds=0.6)
    first.acquire()
    Storage().delete(f"{place}/lease.json")
    time.sleep(0.5)
    first.verify()
    with pytest.raises(LeaseHeldError, match="run-1"):
        make(place, "run-2").acquire()
    first.release(in_order=True)
    assert left_in_order(Storage(), place)


@pytest.mark.parametrize("in_order", [True, False])
def test_it_tells_how_the_last_run_left_things(place: str, in_order: bool) -> None:
    assert left_in_order(Storage(), place)
    first = make(place, "run-1")
    assert first.acquire()
    assert not left_in_order(Storage(), place)
    first.release(in_order=in_order)
    assert left_in_order(Storage(), place) == in_order
    second = make(place, "run-2")
    assert second.acquire() == in_order
    second.release(in_order=True)


def test_of_runs_that_start_together_one_gets_it(place: str) -> None:
    leases = [make(place, f"run-{i}") for i in range(8)]

    def try_it(lease: Lease) -> str:
        try:
            lease.acquire()
        except LeaseHeldError:
            return "refused"
        return "holds it"

    with ThreadPoolExecutor(8) as pool:
        assert Counter(pool.map(try_it, leases)) == {"holds it": 1, "refused": 7}
    for lease in leases:
        if lease._heart.is_alive():
            lease.release(in_order=True)


def test_what_is_no_lease_is_named(tmp_path: Path) -> None:
    (tmp_path / "lease.json").write_text("[]")
    with pytest.raises(StorageError, match=r"lease\.json: not a lease"):
        make(str(tmp_path), "run-1").acquire()
