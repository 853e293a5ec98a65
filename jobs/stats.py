"""Prints the class statistics of a partition: `cvt-label stats URI`."""

from typing import Annotated

import pyarrow.compute as pc
import typer

from jobs import console
from pipeline import load_job_config
from pipeline.run import make_job
from pipeline.run import rebuild as rebuild_partition
from pipeline.storage import StorageError


def stats(
    uri: console.PartitionArgument = None,
    config: console.JobConfigOption = None,
    set: console.SetOption = None,
    top: Annotated[int, typer.Option(metavar="N", min=1, help="Maximum number of classes to print.")] = 1000,
    rebuild: Annotated[
        bool,
        typer.Option(
            "--rebuild",
            help="First rebuild the manifest and the statistics from the prediction files. With --config, "
            "class_stats.parquet may be missing.",
        ),
    ] = False,
) -> None:
    """Print the class statistics of a partition.

    More exit statuses: 4 if nothing is labeled yet; 5 if --rebuild is given while a run is active.
    """
    if rebuild and uri is None and config is not None:  # class_stats.parquet may be missing
        partition = make_job(load_job_config(config, set or ())).partition
    else:
        partition = console.resolve_partition(uri, config, set)
    if rebuild:
        rebuild_partition(partition)
    manifest = partition.manifest.read(("rows", "errors", "output", "error", "deleted", "damage"))
    if not manifest.num_rows:
        raise StorageError(partition.uri, "nothing is labeled yet")
    total, topk = partition.manifest.fold_statistics(), partition.topk()
    console.print_classes(total, partition.labels, topk, top)
    names = ("output", "error", "damage")
    labeled, failed, damaged = (manifest.num_rows - manifest[name].null_count for name in names)
    deleted, images, errors = (pc.sum(manifest[name]).as_py() or 0 for name in ("deleted", "rows", "errors"))
    fields = {
        "shards": f"{labeled:,} labeled, {failed:,} unreadable, {deleted:,} deleted from the input"
        + (f", {damaged:,} labeled in part" if damaged else ""),
        "images": f"{images:,}",
        "errors": f"{errors:,}",
    }
    if total.has_targets:
        fields["accuracy"] = console.format_accuracy(total, topk)
    console.print_fields(fields)
