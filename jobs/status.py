"""Prints the state of jobs on a Ray cluster: `cvt-label status`."""

from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer

from jobs import console
from pipeline.schedule import JobClient, SubmittedJob

#: The job id comes last because its length varies.
_LINE = "{state:<9}  {started:<23}  {took:>8}  {status:>6}  {job}"


def status(
    job: Annotated[str | None, typer.Argument(metavar="JOB", help="Id of a job. Default: all jobs.")] = None,
    address: console.AddressOption = None,
) -> None:
    """Print the state of the labeling jobs on a Ray cluster.

    The table has the state, the start, the duration and the exit status of each job.
    """
    client = JobClient(address)
    if job is not None:
        one = client.job(job)
        console.print_fields(_row(one) | {"message": one.message, "command": one.entrypoint} | one.metadata)
    elif jobs := client.jobs():
        for row in ({name: name for name in _row(jobs[0])}, *map(_row, jobs)):
            console.print_line(_LINE.format(**row))
    else:
        console.print_line("no labeling jobs")


def _row(job: SubmittedJob) -> dict[str, str]:
    started, ended = job.started, job.ended
    took = round(((ended or datetime.now(UTC)) - started).total_seconds()) if started else None
    return {
        "job": job.id,
        "state": job.state.lower(),
        "started": f"{started:%Y-%m-%d %H:%M:%S} UTC" if started else "-",
        "took": "-" if took is None else str(timedelta(seconds=took)),
        "status": "-" if job.exit_status is None else str(job.exit_status),
    }
