"""The scheduler submits what is due once, whatever dies: on a real cluster, with a clock that is set."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import pytest

from jobs.schedule import schedule
from pipeline.config import DatasetConfig, ScheduleConfig, load_config
from pipeline.schedule import (
    DatasetState,
    JobClient,
    Scheduler,
    StateFile,
    Submission,
    SubmittedJob,
    next_ticks,
)
from pipeline.schedule.scheduler import CurrentJob, last_tick
from pipeline.storage import ObjectInfo, Storage
from tests.command import invoke
from tests.pipeline.schedule.lists import DATASET, LIST

NOON = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
HOUR = timedelta(hours=1)


@dataclass
class Bench:
    """Datasets of a folder, whose jobs note that they run, and end when they may.

    Attributes:
        folder: where all of it lies.
        address: the cluster's.
        now: what schedulers take for the time.
    """

    folder: Path
    address: str
    now: datetime = NOON

    @property
    def may_end(self) -> Path:
        return self.folder / "may-end"

    @property
    def file(self) -> Path:
        return self.folder / "schedule.yaml"

    def configure(self, *names: str, address: str | None = None) -> ScheduleConfig:
        """A list of datasets with these names, due every hour."""
        script = self.folder / "python"
        script.write_text(
            f"#!/bin/sh\necho run >> {self.folder}/runs\n"
            f"while [ ! -e {self.may_end} ]; do sleep 0.2; done\nexit 3\n"
        )
        script.chmod(0o755)
        text = LIST.format(address=address or self.address, python=script)
        datasets = "".join(DATASET.format(name=name, folder=self.folder) for name in names)
        self.file.write_text(text + datasets)
        return load_config(ScheduleConfig, self.file)

    def scheduler(self, config: ScheduleConfig, connect: Callable[[], JobClient] | None = None) -> Scheduler:
        return Scheduler(config, connect, clock=lambda: self.now)

    def state(self, name: str, config: ScheduleConfig) -> DatasetState:
        state = StateFile(name, config.datasets[name]).read()
        assert state is not None
        return state

    def jobs(self) -> list[SubmittedJob]:
        mine = str(self.folder)
        return [
            job for job in JobClient(self.address).jobs() if job.metadata.get("input", "").startswith(mine)
        ]

    def end_jobs(self) -> int:
        """Lets the jobs end; returns how many have run."""
        self.may_end.touch()
        deadline = time.monotonic() + 600
        while not all(job.is_finished for job in self.jobs()):
            assert time.monotonic() < deadline
            time.sleep(0.5)
        return len((self.folder / "runs").read_text().splitlines())


def is_submitted(state: DatasetState) -> bool:
    """Whether the cluster has the dataset's job, and the job is not known to be finished."""
    return state.current is not None and state.current.submitted and state.current.problem is None


@pytest.fixture
def bench(cluster: str, tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path, cluster)
    yield made
    made.may_end.touch()


def test_tick_is_submitted_once_or_skipped_while_the_last_job_runs(bench: Bench) -> None:
    config = bench.configure("a")
    scheduler = bench.scheduler(config)
    assert not scheduler.poll()  # seen for the first time: what was due before is not
    assert not scheduler.poll()
    assert bench.jobs() == []

    bench.now = NOON + HOUR
    assert not scheduler.poll()
    assert not scheduler.poll()
    (job,) = bench.jobs()
    assert job.id.endswith("-20260301T1300Z")
    assert job.entrypoint.endswith(" --wait")  # datasets may share an output
    assert is_submitted(bench.state("a", config))

    bench.now = NOON + 2 * HOUR
    assert not scheduler.poll()
    state = bench.state("a", config)
    assert state.skipped is not None
    assert state.skipped.tick == bench.now
    assert job.id in state.skipped.reason
    assert len(bench.jobs()) == 1

    assert bench.end_jobs() == 1
    assert not scheduler.poll()
    last = bench.state("a", config).last
    assert last is not None
    assert (last.id, last.state, last.exit_status) == (job.id, "FAILED", 3)
    assert len(bench.jobs()) == 1  # the tick that was skipped stays so

    bench.now = NOON + 99 * HOUR + timedelta(minutes=7)  # after days without a scheduler, a new one
    for _ in range(3):
        assert not bench.scheduler(config).poll()
    assert [job.metadata["tick"] for job in bench.jobs()] == ["20260305T1500Z", "20260301T1300Z"]
    assert bench.end_jobs() == 2
    shown = invoke(schedule, "--config", bench.file, "--status")
    assert f"last: {job.id} failed, exit status 3" in shown.output
    assert "skipped: 2026-03-01 14:00 UTC" in shown.output


class Killed(BaseException):
    """As SIGKILL: no handler of errors sees it."""


