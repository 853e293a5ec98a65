"""Submits a labeling job to a Ray cluster: `cvt-label submit`."""

import shlex
import sys
from datetime import UTC, datetime
from typing import Annotated, Never

import typer

from jobs import console
from jobs.console import print_notice
from pipeline.config import Config, ConfigError, Selection, SubmitConfig, load_config
from pipeline.schedule import JobClient, Submission, minute_key


def submit(
    config: console.ConfigOption,
    set: console.SetOption = None,
    address: console.AddressOption = None,
    idempotency_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            help="Name of this submission, such as 2026-11-23. A second job with the same key, dataset and "
            "model is refused. Default: the current minute in UTC.",
        ),
    ] = None,
    retry_errors: console.RetryErrorsOption = False,
    relabel: console.RelabelOption = False,
    prune: console.PruneOption = False,
    working_dir: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Code to upload. Default: the code in the image.")
    ] = None,
    requirements: Annotated[
        str | None, typer.Option(metavar="FILE", help="Requirements that Ray installs on every node.")
    ] = None,
    python: Annotated[
        str, typer.Option(metavar="COMMAND", help="Python interpreter on the cluster.")
    ] = "python",
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Follow the log; end with the job's exit status.")
    ] = True,
) -> None:
    """Submit a labeling job to a Ray cluster and follow its log.

    The configuration is checked locally and sent with the job. Credentials are not sent: the cluster needs
    its own. Ctrl-C ends following the log; the job continues.

    More exit statuses: the exit status of the job (see label), 130 if the job was stopped; 6 if the same job
    was submitted before, or a job for the same dataset and model is not finished.
    """
    loaded = load_config(Config, config, set or (), keep_relative_paths=True)
    try:
        key = minute_key(datetime.now(UTC)) if idempotency_key is None else idempotency_key
        to = SubmitConfig(working_dir=working_dir, requirements=requirements, python=python)
        submission = Submission(loaded, key, Selection(retry_errors, relabel, prune), to)
    except ValueError as error:
        raise ConfigError(f"--idempotency-key: {error}") from None
    client = JobClient(address)
    client.submit(submission)
    job = submission.id
    print_notice(f"submitted {job}; stop the job: cvt-label stop {_arguments(client, job)}")
    if wait:
        follow(client, job)
    typer.echo(job)


def follow(client: JobClient, job: str) -> Never:
    """Prints the log of a job until the job is finished, and ends the process with the job's exit status.

    Ctrl-C and SIGTERM end following; the job continues.
    """
    try:
        ended = client.follow(job, console.print_log)
    except KeyboardInterrupt:
        hint = _arguments(client, job)
        print_notice(f"the job continues; follow it: cvt-label logs --follow {hint}")
        print_notice(f"stop the job: cvt-label stop {hint}")
        sys.exit(console.ExitStatus.INTERRUPTED)
    print_notice(f"{job} {ended.state.lower()}, exit status {ended.exit_status}: {ended.message}")
    sys.exit(ended.exit_status)


def _arguments(client: JobClient, job: str) -> str:
    return shlex.join([job, "--address", client.address])
