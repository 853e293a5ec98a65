"""Prints what a labeling job would do: `cvt-label plan`."""

from collections import Counter
from typing import Annotated

import typer
from rich.filesize import decimal

from jobs import console
from pipeline import Selection, load_job_config
from pipeline import plan as plan_run
from pipeline.run import Plan
from pipeline.text import escape_unprintable, pluralize

#: Names of the shards of each format.
_UNITS = {
    "webdataset": "tar shard", "parquet": "Parquet shard", "images": "image group", "table": "table range"
}  # fmt: skip


def plan(
    config: console.ConfigOption,
    set: console.SetOption = None,
    retry_errors: console.RetryErrorsOption = False,
    relabel: console.RelabelOption = False,
    prune: console.PruneOption = False,
    shards: Annotated[bool, typer.Option("--shards", help="Print each shard to label.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Print ignored objects by reason.")] = False,
) -> None:
    """Print what `label` would do, without writing anything.

    Ray is not started.
    """
    prepared = plan_run(load_job_config(config, set or ()), Selection(retry_errors, relabel, prune))
    job, checkpoint, planned = prepared.job, prepared.job.checkpoint, prepared.plan
    if shards:
        for shard in planned.shards:
            typer.echo(f"{escape_unprintable(shard.uri)}\t{shard.format}\t{shard.size}\t{shard.version}")
    if verbose:
        for reason, uris in sorted(planned.listing.ignored_examples.items()):
            for uri in uris:
                console.print_line(f"ignored ({reason}): {uri}")
            if others := planned.listing.ignored[reason] - len(uris):
                console.print_line(f"ignored ({reason}): ... and {others:,} more")
    console.print_fields(
        {
            "input": str(job.config.input.inputs),
            "plan": planned.describe(),
            "to label": _describe_size(planned),
            "ignored": planned.listing.describe_ignored(),
            "model": f"{checkpoint.name}, {pluralize(len(checkpoint.labels), 'class')}, "
            f"{checkpoint.preprocessor.size} pixels",
            "output": job.partition.uri,
        }
    )


def _describe_size(planned: Plan) -> str:
    """Describes the size of the shards to label, and the number of shards by format."""
    size = decimal(sum(shard.size for shard in planned.shards))
    formats = Counter(shard.format for shard in planned.shards)
    parts = [pluralize(count, _UNITS[name]) for name, count in sorted(formats.items())]
    return f"{', '.join(parts) or '0 shards'}; {size}"
