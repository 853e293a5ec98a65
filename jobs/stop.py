"""Stops a submitted job: `python -m jobs.stop JOB`, or `cvt-label stop`."""

from __future__ import annotations

from jobs.console import AddressOption, JobArgument, exit_status, out, run_alone
from pipeline.schedule import JobClient


def stop(job: JobArgument, address: AddressOption = None) -> None:
    """Stop a submitted job as SIGTERM does, and wait until it is finished.

    Shards that it has started are finished, if `run.grace_s` allows; a rerun does the rest.

    Exit status: 0 when it is finished; 4 when the cluster can't be reached, or has no such job.
    """
    with exit_status():
        ended = JobClient(address).stop(job)
    message = f"{job} {ended.state.lower()}, exit status {ended.exit_status}"
    out.print(message, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    run_alone(stop)
