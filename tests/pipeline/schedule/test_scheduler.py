"""The scheduler submits each scheduled time once, also after crashes. Real cluster, fake clock."""

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

from jobs.local_s3 import LocalS3
from jobs.schedule import schedule
from pipeline.config import DatasetConfig, ScheduleConfig, load_config
from pipeline.schedule import (
    DatasetState,
    JobClient,
    Scheduler,
    StateFile,
    Submission,
    SubmittedJob,
    next_scheduled_times,
)
from pipeline.schedule.scheduler import CurrentJob, last_scheduled_time
from pipeline.storage import ObjectChanged, ObjectInfo, Storage, StorageError
from tests.command import invoke
from tests.fault_proxy import FaultProxy
from tests.pipeline.schedule.lists import DATASET, LIST

NOON = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
HOUR = timedelta(hours=1)


@dataclass
class Bench:
    """Datasets of a folder. Their jobs write that they run, and wait until they may end.

    Attributes:
        folder: contains configuration, inputs and outputs.
        address: address of the cluster.
        now: the time that schedulers use.
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
        """Writes and loads a list of datasets with these names, due every hour."""
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
        """Lets the jobs end; returns how many ran."""
        self.may_end.touch()
        deadline = time.monotonic() + 600
        while not all(job.is_finished for job in self.jobs()):
            assert time.monotonic() < deadline
            time.sleep(0.5)
        return len((self.folder / "runs").read_text().splitlines())


@pytest.fixture
def bench(cluster: str, tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path, cluster)
    yield bench
    bench.may_end.touch()


def test_scheduled_time_is_submitted_once_or_skipped_while_a_job_runs(bench: Bench) -> None:
    config = bench.configure("a")
    scheduler = bench.scheduler(config)
    assert not scheduler.poll()  # the first poll: earlier scheduled times are not due
    assert not scheduler.poll()
    assert bench.jobs() == []

    bench.now = NOON + HOUR
    assert not scheduler.poll()
    assert not scheduler.poll()
    (job,) = bench.jobs()
    assert job.id.endswith("-20260301T1300Z")
    assert job.entrypoint.endswith(" --wait")  # datasets may share an output
    assert bench.state("a", config).current_job is not None

    bench.now = NOON + 2 * HOUR
    assert not scheduler.poll()
    state = bench.state("a", config)
    assert state.last_skipped is not None
    assert state.last_skipped.scheduled_time == bench.now
    assert job.id in state.last_skipped.reason
    assert len(bench.jobs()) == 1

    assert bench.end_jobs() == 1
    assert not scheduler.poll()
    last = bench.state("a", config).last_job
    assert last is not None
    assert (last.id, last.state, last.exit_status) == (job.id, "FAILED", 3)
    assert len(bench.jobs()) == 1  # the skipped time is not submitted later

    bench.now = NOON + 99 * HOUR + timedelta(minutes=7)  # a new scheduler, days later
    for _ in range(3):
        assert not bench.scheduler(config).poll()
    assert [job.metadata["idempotency_key"] for job in bench.jobs()] == ["20260305T1500Z", "20260301T1300Z"]
    assert bench.end_jobs() == 2
    shown = invoke(schedule, "--config", bench.file, "--status")
    assert f"last       {job.id} failed, exit status 3" in shown.output
    assert "skipped    2026-03-01 14:00 UTC" in shown.output


class Killed(BaseException):
    """Stands for SIGKILL: no error handler catches it."""


def test_job_runs_once_when_a_scheduler_dies_at_any_step(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dies before and after the submission, and the write that records the submission."""
    points = [(step, when) for step in ("submit", "record") for when in ("before", "after")]
    names = [f"{when}-{step}" for step, when in points]
    config = bench.configure(*names)
    bench.scheduler(config).poll()
    bench.now += HOUR
    for name, (step, when) in zip(names, points, strict=True):
        mine = config.model_copy(update={"datasets": {name: config.datasets[name]}})
        with monkeypatch.context() as patch:
            _kill_at(patch, step, when)
            with pytest.raises(Killed):
                bench.scheduler(mine).poll()
        for _ in range(2):
            assert not bench.scheduler(mine).poll()
        assert bench.state(name, config).current_job is not None
    assert bench.end_jobs() == len(points)
    assert len(bench.jobs()) == len(points)
    assert not bench.scheduler(config).poll()
    for name in names:
        state = bench.state(name, config)
        assert state.last_job is not None
        assert state.last_job.exit_status == 3


def _kill_at(patch: pytest.MonkeyPatch, step: str, when: str) -> None:
    """Makes a scheduler die before or after a step."""
    write, submit = Storage.write, JobClient.submit

    def kill_if(is_step: bool, action: Callable[[], object]) -> object:
        if is_step and when == "before":
            raise Killed
        result = action()
        if is_step:
            raise Killed
        return result

    def killing_write(self: Storage, uri: str, data: bytes, expected: str | None = None) -> ObjectInfo:
        result = kill_if(step == "record", lambda: write(self, uri, data, expected))
        assert isinstance(result, ObjectInfo)
        return result

    def killing_submit(self: JobClient, submission: Submission) -> None:
        kill_if(step == "submit", lambda: submit(self, submission))

    patch.setattr(Storage, "write", killing_write)
    patch.setattr(JobClient, "submit", killing_submit)


