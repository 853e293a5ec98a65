"""Publishes labels as a table: `python -m jobs.publish --config FILE --to URI`, or `cvt-label publish`."""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import Annotated

import typer

from jobs.console import ConfigOption, Exit, SetOption, err, exit_status, out, run_alone
from pipeline.commit import Partition
from pipeline.config import Config, ConfigError, load_config
from pipeline.publish import FILE_BYTES, ConsumerTable, ParquetTable, Publication, parquet_table
from pipeline.publish import publish as publish_table
from pipeline.publish.delta_table import DeltaTable
from pipeline.run import make_job
from pipeline.storage import StorageError, lies_in, normalised


class TableFormat(StrEnum):
    """What a consumer table is."""

    PARQUET = "parquet"
    DELTA = "delta"


def publish(
    config: ConfigOption,
    to: Annotated[
        str, typer.Option("--to", help="Folder of the table; it may hold several models and datasets.")
    ],
    set: SetOption = None,
    format: Annotated[
        TableFormat, typer.Option("--format", help="Delta Lake needs cvt-label[delta].")
    ] = TableFormat.PARQUET,
    embedding: Annotated[
        bool, typer.Option("--with-embedding/--without-embedding", help="Where the labels have one.")
    ] = True,
    keep: Annotated[
        int, typer.Option("--keep", min=1, help="Versions of a Parquet table whose files are kept.")
    ] = parquet_table.KEEP,
    file_mb: Annotated[
        int, typer.Option("--file-mb", min=1, help="MiB of rows in memory that make one file.")
    ] = FILE_BYTES // 1024**2,
) -> None:
    """Write what is labelled into few large files for consumers, or bring them up to date.

    Exit status: 0; 2 when command line or configuration can't be used; 3 when labels have changed since
    the manifest was written, and wait for the next time; 4 when output, table or model can't be used, or
    nothing is labelled yet; 5 when others changed the table, or the labels, again and again.
    """
    with exit_status():
        loaded = load_config(Config, config, set or ())
        target = _checked(loaded, to)
        partition = make_job(loaded).partition
        if not partition.manifest.exists():
            raise StorageError(partition.uri, "nothing is labelled yet")
        table = _table(partition, target, format, keep)
        publication = publish_table(partition, table, embedding=embedding, file_bytes=file_mb * 1024**2)
    out.print(_described(publication, table.uri), markup=False, highlight=False, soft_wrap=True)
    if pending := len(publication.increment.pending):
        message = f"{pending:,} shards have changed since the manifest was written: publish again later"
        err.print(message, markup=False, highlight=False)
        sys.exit(Exit.INCOMPLETE)


def _checked(config: Config, to: str) -> str:
    """The table's URI; refuses places where readers, or Delta's VACUUM, would mix it up with other things."""
    target = normalised(to)
    for name, other in (("input.uri", config.input.uri), ("output.uri", config.output.uri)):
        other = normalised(other)
        if lies_in(target, other) or lies_in(other, target):
            raise ConfigError(f"--to {to}: a table needs a place of its own, and {name} is {other}")
    return target


def _table(partition: Partition, target: str, format: TableFormat, keep: int) -> ConsumerTable:
    if format is TableFormat.DELTA:
        return DeltaTable(partition.storage, target, partition.model)
    return ParquetTable(partition.storage, target, partition.model, keep)


def _described(publication: Publication, uri: str) -> str:
    snapshot, increment = publication.snapshot, publication.increment
    what = f"{uri}: version {snapshot.version}"
    if not publication.is_new:
        return f"{what} has everything already"
    added = len(increment.added) - len(increment.replaced)
    return (
        f"{what}: {added:,} shards added, {len(increment.replaced):,} replaced, "
        f"{len(increment.removed):,} removed; {snapshot.rows:,} rows in {len(snapshot.files):,} files"
    )


if __name__ == "__main__":
    run_alone(publish)
