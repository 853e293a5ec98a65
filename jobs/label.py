"""Labels a dataset: `python -m jobs.label --config FILE`, or `cvt-label label`."""

import logging
import sys
from typing import Annotated

import typer

from jobs import console
from jobs.cli import make_app
from jobs.console import ExitStatus, print_notice
from jobs.progress import ProgressView
from pipeline import RunResult, load_job_config
from pipeline import label as label_dataset
from pipeline.commit import Progress
from pipeline.config import IN_PROCESS, LABEL_NEW, Config, Selection
from pipeline.decode import hide_pillow_warnings
from pipeline.run import Plan
from pipeline.text import pluralize

logger = logging.getLogger("cvt_label")

#: Maximum number of examples in a line of the summary.
_EXAMPLES = 5


def label(
    config: console.ConfigOption,
    set: console.SetOption = None,
    retry_errors: console.RetryErrorsOption = False,
    relabel: console.RelabelOption = False,
    prune: console.PruneOption = False,
    no_ray: Annotated[bool, typer.Option("--no-ray", help="Run without Ray, also for large inputs.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for another run on the same partition.")] = False,
) -> None:
    """Label the new and changed shards of a dataset.

    Writes Parquet labels, class statistics and a report. With a run record in place of a configuration, the
    command uses the configuration and the model of that run.

    More exit statuses: 3 if shards could not be read to the end (all others are labeled); 5 if another run
    labels the same partition; 7 if a limit of the gate on drift is exceeded (shards may be unreadable too); 8
    if too many images or shards failed, or the gate stopped the run.
    """
    overrides = [*(set or ()), *[f"ray.address={IN_PROCESS}"] * no_ray]
    result = run(load_job_config(config, overrides), Selection(retry_errors, relabel, prune), wait)
    if result.broken_failure_limits or result.aborted:
        sys.exit(ExitStatus.FAILURES)
    if result.broken_limits:
        sys.exit(ExitStatus.DRIFTED)
    sys.exit(ExitStatus.OK if result.is_complete else ExitStatus.INCOMPLETE)


def run(config: Config, selection: Selection = LABEL_NEW, wait: bool = False) -> RunResult:
    """Labels a dataset, shows the progress, and prints the result."""
    hide_pillow_warnings()
    with ProgressView("labeling") as view:
        result = label_dataset(
            config,
            selection,
            on_progress=lambda progress, prepared: view.show_progress(
                describe_progress(progress, prepared.plan), progress.images, progress.fraction
            ),
            on_plan=lambda prepared: print_notice(prepared.plan.describe()),
            on_phase=view.show_phase,
            wait=wait,
            on_wait=logger.info,
        )
    print_result(result)
    return result


def describe_progress(progress: Progress, plan: Plan) -> str:
    """Describes the number of shards, images and errors."""
    images = pluralize(progress.images, "image")
    if plan.images is not None:
        images = f"{progress.images:,} of {pluralize(plan.images, 'image')}"
    shards = f"{progress.shards:,} of {pluralize(len(plan.shards), 'shard')}"
    return f"{shards}, {images}, {pluralize(progress.errors, 'error')}"


def print_result(result: RunResult) -> None:
    """Prints the classes and a summary of the run."""
    totals, stats, plan = result.totals, result.statistics, result.plan
    topk = result.job.topk
    if stats is not None:
        console.print_classes(stats, result.partition.labels, topk, top=20)
    fields = {"plan": plan.describe()}
    if plan.listing.ignored:
        fields["ignored"] = plan.listing.describe_ignored()
    if plan.shards:
        labeled = totals.shards - len(totals.unreadable)
        copied = f", {plan.copied_images:,} of them copied" if plan.copied_images else ""
        fields["images"] = f"{totals.images:,} in {pluralize(labeled, 'shard')}{copied}"
        fields["errors"] = f"{totals.errors:,}" + (" (listed in the report)" if totals.errors else "")
        fields["images/s"] = "unknown: the run was too short"
        if (images_per_s := result.throughput.get("images_per_s")) is not None:
            fields["images/s"] = f"{images_per_s:,.1f} from the first result to the last"
        fields["total time"] = f"{result.timings['ended']:,.1f} s"
    fields["output"] = result.partition.uri
    fields["report"] = f"{result.partition.uri}/report.html"
    if result.throughput:
        fields["decoded by"] = result.throughput["decoder"]
        fields["bound by"] = result.throughput["bound_by"]
    if stats is not None and stats.has_targets:
        fields["accuracy"] = f"{console.format_accuracy(stats, topk)}, of all labels"
    console.print_fields(fields)
    if totals.unmatched.count:
        targets = pluralize(totals.unmatched.count, "target")
        remedy = "map classes with input.target_map, or ignore labels with input.labels: false"
        print_notice(f"unmatched: {targets} ({totals.unmatched.describe(_EXAMPLES)}); {remedy}")
    if totals.duplicate_keys:
        print_notice(f"duplicate keys within a shard: {pluralize(totals.duplicate_keys, 'sample')}")
    if totals.merged_images:
        remedy = "set input.key: last-dot to label each image, or input.image_member to choose one"
        print_notice(f"merged: {totals.merged_images:,} more images in the same samples; {remedy}")
    remedy = "to read again, replace the file or use --retry-errors"
    for row in totals.unreadable:
        print_notice(f"not labeled: {row.error}")
    if plan.skipped:
        shards = f"{pluralize(len(plan.skipped), 'shard')} that could not be read before"
        print_notice(f"not labeled: {shards} (see error in manifest.parquet); {remedy}")
    if any(row.readable_rows for row in (*totals.unreadable, *plan.skipped)):
        print_notice("to label the readable part of damaged shards, set input.on_damaged_shard: keep")
    for row in totals.damaged:
        print_notice(f"labeled in part: {row.damage}")
    if plan.damaged:
        shards = f"{pluralize(plan.damaged, 'shard')} that could not be read to the end before"
        print_notice(f"labeled in part: {shards} (see damage in manifest.parquet); {remedy}")
    for message in result.broken_limits:
        print_notice(f"drift from the previous run: {message}")
    for message in result.broken_failure_limits:
        print_notice(f"too many failures: {message}")
    if result.aborted:
        shards = pluralize(len(plan.shards) - totals.shards, "shard")
        print_notice(f"the gate stopped the run: {shards} not labeled; run the command again to label them")


if __name__ == "__main__":
    app = make_app()
    console.add_command(app, label)
    app()
