"""A client of Ray's Jobs API: submits a job once, finds it again, follows it and stops it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pipeline.config import LABEL_NEW, Config, Selection, SubmitConfig
from pipeline.dataflow import ClusterError, check_reachable

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

DEFAULT_ADDRESS = "http://127.0.0.1:8265"

#: Variables with the address of a cluster. Ray prefers them to any address that it is given.
_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")

_RECONNECTIONS = 10  # to a log, one after the other
_POLL_SECONDS = 1.0

CONFIG_VARIABLE = "CVT_LABEL_CONFIG"  # in the job's environment

#: The value of `program` in the metadata of labeling jobs.
PROGRAM = "cvt-label"

#: Seconds that a stopped job has, in addition to `run.grace_period_s`, to write manifest and statistics.
_STOP_SECONDS = 60
_TICK = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")


class UnknownJobError(LookupError):
    """The cluster has no job of this id."""


class SubmissionRefusedError(RuntimeError):
    """The submission would run something twice."""


class AlreadySubmittedError(SubmissionRefusedError):
    """The cluster has, or had, a job for this dataset, model and tick."""


class StillRunningError(SubmissionRefusedError):
    """A job of another tick for the same dataset and model is not finished."""


@dataclass(frozen=True)
class SubmittedJob:
    """A job of a cluster.

    Attributes:
        id: the submission id.
        state: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED; LOST if the cluster has forgotten the job.
        message: one line about the state.
        exit_status: of the process, as a shell reports it; 130 if the job was stopped, 1 if it failed before
            it had a process; None while the job is not finished, or if it is lost.
        entrypoint: the command.
    """

    id: str
    state: str
    message: str = ""
    started: datetime | None = None
    ended: datetime | None = None
    exit_status: int | None = None
    entrypoint: str = ""
    metadata: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_details(cls, details: JobDetails) -> SubmittedJob:
        """Makes a job from what Ray knows of it."""
        state, code = str(details.status), details.driver_exit_code
        status = {"PENDING": None, "RUNNING": None, "SUCCEEDED": 0, "STOPPED": 130}
        failed = (code if code > 0 else 128 - code) if code else 1
        return cls(
            id=details.submission_id or "",
            state=state,
            # Ray appends the end of the log to its message.
            message=(details.message or "").partition("\n")[0].partition(", last available logs")[0],
            started=datetime.fromtimestamp(details.start_time / 1000, UTC) if details.start_time else None,
            ended=datetime.fromtimestamp(details.end_time / 1000, UTC) if details.end_time else None,
            exit_status=status.get(state, failed),
            entrypoint=details.entrypoint,
            metadata=details.metadata or {},
        )

    @property
    def is_finished(self) -> bool:
        """Whether the job has ended, in whatever state."""
        return self.state not in ("PENDING", "RUNNING")

    @property
    def is_labeling(self) -> bool:
        """Whether it is a job of `submit` or `schedule`, or a labeling job of `ray job submit`."""
        is_ours = self.metadata.get("program") == PROGRAM
        return is_ours or re.search(r"\bjobs\.label\b|\bcvt-label label\b", self.entrypoint) is not None


@dataclass(frozen=True)
class Submission:
    """A labeling job to submit.

    It gets nothing of the submitter's environment but its configuration, which contains no secret: the
    cluster has its own credentials.

    Attributes:
        config: the job's configuration; `ray.address` is ignored: the job runs on the cluster that gets it.
        tick: names the scheduled time. One tick of one dataset and model is one job.
        selection: the shards to label in addition to new ones.
        to: how the job runs on its cluster; the address is not used here.
        wait: wait for other runs on the same labels to end, of another input for example.
    """

    config: Config
    tick: str
    selection: Selection = LABEL_NEW
    to: SubmitConfig = field(default_factory=SubmitConfig)
    wait: bool = False

    def __post_init__(self) -> None:
        if not _TICK.fullmatch(self.tick):
            raise ValueError(f"tick {self.tick!r}: expected up to 40 letters, digits, dots, - and _")

    @property
    def id(self) -> str:
        """The submission id: the same for the same input, output, model and tick, and for no other."""
        labels = self._labels
        digest = hashlib.sha256("\n".join(labels.values()).encode()).hexdigest()[:6]
        dataset = labels["input"].partition("://")[2] or labels["input"]
        return f"label-{_slug(dataset)}-{_slug(labels['model'])}-{digest}-{self.tick}"

    @property
    def metadata(self) -> dict[str, str]:
        """What the cluster shows of the job, in addition to its state."""
        return {"program": PROGRAM, **self._labels, "tick": self.tick}

    def has_labels_of(self, metadata: Mapping[str, str]) -> bool:
        """Whether a job with this metadata labels the same dataset with the same model, at any tick."""
        return self._labels.items() <= metadata.items()

    @property
    def entrypoint(self) -> str:
        """The command that the cluster runs. It replaces the shell, so that the job receives the signals."""
        options = {
            "--retry-errors": self.selection.retry_errors,
            "--relabel": self.selection.relabel,
            "--prune": self.selection.prune,
            "--wait": self.wait,
        }
        command = [self.to.python, "-m", "jobs.label", f"--config=env:{CONFIG_VARIABLE}"]
        return f"exec {shlex.join([*command, *(name for name, given in options.items() if given)])}"

    @property
    def runtime_env(self) -> dict[str, Any]:
        """What Ray sets up for the job on every node."""
        config = self.config.model_copy(update={"ray": self.config.ray.model_copy(update={"address": None})})
        # Without this variable, Ray kills a job 3 seconds after it has told it to stop.
        patience = math.ceil(config.run.grace_period_s) + _STOP_SECONDS
        variables = {CONFIG_VARIABLE: config.model_dump_json(), "RAY_JOB_STOP_WAIT_TIME_S": str(patience)}
        given = {"env_vars": variables, "working_dir": self.to.working_dir, "pip": self.to.requirements}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def _labels(self) -> dict[str, str]:
        config = self.config
        settings = config.label_settings | {"class_names": config.model.labels}
        return {
            "input": config.input.uri,
            "output": config.output.uri,
            "model": config.model.path + (f"@{config.model.revision}" if config.model.revision else ""),
            "settings": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8],
        }


def _slug(name: str, longest: int = 40) -> str:
    """The end of a name in lower-case letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower())[-longest:].strip("-") or "x"


