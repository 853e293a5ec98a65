"""Stops a submitted job: `cvt-label stop`."""

from jobs import console
from pipeline.schedule import JobClient


def stop(job: console.JobArgument, address: console.AddressOption = None) -> None:
    """Stop a submitted job and wait until it is finished.

    The job receives SIGTERM and finishes the shards that it has started, within `run.grace_period_s`. Submit
    the job again to label the remaining shards.
    """
    ended = JobClient(address).stop(job)
    console.print_line(f"{job} {ended.state.lower()}, exit status {ended.exit_status}")
