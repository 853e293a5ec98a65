"""Stops a submitted job: `python -m jobs.stop JOB`, or `cvt-label stop`."""

from jobs import console
from pipeline.schedule import JobClient


@console.exit_on_error()
def stop(job: console.JobArgument, address: console.AddressOption = None) -> None:
    """Stop a submitted job as SIGTERM does, and wait until it is finished.

    Shards that it has started are finished, if `run.grace_period_s` allows; a rerun does the rest.

    Exit status: 0 when it is finished; 4 when the cluster can't be reached, or has no such job.
    """
    ended = JobClient(address).stop(job)
    console.print_line(f"{job} {ended.state.lower()}, exit status {ended.exit_status}")


if __name__ == "__main__":
    console.run_command(stop)
