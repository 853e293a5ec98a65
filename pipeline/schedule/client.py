"""A client for Ray's Jobs API: submits a job once, finds jobs, follows their logs and stops them."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pipeline.config import LABEL_NEW, Config, Selection, SubmitConfig
from pipeline.dataflow import ClusterError, check_reachable

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
#: Variables with the address of a cluster. Ray prefers them to an address that is passed as an argument.
_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_MAX_RECONNECTIONS = 10  # in a row
_POLL_SECONDS = 1.0
_LOG_CHARACTERS_PER_S = 1_000_000
#: Environment variable of the job that contains the configuration.
CONFIG_VARIABLE = "CVT_LABEL_CONFIG"
#: The value of `program` in the metadata of labeling jobs.
PROGRAM = "cvt-label"
#: Seconds, in addition to `run.grace_period_s`, in which a stopped job can write manifest and statistics.
_SHUTDOWN_SECONDS = 60
_IDEMPOTENCY_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")


class UnknownJobError(LookupError):
    """The cluster has no job with this id."""


class SubmissionRefusedError(RuntimeError):
    """The submission would run something twice."""


class AlreadySubmittedError(SubmissionRefusedError):
    """The cluster already has a job for this dataset, model and idempotency key, possibly a finished one."""


class StillRunningError(SubmissionRefusedError):
    """A job for the same dataset and model, with another idempotency key, is not finished."""


@dataclass(frozen=True)
class SubmittedJob:
    """A job of a cluster.

    Attributes:
        state: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED; LOST if the cluster no longer has the job.
        message: one line about the state.
        exit_status: exit status of the process, as a shell reports it. 130 if the job was stopped, 1 if it
            failed before its process started. None if the job is not finished or is lost.
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
        """Creates a job from Ray's job details."""
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
        """Whether the job has ended, in any state."""
        return self.state not in ("PENDING", "RUNNING")

    @property
    def is_labeling(self) -> bool:
        """Whether `submit` or `schedule` submitted the job, or `ray job submit` with a labeling command."""
        has_metadata = self.metadata.get("program") == PROGRAM
        command = r"\b(jobs\.label|(jobs\.cli|cvt-label) label)\b"
        return has_metadata or re.search(command, self.entrypoint) is not None


@dataclass(frozen=True)
class Submission:
    """A labeling job to submit. The job receives the configuration, and no secret of the submitter.

    Attributes:
        config: the job's configuration. `ray.address` is ignored.
        idempotency_key: usually the scheduled time. The cluster accepts one job per dataset, model and key.
        selection: the shards to label in addition to new ones.
        submit_config: how the job runs on its cluster. The address is not used here.
        wait: whether the job waits for other runs on the same partition to end.
    """

    config: Config
    idempotency_key: str
    selection: Selection = LABEL_NEW
    submit_config: SubmitConfig = field(default_factory=SubmitConfig)
    wait: bool = False

    def __post_init__(self) -> None:
        if not _IDEMPOTENCY_KEY.fullmatch(self.idempotency_key):
            expected = "1 to 40 letters, digits, dots, hyphens and underscores; start with a letter or digit"
            raise ValueError(f"idempotency key {self.idempotency_key!r}: use {expected}")

    @property
    def id(self) -> str:
        """The submission id: a function of input, output, model, label settings and idempotency key."""
        identity = self.identity
        digest = hashlib.sha256("\n".join(identity.values()).encode()).hexdigest()[:6]
        dataset = identity["input"].partition("://")[2] or identity["input"]
        return f"label-{_slug(dataset)}-{_slug(identity['model'])}-{digest}-{self.idempotency_key}"

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata that the cluster shows with the job."""
        return {"program": PROGRAM, **self.identity, "idempotency_key": self.idempotency_key}

    @property
    def entrypoint(self) -> str:
        """The command that the cluster runs. `exec` replaces the shell, so that the job receives signals."""
        command = [self.submit_config.python, "-m", "jobs.label", f"--config=env:{CONFIG_VARIABLE}"]
        options = asdict(self.selection) | {"wait": self.wait}
        command += [f"--{name.replace('_', '-')}" for name, is_set in options.items() if is_set]
        return f"exec {shlex.join(command)}"

    @property
    def runtime_env(self) -> dict[str, Any]:
        """The Ray runtime environment of the job."""
        config = self.config.model_copy(update={"ray": self.config.ray.model_copy(update={"address": None})})
        # Without RAY_JOB_STOP_WAIT_TIME_S, Ray kills a job 3 seconds after it sent SIGTERM.
        stop_timeout = math.ceil(config.run.grace_period_s) + _SHUTDOWN_SECONDS
        fields = {
            "env_vars": {
                CONFIG_VARIABLE: config.model_dump_json(),
                "RAY_JOB_STOP_WAIT_TIME_S": str(stop_timeout),
            },
            "working_dir": self.submit_config.working_dir,
            "pip": self.submit_config.requirements,
        }
        return {name: value for name, value in fields.items() if value is not None}

    @property
    def identity(self) -> dict[str, str]:
        """The part of the metadata that jobs for the same dataset, model and settings have in common."""
        config = self.config
        settings = config.label_settings | {"class_names": config.model.labels}
        if config.input.exclude or not isinstance(config.input.uri, str):
            settings["dataset"] = [config.input.uri, config.input.exclude]
        if config.run.share is not None:
            settings["share"] = config.run.share
        return {
            "input": str(config.input.inputs),
            "output": config.output.uri,
            "model": config.model.path + (f"@{config.model.revision}" if config.model.revision else ""),
            "settings": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8],
        }


def _slug(name: str) -> str:
    """Returns the end of a name in lower-case letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower())[-40:].strip("-") or "x"


