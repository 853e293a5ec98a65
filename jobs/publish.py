"""Publishes a partition as a Delta Lake or Iceberg table: `cvt-label publish`."""

import sys
from typing import Annotated, Any

import pyarrow.compute as pc
import typer
from pydantic import ByteSize, Field, TypeAdapter

from jobs import console
from pipeline import publish_labels
from pipeline.text import pluralize

_SIZE = TypeAdapter(Annotated[ByteSize, Field(gt=0)]).validate_python
MemoryOption = Annotated[
    Any, typer.Option(metavar="SIZE", parser=_SIZE, help="Memory for rows, such as 500MB.")
]


def publish(
    to: Annotated[
        str,
        typer.Option(
            metavar="TABLE",
            help="delta:URI, or iceberg:CATALOG.NAMESPACE.TABLE with a catalog of pyiceberg's "
            "configuration. A table may have several models and datasets.",
        ),
    ],
    uri: console.PartitionArgument = None,
    config: console.JobConfigOption = None,
    set: console.SetOption = None,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Replace all rows of the partition, also in an edited table.")
    ] = False,
    without_embedding: Annotated[
        bool, typer.Option("--without-embedding", help="Leave out the embedding column of the labels.")
    ] = False,
    memory: MemoryOption = "4GiB",
) -> None:
    """Publish labels to a Delta Lake or Iceberg table.

    Each publication is one transaction with the changes since the last one. Needs `pip install
    'cvt-label[delta]'` or `'cvt-label[iceberg]'`.

    More exit statuses: 3 if labels changed after the manifest was written (they are published next time); 4
    if the table was edited; 5 if other writers kept changing the table or the labels.
    """
    partition = console.resolve_partition(uri, config, set)
    done = publish_labels(
        partition, to, rebuild=rebuild, embedding=not without_embedding, memory_bytes=memory
    )
    changes = ", already up to date"
    if done.published_at is not None:
        changes = (
            f": {pluralize(len(done.added) - len(done.replaced), 'shard')} added, "
            f"{len(done.replaced):,} replaced, {len(done.removed):,} removed; "
            f"{pluralize(pc.sum(done.added['rows']).as_py() or 0, 'row')} written"
        )
    console.print_line(f"{done.table}: version {done.version}{changes}")
    if pending := len(done.pending):
        console.print_notice(
            f"{pluralize(pending, 'shard')} changed after the manifest was written: publish again later"
        )
        sys.exit(console.ExitStatus.INCOMPLETE)
