"""Shows the statistics of what is labelled: `python -m jobs.stats --config FILE`, or `cvt-label stats`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from jobs.console import (
    ConfigOption,
    Exit,
    SetOption,
    accuracy,
    class_statistics_table,
    err,
    exit_status,
    out,
    run_alone,
)
from pipeline.config import Config, load_config
from pipeline.labelling import open_partition
from pipeline.manifest import fold_statistics, read_manifest


def stats(
    config: ConfigOption,
    set: SetOption = None,
    most: Annotated[int, typer.Option("--most", min=1, help="Classes to show, at most.")] = 1000,
) -> None:
    """Show the per-class statistics of what the configured model has labelled so far.

    Exit status: 0; 2 when the configuration can't be used; 4 when output or model can't be used, or
    nothing is labelled yet.
    """
    with exit_status():
        partition = open_partition(load_config(Config, config, set or ()))
        manifest = read_manifest(partition.storage, partition.manifest_uri)
    if not manifest:
        err.print(f"cvt-label: {partition.uri}: nothing is labelled yet", markup=False, soft_wrap=True)
        sys.exit(Exit.UNUSABLE)
    total = fold_statistics(manifest, len(partition.checkpoint.labels))
    out.print(class_statistics_table(partition.class_table(total), most))
    errors = sum(row.errors or 0 for row in manifest.values())
    unreadable = sum(row.error is not None for row in manifest.values())
    out.print(
        f"{len(manifest):,} shards, {unreadable:,} of them unreadable; "
        f"{sum(row.rows or 0 for row in manifest.values()):,} images, {errors:,} of them errors",
        highlight=False,
    )
    if total.has_targets:
        out.print(accuracy(total, partition.config.output.topk), highlight=False)


if __name__ == "__main__":
    run_alone(stats)
