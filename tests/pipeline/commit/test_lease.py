from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from jobs.local_s3 import LocalS3
from pipeline.commit import Lease, LeaseHeldError, LeaseLostError, was_clean_shutdown
from pipeline.commit.lease import LeaseContent
from pipeline.config import WHOLE, Share
from pipeline.storage import ObjectInfo, Storage, StorageError
from tests.fault_proxy import FaultProxy


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue("tmp_path" if request.param == "folder" else "bucket"))


@pytest.fixture(autouse=True)
def _short_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.commit.lease._POLL_S", 0.05)


def make(place: str, run: str, seconds: float = 60, **options: Any) -> Lease:
    return Lease(Storage(), place, run, seconds, **options)


def write_lease_of_dead_run(place: str, seconds: float, name: str = "lease") -> None:
    until = datetime.now(UTC) + timedelta(seconds=seconds)
    state = LeaseContent(run="dead", holder="host", expires_at=until, state="held")
    Storage().write(f"{place}/{name}.json", state.model_dump_json().encode())


def state(place: str, name: str = "lease") -> dict[str, str]:
    return dict(json.loads(Storage().read(f"{place}/{name}.json")))


def test_second_run_is_rejected_with_the_holder_and_the_expiry(place: str) -> None:
    first = make(place, "run-1")
    assert first.acquire()
    with pytest.raises(LeaseHeldError, match=r"lease\.json: run run-1 \(.*process \d+\).* until 20.* UTC"):
        make(place, "run-2").acquire()
    first.release(clean_shutdown=True)
    second = make(place, "run-2")
    assert second.acquire()
    second.release(clean_shutdown=True)


def test_waiting_run_acquires_the_lease_when_released(place: str) -> None:
    first, second, messages = make(place, "run-1"), make(place, "run-2"), list[str]()
    first.acquire()
    threading.Timer(0.5, first.release, [True]).start()
    start = time.monotonic()
    second.acquire(wait=True, on_wait=messages.append)
    assert time.monotonic() - start > 0.4
    assert len(messages) == 1
    assert "run-1" in messages[0]
    second.release(clean_shutdown=True)


def test_lease_is_renewed_while_the_run_is_active(place: str) -> None:
    first = make(place, "run-1", seconds=0.6)
    first.acquire()
    time.sleep(1.5)
    with pytest.raises(LeaseHeldError):
        make(place, "run-2").acquire()
    first.check()
    first.release(clean_shutdown=True)


def test_lease_expires_after_its_run_died(place: str) -> None:
    write_lease_of_dead_run(place, seconds=0.5)
    with pytest.raises(LeaseHeldError):
        make(place, "run-2").acquire()
    second = make(place, "run-2")
    assert not second.acquire(wait=True)  # the dead run did not shut down cleanly
    second.release(clean_shutdown=True)


@dataclass(frozen=True)
class Suspended(Storage):
    """Storage whose writes wait until the process is resumed."""

    resumed: threading.Event = field(default_factory=threading.Event, compare=False)

    def write(self, uri: str, data: bytes | BinaryIO, expected: str | None = None) -> ObjectInfo:
        self.resumed.wait(20)
        return super().write(uri, data, expected)


def check_until_lost(lease: Lease, patience: float = 60) -> None:
    end = time.monotonic() + patience
    while time.monotonic() < end:
        lease.check()
        time.sleep(0.02)


def take_over(place: str, share: Share = WHOLE) -> tuple[Lease, Lease]:
    """Returns the lease of a delayed run, and that of the run that has taken over the whole partition."""
    storage = Suspended()
    storage.resumed.set()
    zombie = Lease(storage, place, "zombie", seconds=0.3, share=share)
    zombie.acquire()
    storage.resumed.clear()
    other = make(place, "other")
    other.acquire(wait=True)
    storage.resumed.set()
    return zombie, other


def test_delayed_run_learns_that_another_has_taken_over(place: str) -> None:
    zombie, other = take_over(place)
    with pytest.raises(LeaseLostError, match=r"lease\.json: another run has taken over"):
        check_until_lost(zombie)
    zombie.release(clean_shutdown=True)
    assert (state(place)["run"], state(place)["state"]) == (other.run, "held")
    other.check()
    other.release(clean_shutdown=True)


def test_removed_lease_is_rewritten(place: str) -> None:
    first = make(place, "run-1", seconds=0.6)
    first.acquire()
    Storage().delete(f"{place}/lease.json")
    time.sleep(0.5)
    first.verify()
    with pytest.raises(LeaseHeldError, match="run-1"):
        make(place, "run-2").acquire()
    first.release(clean_shutdown=True)
    assert was_clean_shutdown(Storage(), place)


@pytest.mark.parametrize("clean_shutdown", [True, False])
def test_lease_records_whether_the_last_run_shut_down_cleanly(place: str, clean_shutdown: bool) -> None:
    assert was_clean_shutdown(Storage(), place)
    first = make(place, "run-1")
    assert first.acquire()
    assert not was_clean_shutdown(Storage(), place)
    first.release(clean_shutdown=clean_shutdown)
    assert was_clean_shutdown(Storage(), place) == clean_shutdown
    second = make(place, "run-2")
    assert second.acquire() == clean_shutdown
    second.release(clean_shutdown=True)


def test_one_of_several_simultaneous_runs_acquires_the_lease(place: str) -> None:
    leases = [make(place, f"run-{i}") for i in range(8)]

    def try_to_acquire(lease: Lease) -> str:
        try:
            lease.acquire()
        except LeaseHeldError:
            return "rejected"
        return "acquired"

    with ThreadPoolExecutor(8) as pool:
        assert Counter(pool.map(try_to_acquire, leases)) == {"acquired": 1, "rejected": 7}
    held = state(place)["run"]
    leases[int(held.removeprefix("run-"))].release(clean_shutdown=True)
    assert state(place)["state"] == "released"


