"""Jobs on a Ray cluster, through its Jobs API: submitted once, found again, followed and stopped.

Nothing of the submitter's environment goes with a job but its configuration, which holds no secret: the
cluster has credentials of its own.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pipeline.config import LABEL_NEW, Config, Selection
from pipeline.dataflow import ClusterError, check_reachable
from pipeline.storage import normalised

if TYPE_CHECKING:
    from ray.job_submission import JobDetails


#: The variable that carries a job's configuration.
CONFIG_VARIABLE = "CVT_LABEL_CONFIG"

DEFAULT_ADDRESS = "http://127.0.0.1:8265"

#: By which our jobs are told from others of the cluster, in their metadata.
_PROGRAM = "cvt-label"

#: Variables by which Ray would overrule any address that it is given.
_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")

_TICK = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")

#: How often in a row a log that breaks off is asked for again, and seconds between two looks at a job.
_RECONNECTIONS = 10

_POLL = 1.0

#: Seconds that a job which is stopped has, beyond `run.grace_s`, to write manifest and statistics.
_STOP_SECONDS = 60


class UnknownJobError(LookupError):
    """The cluster has no job of this id."""


class SubmissionRefusedError(RuntimeError):
    """Submitting would run something twice."""


class AlreadySubmittedError(SubmissionRefusedError):
    """The cluster has, or had, a job for this dataset, model and tick."""


class StillRunningError(SubmissionRefusedError):
    """A job of another tick for the same dataset and model isn't over."""


@dataclass(frozen=True)
class Submission:
    """A job that is to be submitted.

    Attributes:
        config: what it labels; `ray.address` is ignored, for it runs on the cluster that it is sent to.
        tick: names the occasion. One tick of one dataset and model is one job.
        selection: which shards, beyond new ones.
        working_dir: a local folder with the code, which is uploaded; None where the cluster has it.
        requirements: a local requirements file, of what Ray is to install for the job on every node.
        python: the cluster's interpreter.
        wait: for other runs on the same labels to end, of another input, say.
    """

    config: Config
    tick: str
    selection: Selection = LABEL_NEW
    working_dir: str | None = None
    requirements: str | None = None
    python: str = "python"
    wait: bool = False

    def __post_init__(self) -> None:
        if not _TICK.fullmatch(self.tick):
            raise ValueError(f"tick {self.tick!r}: expected up to 40 letters, digits, dots, - and _")

    @property
    def id(self) -> str:
        """The submission id: the same for the same input, output, model and tick, and for no other."""
        names = self._names
        digest = hashlib.sha256("\n".join(names.values()).encode()).hexdigest()[:6]
        dataset, model = _slug(names["input"].partition("://")[2] or names["input"]), _slug(names["model"])
        return f"label-{dataset}-{model}-{digest}-{self.tick}"

    @property
    def metadata(self) -> dict[str, str]:
        """What the cluster tells of the job, beside its state."""
        return {"program": _PROGRAM, **self._names, "tick": self.tick}

    @property
    def entrypoint(self) -> str:
        """The command that the cluster runs; in place of its shell, so that signals reach it."""
        chosen = {
            "--retry-errors": self.selection.retry_errors,
            "--relabel": self.selection.relabel,
            "--prune": self.selection.prune,
            "--wait": self.wait,
        }
        options = [f"--config=env:{CONFIG_VARIABLE}", *(name for name, given in chosen.items() if given)]
        return f"exec {shlex.join([self.python, '-m', 'jobs.label', *options])}"

    @property
    def runtime_env(self) -> dict[str, Any]:
        """What Ray sets up for the job on every node."""
        config = self.config.model_copy(update={"ray": self.config.ray.model_copy(update={"address": None})})
        # Ray kills a job that is told to stop after 3 seconds, unless this is set.
        patience = math.ceil(config.run.grace_s) + _STOP_SECONDS
        variables = {CONFIG_VARIABLE: config.model_dump_json(), "RAY_JOB_STOP_WAIT_TIME_S": str(patience)}
        environment: dict[str, Any] = {"env_vars": variables}
        if self.working_dir is not None:
            environment["working_dir"] = self.working_dir
        if self.requirements is not None:
            environment["pip"] = self.requirements
        return environment

    def is_of(self, job: Job) -> bool:
        """Whether a job labels the same dataset with the same model, at whatever tick."""
        return all(job.metadata.get(name) == value for name, value in self._names.items())

    @property
    def _names(self) -> dict[str, str]:
        config = self.config
        named = {"input": {"uri"}, "model": {"path", "revision"}, "output": {"uri"}}
        decides = config.model_dump(include={*named}, exclude=named)
        decides["decode"] = config.decode.model_dump(include={"device", "quality"})
        decides["device"] = config.classify.device
        revision = f"@{config.model.revision}" if config.model.revision else ""
        return {
            "input": _place(config.input.uri),
            "output": _place(config.output.uri),
            "model": _place(config.model.path) + revision,
            # Whatever else decides a label: another precision, say, is another set of labels.
            "settings": hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:8],
        }


