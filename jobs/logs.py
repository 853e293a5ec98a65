"""Prints the log of a submitted job: `cvt-label logs`."""

from typing import Annotated

import typer

from jobs import console
from jobs.submit import follow as follow_job
from pipeline.schedule import JobClient


def logs(
    job: console.JobArgument,
    address: console.AddressOption = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Follow the log; end with the job's exit status.")
    ] = False,
) -> None:
    """Print the log of a submitted job.

    The log includes the progress of the job.

    More exit statuses: with --follow, the exit status of the job.
    """
    client = JobClient(address)
    if follow:
        follow_job(client, job)
    console.print_log(client.logs(job))