def minute_key(time: datetime) -> str:
    """Returns the idempotency key of a scheduled time: its minute in UTC, such as `20261123T0200Z`."""
    return f"{time.astimezone(UTC):%Y%m%dT%H%MZ}"


class JobClient:
    """The Jobs API of a Ray cluster.

    Every method raises `ClusterError` if the cluster does not answer or refuses the request. The default of
    the dashboard's address is RAY_API_SERVER_ADDRESS, else RAY_ADDRESS, else `DEFAULT_ADDRESS`.
    """

    def __init__(self, address: str | None = None) -> None:
        if address is None:
            address = next(filter(None, map(os.environ.get, _ADDRESS_VARIABLES)), DEFAULT_ADDRESS)
        elif "://" not in address:
            address = f"http://{address}"
        if "@" in address:
            cause = "the cluster's address contains credentials, which logs and messages would show"
            raise ClusterError(f"{cause}: remove them and set RAY_AUTH_TOKEN")
        self.address = address
        check_reachable(address)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        from ray.job_submission import JobSubmissionClient  # the import takes seconds

        with self._translate_errors(), _hide_address_variables():
            self._client = JobSubmissionClient(address)

    def submit(self, submission: Submission) -> None:
        """Submits a job; raises `SubmissionRefusedError`."""
        exists = f"the cluster already has job {submission.id}"
        remedy = "use another --idempotency-key to submit another job"
        for job in self.jobs():
            if job.id == submission.id:
                raise AlreadySubmittedError(f"{exists} ({job.state.lower()}): {remedy}")
            if submission.identity.items() <= job.metadata.items() and not job.is_finished:
                cause = f"job {job.id} for the same dataset and model is {job.state.lower()}"
                raise StillRunningError(f"not submitted: {cause}")
        with self._translate_errors():
            try:
                self._client.submit_job(
                    entrypoint=submission.entrypoint,
                    runtime_env=submission.runtime_env,
                    metadata=submission.metadata,
                    submission_id=submission.id,
                )
            except (RuntimeError, OSError) as error:
                if "already exists" in str(error):  # another process submitted it: Ray accepts an id once
                    raise AlreadySubmittedError(f"{exists}: {remedy}") from None
                raise

    def jobs(self) -> list[SubmittedJob]:
        """Returns the labeling jobs of the cluster, the latest first."""
        with self._translate_errors():
            all_details = self._client.list_jobs()
        jobs = (SubmittedJob.from_details(details) for details in all_details if details.submission_id)
        labeling_jobs = (job for job in jobs if job.is_labeling)
        return sorted(labeling_jobs, key=lambda job: job.started or datetime.now(UTC), reverse=True)

    def job(self, job_id: str) -> SubmittedJob:
        """Returns the job with this id; raises `UnknownJobError`."""
        with self._translate_errors(job_id):
            return SubmittedJob.from_details(self._client.get_job_info(job_id))

    def logs(self, job_id: str) -> str:
        """Returns the log of a job so far; raises `UnknownJobError`."""
        with self._translate_errors(job_id):
            return self._client.get_job_logs(job_id)

    def follow(self, job_id: str, write: Callable[[str], None]) -> SubmittedJob:
        """Passes the log of a job to `write` until the job is finished; returns the finished job.

        Reconnects if the cluster does not answer for a while. Raises `UnknownJobError`.
        """
        written = failures = 0
        while True:
            try:
                job = self.job(job_id)  # before the log, which is complete if the job is finished
                log = self.logs(job_id)
            except ClusterError:
                failures += 1
                if failures > _MAX_RECONNECTIONS:
                    raise
            else:
                failures = 0
                if log[written:]:
                    write(log[written:])
                written = len(log)
                if job.is_finished:
                    return job
            time.sleep(max(_POLL_SECONDS, written / _LOG_CHARACTERS_PER_S))  # each poll gets the whole log

    def stop(self, job_id: str) -> SubmittedJob:
        """Sends SIGTERM to a job and waits until the job is finished; raises `UnknownJobError`."""
        job = self.job(job_id)
        if not job.is_finished:
            with self._translate_errors():
                self._client.stop_job(job_id)
        while not job.is_finished:
            time.sleep(_POLL_SECONDS)
            job = self.job(job_id)
        return job

    @contextmanager
    def _translate_errors(self, job_id: str | None = None) -> Iterator[None]:
        import requests
        from ray.exceptions import AuthenticationError, RayError

        unknown = UnknownJobError(f"{self.address} has no job {job_id}: list the jobs with cvt-label status")
        if job_id == "":  # the request would return all jobs
            raise unknown
        try:
            yield
        except requests.exceptions.InvalidHeader:  # its message contains the token
            cause = "contains a line break or starts with a space"
            raise ClusterError(f"the token in RAY_AUTH_TOKEN {cause}") from None
        except AuthenticationError:
            raise ClusterError(
                f"{self.address}: the cluster requires a token, and the token is missing or wrong: set "
                "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's token"
            ) from None
        except (ClusterError, SubmissionRefusedError):
            raise
        except (RuntimeError, ValueError, OSError, RayError) as error:  # requests raises OSError
            if job_id and "status code 404" in str(error):
                raise unknown from None
            # The cluster returns a traceback. Its last line has the cause.
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise ClusterError(f"{self.address}: {(lines or [type(error).__name__])[-1]}") from None


@contextmanager
def _hide_address_variables() -> Iterator[None]:
    hidden = {name: os.environ.pop(name) for name in _ADDRESS_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)
