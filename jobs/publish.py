"""Publishes a partition as a Delta table: `python -m jobs.publish URI --to TABLE`, or `cvt-label publish`."""

import sys
from typing import Annotated

import typer

from jobs import console
from pipeline import publish_labels
from pipeline.publish import FILE_BYTES


@console.exit_on_error()
def publish(
    to: Annotated[
        str, typer.Option("--to", help="URI of the Delta table; it may hold several models and datasets.")
    ],
    uri: console.PartitionArgument = None,
    config: console.PartitionConfigOption = None,
    set: console.SetOption = None,
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
    partition = console.resolve_partition(uri, config, set)
    done = publish_labels(partition, to, rebuild=rebuild, embedding=embedding, file_bytes=file_mb * 1024**2)
    snapshot = done.snapshot
    changes = " has everything already"
    if done.is_new:
        changes = (
            f": {len(done.added) - len(done.replaced):,} shards added, "
            f"{len(done.replaced):,} replaced, {len(done.removed):,} removed; "
            f"{snapshot.rows:,} rows in {len(snapshot.files):,} files"
        )
    console.print_line(f"{done.table}: version {snapshot.version}{changes}")
    if pending := len(done.pending):
        console.print_notice(
            f"{pending:,} shards have changed since the manifest was written: publish again later"
        )
        sys.exit(console.ExitStatus.INCOMPLETE)


if __name__ == "__main__":
    console.run_command(publish)
