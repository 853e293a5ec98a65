"""Shows the log of a submitted job: `python -m jobs.logs JOB`, or `cvt-label logs`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from jobs.console import AddressOption, JobArgument, exit_status, print_log, run_alone
from jobs.submit import follow as follow_job
from pipeline.schedule import JobClient


def logs(
    job: JobArgument,
    address: AddressOption = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Continue until the job is finished, and end as it ends.")
    ] = False,
) -> None:
    """Show the log of a submitted job, its progress included.

    Exit status: 0, or with --follow the job's own; 4 when the cluster can't be reached, or has no such job.
    """
    with exit_status():
        client = JobClient(address)
        if not follow:
            print_log(client.logs(job))
            return
        ended = follow_job(client, job)
    sys.exit(ended.exit_status)


if __name__ == "__main__":
    run_alone(logs)