def test_tick_runs_once_at_whatever_step_a_scheduler_dies(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before and after each of: the claim's write, the submission, the write that it is submitted."""
    points = [(step, when) for step in ("claim", "submit", "note") for when in ("before", "after")]
    names = [f"{when}-{step}" for step, when in points]
    config = bench.configure(*names)
    bench.scheduler(config).poll()
    bench.now += HOUR
    for name, (step, when) in zip(names, points, strict=True):
        mine = config.model_copy(update={"datasets": {name: config.datasets[name]}})
        with monkeypatch.context() as patch:
            _die(patch, step, when)
            with pytest.raises(Killed):
                bench.scheduler(mine).poll()
        for _ in range(2):
            assert not bench.scheduler(mine).poll()
        assert is_submitted(bench.state(name, config))
    assert bench.end_jobs() == len(points)
    assert len(bench.jobs()) == len(points)
    assert not bench.scheduler(config).poll()
    for name in names:
        state = bench.state(name, config)
        assert state.last is not None
        assert state.last.exit_status == 3


def _die(patch: pytest.MonkeyPatch, step: str, when: str) -> None:
    """Has a scheduler die before or after a step."""
    write, submit = Storage.write, JobClient.submit
    writes = 0

    def at(here: bool, do: Callable[[], object]) -> object:
        if here and when == "before":
            raise Killed
        result = do()
        if here:
            raise Killed
        return result

    def dying_write(self: Storage, uri: str, data: bytes, expected: str | None = None) -> ObjectInfo:
        nonlocal writes
        writes += 1
        result = at(writes == {"claim": 1, "note": 2}.get(step), lambda: write(self, uri, data, expected))
        assert isinstance(result, ObjectInfo)
        return result

    def dying_submit(self: JobClient, submission: Submission) -> None:
        at(step == "submit", lambda: submit(self, submission))

    patch.setattr(Storage, "write", dying_write)
    patch.setattr(JobClient, "submit", dying_submit)


def test_of_two_schedulers_at_once_one_submits_each_tick(bench: Bench) -> None:
    names = [f"set-{i}" for i in range(4)]
    config = bench.configure(*names)
    bench.scheduler(config).poll()
    bench.now += HOUR
    start = threading.Barrier(2)

    def race() -> None:
        scheduler = bench.scheduler(config)
        start.wait()
        for _ in range(3):
            assert not scheduler.poll()

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(race) for _ in range(2)]:
            done.result()
    assert bench.end_jobs() == len(names)
    assert all(is_submitted(bench.state(name, config)) for name in names)


def test_tick_waits_for_the_cluster_and_a_broken_dataset_stops_no_other(bench: Bench) -> None:
    away = bench.configure("a", "b", address="http://127.0.0.1:1")
    bench.scheduler(away).poll()
    Storage().write(StateFile("a", away.datasets["a"]).uri, b"{}")
    bench.now += HOUR
    problems = bench.scheduler(away).poll()
    assert "not a schedule's state" in problems["a"]
    assert "no Ray cluster answers" in problems["b"]
    state = bench.state("b", away)
    assert state.current is not None
    assert not state.current.submitted
    assert "no Ray cluster answers" in (state.current.problem or "")

    config = bench.configure("a", "b")
    bench.now += 2 * HOUR  # the claimed tick comes first, and the next ones find it running
    assert set(bench.scheduler(config).poll()) == {"a"}
    assert [job.metadata["tick"] for job in bench.jobs()] == ["20260301T1300Z"]
    state = bench.state("b", config)
    assert is_submitted(state)
    assert state.skipped is not None


def test_a_dataset_that_somebody_else_labels_is_skipped(bench: Bench) -> None:
    config = bench.configure("a")
    scheduler = bench.scheduler(config)
    scheduler.poll()
    by_hand = Submission(config.datasets["a"].job, "by-hand", to=config.submit)
    JobClient(bench.address).submit(by_hand)
    bench.now += HOUR
    assert not scheduler.poll()
    state = bench.state("a", config)
    assert state.skipped is not None
    assert by_hand.id in state.skipped.reason
    assert [job.id for job in bench.jobs()] == [by_hand.id]


def test_a_job_that_the_cluster_has_forgotten_is_lost(bench: Bench) -> None:
    config = bench.configure("a")
    gone = CurrentJob(tick=NOON, id="gone", submitted=True)
    StateFile("a", config.datasets["a"]).write(DatasetState(dataset="a", through=NOON, current=gone))
    assert not bench.scheduler(config).poll()
    state = bench.state("a", config)
    assert state.current is None
    assert state.last is not None
    assert (state.last.id, state.last.state, state.last.exit_status) == ("gone", "LOST", None)
    assert bench.jobs() == []


def _dataset(cron: str, timezone: str) -> DatasetConfig:
    places = [f"{section}={{uri: /x/{section}}}" for section in ("input", "output")]
    common = ["model.path=m", f"cron={cron!r}", f"timezone={timezone}"]
    return load_config(DatasetConfig, None, [*places, *common])


@pytest.mark.parametrize("start", [datetime(2026, 3, 28, tzinfo=UTC), datetime(2026, 10, 24, tzinfo=UTC)])
@pytest.mark.parametrize("cron", ["30 2 * * *", "0 * * * *", "0 3 * * 0", "@daily"])
def test_tick_is_the_last_one_until_the_next_when_clocks_change(cron: str, start: datetime) -> None:
    """In Berlin, 02:30 isn't there on the first of these weekends, and twice on the second."""
    dataset = _dataset(cron, "Europe/Berlin")
    ticks = [tick.astimezone(UTC) for tick in next_ticks(dataset, start, 5)]
    assert ticks == sorted(set(ticks))
    for tick, following in pairwise(ticks):
        assert last_tick(dataset, tick) == tick
        assert last_tick(dataset, following - timedelta(microseconds=1)) == tick
