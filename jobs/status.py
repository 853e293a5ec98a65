"""Shows labelling jobs of a Ray cluster: `python -m jobs.status [JOB]`, or `cvt-label status`."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer
from rich.table import Table

from jobs.console import AddressOption, exit_status, out, plain, run_alone
from pipeline.schedule import Cluster, Job

#: State, start, seconds and exit status, as wide as they get; the id, which may be long, comes last.
_LINE = "{:<9}  {:<23}  {:>8}  {:>6}  {}"


def status(
    job: Annotated[
        str | None, typer.Argument(metavar="JOB", help="A job's id; else all are listed.", show_default=False)
    ] = None,
    address: AddressOption = None,
) -> None:
    """Show a labelling job, or all that the cluster knows of: state, times, exit status.

    Exit status: 0; 4 when the cluster can't be reached, or has no such job.
    """
    with exit_status():
        cluster = Cluster(address)
        if job is None:
            _list(cluster.jobs())
        else:
            _show(cluster.job(job))


def _list(jobs: list[Job]) -> None:
    if not jobs:
        out.print("no labelling jobs")
        return
    out.print(_LINE.format("state", "started", "took", "status", "job"), highlight=False, soft_wrap=True)
    for job in jobs:
        facts = _facts(job)
        cells = facts["state"], facts["started"], facts["took"], facts["exit status"], job.id
        out.print(plain(_LINE.format(*cells)), highlight=False, soft_wrap=True)


def _show(job: Job) -> None:
    table = Table.grid(padding=(0, 2))
    for name, value in (
        {"job": job.id} | _facts(job) | {"message": job.message, "command": job.entrypoint} | job.metadata
    ).items():
        table.add_row(plain(name), plain(value))
    out.print(table, soft_wrap=True, highlight=False)


def _facts(job: Job) -> dict[str, str]:
    started, ended = job.started, job.ended
    took = (ended or datetime.now(UTC)) - started if started else None
    return {
        "state": job.state.lower(),
        "started": f"{started:%Y-%m-%d %H:%M:%S} UTC" if started else "-",
        "took": str(timedelta(seconds=round(took.total_seconds()))) if took is not None else "-",
        "exit status": "-" if job.exit_status is None else str(job.exit_status),
    }


if __name__ == "__main__":
    run_alone(status)
