"""Shows what a labelling job would do: `python -m jobs.plan --config FILE`, or `cvt-label plan`."""

from collections import Counter
from typing import Annotated

import typer
from rich.filesize import decimal

from jobs.console import (
    ConfigOption,
    PruneOption,
    RelabelOption,
    RetryErrorsOption,
    SetOption,
    exit_status,
    load_job,
    out,
    print_facts,
    run_alone,
    states_line,
)
from pipeline.run import plan_run
from pipeline.text import printable


def plan(
    config: ConfigOption,
    set: SetOption = None,
    retry_errors: RetryErrorsOption = None,
    relabel: RelabelOption = None,
    prune: PruneOption = None,
    shards: Annotated[
        bool, typer.Option("--shards", help="List what is to be labelled, a line a shard.")
    ] = False,
) -> None:
    """Show what `label` would do, without doing it: nothing is written, and Ray is not started.

    Exit status: 0; 2 when the configuration can't be used; 4 when input or model can't be used.
    """
    with exit_status():
        planned = plan_run(*load_job(config, set, retry_errors, relabel, prune))
    to_label = planned.plan.shards
    if shards:
        for shard in to_label:
            line = f"{printable(shard.uri)}\t{shard.format}\t{shard.size}\t{shard.version}"
            out.print(line, markup=False, highlight=False, soft_wrap=True)
    job, checkpoint = planned.job, planned.job.checkpoint
    formats = Counter(shard.format for shard in to_label)
    facts = {
        "input": job.config.input.uri,
        "shards": states_line(planned.plan),
        "to label": f"{len(to_label):,} shards, {decimal(sum(shard.size for shard in to_label))}"
        + "".join(f"; {count:,} {name}" for name, count in sorted(formats.items())),
        "ignored": f"{planned.plan.ignored:,} objects that are no shard",
        "model": f"{checkpoint.name}, {len(checkpoint.labels):,} classes, "
        f"{checkpoint.preprocessor.size} pixels",
        "output": job.partition.uri,
    }
    print_facts(facts)


if __name__ == "__main__":
    run_alone(plan)