def _place(uri: str) -> str:
    """One spelling of a URI; a relative path is the cluster's matter."""
    return normalised(uri) if "://" in uri or uri.startswith("/") else uri


def _slug(name: str, longest: int = 40) -> str:
    """The end of a name, of small letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower())[-longest:].strip("-") or "x"


def minute_tick(moment: datetime) -> str:
    """The tick that a moment's minute is."""
    return f"{moment.astimezone(UTC):%Y%m%dT%H%MZ}"


@dataclass(frozen=True)
class Job:
    """A job as the cluster tells of it.

    Attributes:
        id: its submission id.
        state: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED.
        message: one line on that.
        started, ended: when; None where it hasn't.
        exit_status: its process's, as a shell tells it; 130 where it was stopped, 1 where it failed before it
            had a process; None while it isn't over.
        entrypoint: its command.
        metadata: as it was submitted.
    """

    id: str
    state: str
    message: str
    started: datetime | None
    ended: datetime | None
    exit_status: int | None
    entrypoint: str
    metadata: dict[str, str]

    @property
    def is_over(self) -> bool:
        """Whether it has ended, somehow."""
        return self.exit_status is not None


class Cluster:
    """A Ray cluster's Jobs API.

    Every call raises `ClusterError` where the cluster doesn't answer, or refuses.
    """

    def __init__(self, address: str | None = None) -> None:
        """Connects.

        Args:
            address: of the dashboard, such as `http://head:8265`; None takes what the environment says
                (RAY_API_SERVER_ADDRESS, RAY_ADDRESS), or `DEFAULT_ADDRESS`.
        """
        if address is None and not any(os.environ.get(name) for name in _ADDRESS_VARIABLES):
            address = DEFAULT_ADDRESS
        if address is not None and "://" not in address:
            address = f"http://{address}"
        named = [os.environ[name] for name in _ADDRESS_VARIABLES if os.environ.get(name)]
        self.address = address or named[0]
        if "@" in self.address:
            raise ClusterError(
                "the cluster's address holds credentials, which would be shown: set RAY_AUTH_TOKEN"
            )
        check_reachable(self.address)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        from ray.job_submission import JobSubmissionClient  # takes seconds

        with self._errors(), _overruling_variables_hidden(address is not None):
            self._client = JobSubmissionClient(address)

    def submit(self, submission: Submission) -> None:
        """Submits a job, unless that would run something twice.

        Raises:
            AlreadySubmittedError: there is, or was, a job of this id.
            StillRunningError: one for the same dataset and model, of another tick, isn't over.
        """
        for job in self.jobs():
            if job.id == submission.id:
                raise _already_submitted(job)
            if submission.is_of(job) and not job.is_over:
                raise StillRunningError(
                    f"job {job.id}, for the same dataset and model, is {job.state.lower()}: not submitted"
                )
        with self._errors():
            try:
                self._client.submit_job(
                    entrypoint=submission.entrypoint,
                    runtime_env=submission.runtime_env,
                    metadata=submission.metadata,
                    submission_id=submission.id,
                )
            except (RuntimeError, OSError) as error:
                # Somebody was faster; Ray itself lets only one of them in.
                if "already exists" in str(error) and (found := self.find(submission.id)):
                    raise _already_submitted(found) from None
                raise

    def jobs(self) -> list[Job]:
        """The labelling jobs that the cluster knows, the latest first; those of `ray job submit`, too."""
        with self._errors():
            found = [_job(details) for details in self._client.list_jobs() if details.submission_id]
        ours = [job for job in found if job.metadata.get("program") == _PROGRAM or _labels(job.entrypoint)]
        return sorted(ours, key=lambda job: job.started or datetime.now(UTC), reverse=True)

    def job(self, name: str) -> Job:
        """One job by its id; raises `UnknownJobError`."""
        job = self.find(name)
        if job is None:
            raise UnknownJobError(f"{self.address} has no job {name}: see cvt-label status")
        return job

    def find(self, name: str) -> Job | None:
        """One job by its id; None where the cluster doesn't know it."""
        if not name:
            return None
        with self._errors():
            try:
                details = self._client.get_job_info(name)
            except RuntimeError as error:
                if "status code 404" in str(error):
                    return None
                raise
        return _job(details)

    def logs(self, name: str) -> str:
        """What a job has written so far; raises `UnknownJobError`."""
        self.job(name)
        with self._errors():
            return self._client.get_job_logs(name)

    def follow(self, name: str, write: Callable[[str], None]) -> Job:
        """Passes on what a job writes, from its start, until it is over; returns how it ended.

        A connection that breaks off is made anew, and what was passed on isn't again.

        Raises:
            UnknownJobError: there is no such job.
        """
        import aiohttp

        job = self.job(name)
        tail, failures = _Tail(self._client, name, write), 0
        while True:
            before = tail.passed
            try:
                asyncio.run(tail.run())
                job = self.job(name)
                failures = 0 if tail.passed > before else failures
            except (RuntimeError, OSError, aiohttp.ClientError) as error:
                failures += 1
                if failures > _RECONNECTIONS:
                    raise ClusterError(f"{self.address}: job {name} can't be followed: {error}") from None
            if job.is_over:
                return job
            time.sleep(_POLL)

    def stop(self, name: str) -> Job:
        """Stops a job as SIGTERM does, and waits until it is over; raises `UnknownJobError`."""
        job = self.job(name)
        if not job.is_over:
            with self._errors():
                self._client.stop_job(name)
        while not job.is_over:
            time.sleep(_POLL)
            job = self.job(name)
        return job

    @contextmanager
    def _errors(self) -> Iterator[None]:
        import requests
        from ray.exceptions import AuthenticationError, RayError

        try:
            yield
        except requests.exceptions.InvalidHeader:  # whose message holds it
            raise ClusterError(
                "the token in RAY_AUTH_TOKEN holds a line break, or begins with a space"
            ) from None
        except AuthenticationError:
            raise ClusterError(
                f"{self.address}: the cluster asks for a token, and has none or another one from here: set "
                "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to the cluster's own"
            ) from None
        except (ClusterError, SubmissionRefusedError):
            raise
        except (RuntimeError, ValueError, OSError, RayError) as error:  # OSError: of requests, too
            raise ClusterError(f"{self.address}: {_last_line(error)}") from None


