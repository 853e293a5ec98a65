"""Publishes a partition as a Delta table: `cvt-label publish`."""

import sys
from typing import Annotated

import typer

from jobs import console
from pipeline import publish_labels
from pipeline.text import pluralize


def publish(
    to: Annotated[
        str,
        typer.Option(
            metavar="TABLE", help="URI of the Delta table. A table may have several models and datasets."
        ),
    ],
    uri: console.PartitionArgument = None,
    config: console.JobConfigOption = None,
    set: console.SetOption = None,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Publish all labels again, even if the table was edited.")
    ] = False,
    without_embedding: Annotated[
        bool, typer.Option("--without-embedding", help="Leave out the embedding column of the labels.")
    ] = False,
) -> None:
    """Publish the labels of a partition as a Delta table.

    Writes few large files, and on later calls only the changes. Needs `pip install 'cvt-label[delta]'`.

    More exit statuses: 3 if labels changed after the manifest was written (they are published next time); 4
    if the table was edited; 5 if other writers kept changing the table or the labels.
    """
    partition = console.resolve_partition(uri, config, set)
    done = publish_labels(partition, to, rebuild=rebuild, embedding=not without_embedding)
    snapshot = done.snapshot
    changes = ", already up to date"
    if done.is_new:
        changes = (
            f": {pluralize(len(done.added) - len(done.replaced), 'shard')} added, "
            f"{len(done.replaced):,} replaced, {len(done.removed):,} removed; "
            f"{pluralize(snapshot.rows, 'row')} in {pluralize(len(snapshot.files), 'file')}"
        )
    console.print_line(f"{done.table}: version {snapshot.version}{changes}")
    if pending := len(done.pending):
        console.print_notice(
            f"{pluralize(pending, 'shard')} changed after the manifest was written: publish again later"
        )
        sys.exit(console.ExitStatus.INCOMPLETE)
