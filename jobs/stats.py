"""Shows the statistics of a partition: `python -m jobs.stats URI`, or `cvt-label stats URI`."""

import sys
from typing import Annotated

import pyarrow.compute as pc
import typer

from jobs.console import (
    Exit,
    PartitionArgument,
    PartitionConfigOption,
    SetOption,
    accuracy,
    class_statistics_table,
    err,
    exit_status,
    given_partition,
    out,
    run_alone,
)
from pipeline.config import load_job_config
from pipeline.run import make_job
from pipeline.run import rebuild as rebuild_partition
from pipeline.statistics import class_table


def stats(
    uri: PartitionArgument = None,
    config: PartitionConfigOption = None,
    set: SetOption = None,
    most: Annotated[int, typer.Option("--most", min=1, help="Classes to show, at most.")] = 1000,
    rebuild: Annotated[
        bool,
        typer.Option(
            "--rebuild",
            help="First regenerate manifest and statistics from the prediction files. "
            "With --config, the model is loaded, and class_stats.parquet may be missing.",
        ),
    ] = False,
) -> None:
    """Show the per-class statistics of a partition.

    Exit status: 0; 2 when the configuration can't be used; 4 when the output can't be used, or nothing is
    labeled yet; 5 when a run is at work, with --rebuild.
    """
    with exit_status():
        if rebuild and uri is None and config is not None:  # class_stats.parquet may be missing
            partition = make_job(load_job_config(config, set or ())).partition
        else:
            partition = given_partition(uri, config, set)
        if rebuild:
            rebuild_partition(partition)
        manifest = partition.manifest.read(("rows", "errors", "output", "error", "gone"))
        total, topk = partition.manifest.fold_statistics(), partition.topk()
    if not manifest.num_rows:
        err.print(f"cvt-label: {partition.uri}: nothing is labeled yet", markup=False, soft_wrap=True)
        sys.exit(Exit.UNUSABLE)
    out.print(class_statistics_table(class_table(total, partition.labels, topk), most))
    labeled = manifest.num_rows - manifest["output"].null_count
    failed = manifest.num_rows - manifest["error"].null_count
    out.print(
        f"{labeled:,} shards, {pc.sum(manifest['gone']).as_py():,} of them gone from the input; "
        f"{failed:,} could not be read; {pc.sum(manifest['rows']).as_py() or 0:,} images, "
        f"{pc.sum(manifest['errors']).as_py() or 0:,} of them errors",
        highlight=False,
    )
    if total.has_targets:
        out.print(accuracy(total, topk), highlight=False)


if __name__ == "__main__":
    run_alone(stats)