def minute_tick(moment: datetime) -> str:
    """Returns the tick of a moment: its minute in UTC."""
    return f"{moment.astimezone(UTC):%Y%m%dT%H%MZ}"


class JobClient:
    """The Jobs API of a Ray cluster.

    Every method raises `ClusterError` if the cluster does not answer, or refuses.

    Args:
        address: of the dashboard, such as `http://head:8265`; None: RAY_API_SERVER_ADDRESS or RAY_ADDRESS of
            the environment, or `DEFAULT_ADDRESS`.
    """

    def __init__(self, address: str | None = None) -> None:
        if address is None:
            address = next(filter(None, map(os.environ.get, _ADDRESS_VARIABLES)), DEFAULT_ADDRESS)
        elif "://" not in address:
            address = f"http://{address}"
        if "@" in address:
            cause = "the cluster's address holds credentials, which would be shown"
            raise ClusterError(f"{cause}: set RAY_AUTH_TOKEN")
        self.address = address
        check_reachable(address)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        from ray.job_submission import JobSubmissionClient  # takes seconds

        with self._errors(), _address_variables_hidden():
            self._client = JobSubmissionClient(address)

    def submit(self, submission: Submission) -> None:
        """Submits a job; raises `SubmissionRefusedError`."""
        already, hint = f"job {submission.id} is on the cluster already", "another --tick makes another job"
        for job in self.jobs():
            if job.id == submission.id:
                raise AlreadySubmittedError(f"{already} ({job.state.lower()}): {hint}")
            if submission.has_labels_of(job.metadata) and not job.is_finished:
                what = f"job {job.id}, for the same dataset and model, is {job.state.lower()}"
                raise StillRunningError(f"{what}: not submitted")
        with self._errors():
            try:
                self._client.submit_job(
                    entrypoint=submission.entrypoint,
                    runtime_env=submission.runtime_env,
                    metadata=submission.metadata,
                    submission_id=submission.id,
                )
            except (RuntimeError, OSError) as error:
                if "already exists" in str(error):  # another process was faster: Ray accepts an id once
                    raise AlreadySubmittedError(f"{already}: {hint}") from None
                raise

    def jobs(self) -> list[SubmittedJob]:
        """Returns the labeling jobs that the cluster knows, the latest first."""
        with self._errors():
            every = self._client.list_jobs()
        jobs = (SubmittedJob.from_details(details) for details in every if details.submission_id)
        found = (job for job in jobs if job.is_labeling)
        return sorted(found, key=lambda job: job.started or datetime.now(UTC), reverse=True)

    def job(self, name: str) -> SubmittedJob:
        """Returns one job by its id; raises `UnknownJobError`."""
        job = self.find(name)
        if job is None:
            raise UnknownJobError(f"{self.address} has no job {name}: see cvt-label status")
        return job

    def find(self, name: str) -> SubmittedJob | None:
        """Returns one job by its id; None if the cluster doesn't know it."""
        if not name:
            return None
        with self._errors():
            try:
                return SubmittedJob.from_details(self._client.get_job_info(name))
            except RuntimeError as error:
                if "status code 404" in str(error):
                    return None
                raise

    def logs(self, name: str) -> str:
        """Returns what a job has written so far; raises `UnknownJobError`."""
        self.job(name)
        with self._errors():
            return self._client.get_job_logs(name)

    def follow(self, name: str, write: Callable[[str], None]) -> SubmittedJob:
        """Passes the log of a job to `write` until the job is finished; returns the finished job.

        After a lost connection it reconnects, and writes nothing twice. Raises `UnknownJobError`.
        """
        import aiohttp

        job, written, failures = self.job(name), 0, 0

        async def pass_on() -> None:
            nonlocal written, failures
            seen = 0
            async for text in self._client.tail_job_logs(name):
                seen += len(text)
                if seen > written:
                    write(text[written - seen :])
                    written, failures = seen, 0

        while True:
            try:
                asyncio.run(pass_on())
                job = self.job(name)
            except (RuntimeError, OSError, aiohttp.ClientError) as error:
                failures += 1
                if failures > _RECONNECTIONS:
                    raise ClusterError(f"{self.address}: job {name} can't be followed: {error}") from None
            if job.is_finished:
                return job
            time.sleep(_POLL_SECONDS)

    def stop(self, name: str) -> SubmittedJob:
        """Stops a job as SIGTERM does, and waits until it is finished; raises `UnknownJobError`."""
        job = self.job(name)
        if not job.is_finished:
            with self._errors():
                self._client.stop_job(name)
        while not job.is_finished:
            time.sleep(_POLL_SECONDS)
            job = self.job(name)
        return job

    @contextmanager
    def _errors(self) -> Iterator[None]:
        import requests
        from ray.exceptions import AuthenticationError, RayError

        try:
            yield
        except requests.exceptions.InvalidHeader:  # its message contains the token
            cause = "holds a line break, or begins with a space"
            raise ClusterError(f"the token in RAY_AUTH_TOKEN {cause}") from None
        except AuthenticationError:
            raise ClusterError(
                f"{self.address}: the cluster asks for a token, and has none or another one from here: set "
                "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to the cluster's own"
            ) from None
        except (ClusterError, SubmissionRefusedError):
            raise
        except (RuntimeError, ValueError, OSError, RayError) as error:  # OSError: of requests, too
            # The cluster's error is a traceback: its last line says what happened.
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise ClusterError(f"{self.address}: {(lines or [type(error).__name__])[-1]}") from None


@contextmanager
def _address_variables_hidden() -> Iterator[None]:
    before = {name: os.environ.pop(name) for name in _ADDRESS_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)