@pytest.mark.parametrize(
    ("kind", "method", "problem"),
    [
        ("refused", "PUT", "the store refused 20 requests for the version that the store reports"),
        ("other_etag", "GET", "the store refused 20 requests for the version that the store reports"),
        ("flood", "HEAD", "has 1,000,000,000,000 bytes, more than the limit of 65,536 bytes"),
        ("drip", "GET", "the request is too slow"),
    ],
)
def test_lease_in_a_hostile_store_is_an_error(
    bucket: str, s3_server: LocalS3, monkeypatch: pytest.MonkeyPatch, kind: str, method: str, problem: str
) -> None:
    monkeypatch.setattr("pipeline.storage.retrying.MAX_PAUSE_S", 0.0)
    write_lease_of_dead_run(bucket, -1)
    with FaultProxy(s3_server.endpoint_url) as proxy:
        proxy.always(kind, where=lambda request: request.method == method)
        timeout_s = 0.1 if kind == "drip" else 10
        storage = Storage(endpoint_url=proxy.url, request_timeout_s=timeout_s, min_bytes_per_s=1e6)
        with pytest.raises(StorageError, match=problem):
            Lease(storage, bucket, "run", 60).acquire()


def test_invalid_lease_is_named(tmp_path: Path) -> None:
    (tmp_path / "lease.json").write_text("[]")
    with pytest.raises(StorageError, match=r"lease\.json: not a lease"):
        make(str(tmp_path), "run-1").acquire()


def test_interrupt_before_the_lease_is_acquired_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Storage, "update", interrupted)
    with pytest.raises(KeyboardInterrupt), Lease(Storage(), str(tmp_path), "run", 60).held():
        pass
    assert not list(tmp_path.iterdir())


def test_shares_of_one_division_are_held_at_the_same_time(place: str) -> None:
    leases = [make(place, f"run-{i}", share=Share(i, 3)) for i in (1, 2, 3)]
    assert [lease.acquire() for lease in leases] == [True, True, True]
    for lease in leases:
        lease.verify()
        lease.release(clean_shutdown=True)
    assert was_clean_shutdown(Storage(), place)


@pytest.mark.parametrize("share", [WHOLE, Share(2, 3), Share(1, 2), Share(5, 6)])
def test_share_is_rejected_while_an_overlapping_one_is_held(place: str, share: Share) -> None:
    first = make(place, "run-1", share=Share(2, 3))
    first.acquire()
    with pytest.raises(LeaseHeldError, match=r"lease-2-of-3\.json: run run-1 "):
        make(place, "run-2", share=share).acquire()
    first.release(clean_shutdown=True)
    second = make(place, "run-2", share=share)
    assert second.acquire()
    second.release(clean_shutdown=True)


@pytest.mark.parametrize("is_clean", [True, False])
def test_lease_of_another_division_is_taken_over_after_it_expired(place: str, is_clean: bool) -> None:
    write_lease_of_dead_run(place, -1, "lease-2-of-3")
    other = make(place, "other", share=Share(1, 3))
    assert other.acquire()  # has no shard of the dead run
    other.release(clean_shutdown=True)
    first = make(place, "run-1", share=Share(1, 2))
    assert not first.acquire()
    assert (state(place, "lease-2-of-3")["run"], state(place, "lease-2-of-3")["state"]) == (
        "run-1",
        "unfinished",
    )
    first.release(is_clean)
    for share in (Share(2, 3), WHOLE):
        assert was_clean_shutdown(Storage(), place, share) == is_clean
    second = make(place, "run-2", share=Share(2, 3))
    assert second.acquire() == is_clean
    second.release(clean_shutdown=True)


@dataclass(frozen=True)
class Interleaved(Storage):
    """Storage that another run uses right before the first write."""

    other: list[Callable[[], object]] = field(default_factory=list, compare=False)

    def write(self, uri: str, data: bytes | BinaryIO, expected: str | None = None) -> ObjectInfo:
        if self.other:
            self.other.pop()()
        return super().write(uri, data, expected)


@pytest.mark.parametrize("is_renewal", [False, True])
def test_one_of_two_divisions_that_acquire_at_the_same_time_is_rejected(place: str, is_renewal: bool) -> None:
    """Both have found no lease, or one run renews its expired lease while the other takes it over."""
    other = make(place, "other", share=Share(1, 3))
    if is_renewal:
        write_lease_of_dead_run(place, -1, "lease-1-of-3")
    storage = Interleaved(other=[other.acquire])
    with pytest.raises(LeaseHeldError, match=r"lease-1-of-3\.json: run other "):
        Lease(storage, place, "run-1", 60, share=Share(1, 2)).acquire()
    other.verify()
    other.release(clean_shutdown=True)
    second = make(place, "run-2", share=Share(1, 2))
    assert not second.acquire()  # repairs nothing, but the rejected run cannot know
    second.release(clean_shutdown=True)


def test_delayed_run_learns_that_another_division_has_taken_over(place: str) -> None:
    zombie, whole = take_over(place, Share(2, 3))
    with pytest.raises(LeaseLostError, match=r"lease-2-of-3\.json: another run has taken over"):
        check_until_lost(zombie)
    zombie.release(clean_shutdown=True)
    whole.release(clean_shutdown=True)
    assert was_clean_shutdown(Storage(), place)