class _Tail:
    """A job's log, passed on once however often it is begun anew."""

    def __init__(self, client: Any, name: str, write: Callable[[str], None]) -> None:
        self._client = client
        self._name = name
        self._write = write
        self.passed = 0

    async def run(self) -> None:
        """Passes on what is there, and what comes, until the job is over."""
        seen = 0
        async for text in self._client.tail_job_logs(self._name):
            new = text[max(0, self.passed - seen) :]
            seen += len(text)
            if new:
                self._write(new)
                self.passed = seen


def _job(details: JobDetails) -> Job:
    state = str(details.status)
    return Job(
        id=details.submission_id or "",
        state=state,
        message=_first_line(details.message or ""),
        started=_moment(details.start_time),
        ended=_moment(details.end_time),
        exit_status=_exit_status(state, details.driver_exit_code),
        entrypoint=details.entrypoint,
        metadata=details.metadata or {},
    )


def _exit_status(state: str, code: int | None) -> int | None:
    if state in ("PENDING", "RUNNING"):
        return None
    if state in ("SUCCEEDED", "STOPPED"):
        return 0 if state == "SUCCEEDED" else 130
    return (code if code > 0 else 128 - code) if code else 1


def _moment(milliseconds: int | None) -> datetime | None:
    return datetime.fromtimestamp(milliseconds / 1000, UTC) if milliseconds else None


def _labels(entrypoint: str) -> bool:
    return re.search(r"\bjobs\.label\b|\bcvt-label label\b", entrypoint) is not None


def _first_line(message: str) -> str:
    """Without the end of the job's log, which Ray puts after it."""
    return message.partition("\n")[0].partition(", last available logs")[0]


def _last_line(error: BaseException) -> str:
    """Of an error from the cluster, which is a traceback."""
    return next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)


def _already_submitted(job: Job) -> AlreadySubmittedError:
    return AlreadySubmittedError(
        f"job {job.id} is on the cluster already ({job.state.lower()}): not submitted again; another --tick "
        "makes another job"
    )


@contextmanager
def _overruling_variables_hidden(hidden: bool) -> Iterator[None]:
    """Keeps Ray from taking the environment's address where one was given."""
    names = _ADDRESS_VARIABLES if hidden else ()
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)