def test_two_concurrent_schedulers_submit_each_time_once(bench: Bench) -> None:
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
        for future in [pool.submit(race) for _ in range(2)]:
            future.result()
    assert bench.end_jobs() == len(names)
    assert all(bench.state(name, config).current_job for name in names)


def test_unreachable_cluster_and_broken_dataset_affect_no_other_dataset(bench: Bench) -> None:
    unreachable = bench.configure("a", "b", address="http://127.0.0.1:1")
    bench.scheduler(unreachable).poll()
    Storage().write(StateFile("a", unreachable.datasets["a"]).uri, b"{}")
    bench.now += HOUR
    errors = bench.scheduler(unreachable).poll()
    assert "not a schedule state file" in errors["a"]
    assert "no Ray cluster answers" in errors["b"]
    state = bench.state("b", unreachable)
    assert state.current_job is None
    assert "no Ray cluster answers" in (state.last_error or "")
    shown = invoke(schedule, "--config", bench.file, "--status", status=4)
    assert "b  error      no Ray cluster answers" in shown.output

    config = bench.configure("a", "b")
    bench.now += 2 * HOUR  # one job for the times that were missed
    for _ in range(2):
        assert set(bench.scheduler(config).poll()) == {"a"}
    assert [job.metadata["idempotency_key"] for job in bench.jobs()] == ["20260301T1500Z"]
    state = bench.state("b", config)
    assert state.current_job is not None
    assert state.last_error is None


def test_scheduled_time_is_skipped_while_a_manual_job_runs(bench: Bench) -> None:
    config = bench.configure("a")
    scheduler = bench.scheduler(config)
    scheduler.poll()
    manual = Submission(config.datasets["a"].job, "manual", submit_config=config.submit)
    JobClient(bench.address).submit(manual)
    bench.now += HOUR
    assert not scheduler.poll()
    state = bench.state("a", config)
    assert state.last_skipped is not None
    assert manual.id in state.last_skipped.reason
    assert [job.id for job in bench.jobs()] == [manual.id]


def test_job_that_the_cluster_no_longer_has_is_lost(bench: Bench) -> None:
    config = bench.configure("a")
    lost = CurrentJob(scheduled_time=NOON, id="lost")
    state = DatasetState(dataset="a", handled_until=NOON, current_job=lost)
    StateFile("a", config.datasets["a"]).write(state)
    assert not bench.scheduler(config).poll()
    state = bench.state("a", config)
    assert state.current_job is None
    assert state.last_job is not None
    assert (state.last_job.id, state.last_job.state, state.last_job.exit_status) == ("lost", "LOST", None)
    assert bench.jobs() == []


def test_store_that_refuses_the_state_is_reported_and_another_scheduler_is_not(
    bucket: str, s3_server: LocalS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.storage.retrying.MAX_PAUSE_S", 0.0)
    state = DatasetState(dataset="a", handled_until=NOON)
    with FaultProxy(s3_server.endpoint_url) as proxy:
        places = [
            "input={uri: s3://x/y}",
            f"output={{uri: {bucket}}}",
            f"storage={{endpoint_url: '{proxy.url}'}}",
        ]
        dataset = load_config(DatasetConfig, None, [*places, "model.path=m", "cron='@daily'"])
        first, second = StateFile("a", dataset), StateFile("a", dataset)
        first.write(state)
        with pytest.raises(ObjectChanged, match="another scheduler has written the state"):
            second.write(state, handled_until=NOON + HOUR)
        proxy.always("refused", where=lambda request: request.method == "PUT")
        with pytest.raises(StorageError, match="the store refused 20 requests") as caught:
            first.write(state, handled_until=NOON + HOUR)
        assert not isinstance(caught.value, ObjectChanged)


def _dataset(cron: str, timezone: str) -> DatasetConfig:
    places = [f"{section}={{uri: /x/{section}}}" for section in ("input", "output")]
    common = ["model.path=m", f"cron={cron!r}", f"timezone={timezone}"]
    return load_config(DatasetConfig, None, [*places, *common])


@pytest.mark.parametrize("start", [datetime(2026, 3, 28, tzinfo=UTC), datetime(2026, 10, 24, tzinfo=UTC)])
@pytest.mark.parametrize("cron", ["30 2 * * *", "0 * * * *", "0 3 * * 0", "@daily"])
def test_last_scheduled_time_is_consistent_when_clocks_change(cron: str, start: datetime) -> None:
    """In Berlin, 02:30 does not exist on the first of these weekends, and occurs twice on the second."""
    dataset = _dataset(cron, "Europe/Berlin")
    times = [time.astimezone(UTC) for time in next_scheduled_times(dataset, start, 5)]
    assert times == sorted(set(times))
    for scheduled, following in pairwise(times):
        assert last_scheduled_time(dataset, scheduled) == scheduled
        assert last_scheduled_time(dataset, following - timedelta(microseconds=1)) == scheduled
