"""Publishes a partition as a Delta table: `python -m jobs.publish URI --to TABLE`, or `cvt-label publish`."""

import sys
from typing import Annotated

import typer

from jobs.console import (
    Exit,
    PartitionArgument,
    PartitionConfigOption,
    SetOption,
    err,
    exit_status,
    given_partition,
    out,
    run_alone,
)
from pipeline.publish import FILE_BYTES, Publication, publish_labels


def publish(
    to: Annotated[
        str, typer.Option("--to", help="URI of the Delta table; it may hold several models and datasets.")
    ],
    uri: PartitionArgument = None,
    config: PartitionConfigOption = None,
    set: SetOption = None,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Publish all labels again, also if the table was edited.")
    ] = False,
    embedding: Annotated[
        bool, typer.Option("--with-embedding/--without-embedding", help="Where the labels have one.")
    ] = True,
    file_mb: Annotated[
        int, typer.Option("--file-mb", min=1, help="MiB of rows in memory that make one file.")
    ] = FILE_BYTES // 1024**2,
) -> None:
    """Write labels into few large files for consumers, or bring these up to date; needs cvt-label[delta].

    Exit status: 0; 2 when the command line or the configuration can't be used; 3 when labels have changed
    since the manifest was written, and wait for the next time; 4 when labels or table can't be used, or
    somebody edited the table; 5 when others changed the table, or the labels, again and again.
    """
    with exit_status():
        partition = given_partition(uri, config, set)
        done = publish_labels(
            partition, to, rebuild=rebuild, embedding=embedding, file_bytes=file_mb * 1024**2
        )
    out.print(_described(done), markup=False, highlight=False, soft_wrap=True)
    if pending := len(done.pending):
        message = f"{pending:,} shards have changed since the manifest was written: publish again later"
        err.print(message, markup=False, highlight=False)
        sys.exit(Exit.INCOMPLETE)


def _described(done: Publication) -> str:
    snapshot = done.snapshot
    what = f"{done.table}: version {snapshot.version}"
    if not done.is_new:
        return f"{what} has everything already"
    added = len(done.added) - len(done.replaced)
    return (
        f"{what}: {added:,} shards added, {len(done.replaced):,} replaced, "
        f"{len(done.removed):,} removed; {snapshot.rows:,} rows in {len(snapshot.files):,} files"
    )


if __name__ == "__main__":
    run_alone(publish)
