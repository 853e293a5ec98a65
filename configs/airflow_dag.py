"""An Airflow DAG that labels a dataset every night, on a Ray cluster that is there already.

Goes into Airflow's folder of DAGs as it is. It needs no provider, only `ray[default]` of the cluster's
version beside Airflow 3, and in the environment of its workers:

    RAY_API_SERVER_ADDRESS          the cluster's dashboard, such as http://cvt-label-head-svc:8265
    RAY_AUTH_MODE, RAY_AUTH_TOKEN   the cluster's, from a secret

Credentials for the storage are the cluster's own matter. Each logical date is labelled once: its job's name
comes from that date, Ray refuses a name that it has had, and a task that is tried again first looks for what
its forerunner has left. A task that Airflow kills leaves its job running, and the next try follows it
(`ray job stop NAME` stops it).
"""

from __future__ import annotations

import asyncio
import logging
import time
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

#: What the cluster runs; its image has the code, and the configuration is mounted there. `exec`, so that it
#: is told to stop itself, and not a shell in its place.
ENTRYPOINT = "exec python -m jobs.label --config /etc/cvt-label/job.yaml"
#: Ray kills a job 3 seconds after it told it to stop, unless this is set: more than `run.grace_s`.
RUNTIME_ENV = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "80"}}
#: Exit statuses that no other try would change: an unusable configuration, shards that can't be read, drift.
HOPELESS = {2, 3, 7}

_logger = logging.getLogger(__name__)


class JobFailed(RuntimeError):  # noqa: N818 - reads as what happened
    """The job has failed or was stopped.

    Attributes:
        exit_status: of its process; None where it had none.
    """

    def __init__(self, name: str, job: JobDetails) -> None:
        super().__init__(f"job {name}: {job.status}, exit status {job.driver_exit_code}: {job.message}")
        self.exit_status = job.driver_exit_code


def label_once(client: JobSubmissionClient, name: str, entrypoint: str = ENTRYPOINT) -> str:
    """Runs a job of this name, unless one did or does, and follows it to its end; returns its full name.

    A job that has failed is left, and another one is begun, with the next number behind its name.

    Raises:
        JobFailed: it has failed or was stopped.
    """
    for number in count(1):
        job_name = f"{name}-{number}"
        found = _find(client, job_name)
        if found is None:
            _submit(client, job_name, entrypoint)
        elif found.status.is_terminal() and found.status != "SUCCEEDED":
            continue
        job = _followed(client, job_name)
        if job.status != "SUCCEEDED":
            raise JobFailed(job_name, job)
        return job_name
    raise AssertionError("unreachable")


def _find(client: JobSubmissionClient, name: str) -> JobDetails | None:
    try:
        return client.get_job_info(name)
    except RuntimeError as error:
        if "404" not in str(error):
            raise
        return None


def _submit(client: JobSubmissionClient, name: str, entrypoint: str) -> None:
    try:
        client.submit_job(entrypoint=entrypoint, submission_id=name, runtime_env=RUNTIME_ENV)
        _logger.info("submitted %s", name)
    except RuntimeError:  # somebody was faster
        if _find(client, name) is None:
            raise


def _followed(client: JobSubmissionClient, name: str) -> JobDetails:
    """Passes the job's log on until it is over."""

    async def follow() -> None:
        async for text in client.tail_job_logs(name):
            for line in text.splitlines():
                _logger.info("%s", line)

    while True:
        asyncio.run(follow())
        job = client.get_job_info(name)
        if job.status.is_terminal():
            return job
        time.sleep(1)  # the connection broke off, or the job isn't written down as over yet


def job_name(dag: str, moment: datetime) -> str:
    """The name of a dataset's job for a logical date."""
    return f"{dag}-{moment.astimezone(UTC):%Y%m%dT%H%M}"


try:
    from airflow.sdk import dag, get_current_context, task
    from airflow.sdk.exceptions import AirflowFailException
except ImportError:  # the functions above are of use without Airflow, too
    pass
else:

    @dag(
        schedule="0 2 * * *",
        start_date=datetime(2026, 1, 1, tzinfo=UTC),
        catchup=False,  # one run labels whatever is new, however many nights were missed
        max_active_runs=1,
        default_args={"retries": 2, "retry_delay": timedelta(minutes=5)},
        tags=["cvt-label"],
    )
    def label_images() -> None:
        """Labels what is new or has changed in the dataset."""

        @task(execution_timeout=timedelta(hours=20))
        def label() -> str:
            from ray.job_submission import JobSubmissionClient

            context = get_current_context()
            moment = context.get("logical_date") or context["dag_run"].run_after  # of a run by hand
            try:
                return label_once(JobSubmissionClient(), job_name("label-images", moment))
            except JobFailed as failure:
                if failure.exit_status in HOPELESS:
                    raise AirflowFailException(str(failure)) from failure
                raise

        label()

    label_images()
