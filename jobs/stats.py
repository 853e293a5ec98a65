"""Shows the statistics of what is labelled: `python -m jobs.stats --config FILE`, or `cvt-label stats`."""

from __future__ import annotations

import sys
from typing import Annotated

import pyarrow.compute as pc
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
from pipeline.run import labelling, make_job
from pipeline.statistics import class_table


def stats(
    config: ConfigOption,
    set: SetOption = None,
    most: Annotated[int, typer.Option("--most", min=1, help="Classes to show, at most.")] = 1000,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="First make manifest and statistics anew from the labels.")
    ] = False,
) -> None:
    """Show the per-class statistics of what the configured model has labelled so far.

    Exit status: 0; 2 when the configuration can't be used; 4 when output or model can't be used, or
    nothing is labelled yet; 5 when a run is at work, with --rebuild.
    """
    with exit_status():
        loaded = load_config(Config, config, set or ())
        job = labelling.rebuild(loaded) if rebuild else make_job(loaded)
        partition = job.partition
        manifest = partition.manifest.read(("rows", "errors", "output", "error", "gone"))
        total = partition.manifest.fold_statistics()
    if not manifest.num_rows:
        err.print(f"cvt-label: {partition.uri}: nothing is labelled yet", markup=False, soft_wrap=True)
        sys.exit(Exit.UNUSABLE)
    out.print(class_statistics_table(class_table(total, partition.labels, loaded.output.topk), most))
    labelled = manifest.num_rows - manifest["output"].null_count
    failed = manifest.num_rows - manifest["error"].null_count
    gone = pc.sum(manifest["gone"]).as_py()
    out.print(
        f"{labelled:,} shards, {gone:,} of them gone from the input; {failed:,} could not be read; "
        f"{pc.sum(manifest['rows']).as_py() or 0:,} images, {pc.sum(manifest['errors']).as_py() or 0:,} "
        "of them errors",
        highlight=False,
    )
    if total.has_targets:
        out.print(accuracy(total, loaded.output.topk), highlight=False)


if __name__ == "__main__":
    run_alone(stats)
