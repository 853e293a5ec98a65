"""Shows labeling jobs of a Ray cluster: `python -m jobs.status [JOB]`, or `cvt-label status`."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer
from rich.table import Table

from jobs.console import AddressOption, exit_status, out, plain, run_alone
from pipeline.schedule import JobClient, SubmittedJob

#: State, start, seconds and exit status have a maximum width; the id, which may be long, comes last.
_LINE = "{state:<9}  {started:<23}  {took:>8}  {status:>6}  {job}"


def status(
    job: Annotated[
        str | None, typer.Argument(metavar="JOB", help="A job's id; else all are listed.", show_default=False)
    ] = None,
    address: AddressOption = None,
) -> None:
    """Show a labeling job, or all that the cluster knows of: state, times, exit status.

    Exit status: 0; 4 when the cluster can't be reached, or has no such job.
    """
    with exit_status():
        client = JobClient(address)
        if job is not None:
            _show(client.job(job))
            return
        jobs = client.jobs()
    if not jobs:
        out.print("no labeling jobs")
        return
    headings = {name: name for name in ("state", "started", "took", "status", "job")}
    for row in (headings, *map(_row, jobs)):
        out.print(plain(_LINE.format(**row)), highlight=False, soft_wrap=True)


def _show(job: SubmittedJob) -> None:
    facts = _row(job) | {"message": job.message, "command": job.entrypoint} | job.metadata
    table = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        table.add_row(plain(name), plain(value))
    out.print(table, soft_wrap=True, highlight=False)


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
    run_alone(status)
