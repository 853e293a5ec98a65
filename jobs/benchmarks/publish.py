"""Measures the publication of labels: `cvt-label benchmark publish`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from jobs import console
from jobs.benchmarks import figures
from jobs.benchmarks.bucket import open_folder
from jobs.benchmarks.sections import OK, Row, run_section
from jobs.benchmarks.synthetic_labels import SyntheticLabels
from jobs.publish import MemoryOption
from pipeline.storage import temporary_folder

_MODULE, _TIMEOUT_S = "jobs.benchmarks.publish_steps", 3600.0
_FORMATS = ("delta", "iceberg")


def publish(
    context: typer.Context,
    rows: Annotated[int, typer.Option(metavar="N", min=1, help="Number of rows of a shard.")] = 1000,
    shards: Annotated[int, typer.Option(metavar="N", min=1, help="Number of shards.")] = 1000,
    embedding: Annotated[
        int, typer.Option(metavar="N", min=0, help="Values of an embedding, or 0: no embeddings.")
    ] = 0,
    formats: Annotated[str, typer.Option(metavar="FORMAT,...", help="Formats of tables.")] = ",".join(
        _FORMATS
    ),
    s3: Annotated[bool, typer.Option("--s3", help="Store labels and tables on a local S3 server.")] = False,
    memory: MemoryOption = "4GiB",
    output: figures.OutputOption = None,
) -> None:
    """Measure the publication of labels as tables.

    Publishes synthetic labels, publishes with nothing new, with one percent of the shards changed, with one
    percent added, and with --rebuild. After each step, all rows and columns of the table are compared with
    the prediction files. Iceberg has a SQL catalog in a file.

    More exit statuses: 1 if a publication failed, or the rows differ.
    """
    names = formats.split(",")
    if unknown := {*names} - {*_FORMATS}:
        raise typer.BadParameter(f"unknown format: {', '.join(sorted(unknown))}", param_hint="--formats")
    with _folder(s3) as folder:
        labels = SyntheticLabels(f"{folder}/labels/model=synthetic-00000000", rows, embedding)
        measured = _measure(labels, shards, [_table(name, folder) for name in names], memory)
    rows_by_format = [row for name in names for row in measured if row["format"] == name]
    figures.print_results(context, output, publications=rows_by_format)


@contextmanager
def _folder(s3: bool) -> Iterator[str]:
    """Yields a folder for labels and tables, and sets the environment for a catalog in a local file."""
    with temporary_folder() as local:
        catalog = {"URI": f"sqlite:///{local}/catalog.db", "TYPE": "sql"}
        if not s3:
            _configure(catalog | {"WAREHOUSE": f"file://{local}/warehouse"})
            yield str(local)
            return
        with open_folder(None) as bucket:
            access = {
                "WAREHOUSE": f"{bucket}/warehouse",
                "S3__ENDPOINT": os.environ["AWS_ENDPOINT_URL_S3"],
                "S3__ACCESS_KEY_ID": os.environ["AWS_ACCESS_KEY_ID"],
                "S3__SECRET_ACCESS_KEY": os.environ["AWS_SECRET_ACCESS_KEY"],
                "S3__REGION": os.environ["AWS_DEFAULT_REGION"],
            }
            _configure(catalog | access)
            yield bucket


def _configure(catalog: dict[str, str]) -> None:
    os.environ.update({f"PYICEBERG_CATALOG__BENCHMARK__{name}": value for name, value in catalog.items()})


def _table(name: str, folder: str) -> str:
    return f"delta:{folder}/delta" if name == "delta" else "iceberg:benchmark.benchmark.labels"


def _measure(labels: SyntheticLabels, shards: int, tables: list[str], memory: int) -> list[Row]:
    """Publishes and checks each table after each change of the labels; returns a row per publication."""
    percent = max(1, shards // 100)
    steps = {
        "first publication": range(shards),
        "nothing new": range(0),
        "1 % changed": range(shards // 2, shards // 2 + percent),
        "1 % added": range(shards, shards + percent),
        "--rebuild": range(0),
    }
    results = list[Row]()
    states = {table: list[Row]() for table in tables}  # of each shard: its run and time of publication
    for number, (step, written) in enumerate(steps.items()):
        console.print_notice(step)
        if written:
            labels.write(written.start, written.stop, seed=number)
        for table, state in states.items():
            kind = table.partition(":")[0]
            settings: Row = {"partition": labels.uri, "to": table, "rebuild": step == "--rebuild"}
            row = _run("publish", f"{kind}, {step}", {**settings, "memory": memory})
            at = row.pop("published_at")
            state += [{}] * (max(written.stop, len(state)) - len(state))
            for shard in written:
                state[shard] = {"run": f"run-{number}", "at": at}
            if settings["rebuild"]:
                state[:] = [{**each, "at": at} for each in state]
            settings |= {"rows": labels.rows, "embedding": labels.embedding, "published": state}
            checked = _run("check", f"check of {kind}, {step}", settings)
            results.append({"format": kind, "step": step} | row | checked)
    return results


def _run(section: str, name: str, settings: Row) -> Row:
    result = run_section(_MODULE, section, settings, _TIMEOUT_S)
    if result.status != OK:
        raise figures.BenchmarkError(f"{name}: {result.reason}")
    return result.rows[0]
