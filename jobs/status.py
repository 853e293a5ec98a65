"""Shows labeling jobs of a Ray cluster: `python -m jobs.status [JOB]`, or `cvt-label status`."""

from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer

from jobs import console
from pipeline.schedule import JobClient, SubmittedJob

#: State, start, seconds and exit status have a maximum width; the id, which may be long, comes last.
_LINE = "{state:<9}  {started:<23}  {took:>8}  {status:>6}  {job}"


@console.exit_on_error()
def status(
    job: Annotated[
        str | None, typer.Argument(metavar="JOB", help="A job's id; else all are listed.", show_default=False)
    ] = None,
    address: console.AddressOption = None,
) -> None:
    """Show a labeling job, or all that the cluster knows of: state, times, exit status.

    Exit status: 0; 4 when the cluster can't be reached, or has no such job.
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


if __name__ == "__main__":
    console.run_command(status)
