"""Prints what a labeling job would do: `python -m jobs.plan --config FILE`, or `cvt-label plan`."""

from collections import Counter
from typing import Annotated

import typer
from rich.filesize import decimal

from jobs import console
from pipeline import plan as plan_run
from pipeline.text import escape_unprintable


@console.exit_on_error()
def plan(
    config: console.ConfigOption,
    set: console.SetOption = None,
    retry_errors: console.RetryErrorsOption = None,
    relabel: console.RelabelOption = None,
    prune: console.PruneOption = None,
    shards: Annotated[
        bool, typer.Option("--shards", help="Print each shard to label, one per line.")
    ] = False,
) -> None:
    """Print what `label` would do, without writing anything.

    Ray is not started.

    Exit status: 0 on success; 2 if the configuration is not valid; 4 if the input or the model cannot be
    accessed.
    """
    planned = plan_run(*console.load_job(config, set, retry_errors, relabel, prune))
    job, checkpoint, to_label = planned.job, planned.job.checkpoint, planned.plan.shards
    if shards:
        for shard in to_label:
            typer.echo(f"{escape_unprintable(shard.uri)}\t{shard.format}\t{shard.size}\t{shard.version}")
    formats = Counter(shard.format for shard in to_label)
    console.print_fields(
        {
            "input": job.config.input.uri,
            "shards": console.describe_plan(planned.plan),
            "to label": f"{len(to_label):,} shards, {decimal(sum(shard.size for shard in to_label))}"
            + "".join(f"; {count:,} {name}" for name, count in sorted(formats.items())),
            "ignored": f"{planned.plan.ignored.total():,} objects that are no shard",
            "model": f"{checkpoint.name}, {len(checkpoint.labels):,} classes, "
            f"{checkpoint.preprocessor.size} pixels",
            "output": job.partition.uri,
        }
    )


if __name__ == "__main__":
    console.run_command(plan)
