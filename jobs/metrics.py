"""Prints metrics of the last runs for Prometheus: `cvt-label metrics`."""

import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from prometheus_client import CollectorRegistry, Gauge, generate_latest, write_to_textfile

from jobs import console
from pipeline import load_job_config
from pipeline.config import WHOLE, ScheduleConfig, load_config
from pipeline.run import find_last_runs


def metrics(
    config: console.JobConfigOption = None,
    schedule: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Configuration of a schedule, in place of --config.")
    ] = None,
    set: console.SetOption = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="File to replace, in one step.")
    ] = None,
) -> None:
    """Print metrics of each dataset's last run for Prometheus.

    The metrics come from the run records in the output, so they exist when no cluster is running. If several
    drivers label a dataset, each share has its own last run.

    More exit statuses: 4 if a dataset or a share has no run yet, or its runs cannot be read (all others are
    printed).
    """
    if config is not None and schedule is None:
        jobs = [load_job_config(config, set or ())]
    elif schedule is not None and config is None:
        loaded = load_config(ScheduleConfig, schedule, set or (), keep_relative_paths=True)
        jobs = [dataset.job for dataset in loaded.datasets.values()]
    else:
        raise typer.BadParameter("give --config or --schedule, not both")
    registry, exit_status = CollectorRegistry(), console.ExitStatus.OK

    def gauge(name: str, text: str, *more_labels: str) -> Gauge:
        labels = "dataset", "model", "share", *more_labels
        return Gauge(f"cvt_label_last_run_{name}", text, labels, registry=registry)

    status = gauge(
        "status", "1; the label is the status in the run record, limit_exceeded or unknown.", "status"
    )
    #: By field of the run record.
    gauges = {
        "started_at": gauge("start_timestamp_seconds", "Start of the last run."),
        "ended_at": gauge(
            "end_timestamp_seconds", "End; missing while the run is active or if it was killed."
        ),
        "images_per_s": gauge("images_per_second", "Rate; missing if the last run was too short."),
    }
    for job in jobs:
        dataset = str(job.input.inputs)
        problem = f"{job.output.uri}: has no record of a run"
        try:
            runs = find_last_runs(job)
        except Exception as error:  # does not affect the other datasets
            runs, problem = {WHOLE: ("", {})}, str(error)
        for share, (model, record) in runs.items():
            labels = dataset, model, str(share)
            if not record:
                console.print_notice(f"{dataset}, share {share}: {problem}")
                exit_status = console.ExitStatus.UNAVAILABLE
            is_broken = record.get("broken_limits") or record.get("broken_failure_limits")
            state = "limit_exceeded" if is_broken else record.get("status", "unknown")
            status.labels(*labels, state).set(1)
            for field, each in gauges.items():
                if (value := record.get(field)) is not None:
                    is_time = isinstance(value, str)
                    each.labels(*labels).set(datetime.fromisoformat(value).timestamp() if is_time else value)
    if output is None:
        typer.echo(generate_latest(registry).decode(), nl=False)
    else:
        write_to_textfile(str(output), registry)
    sys.exit(exit_status)
