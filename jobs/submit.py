"""Submits a labeling job to a Ray cluster: `python -m jobs.submit --config FILE`, or `cvt-label submit`."""

import shlex
import sys
from datetime import UTC, datetime
from typing import Annotated

import typer

from jobs import console
from jobs.console import print_notice
from pipeline.config import ConfigError, SubmitConfig
from pipeline.dataflow import sigterm_interrupts
from pipeline.schedule import JobClient, Submission, SubmittedJob, minute_key


@console.exit_on_error()
def submit(
    config: console.ConfigOption,
    set: console.SetOption = None,
    address: console.AddressOption = None,
    idempotency_key: Annotated[
        str | None,
        typer.Option(
            help="Name of this submission, such as 2026-11-23. A second job with the same key, dataset and "
            "model is refused. Default: the current minute in UTC.",
            show_default=False,
        ),
    ] = None,
    retry_errors: console.RetryErrorsOption = None,
    relabel: console.RelabelOption = None,
    prune: console.PruneOption = None,
    working_dir: Annotated[
        str | None,
        typer.Option(help="Local folder with the code to upload; else the cluster's image must contain it."),
    ] = None,
    pip: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Requirements that Ray installs for the job, on every node."),
    ] = None,
    python: Annotated[str, typer.Option(help="The cluster's interpreter.")] = "python",
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Follow the job's log, and end as it ends.")
    ] = True,
) -> None:
    """Submit a labeling job to a Ray cluster, follow it, and end with its exit status.

    The configuration is checked here, and sent with the job, without credentials: the cluster has its own.
    Ctrl-C stops following, not the job.

    Exit status: the job's own (see label), 130 when it was stopped; 2 when the configuration can't be
    used; 4 when the cluster can't be reached or refuses; 6 when this job was submitted before, or one for
    the same dataset and model is not finished. With --no-wait, 0 once it is submitted.
    """
    loaded, selection = console.load_job(config, set, retry_errors, relabel, prune, keep_relative_paths=True)
    try:
        key = minute_key(datetime.now(UTC)) if idempotency_key is None else idempotency_key
        to = SubmitConfig(working_dir=working_dir, requirements=pip, python=python)
        submission = Submission(loaded, key, selection, to)
    except ValueError as error:
        raise ConfigError(f"--idempotency-key: {error}") from None
    client = JobClient(address)
    client.submit(submission)
    job = submission.id
    print_notice(f"submitted {job}; stop it: cvt-label stop {_arguments(client, job)}")
    if wait:
        sys.exit(follow(client, job).exit_status)
    typer.echo(job)


def follow(client: JobClient, job: str) -> SubmittedJob:
    """Prints the log of a job until the job is finished; Ctrl-C and SIGTERM stop following, not the job."""
    try:
        with sigterm_interrupts():
            ended = client.follow(job, console.print_log)
    except KeyboardInterrupt:
        hint = _arguments(client, job)
        print_notice(
            f"no longer followed; the job goes on: cvt-label logs --follow {hint}, cvt-label stop {hint}"
        )
        sys.exit(console.ExitStatus.INTERRUPTED)
    print_notice(f"{job} {ended.state.lower()}, exit status {ended.exit_status}: {ended.message}")
    return ended


def _arguments(client: JobClient, job: str) -> str:
    return shlex.join([job, "--address", client.address])


if __name__ == "__main__":
    console.run_command(submit)
